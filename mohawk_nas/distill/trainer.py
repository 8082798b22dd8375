"""Training one layer at a time: stages 1 and 2 of any number of candidates in one teacher pass.

In these stages a layer's loss depends on that layer's parameters alone, because its input comes
from the teacher. So each candidate has its own optimizer, clipping and seed, its backward runs as
soon as the teacher's layer has, and the result does not depend on what is trained beside it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from mohawk_nas.config import StageConfig
from mohawk_nas.data import BlockOrder, TokenBlocks
from mohawk_nas.distill.hidden import hidden_loss
from mohawk_nas.distill.matrix import matrix_loss
from mohawk_nas.errors import TrainingError
from mohawk_nas.mixer import Mixer
from mohawk_nas.reporting import Reporter
from mohawk_nas.teacher import LayerCapture, Teacher

__all__ = ["LayerJob", "Stage", "learning_rate", "make_optimizer", "num_steps", "train_layers"]

StageName = Literal["matrix", "hidden"]

LOSSES: dict[StageName, Callable[[Mixer, LayerCapture], Tensor]] = {
    "matrix": matrix_loss,
    "hidden": hidden_loss,
}

STAGE_NUMBERS: dict[StageName, int] = {"matrix": 1, "hidden": 2}

MAX_BAD_STEPS = 10
"""Non-finite gradients of one candidate, ever, before the run stops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of a recipe."""

    name: StageName
    config: StageConfig


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
    optimizer: torch.optim.AdamW | None = None

    @property
    def name(self) -> str:
        return f"layer {self.layer}, {self.candidate}"


def num_steps(config: StageConfig, block_size: int) -> int:
    """Optimizer steps that a stage's tokens make."""
    return config.tokens // (config.batch_size * block_size)


def learning_rate(config: StageConfig, step: int, steps: int) -> float:
    """Rate at one step of a warm-up, constant, linearly decaying schedule."""
    warmup, decay = round(config.warmup * steps), round(config.decay * steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if step >= steps - decay:
        left = (steps - step) / (decay + 1)
        return config.min_lr + (config.lr - config.min_lr) * left
    return config.lr


def make_optimizer(parameters: Sequence[nn.Parameter], config: StageConfig) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves vectors (biases, gains, skips) alone."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas
    )


def train_layers(
    teacher: Teacher,
    jobs: Sequence[LayerJob],
    blocks: TokenBlocks,
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
        blocks: Text to train on.
        stages: In order; each restarts optimizer and schedule.
        seed: Of the order of the blocks.
        reporter: Shown the mean loss as it goes.
        save: Called with each unfinished job every ``save_every`` steps.
        save_every: 0 never saves.

    Raises:
        TrainingError: A candidate's gradient was not finite too often.
    """
    block_size = blocks.tokens.shape[1]
    (done,) = {job.step for job in jobs}
    first = 0
    for number, stage in enumerate(stages):
        steps = num_steps(stage.config, block_size)
        last = first + steps
        if done < last:
            # Each stage reads the text in an order of its own.
            order = BlockOrder(
                len(blocks), batch_size=stage.config.batch_size, seed=seed * 16 + number
            )
            size = stage.config.batch_size * block_size
            began = max(0, done - first)
            with reporter.stage(
                f"stage {STAGE_NUMBERS[stage.name]} ({stage.name})",
                total=steps,
                unit="step",
                done=began,
            ) as task:
                for step in range(began, steps):
                    loss = _train_step(teacher, jobs, blocks, order, stage, step, steps)
                    finished = first + step + 1
                    task.advance(1, tokens=size, loss=loss)
                    if save is not None and save_every and finished % save_every == 0:
                        for job in jobs:
                            save(job)
            for job in jobs:
                job.optimizer = None
        first = last


def _train_step(
    teacher: Teacher,
    jobs: Sequence[LayerJob],
    blocks: TokenBlocks,
    order: BlockOrder,
    stage: Stage,
    step: int,
    steps: int,
) -> float:
    """One batch for every job; returns the mean loss over jobs."""
    rate = learning_rate(stage.config, step, steps)
    by_layer: dict[int, list[LayerJob]] = {}
    for job in jobs:
        by_layer.setdefault(job.layer, []).append(job)
    losses: list[float] = []

    def on_layer(capture: LayerCapture) -> None:
        # Candidates are trained in float32, whatever type the teacher is held in.
        inputs = dataclasses.replace(capture, hidden=capture.hidden.float())
        for job in by_layer[capture.view.layer_idx]:
            began = time.perf_counter()
            losses.append(_update(job, inputs, stage, rate, step, steps))
            job.seconds += time.perf_counter() - began

    tokens = blocks.batch(order.indices(step)).to(teacher.device)
    teacher.run(tokens, on_layer=on_layer, layers=by_layer, matrices=stage.name == "matrix")
    return sum(losses) / len(losses)


def _update(
    job: LayerJob, capture: LayerCapture, stage: Stage, rate: float, step: int, steps: int
) -> float:
    if not job.calibrated:
        job.mixer.calibrate(capture.hidden, capture.output, mask=capture.mask)
        job.calibrated = True
    parameters = [p for p in job.mixer.parameters() if p.requires_grad]
    if job.optimizer is None:
        job.optimizer = make_optimizer(parameters, stage.config)
    for group in job.optimizer.param_groups:
        group["lr"] = rate
    with torch.enable_grad():
        loss = LOSSES[stage.name](job.mixer, capture)
        loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, stage.config.grad_clip)
    value = loss.item()
    if torch.isfinite(norm):
        job.optimizer.step()
    else:
        job.bad_steps += 1
        if job.bad_steps > MAX_BAD_STEPS:
            raise TrainingError(
                f"{job.name}: its gradient was not finite in {job.bad_steps} steps of stage "
                f"{stage.name}; lower the stage's lr (now {stage.config.lr})"
            )
    job.optimizer.zero_grad(set_to_none=True)
    job.step += 1
    job.loss_sum += value
    job.loss_count += 1
    finished = step + 1
    if finished == steps and not math.isfinite(value):
        raise TrainingError(
            f"{job.name}: its loss must be a number when stage {stage.name} ends, but is {value}; "
            f"lower the stage's lr (now {stage.config.lr})"
        )
    # Powers of two keep the curve short whatever the budget is.
    if finished == steps or finished & step == 0:
        tokens = finished * capture.hidden.shape[0] * capture.hidden.shape[1]
        job.losses.append((stage.name, tokens, job.loss_sum / job.loss_count))
        job.loss_sum, job.loss_count = 0.0, 0
    return value
