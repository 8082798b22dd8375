"""Stage 3's optimizer steps, for one student and for several side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from mohawk_nas.bench.results import Record
from mohawk_nas.bench.setup import RECORDED, Case, FreshBank, Setup
from mohawk_nas.bench.timing import Timing, peak_bytes
from mohawk_nas.config import LogitsConfig
from mohawk_nas.distill.logits import LogitsTrainer
from mohawk_nas.student import assemble

__all__ = ["cases"]

STUDENTS = (1, 4)


def cases(setup: Setup) -> Iterator[Case]:
    """A step that trains every weight of each student, on one batch."""
    shapes = setup.step_shapes(setup.shape.distill_batch_size)
    for count in STUDENTS:
        case = "one student" if count == 1 else f"{count} students"
        blank = setup.blank("distill", case, **shapes, students=count)
        # Several large students may be more than a GPU holds; one should fit.
        yield Case(blank=blank, run=partial(_measure, setup, count), may_run_out=count > 1)


def _measure(setup: Setup, count: int, blank: Record) -> Iterable[Record]:
    teacher, batch_size = setup.teacher, setup.shape.distill_batch_size
    bank = FreshBank(setup, teacher)
    layouts = setup.layouts(count)
    students = [
        assemble(teacher, layouts[number % len(layouts)], bank, share=False).float()
        for number in range(count)
    ]
    config = LogitsConfig(tokens=1, batch_size=batch_size, lr=1e-4)
    trainer = LogitsTrainer(teacher, students, config)
    batches = setup.batches(batch_size)
    found: list[Timing] = []

    def run() -> None:
        found.append(
            setup.time(
                lambda number: trainer.step([batches[number % len(batches)]], config.lr),
                warmup=RECORDED,
            )
        )

    if (peak := peak_bytes(run, setup.device)) is None:
        run()
    timing = found[0]
    tokens = batch_size * setup.shape.block_size
    yield blank.measured(
        timing,
        unit="steps/s",
        figure=lambda seconds: 1 / seconds,
        ms_a_step=timing.median * 1e3,
        tokens_per_second=tokens / timing.median,
        student_tokens_per_second=count * tokens / timing.median,
        peak_bytes=None if peak is None else float(peak[0]),
    )
