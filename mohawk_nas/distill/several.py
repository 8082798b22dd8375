"""Short distillations of several layouts side by side, for rungs, audits and ground truth."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from mohawk_nas.config import LogitsConfig
from mohawk_nas.data import BlockOrder, TokenBlocks
from mohawk_nas.distill.logits_trainer import LogitsTrainer, student_to_train
from mohawk_nas.distill.optimizer import learning_rate
from mohawk_nas.distill.trainer import READ_EVERY, num_steps
from mohawk_nas.errors import InputError, TrainingError
from mohawk_nas.layout import Layout
from mohawk_nas.ranks import gpu_sharers
from mohawk_nas.reporting import SILENT, Reporter
from mohawk_nas.student import MixerSource, assemble
from mohawk_nas.teacher import Teacher

__all__ = ["distil_layouts", "students_at_once"]

T = TypeVar("T")

MOST_AT_ONCE = 4
"""Beyond so many the teacher's forward pass that they share saves next to nothing."""
SHARE = 0.9
"""Of the free memory that students may take; the rest is working memory."""


def students_at_once(device: torch.device, each: int) -> int:
    """How many students to train side by side: four, or as many as there is room for, at least one.

    Args:
        device: Where they are trained.
        each: Bytes of one, as :func:`~mohawk_nas.forecast.count_student_memory` counts.
    """
    if device.type == "cuda":
        # What PyTorch holds without using it is free as well.
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
    else:
        free = _available_bytes()
    return max(1, min(MOST_AT_ONCE, int(SHARE * free / gpu_sharers()) // each))


def _available_bytes() -> int:
    """Of the machine's memory, with what the system gives back when asked."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        (line,) = (line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 1024 * int(line.split()[1])


def distil_layouts(
    teacher: Teacher,
    layouts: Sequence[Layout],
    bank: MixerSource,
    *,
    train: TokenBlocks,
    config: LogitsConfig,
    seed: int,
    measure: Callable[[Any], T],
    reporter: Reporter = SILENT,
) -> list[T]:
    """Stage 3 of each layout from the bank's mixers, on the same batches; nothing is kept.

    A layout's result does not depend on its company.

    Args:
        teacher: The teacher.
        layouts: As many as the device holds: each is a model with gradients and an optimizer.
        bank: Where their mixers come from.
        train: Text to train on.
        config: Its ``tokens`` for each layout; 0 only measures.
        seed: Of the order of the text.
        measure: Given each student when it is trained.
        reporter: Shown the steps.

    Raises:
        InputError: The tokens are fewer than one step's.
        TrainingError: Gradients were not finite too often.
    """
    if not config.tokens:
        return [measure(assemble(teacher, layout, bank)) for layout in layouts]
    size = config.batch_size * config.accumulate * train.tokens.shape[1]
    steps = num_steps(config, train.tokens.shape[1]) // config.accumulate
    if not steps:
        raise InputError(
            f"stage 3: tokens must be 0 or at least one step of {size:,} tokens (batch_size * "
            f"accumulate * data.block_size), but got {config.tokens:,}"
        )
    dtype = teacher.model.dtype
    students = [
        student_to_train(teacher, layout, bank, config.trainable, taught_in=dtype)
        for layout in layouts
    ]
    trainer = LogitsTrainer(teacher, students, config)
    order = BlockOrder(len(train), batch_size=config.batch_size, seed=seed * 16 + 2)
    bad = [0] * len(layouts)
    try:
        with reporter.stage("stage 3 (logits)", total=steps, unit="step") as task:
            looked = time.perf_counter()
            for step in range(steps):
                first = step * config.accumulate
                batches = [train.batch(order.indices(first + i)) for i in range(config.accumulate)]
                trainer.step(batches, learning_rate(config, step, steps))
                if step + 1 < steps and time.perf_counter() - looked < READ_EVERY:
                    task.advance(1, tokens=size)
                    continue
                looked = time.perf_counter()
                entries = trainer.read()
                for _, refused in entries:
                    bad = [count + again for count, again in zip(bad, refused, strict=True)]
                task.advance(1, tokens=size, loss=sum(entries[-1][0]) / len(layouts))
                if max(bad) > config.max_bad_steps:
                    raise TrainingError(
                        f"stage 3 of {layouts[bad.index(max(bad))]}: loss or gradient was not "
                        f"finite in {max(bad)} steps; lower search.rungs.lr, or distill.logits.lr "
                        f"where that is not given (now {config.lr})"
                    )
        # In the types they were trained in, which are those the search scores them in.
        return [measure(student) for student in students]
    finally:
        trainer.release()
