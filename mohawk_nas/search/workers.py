"""Several processes of one machine at one study: started, watched, stopped.

The parent scores nothing. It shows what the study's storage says, and names a worker that stops
before the study has ended; the others go on without it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from mohawk_nas.config import StudyConfig
from mohawk_nas.errors import MohawkError, TrainingError
from mohawk_nas.ranks import GPU_SHARERS
from mohawk_nas.reporting import SILENT, Reporter, Task
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.leases import DEFAULT_PACE, Pace
from mohawk_nas.search.ledger import Ledger
from mohawk_nas.search.record import open_ledger, study_result
from mohawk_nas.search.result import StudyResult
from mohawk_nas.search.space import SearchSpace
from mohawk_nas.search.study import plan_search

__all__ = ["Crew", "environments", "run_crew"]

MOST_WORDS = 4000
"""Characters of what a worker that failed says."""
STOP_PATIENCE = 20.0
"""Seconds that workers are given to leave when they are asked to."""

# A worker belongs to no rank, even if torchrun started its parent, and the screen is its parent's.
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_QUIET = {
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def environments(count: int, device: str) -> list[dict[str, str]]:
    """What each worker's environment says of its share of the machine.

    Args:
        count: Workers.
        device: As ``teacher.device``. Each worker sees one GPU, in turn, unless one is named by
            its number or there is none; on a CPU the threads are shared out. More workers than
            GPUs share them: a small model leaves a GPU waiting for Python.
    """
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if not on_gpu:
        return [{"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // count))}] * count
    if device not in ("auto", "cuda"):
        return [{GPU_SHARERS: str(count)}] * count
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    visible = [item.strip() for item in named.split(",") if item.strip()]
    visible = visible or [str(i) for i in range(torch.cuda.device_count())]
    sharers = str(-(-count // len(visible)))
    return [
        {"CUDA_VISIBLE_DEVICES": visible[i % len(visible)], GPU_SHARERS: sharers}
        for i in range(count)
    ]


@dataclass
class _Member:
    number: int
    process: Any
    inbox: connection.Connection
    said: list[str] = field(default_factory=list)
    told: bool = False

    def listen(self) -> None:
        with suppress(EOFError, OSError):
            while self.inbox.poll():
                self.said.append(self.inbox.recv())

    def last_words(self) -> str:
        code = self.process.exitcode
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was stopped by {signal.Signals(-code).name}"
        reason = f": {self.said[-1]}" if self.said else ""
        return f"worker {self.number} (process {self.process.pid}) {how}{reason}"


class Crew:
    """Worker processes, for the length of a ``with`` block; none of them outlives it or its parent.

    Args:
        target: A function at the top of a module; called with a worker's number and ``arguments``.
            What it raises ends that worker alone.
        arguments: What every worker gets; must pickle.
        environments: One a worker.
    """

    def __init__(
        self,
        target: Callable[..., None],
        arguments: Sequence[Any],
        *,
        environments: Sequence[Mapping[str, str]],
    ) -> None:
        self._target = target
        self._arguments = arguments
        self._environments = environments
        self._members: list[_Member] = []

    def __enter__(self) -> Crew:
        try:
            for number, environment in enumerate(self._environments):
                self._members.append(self._start(number, environment))
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def working(self) -> bool:
        """Whether one of them has not ended."""
        return any(member.process.exitcode is None for member in self._members)

    @property
    def finished(self) -> bool:
        """Whether one of them has come to the study's end."""
        return any(member.process.exitcode == 0 for member in self._members)

    def wait(self, seconds: float) -> list[str]:
        """Wait for so long, or until one of them ends; what is to be told of those that failed."""
        alive = [m.process.sentinel for m in self._members if m.process.exitcode is None]
        connection.wait(alive, timeout=seconds)
        told = []
        for member in self._members:
            if member.process.exitcode and not member.told:
                member.listen()
                member.told = True
                told.append(member.last_words())
        return told

    def _start(self, number: int, environment: Mapping[str, str]) -> _Member:
        # A fresh interpreter, since a process that has used a GPU cannot be forked.
        context = get_context("spawn")
        inbox, outbox = context.Pipe(duplex=False)
        process = context.Process(
            target=_work, args=(self._target, number, tuple(self._arguments), outbox), daemon=True
        )
        # Libraries read it while they are imported, so it must be there from the start.
        with _environment({**_QUIET, **environment}, without=_RANKS), _deaf_to_ctrl_c():
            process.start()
        outbox.close()
        return _Member(number=number, process=process, inbox=inbox)

    def _stop(self) -> None:
        until = time.monotonic() + STOP_PATIENCE
        for member in self._members:
            if member.process.exitcode is None:
                member.process.terminate()
        for member in self._members:
            member.process.join(max(0.0, until - time.monotonic()))
            if member.process.exitcode is None:
                member.process.kill()
                member.process.join()


def run_crew(
    config: StudyConfig,
    space: SearchSpace,
    budget: Budget,
    *,
    run_dir: Path,
    target: Callable[..., None],
    arguments: Sequence[Any],
    environments: Sequence[Mapping[str, str]],
    identity: Mapping[str, Any] | None = None,
    reporter: Reporter = SILENT,
    pace: Pace = DEFAULT_PACE,
) -> StudyResult:
    """Have a study run by several workers, and show how it goes.

    Args:
        config: The study; its storage must be one that processes can share.
        space: What may be chosen.
        budget: What every layout must meet.
        run_dir: Folder of ``study.journal``, unless the config names a storage.
        target: What each worker runs, see :class:`Crew`; it must call ``run_study``.
        arguments: Its arguments after its number.
        environments: One a worker.
        identity: As of ``run_study``.
        reporter: Told what happens.
        pace: The workers'.

    Raises:
        RunError: The storage holds this study with other settings or another identity.
        TrainingError: The storage cannot be used, or no worker came to the end.
    """
    with open_ledger(
        config, space, run_dir=run_dir, begin=True, identity=identity, pace=pace
    ) as ledger:
        trials = ledger.trials
        if trials:
            reporter.say(f"continuing: {len(trials)} layouts are scored already")
        total = plan_search(config.search, space, budget).trials
        reporter.say(f"{len(environments)} workers score layouts")
        with (
            reporter.stage("search", total=total, unit="layout", done=len(trials)) as task,
            Crew(target, arguments, environments=environments) as crew,
        ):
            told: list[str] = []
            shown = len(trials), len(ledger.probes), ledger.num_distilled
            working = True
            while working:
                # Asked first: one that ends while this looks is told of in the next round.
                working = crew.working
                for text in crew.wait(pace.look_every):
                    told.append(text)
                    reporter.say(f"{text}{'; the others go on' if crew.working else ''}")
                ledger.refresh()
                shown = _show(ledger, shown, task)
        if not crew.finished:
            raise TrainingError(
                f"study {config.name!r}: no worker came to its end; the last one: {told[-1]}. What "
                "was scored is kept; run again to continue"
            )
        ledger.refresh()
        return study_result(config, space, budget, ledger)


def _show(ledger: Ledger, shown: tuple[int, int, int], task: Task) -> tuple[int, int, int]:
    counts = len(ledger.trials), len(ledger.probes), ledger.num_distilled
    if counts != shown:
        figures: dict[str, Any] = {}
        if ledger.trials:
            best = min(ledger.trials, key=lambda trial: (trial.value, trial.number))
            figures = {"value": best.value, "best": best.layout.strip(ledger.symbols)}
        if ledger.probes:
            figures["probes"] = str(counts[1])
        if ledger.num_distilled:
            figures["distilled"] = str(counts[2])
        task.advance(counts[0] - shown[0], **figures)
    return counts


@contextmanager
def _environment(changes: Mapping[str, str], *, without: Sequence[str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    for name in without:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """What is started in the block ignores Ctrl-C, which reaches every process of a terminal.

    The parent passes it on, once, as another signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(
    target: Callable[..., None],
    number: int,
    arguments: tuple[Any, ...],
    outbox: connection.Connection,
) -> None:
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_follow_parent, daemon=True).start()
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    try:
        target(number, *arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except MohawkError as e:
        _fail(outbox, str(e))
    except Exception as e:
        _fail(outbox, f"{type(e).__name__}: {' '.join(str(e).split())}")


def _fail(outbox: connection.Connection, text: str) -> None:
    with suppress(OSError):
        # It is read when this process has ended, so it must fit into the pipe.
        outbox.send(text[:MOST_WORDS])
    sys.exit(1)


def _leave(*_: object) -> None:
    # Once is enough, or what it cleans up would be cut short.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _follow_parent() -> None:
    """Leave when the parent is gone, however it went."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
