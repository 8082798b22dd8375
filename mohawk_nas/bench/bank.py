"""Training steps of stages 1 and 2 of every layer at once, beside what the arithmetic alone takes.

B batch, T tokens a block, D model width, H heads, P head size, N state size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mohawk_nas.bench.results import Record
from mohawk_nas.bench.setup import RECORDED, Case, Setup
from mohawk_nas.bench.timing import Timing, peak_bytes
from mohawk_nas.config import StageConfig
from mohawk_nas.distill.graph import RecordedStep
from mohawk_nas.distill.trainer import STAGE_NUMBERS, LayerJob, LayerTrainer, Stage, StageName
from mohawk_nas.mixer import MixerConfig, build_mixer
from mohawk_nas.teacher import Teacher

__all__ = ["cases", "mixer_flops", "teacher_flops"]

STAGES: tuple[StageName, ...] = ("matrix", "hidden")

PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the matrices whose product says what the device can do."""


def cases(setup: Setup) -> Iterator[Case]:
    """The rate of a matrix product, of the teacher's forward pass, and of both stages' steps."""
    size = 128 if setup.options.quick else PRODUCT_SIZE[setup.device.type]
    rates: list[Timing] = []
    yield Case(
        blank=setup.blank("bank", "matrix product", rows=size, columns=size, inner=size),
        run=lambda blank: _product(setup, blank, size, rates),
    )
    shapes = setup.step_shapes(setup.shape.batch_size)
    yield Case(blank=setup.blank("bank", "teacher forward", **shapes), run=partial(_forward, setup))
    for name in STAGES:
        case = f"stage {STAGE_NUMBERS[name]}"
        run = partial(_steps, setup, name)
        yield Case(blank=setup.blank("bank", case, **shapes), run=run)
        floor = setup.blank("bank", f"{case}, counted floor", **shapes)
        yield Case(blank=floor, run=partial(_floor, setup, name, rates))


def _product(setup: Setup, blank: Record, size: int, rates: list[Timing]) -> Iterable[Record]:
    generator = torch.Generator(setup.device).manual_seed(0)
    a, b, c = (
        torch.randn(size, size, generator=generator, device=setup.device).to(setup.dtype)
        for _ in range(3)
    )
    out = torch.empty_like(a)
    pairs = [(a, b), (b, c), (c, a)]
    timing = setup.time(lambda number: torch.mm(*pairs[number % 3], out=out))
    rates.append(timing)
    figure = {"unit": "TFLOP/s", "figure": lambda seconds: 2 * size**3 / seconds / 1e12}
    yield blank.measured(timing, **figure)  # type: ignore[arg-type]


def _forward(setup: Setup, blank: Record) -> Iterable[Record]:
    teacher, batches = setup.teacher, setup.batches(setup.shape.batch_size)

    def run(tokens: Tensor) -> None:
        teacher.run(tokens)

    # Recorded like the steps it is compared with.
    step = RecordedStep(run, setup.device)
    yield _rated(setup, blank, lambda number: step(batches[number % len(batches)]))


def _steps(setup: Setup, name: StageName, blank: Record) -> Iterable[Record]:
    teacher, batches = setup.teacher, setup.batches(setup.shape.batch_size)
    jobs = [
        LayerJob(layer=layer, candidate=setup.candidate, mixer=setup.mixer(teacher, layer))
        for layer in range(teacher.num_layers)
    ]
    config = StageConfig(tokens=1, batch_size=setup.shape.batch_size)
    trainer = LayerTrainer(teacher, jobs, Stage(name=name, config=config))
    yield _rated(
        setup, blank, lambda number: trainer.step(batches[number % len(batches)], config.lr)
    )
    # Says so if the steps were no steps.
    trainer.read()


def _rated(setup: Setup, blank: Record, call: Any) -> Record:
    """Tokens a second, milliseconds and the most memory of a step."""
    tokens = setup.shape.batch_size * setup.shape.block_size
    found: list[Timing] = []
    # Recording is when a step's memory is taken, so warm-up is part of what is looked at.
    peak = peak_bytes(lambda: found.append(setup.time(call, warmup=RECORDED)), setup.device)
    if not found:
        found.append(setup.time(call, warmup=RECORDED))
    return blank.measured(
        found[0],
        unit="tokens/s",
        figure=lambda seconds: tokens / seconds,
        ms_a_step=found[0].median * 1e3,
        peak_bytes=None if peak is None else float(peak[0]),
    )


def _floor(setup: Setup, name: StageName, rates: list[Timing], blank: Record) -> Iterable[Record]:
    if not rates:
        raise RuntimeError("the matrix product's rate is not known")
    size = 128 if setup.options.quick else PRODUCT_SIZE[setup.device.type]
    teacher = setup.teacher
    flops = teacher_flops(teacher, setup.shape.block_size) + teacher.num_layers * mixer_flops(
        setup.mixer_config, teacher, setup.shape.block_size, name
    )
    yield blank.measured(
        rates[0],
        unit="tokens/s",
        figure=lambda seconds: 2 * size**3 / seconds / flops,
        flops_a_token=float(flops),
    )


def teacher_flops(teacher: Teacher, length: int) -> int:
    """Operations a token of the teacher's forward pass, up to its last attention layer.

    Two a weight of every linear layer, and the two products of attention over half of T: nothing
    is counted of norms, softmax and embeddings. Stages 1 and 2 end with the last layer's attention,
    so that layer's other linear layers are left out.
    """
    flops = 0
    for slot in teacher.slots:
        is_last = slot.view.layer_idx == teacher.num_layers - 1
        flops += 2 * _linear_weights(
            slot.get(teacher.model) if is_last else teacher.model.get_submodule(slot.parent)
        )
        flops += 2 * (length + 1) * slot.view.num_heads * slot.view.head_dim
    return flops


def mixer_flops(config: MixerConfig, teacher: Teacher, length: int, stage: StageName) -> int:
    """Operations a token of one mixer's training step.

    A linear layer counts two a weight forward, two for the weight's gradient, and two for its
    input's gradient where that is asked for: not where it reads what the teacher's layer reads.
    The rest of stage 2, which is the scan, is what the mixer says of itself for one token, three
    times. The rest of stage 1 are the products of the matrix distance, over the causal half: q k^T
    and C B^T forward and again backward, since neither is stored, and the gradients of C and B.
    """
    view = teacher.views[0]
    # On the CPU and over a few tokens: nothing is compiled, and only who asks for gradients counts.
    mixer = build_mixer(config, view).float()
    linear = [module for module in mixer.modules() if isinstance(module, nn.Linear)]
    flops = 0

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal flops
        weight = module.weight
        assert isinstance(weight, Tensor)
        flops += (6 if args[0].requires_grad else 4) * weight.numel()

    hidden = torch.randn(1, 8, view.d_model)
    for module in linear:
        module.register_forward_pre_hook(count)
    if stage == "hidden":
        mixer(hidden)
        weights = sum(module.weight.numel() for module in linear)
        return flops + 3 * (config.flops_per_token(view, length) - 2 * weights)
    factors = mixer.factors(hidden)
    assert factors is not None
    heads, state = factors.c.shape[1], factors.c.shape[-1]
    return flops + (length + 1) * heads * (2 * view.head_dim + 4 * state)


def _linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
