"""Stage 3, end-to-end distillation of the assembled student, resumable at any step.

The folder holds ``best.safetensors``, the trained weights with the lowest validation KL so far, a
checkpoint (see :mod:`mohawk_nas.distill.checkpoints`), where to go on, and ``log.jsonl``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from mohawk_nas.config import LogitsConfig
from mohawk_nas.data import TokenBlocks, TrainingBatches, TrainingText
from mohawk_nas.distill.checkpoints import Checkpoints
from mohawk_nas.distill.logits_trainer import LogitsTrainer, trainable_parameters
from mohawk_nas.distill.optimizer import learning_rate
from mohawk_nas.distill.parallel import Mode, evaluate_shares, make_trainer
from mohawk_nas.distill.trainer import READ_EVERY, num_steps
from mohawk_nas.errors import Stopped, TrainingError
from mohawk_nas.files import DamagedFile, atomic_write, load_tensors, save_tensors
from mohawk_nas.metrics import BlockFigures
from mohawk_nas.ranks import any_rank, num_ranks, rank, stop_request, told_once, wait_for_all
from mohawk_nas.reporting import Reporter
from mohawk_nas.reporting.board import Board
from mohawk_nas.teacher import Teacher

__all__ = ["LogitsResult", "LogitsTrainer", "distill_logits", "trainable_parameters"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitsResult:
    """Where a distillation ended."""

    before: BlockFigures
    """The undistilled student on the validation split."""
    after: BlockFigures
    """The best weights on the same blocks."""
    best_step: int
    """Optimizer step of the best weights; 0 if none was better than the undistilled student."""
    tokens: int
    """Tokens trained on; fewer than configured if validation stopped improving."""


@dataclass
class _Progress:
    steps: int
    """Where the run ends."""
    step: int = 0
    best_step: int = 0
    best_kl: float = math.inf
    bad_steps: int = 0
    lowered_to: float = math.inf
    """Validation KL when it last fell by ``min_gain`` at the full rate."""
    looks_since: int = 0
    """Looks at the validation split since then."""

    def improves(self, kl: float, config: LogitsConfig) -> bool:
        """Whether to go on at the full rate after this look at the validation split."""
        if kl < self.lowered_to * (1 - config.min_gain):
            self.lowered_to, self.looks_since = kl, 0
        else:
            self.looks_since += 1
        return self.looks_since < config.patience

    def end_early(self, config: LogitsConfig) -> None:
        """Let the schedule be one whose rate falls from here on."""
        self.steps = min(self.steps, round(self.step / (1 - config.decay)))


def distill_logits(
    teacher: Teacher,
    student: Any,
    *,
    undistilled: Callable[[], Any] | None = None,
    train: TrainingText,
    validation: TokenBlocks,
    config: LogitsConfig,
    folder: Path,
    seed: int,
    reporter: Reporter,
    mode: Mode = "one",
    tensorboard: bool = False,
) -> LogitsResult:
    """Train the student end to end; it holds the best weights when this returns.

    The weights that are kept are never worse on the validation split than the undistilled ones. A
    run that was interrupted goes on from its last checkpoint and ends with the same weights as an
    unbroken one: bitwise on a CPU with as many processes, up to rounding with another number of
    them. Dropout stays off.

    Every process of the run calls this with the same arguments. Files are written by the first one,
    the parts of a checkpoint by all. With ``mode="fsdp"`` each holds a part of the student, and the
    best weights are in ``best.safetensors`` alone.

    Args:
        teacher: The teacher.
        student: Shares no trained weights with it; trained in place.
        undistilled: Makes what the result is compared with, where more of stage 2 has already
            changed the student. If that made it worse on the validation split, its mixers are what
            to start with. It may share weights with the teacher, and is let go of before training.
        train: Text to train on.
        validation: Text to watch.
        config: Stage 3.
        folder: Of checkpoints and the log.
        seed: Of the order of the text.
        reporter: Shown the loss and the validation KL.
        mode: How processes share the work.
        tensorboard: Also log to TensorBoard, in the folder's ``tensorboard``.

    Raises:
        TrainingError: Gradients were not finite too often.
        Stopped: A signal asked for it; a checkpoint has been written.
        DamagedFile: What an interrupted run left cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Blocks of a step are those of all ranks together.
    share = config.batch_size // num_ranks()
    earlier, mixers = None, {}
    if undistilled is not None:
        # Before the teacher may be divided, of which it would keep the whole.
        model = undistilled()
        earlier = evaluate_shares(
            teacher, validation, lambda work: work(model), batch_size=config.batch_size
        )
        # All that it has of its own.
        named = trainable_parameters(model, "mixers")
        mixers = {name: parameter.detach().cpu() for name, parameter in named.items()}
        del model, named
    order = {"seed": seed * 16 + 2, "rank": rank(), "world": num_ranks()}
    with closing(train.batches(batch_size=share, **order)) as text:
        trainer = make_trainer(teacher, student, config, mode)
        try:
            with _own_random_numbers(teacher, seed):
                start = trainer.evaluate(validation, batch_size=config.batch_size)
                before = start if earlier is None else earlier
                if before.mean_kl < start.mean_kl:
                    trainer.load(0, mixers)
                mixers.clear()
                return _distill(
                    trainer,
                    before,
                    best_kl=min(start.mean_kl, before.mean_kl),
                    text=text,
                    block_size=train.block_size,
                    validation=validation,
                    folder=folder,
                    reporter=reporter,
                    board=Board(folder / "tensorboard") if tensorboard and rank() == 0 else None,
                )
        finally:
            trainer.release()


def _distill(
    trainer: LogitsTrainer,
    before: BlockFigures,
    *,
    best_kl: float,
    text: TrainingBatches,
    block_size: int,
    validation: TokenBlocks,
    folder: Path,
    reporter: Reporter,
    board: Board | None,
) -> LogitsResult:
    config = trainer.config
    steps = num_steps(config, block_size) // config.accumulate
    checkpoints, best = Checkpoints(folder), folder / "best.safetensors"

    def keep() -> None:
        weights = trainer.weights()
        if rank() == 0:
            save_tensors(best, weights)

    progress = _Progress(steps=steps, best_kl=best_kl)
    if (checkpoint := checkpoints.newest()) is not None:
        if not best.is_file():
            raise DamagedFile(f"{best}: must hold the best weights so far, but is not there")
        # Told now, rather than when training has ended.
        load_tensors(best)
        kept = checkpoints.restore(checkpoint, trainer)
        text.load_state_dict(kept.pop("text"))
        progress = dataclasses.replace(progress, **kept)
        reporter.say(f"continuing after step {progress.step} of {progress.steps}")
    else:
        keep()

    size = config.batch_size * config.accumulate * block_size
    with (
        _log_after(folder / "log.jsonl", progress.step) as log,
        board.after(progress.step) if board is not None else nullcontext(),
        reporter.stage(
            "stage 3 (logits)", total=progress.steps, unit="step", done=progress.step
        ) as task,
        stop_request() as request,
    ):
        looked, rates = time.perf_counter(), []
        while progress.step < progress.steps:
            rates.append(learning_rate(config, progress.step, progress.steps))
            trainer.step([text.next() for _ in range(config.accumulate)], rates[-1])
            progress.step += 1
            last = progress.step == progress.steps
            validates = last or progress.step % config.validate_steps == 0
            saves = last or progress.step % config.checkpoint_steps == 0
            # Each rank has a clock of its own, and a signal may come to one alone.
            looks = rank() == 0 and time.perf_counter() - looked >= READ_EVERY
            looks, stops = any_rank(looks, request.made)
            if not (validates or saves or looks or stops):
                task.advance(1, tokens=size)
                continue
            entries = _read(trainer, progress, rates)
            at_full_rate = rates[-1] == config.lr
            looked, rates = time.perf_counter(), []
            task.advance(1, tokens=size, loss=entries[-1]["loss"])
            if validates:
                now = trainer.evaluate(validation, batch_size=config.batch_size)
                entries[-1]["validation_kl"] = now.mean_kl
                if now.mean_kl < progress.best_kl:
                    progress.best_kl, progress.best_step = now.mean_kl, progress.step
                    keep()
                if config.patience and at_full_rate and not progress.improves(now.mean_kl, config):
                    progress.end_early(config)
                    last = progress.step == progress.steps
                    saves = saves or last
                    task.expect(progress.steps)
                    reporter.say(
                        f"stage 3: validation KL has not fallen by {config.min_gain:.1%} in "
                        f"{config.patience} looks, so the rate falls from step {progress.step} on "
                        f"and the run ends after {progress.steps} of {steps}"
                    )
            if log is not None:
                log.write("".join(json.dumps(entry) + "\n" for entry in entries))
                log.flush()
            if board is not None:
                board.add(entries)
            if saves or stops:
                # The same on every rank.
                checkpoints.save(trainer, vars(progress) | {"text": text.state_dict()})
            if stops and not last:
                name = request.signal.name if request.signal else "a signal to another process"
                raise told_once(
                    Stopped(
                        f"stage 3: stopped by {name} after step {progress.step} of "
                        f"{progress.steps}, which is saved; the same command goes on from here"
                    )
                )

    # The first rank has written it by now.
    wait_for_all()
    trainer.load(0, load_tensors(best))
    after = trainer.evaluate(validation, batch_size=config.batch_size)
    return LogitsResult(
        before=before, after=after, best_step=progress.best_step, tokens=progress.step * size
    )


@contextmanager
def _own_random_numbers(teacher: Teacher, seed: int) -> Iterator[None]:
    """Leave the caller's generators alone, and start from the seed whatever they were."""
    devices = [teacher.device] if teacher.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed * 16 + 2) * 4096 + rank())
        yield


@contextmanager
def _log_after(path: Path, step: int) -> Iterator[TextIO | None]:
    """The log, open for what comes after a step; on the first rank only.

    What was logged after the checkpoint is forgotten: those steps are done again.
    """
    if rank():
        yield None
        return
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        with atomic_write(path) as beside:
            beside.write_text("".join(kept), encoding="utf-8")
    with path.open("a", encoding="utf-8") as log:
        yield log


def _read(
    trainer: LogitsTrainer, progress: _Progress, rates: Sequence[float]
) -> list[dict[str, float]]:
    """Log entries of the steps since last asked, the newest last."""
    config, entries = trainer.config, []
    first = progress.step - len(rates) + 1
    for number, ((loss,), (refused,)) in enumerate(trainer.read()):
        entries.append({"step": first + number, "loss": loss, "lr": rates[number]})
        progress.bad_steps += refused
    if progress.bad_steps > config.max_bad_steps:
        raise told_once(
            TrainingError(
                f"stage 3: loss or gradient was not finite in {progress.bad_steps} steps, more "
                f"than distill.logits.max_bad_steps ({config.max_bad_steps}); lower "
                f"distill.logits.lr (now {config.lr})"
            )
        )
    return entries
