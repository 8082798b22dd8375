"""A whole search with random weights, its wall-clock by phase added up over commands.

The bank and the study resume by themselves, so a command that was stopped for its time is given
again until the search has ended: ``timeout -s INT 570 mohawk-nas bench search --model phi-1.5``.
What it did after its last checkpoint is done again and counted again. Of a command that was killed,
the step that was under way is not counted; nor are Python's start and imports in any.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from mohawk_nas.bank import Bank
from mohawk_nas.bench.results import Record
from mohawk_nas.bench.setup import SPACE, Case, Setup
from mohawk_nas.config import StudyConfig, plain, study_from_dict
from mohawk_nas.errors import ConfigError, InputError
from mohawk_nas.files import read_json, write_json
from mohawk_nas.layout import Layout
from mohawk_nas.reporting import Reporter, Task
from mohawk_nas.runs import only_one
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.objectives import BankScorer
from mohawk_nas.search.study import check_search, run_study

__all__ = ["PhaseClock", "cases", "check", "make_study"]

PHASES = {
    "load": "load",
    "stage 1 (matrix)": "stage 1",
    "stage 2 (hidden)": "stage 2",
    "baselines": "probes",
    "search": "trials",
}
"""Stage as it is reported -> phase. What lies between stages is the phase ``rest``."""

SETTINGS = "settings.json"
"""In the search's folder: what its times depend on."""

WRITE_EVERY = 1.0
"""Seconds between two writings of the times."""


def cases(setup: Setup) -> Iterator[Case]:
    """One case; its records are the phases."""
    study = make_study(setup)
    shapes = setup.step_shapes(study.bank.hidden.batch_size) | {
        "stage1_tokens": study.bank.matrix.tokens,
        "stage2_tokens": study.bank.hidden.tokens,
        "trials": study.search.trials,
        "search_tokens": study.search.tokens,
        "attention_layers": setup.shape.keep,
    }
    yield Case(
        blank=setup.blank("search", "whole search", **shapes), run=partial(_run, setup, study)
    )


def check(setup: Setup) -> None:
    """See whether the search can be run, or go on, in its folder.

    Raises:
        InputError: What was asked for makes no study, or the folder holds another search.
    """
    study = make_study(setup)
    record, mine = Path(study.output) / SETTINGS, _settings(setup, study)
    # Times of two searches must not be added up.
    if record.is_file() and (old := read_json(record)) != mine:
        changed = ", ".join(name for name in mine if old.get(name) != mine[name])
        raise InputError(
            f"--work: {study.output} holds a search with another {changed}; name another folder or "
            "remove it"
        )


def make_study(setup: Setup) -> StudyConfig:
    """The study of the named shape, with random text.

    Raises:
        ConfigError: What was asked for makes no study.
    """
    options, shape = setup.options, setup.shape
    step = shape.batch_size * shape.block_size
    quick = {"stage1": 2 * step, "stage2": 4 * step, "search": 2 * shape.block_size, "trials": 9}
    full = {"stage1": 5_242_880, "stage2": 10_485_760, "search": 49_152, "trials": 500}
    sizes = quick if options.quick else full
    tokens = {
        "stage1": options.stage1_tokens,
        "stage2": options.stage2_tokens,
        "search": options.search_tokens,
        "trials": options.trials,
    }
    sizes |= {name: value for name, value in tokens.items() if value is not None}
    bank: dict[str, Any] = {
        stage: {"tokens": sizes[name], "batch_size": shape.batch_size, "lr": 1e-3}
        for stage, name in (("matrix", "stage1"), ("hidden", "stage2"))
    }
    if options.checkpoint_steps is not None:
        bank["checkpoint_steps"] = options.checkpoint_steps
    work = options.work or Path("runs") / "bench" / f"search-{options.model}"
    study = study_from_dict(
        {
            "name": "bench",
            "output": str(work),
            "seed": options.seed,
            "teacher": {"source": f"{options.model}, random weights", "random_weights": True},
            "data": {"source": "random tokens", "block_size": shape.block_size}
            | dict.fromkeys(("validation_tokens", "test_tokens"), shape.block_size),
            "space": SPACE,
            "budget": {"attention_layers": shape.keep},
            "bank": bank | {"path": str(work / "bank")},
            # Random weights recall nothing.
            "search": {"tokens": sizes["search"], "trials": sizes["trials"], "objective": "kl"},
        }
    )
    budget = Budget(attention_layers=shape.keep)
    if problems := check_search(study.search, space=setup.space, budget=budget):
        raise ConfigError(problems)
    return study


def _run(setup: Setup, study: StudyConfig, blank: Record) -> Iterable[Record]:
    work = Path(study.output)
    with only_one(work):
        check(setup)
        write_json(work / SETTINGS, _settings(setup, study))
        clock = PhaseClock(work / "phases.json", setup.reporter)
        if clock.result is None:
            clock.finish(_search(setup, study, work, clock))
    phases, result = clock.seconds(), clock.result or {}
    total = sum(phases.values())
    figures = {
        "stage 1": {"tokens_per_second": study.bank.matrix.tokens / phases.get("stage 1", 1)},
        "stage 2": {"tokens_per_second": study.bank.hidden.tokens / phases.get("stage 2", 1)},
        "probes": {"layouts": result.get("layouts_by_baselines", 0)},
        "trials": {"layouts": result.get("layouts_by_strategy", 0)},
        "total": {"commands": len(clock.calls), "minutes": total / 60},
    }
    for name, seconds in [*phases.items(), ("total", total)]:
        yield dataclasses.replace(
            blank,
            case=name,
            unit="s",
            median=seconds,
            spread=(seconds, seconds),
            repeats=1,
            figures=figures.get(name, {}),
        )


def _search(setup: Setup, study: StudyConfig, work: Path, clock: PhaseClock) -> dict[str, float]:
    """As ``mohawk-nas search`` does it, on random text; returns what was scored."""
    with clock.stage("load", total=None, unit="model"):
        # Other suites may have loaded one, which would take its memory twice.
        setup.__dict__.pop("teacher", None)
        teacher = setup.load_teacher()
        budget = study.bank
        blocks = setup.blocks("bank", max(budget.matrix.tokens, budget.hidden.tokens))
    bank = Bank(
        study.bank.path,
        teacher=teacher,
        candidates=setup.space.candidates,
        recipe=study.bank,
        blocks=blocks,
        seed=study.seed,
    )
    bank.train(setup.space.replaceable, reporter=clock)
    scorer = BankScorer(
        teacher,
        bank,
        setup.blocks("search", study.search.tokens),
        pairs=setup.space.replaceable,
        weights=study.search.objective,
        batch_size=study.search.batch_size,
    )

    def provenance(layout: Layout) -> Mapping[str, Any]:
        return {"bank": {str(i): bank.key(i, layout[i]) for i in layout.replaced_layers}}

    result = run_study(
        study,
        setup.space,
        Budget(attention_layers=study.budget.attention_layers),
        scorer,
        run_dir=work,
        provenance=provenance,
        reporter=clock,
    )
    named = sum(trial.proposed_by in result.baselines for trial in result.trials)
    return {
        "layouts_by_baselines": named + len(result.probes),
        "layouts_by_strategy": len(result.trials) - named,
    }


def _settings(setup: Setup, study: StudyConfig) -> dict[str, Any]:
    """What the times depend on, as JSON gives it back."""
    dtype = str(setup.dtype).removeprefix("torch.")
    return {
        "study": plain(study),
        "model": dict(setup.shape.config),
        "device": f"{setup.device_name}, {dtype}",
    }


class PhaseClock:
    """Counts each phase's seconds and shows the work on another reporter.

    The file is written about once a second, so that a command that is killed has told its time.

    Args:
        path: Where the times of all commands stand.
        reporter: Shown the work.
    """

    def __init__(self, path: Path, reporter: Reporter) -> None:
        self._path, self._inner = path, reporter
        earlier = read_json(path) if path.is_file() else {"commands": [], "result": None}
        self.calls: list[dict[str, float]] = earlier["commands"]
        self.result: dict[str, float] | None = earlier["result"]
        if self.result is None:
            self.calls.append({})
        self._phase = "rest"
        self._since = self._written = time.perf_counter()

    def seconds(self) -> dict[str, float]:
        """Phase -> seconds of all commands."""
        names = [*PHASES.values(), "rest"]
        found = {name: sum(call.get(name, 0.0) for call in self.calls) for name in names}
        return {name: seconds for name, seconds in found.items() if seconds > 0}

    def finish(self, result: dict[str, float]) -> None:
        """Say that the search has ended, and with what."""
        self.result = result
        self._lap(write=True)

    @contextmanager
    def stage(
        self, name: str, total: float | None, unit: str, *, done: float = 0
    ) -> Iterator[Task]:
        self._lap(write=True)
        outer, self._phase = self._phase, PHASES.get(name, self._phase)
        try:
            with self._inner.stage(name, total, unit, done=done) as task:
                yield _Watched(task, self)
        finally:
            self._lap(write=True)
            self._phase = outer

    def say(self, text: str) -> None:
        self._inner.say(text)

    def tick(self) -> None:
        """Something has been done."""
        self._lap(write=time.perf_counter() - self._written >= WRITE_EVERY)

    def _lap(self, *, write: bool) -> None:
        now = time.perf_counter()
        call = self.calls[-1]
        call[self._phase] = call.get(self._phase, 0.0) + now - self._since
        self._since = now
        if write:
            self._written = now
            write_json(self._path, {"commands": self.calls, "result": self.result})


class _Watched:
    def __init__(self, task: Task, clock: PhaseClock) -> None:
        self._task, self._clock = task, clock

    def advance(self, amount: float = 1, *, tokens: int = 0, **figures: float | str) -> None:
        self._task.advance(amount, tokens=tokens, **figures)
        self._clock.tick()

    def expect(self, total: float) -> None:
        self._task.expect(total)
