"""Stage 3's optimizer steps: one student, several side by side, or one on several processes.

Beside them stands what anybody could write: the stock teacher's forward pass and a stock training
step of the same architecture.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mohawk_nas.bench.results import Record
from mohawk_nas.bench.setup import RECORDED, Case, FreshBank, Setup
from mohawk_nas.bench.timing import Timing, peak_bytes
from mohawk_nas.config import LogitsConfig
from mohawk_nas.distill.logits_trainer import LogitsTrainer, student_to_train
from mohawk_nas.distill.parallel import Mode, make_trainer, parallel_mode
from mohawk_nas.layout import Layout
from mohawk_nas.ranks import num_ranks
from mohawk_nas.student import assemble
from mohawk_nas.teacher import Teacher

__all__ = ["cases", "forward_flops"]

STUDENTS = (1, 4)

PEAKS = {"H100": 989e12, "H200": 989e12}
"""Operations a second of dense bfloat16 products, as NVIDIA's data sheets of the SXM modules say;
by a part of the GPU's name."""


def cases(setup: Setup) -> Iterator[Case]:
    """A step that trains every weight of each student, on one batch a process."""
    shapes = setup.step_shapes(setup.shape.distill_batch_size)
    if num_ranks() > 1:
        mode = parallel_mode(LogitsConfig(parallel=setup.options.parallel), setup.teacher)
        if mode == "fsdp":
            # Each case has its own; one more would stand beside it.
            del setup.teacher
        for recomputes in (False, True):
            case = f"{mode}, layers run again" if recomputes else mode
            blank = setup.blank("distill", case, **shapes, ranks=num_ranks())
            yield Case(blank=blank, run=partial(_measure, setup, 1, mode, recomputes, []))
        return
    of_one: list[Timing] = []
    for count in STUDENTS:
        case = "one student" if count == 1 else f"{count} students"
        blank = setup.blank("distill", case, **shapes, students=count)
        # Several large students may be more than a GPU holds; one should fit.
        run = partial(_measure, setup, count, "one", False, of_one if count == 1 else [])
        yield Case(blank=blank, run=run, may_run_out=count > 1)
    blank = setup.blank("distill", "one student, layers run again", **shapes, students=1)
    yield Case(blank=blank, run=partial(_measure, setup, 1, "one", True, []))
    blank = setup.blank("distill", "stock forward and training step", **shapes, students=1)
    yield Case(blank=blank, run=partial(_stock, setup, of_one), may_run_out=True)


def _measure(
    setup: Setup,
    count: int,
    mode: Mode,
    recomputes: bool,
    timings: list[Timing],
    blank: Record,
) -> Iterable[Record]:
    # One that is sharded is no use to the next case.
    teacher = setup.load_teacher() if mode == "fsdp" else setup.teacher
    batch_size = setup.shape.distill_batch_size
    bank, layouts = FreshBank(setup, teacher), setup.layouts(count)
    config = LogitsConfig(
        tokens=1, batch_size=batch_size, lr=1e-4, activation_checkpointing=recomputes
    )

    def student(number: int) -> Any:
        layout = layouts[number % len(layouts)]
        if mode == "fsdp":
            return assemble(teacher, layout, bank, share=False).cpu().float()
        dtype = teacher.model.dtype
        return student_to_train(teacher, layout, bank, config.trainable, taught_in=dtype)

    if mode == "one":
        trainer = LogitsTrainer(teacher, [student(number) for number in range(count)], config)
    else:
        trainer = make_trainer(teacher, student(0), config, mode)
    batches = setup.batches(batch_size)
    timing, peak = _timed(
        setup, lambda number: trainer.step([batches[number % len(batches)]], config.lr)
    )
    timings.append(timing)
    # Sharded or not, it says how large its weights are.
    flops = forward_flops(setup, teacher) + 3 * sum(
        forward_flops(setup, teacher, layouts[number % len(layouts)]) for number in range(count)
    )
    yield _rated(setup, blank, timing, peak, flops=flops, count=count)


def _stock(setup: Setup, of_one: Sequence[Timing], blank: Record) -> Iterable[Record]:
    """Everything in the teacher's type, the optimizer's moments too: as fast as stock goes."""
    teacher, batches = setup.teacher, setup.batches(setup.shape.distill_batch_size)
    model = copy.deepcopy(teacher.model).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(number: int) -> None:
        tokens: Tensor = batches[number % len(batches)].to(setup.device)
        with torch.no_grad():
            teacher.model(input_ids=tokens, use_cache=False)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    timing, peak = _timed(setup, step)
    figures: dict[str, float] = {}
    if of_one:
        figures["one_student_at_times_this_rate"] = timing.median / of_one[0].median
    flops = 4 * forward_flops(setup, teacher)
    yield _rated(setup, blank, timing, peak, flops=flops, count=1, **figures)


def _timed(setup: Setup, call: Any) -> tuple[Timing, float | None]:
    """Seconds of a step, and the most memory that is held while it is made ready and repeated."""
    found: list[Timing] = []

    def run() -> None:
        found.append(setup.time(call, warmup=RECORDED))

    if (peak := peak_bytes(run, setup.device)) is None:
        run()
    return found[0], None if peak is None else float(peak[0])


def _rated(
    setup: Setup,
    blank: Record,
    timing: Timing,
    peak: float | None,
    *,
    flops: int,
    count: int,
    **figures: float,
) -> Record:
    """A step's record.

    Args:
        setup: Says where and how much.
        blank: What was measured.
        timing: Of a step.
        peak: Bytes of this process's GPU.
        flops: Operations a token, of the model alone: what is computed again does not count.
        count: Students.
        **figures: What else is known.
    """
    tokens = num_ranks() * setup.shape.distill_batch_size * setup.shape.block_size
    rate = tokens / timing.median
    limit = next((p for name, p in PEAKS.items() if name in setup.device_name), None)
    if limit is not None:
        figures["mfu"] = rate * flops / limit / num_ranks()
        figures["assumed_peak_tflops"] = limit / 1e12
    return blank.measured(
        timing,
        unit="steps/s",
        figure=lambda seconds: 1 / seconds,
        ms_a_step=timing.median * 1e3,
        tokens_per_second=rate,
        student_tokens_per_second=count * rate,
        flops_a_token=float(flops),
        peak_bytes=peak,
        **figures,
    )


def forward_flops(setup: Setup, teacher: Teacher, layout: Layout | None = None) -> int:
    """Operations a token of a forward pass with logits; a training step is three of them.

    Two a weight of every linear layer, the head included, and the two products of attention over
    the causal half of a block. Of a mixer besides its linear layers: what it says of itself for one
    token. Nothing is counted of norms, softmax and embeddings.

    Args:
        setup: Whose candidate stands in replaced layers.
        teacher: The model.
        layout: Of a student; None for the teacher itself.
    """
    length, config = setup.shape.block_size, setup.mixer_config
    flops = 2 * linear_weights(teacher.model)
    for slot in teacher.slots:
        view = slot.view
        if layout is None or view.layer_idx in layout.attention_layers:
            flops += 2 * (length + 1) * view.num_heads * view.head_dim
        else:
            # Which holds its linear layers.
            flops += config.flops_per_token(view, length)
            flops -= 2 * linear_weights(slot.get(teacher.model))
    return flops


def linear_weights(module: nn.Module) -> int:
    """Weights that stand in a product."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
