"""Training one layer at a time: stages 1 and 2 of any number of candidates in one teacher pass.

In these stages a layer's loss depends on that layer's parameters alone, because its input comes
from the teacher. So each candidate has its own optimizer, clipping and seed, its backward runs as
soon as the teacher's layer has, and the result does not depend on what is trained beside it.

Nothing in a step waits for the GPU: clipping and the refusal of gradients that are not finite are
decided there, and losses are added up there and read now and then.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mohawk_nas.capture import LayerCapture
from mohawk_nas.config import MatrixConfig, StageConfig
from mohawk_nas.data import TrainingBatches, TrainingText
from mohawk_nas.distill.graph import RecordedStep
from mohawk_nas.distill.hidden import hidden_loss
from mohawk_nas.distill.matrix import matrix_loss
from mohawk_nas.distill.optimizer import MAX_BAD_STEPS, ClippedAdamW, learning_rate
from mohawk_nas.errors import TrainingError
from mohawk_nas.fusion import fused_parts
from mohawk_nas.mixer import Mixer
from mohawk_nas.precision import computing_in
from mohawk_nas.reporting import Reporter, Task
from mohawk_nas.teacher import Teacher

__all__ = ["LayerJob", "LayerTrainer", "Stage", "num_steps", "train_layers"]

StageName = Literal["matrix", "hidden"]

STAGE_NUMBERS: dict[StageName, int] = {"matrix": 1, "hidden": 2}

READ_EVERY = 1.0
"""Seconds between two looks at the losses, for which the GPU must finish what it has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of a recipe."""

    name: StageName
    config: StageConfig

    def loss(self, mixer: Mixer, capture: LayerCapture) -> Tensor:
        """What a mixer of this layer is trained to lower, a scalar in float32."""
        if self.name == "hidden":
            return hidden_loss(mixer, capture)
        squared = isinstance(self.config, MatrixConfig) and self.config.squared
        return matrix_loss(mixer, capture, squared=squared)


@dataclass(kw_only=True)
class LayerJob:
    """One candidate in training."""

    layer: int
    candidate: str
    mixer: Mixer
    step: int = 0
    """Optimizer steps done, over all stages."""
    calibrated: bool = False
    bad_steps: int = 0
    seconds: float = 0.0
    losses: list[tuple[str, int, float]] = field(default_factory=list)
    """(stage, tokens seen in it, mean loss since the last entry)"""
    loss_sum: float = 0.0
    loss_count: int = 0
    optimizer: ClippedAdamW | None = None
    text: Mapping[str, Any] | None = None
    """Where its text goes on, if it stands within a stage."""

    @property
    def name(self) -> str:
        return f"layer {self.layer}, {self.candidate}"


def num_steps(config: StageConfig, block_size: int) -> int:
    """Optimizer steps that a stage's tokens make."""
    return config.tokens // (config.batch_size * block_size)


class LayerTrainer:
    """One stage's optimizer step for any number of candidates, in one pass of the teacher.

    Args:
        teacher: Frozen.
        jobs: Their mixers are trained in place.
        stage: What they are trained for.
    """

    def __init__(self, teacher: Teacher, jobs: Sequence[LayerJob], stage: Stage) -> None:
        self.teacher = teacher
        self.jobs = jobs
        self.stage = stage
        self._rate = torch.tensor(stage.config.lr, device=teacher.device)
        self._by_layer: dict[int, list[int]] = {}
        for number, job in enumerate(jobs):
            self._by_layer.setdefault(job.layer, []).append(number)
            if job.optimizer is None:
                job.optimizer = ClippedAdamW(job.mixer.parameters(), stage.config)
            job.optimizer.share_rate(self._rate)
        # A row a job: sum and number of losses since the last entry of its curve, steps refused,
        # last loss. What was refused is in none of them.
        rows = [[job.loss_sum, job.loss_count, job.bad_steps, math.nan] for job in jobs]
        self._figures = torch.tensor(rows, dtype=torch.float64, device=teacher.device)
        self._step = RecordedStep(self._train, teacher.device)

    def step(self, tokens: Tensor, rate: float) -> None:
        """Train on one batch.

        Args:
            tokens: ``(B, T)`` on the CPU, of the same shape each time.
            rate: Learning rate.
        """
        if fresh := [number for number, job in enumerate(self.jobs) if not job.calibrated]:
            self._calibrate(fresh, tokens)
        self._rate.fill_(rate)
        self._step(tokens)
        for job in self.jobs:
            job.step += 1

    def read(self) -> list[float]:
        """Bring the jobs' figures up to date; returns the last losses.

        Raises:
            TrainingError: A candidate's loss or gradient was not finite too often.
        """
        figures = self._figures.tolist()
        for job, (loss_sum, count, bad_steps, _) in zip(self.jobs, figures, strict=True):
            job.loss_sum, job.loss_count, job.bad_steps = loss_sum, int(count), int(bad_steps)
            if job.bad_steps > MAX_BAD_STEPS:
                raise TrainingError(
                    f"{job.name}: its loss or gradient was not finite in {job.bad_steps} steps so "
                    f"far, the last of them in stage {self.stage.name}; lower that stage's lr (now "
                    f"{self.stage.config.lr})"
                )
        return [last for *_, last in figures]

    def release(self) -> None:
        """Give back the memory of the recorded step."""
        self._step.release()

    def close_entry(self, tokens: int) -> None:
        """Add to each job's curve the mean loss since the last entry; ``read`` comes before."""
        for job in self.jobs:
            if job.loss_count:
                job.losses.append((self.stage.name, tokens, job.loss_sum / job.loss_count))
            job.loss_sum, job.loss_count = 0.0, 0
        self._figures[:, :2] = 0.0

    def _calibrate(self, numbers: Sequence[int], tokens: Tensor) -> None:
        fresh = set(numbers)

        def on_layer(capture: LayerCapture) -> None:
            for number in fresh.intersection(self._by_layer[capture.view.layer_idx]):
                mixer = self.jobs[number].mixer
                hidden, output = capture.hidden.to(mixer.dtype), capture.output.to(mixer.dtype)
                mixer.calibrate(hidden, output, mask=capture.mask)

        layers = {self.jobs[number].layer for number in numbers}
        self.teacher.show(tokens.to(self.teacher.device), on_layer, layers=layers)
        for number in numbers:
            self.jobs[number].calibrated = True

    def _train(self, tokens: Tensor) -> None:
        found: dict[int, tuple[Tensor, Tensor]] = {}

        def on_layer(capture: LayerCapture) -> None:
            for number in self._by_layer[capture.view.layer_idx]:
                found[number] = self._update(self.jobs[number], capture)

        matrices = self.stage.name == "matrix"
        with fused_parts(self.teacher.model):
            self.teacher.show(tokens, on_layer, layers=self._by_layer, matrices=matrices)
        losses = torch.stack([found[number][0] for number in range(len(found))])
        refused = torch.stack([found[number][1] for number in range(len(found))])
        kept = refused == 0
        figures = self._figures.unbind(1)
        figures[0].add_(torch.where(kept, losses, 0.0))
        figures[1].add_(kept)
        figures[2].add_(refused)
        figures[3].copy_(torch.where(kept, losses, figures[3]))

    def _update(self, job: LayerJob, capture: LayerCapture) -> tuple[Tensor, Tensor]:
        """One candidate's step; returns its loss, and 1 if it was refused."""
        optimizer = job.optimizer
        assert optimizer is not None
        optimizer.zero_grad(set_to_none=True)
        if capture.hidden.dtype == torch.float16:
            capture = dataclasses.replace(capture, hidden=capture.hidden.float())
        with torch.enable_grad():
            with computing_in(capture.hidden.dtype, capture.hidden.device):
                loss = self.stage.loss(job.mixer, capture)
            loss.backward()
        return loss.detach().double(), optimizer.clipped_step(loss)


def train_layers(
    teacher: Teacher,
    jobs: Sequence[LayerJob],
    text: TrainingText,
    stages: Sequence[Stage],
    *,
    seed: int,
    reporter: Reporter,
    save: Callable[[LayerJob], None] | None = None,
    save_every: int = 0,
) -> None:
    """Train candidates to the end of all stages, from wherever they stand.

    Args:
        teacher: Frozen; run once a batch for all candidates.
        jobs: All at the same step. Their mixers are trained in place.
        text: To train on.
        stages: In order; each restarts optimizer and schedule.
        seed: Of the order of the text.
        reporter: Shown the mean loss as it goes.
        save: Called with each unfinished job every ``save_every`` steps.
        save_every: 0 never saves.

    Raises:
        TrainingError: A candidate's gradient was not finite too often.
    """
    if teacher.device.type == "cuda":
        reporter.say(
            "the first step compiles and tunes kernels: a minute or two on a new machine, then kept"
        )
    block_size = text.block_size
    (done,) = {job.step for job in jobs}
    first = 0
    for number, stage in enumerate(stages):
        steps = num_steps(stage.config, block_size)
        last = first + steps
        if done < last:
            # Each stage reads the text in an order of its own.
            batches = text.batches(batch_size=stage.config.batch_size, seed=seed * 16 + number)
            began = max(0, done - first)
            if began:
                # They stand at one step, so in one place.
                assert jobs[0].text is not None
                batches.load_state_dict(jobs[0].text)
            with reporter.stage(
                f"stage {STAGE_NUMBERS[stage.name]} ({stage.name})",
                total=steps,
                unit="step",
                done=began,
            ) as task:
                trainer = LayerTrainer(teacher, jobs, stage)
                # Saves are counted over all stages; after the last step the entries are written.
                until = last if number + 1 == len(stages) else last + 1
                try:
                    _train_stage(
                        trainer,
                        batches,
                        range(began, steps),
                        block_size=block_size,
                        task=task,
                        save=save,
                        saves_at={s - first for s in range(save_every, until, save_every or until)},
                    )
                finally:
                    batches.close()
                    trainer.release()
            for job in jobs:
                job.optimizer = job.text = None
        first = last


def _train_stage(
    trainer: LayerTrainer,
    batches: TrainingBatches,
    steps: range,
    *,
    block_size: int,
    task: Task,
    save: Callable[[LayerJob], None] | None,
    saves_at: Collection[int],
) -> None:
    stage = trainer.stage
    size = stage.config.batch_size * block_size
    looked = time.perf_counter()
    for step in steps:
        rate = learning_rate(stage.config, step, steps.stop)
        trainer.step(batches.next(), rate)
        finished = step + 1
        ends = finished == steps.stop
        # Powers of two keep the curve short whatever the budget is.
        enters, saves = ends or finished & step == 0, save is not None and finished in saves_at
        now = time.perf_counter()
        if not (enters or saves or now - looked >= READ_EVERY):
            task.advance(1, tokens=size)
            continue
        losses = trainer.read()
        now = time.perf_counter()
        for job in trainer.jobs:
            # They are trained together, so each is charged its share.
            job.seconds += (now - looked) / len(trainer.jobs)
        looked = now
        task.advance(1, tokens=size, loss=sum(losses) / len(losses))
        if ends:
            _check_losses(trainer)
        if enters:
            trainer.close_entry(finished * size)
        if saves and save is not None:
            position = batches.state_dict()
            for job in trainer.jobs:
                job.text = None if ends else position
                save(job)


def _check_losses(trainer: LayerTrainer) -> None:
    # Every step of the last entry was refused: what is there now is no result.
    for job in trainer.jobs:
        if not job.loss_count:
            why = f"lower the stage's lr (now {trainer.stage.config.lr})"
            if all(stage != trainer.stage.name for stage, _, _ in job.losses):
                why = "it never was one, so what the mixer starts from is at fault"
            raise TrainingError(
                f"{job.name}: its loss must be a number when stage {trainer.stage.name} ends, but "
                f"is nan; {why}"
            )
