"""What a full distillation takes, before anything is run: memory, operations, disk.

Nothing but the teacher's ``config.json`` is read. Teacher and student stand on the meta device,
where the student's forward pass is run to count what autograd keeps of it.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mohawk_nas.config import (
    DistillConfig,
    LogitsConfig,
    StageConfig,
    StudyConfig,
    TeacherConfig,
)
from mohawk_nas.distill.logits import trainable_parameters
from mohawk_nas.distill.parallel import BYTES_A_PARAMETER, bytes_of_parts
from mohawk_nas.distill.trainer import num_steps
from mohawk_nas.errors import ConfigError
from mohawk_nas.layout import Layout
from mohawk_nas.metrics import HEAD_VALUES, body
from mohawk_nas.mixer import Mixer
from mohawk_nas.plan import count_work, find_problems
from mohawk_nas.search.budget import make_budget
from mohawk_nas.search.space import load_space
from mohawk_nas.student import install_mixers
from mohawk_nas.teacher import Teacher, load_teacher

__all__ = ["Forecast", "StageForecast", "count_student_memory", "make_forecast"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageForecast:
    """One stage of a full distillation."""

    tokens: int
    steps: int
    tokens_a_step: int
    flops: float
    """Of all GPUs together."""
    seconds: float
    """At the rate that is assumed."""
    memory: dict[str, int]
    """Part -> bytes a GPU, at the same time."""
    options: dict[str, int]
    """What else a part may be, by how -> bytes a GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a full distillation of one layout takes."""

    strip: str
    teacher_params: int
    student_params: int
    trained_params: int
    """In stage 3."""
    replaced: int
    """Layers with another mixer."""
    mixer_params: int
    """Of all of these together."""
    stages: dict[str, StageForecast]
    """Name -> those that have tokens."""
    disk: dict[str, int]
    """What is written -> bytes."""
    dtype: str
    gpus: int
    peak: float
    """Operations a second of one GPU, as assumed."""
    utilisation: float
    """Share of it, as assumed."""


def make_forecast(
    config: StudyConfig, layout: Layout, *, gpus: int, peak: float, utilisation: float
) -> Forecast:
    """Count what distilling a layout in full takes.

    Args:
        config: The study.
        layout: The student's.
        gpus: Among which layers (stages 1 and 2) and the blocks of a step (stage 3) are divided.
        peak: Operations a second of one of them.
        utilisation: Share of it that is reached.

    Raises:
        ConfigError: Every problem of the study.
        LayoutError: The layout is not of the study's space.
    """
    if problems := find_problems(config):
        raise ConfigError(problems)
    teacher = load_teacher(config.teacher, meta=True)
    return _forecast(
        config,
        layout,
        teacher,
        dtype=_dtype(config.teacher),
        gpus=gpus,
        peak=peak,
        utilisation=utilisation,
    )


def count_student_memory(
    config: StudyConfig, recipe: LogitsConfig, *, teacher: Teacher | None = None
) -> dict[str, int]:
    """Part -> bytes that one student and its teacher hold on a GPU while it is distilled briefly.

    The student is a layout drawn from the budget as far as that is known without measuring.

    Args:
        config: The study.
        recipe: Stage 3 of a rung or an audit, whatever its tokens.
        teacher: Where it is loaded; None takes its ``config.json``, and bfloat16 for "auto".

    Returns:
        A guess where the student cannot be run on the meta device.
    """
    dtype = _dtype(config.teacher) if teacher is None else teacher.model.dtype
    blank = load_teacher(config.teacher, meta=True) if teacher is None else _blank(teacher)
    space = load_space(config.space, num_layers=blank.num_layers)
    budget = make_budget(
        config.budget, space, blank.views, bytes_per_element=dtype.itemsize, decode=None
    )
    # Whatever teaches the full distillation, the study's teacher does here.
    logits = dataclasses.replace(recipe, tokens=1)
    alone = DistillConfig(logits=logits, hidden=StageConfig(tokens=0))
    try:
        forecast = _forecast(
            dataclasses.replace(config, distill=alone),
            budget.random(space, random.Random(config.seed)),
            blank,
            dtype=dtype,
            gpus=1,
            peak=1.0,
            utilisation=1.0,
        )
    except Exception:
        # Somebody's mixer, or a new model, may not run without values; that is no reason not to
        # train it.
        params = _count(blank.model.parameters())
        return {
            "teacher's weights": params * dtype.itemsize,
            "student: weights, masters, gradients, moments": BYTES_A_PARAMETER * params,
            "what the backward pass needs, guessed": BYTES_A_PARAMETER * params,
        }
    return forecast.stages["3 (logits)"].memory


def _forecast(
    config: StudyConfig,
    layout: Layout,
    teacher: Teacher,
    *,
    dtype: torch.dtype,
    gpus: int,
    peak: float,
    utilisation: float,
) -> Forecast:
    """The same for a study without problems, with its teacher on the meta device."""
    space = load_space(config.space, num_layers=teacher.num_layers)
    space.check(layout)
    distill, length = config.distill, config.data.block_size
    names = [layout[i] for i in layout.replaced_layers]
    with torch.device("meta"):
        mixers = {
            i: space.candidates[layout[i]].build(teacher.views[i]) for i in layout.replaced_layers
        }
    teacher_params = _count(teacher.model.parameters())
    # Layers of one model differ in nothing that matters here.
    kinds = {layout[i]: mixer for i, mixer in mixers.items()}
    kept_by_mixer = [_saved_by_mixer(mixer, length, teacher, dtype) for mixer in kinds.values()]
    mixer_params = sum(_count(mixer.parameters()) for mixer in mixers.values())
    stock_params = teacher_params - sum(
        _count(teacher.views[i].module.parameters()) for i in mixers
    )
    work = count_work(teacher, [space.candidates[n] for n in names], length)
    student = _blank(teacher)
    install_mixers(student.model, dict(mixers), student.slots)
    trained = trainable_parameters(student.model, distill.logits.trainable)
    trained_mixers = sum(_count(mixer.parameters()) for mixer in mixers.values())
    trained_stock = _count(trained.values()) - trained_mixers
    guide, taught_in = teacher, dtype
    if distill.teacher.source:
        guide, taught_in = load_teacher(distill.teacher, meta=True), _dtype(distill.teacher)
    low = taught_in == torch.bfloat16
    computes_in = torch.bfloat16 if low else torch.float32
    whole, by_layers = _saved_by_student(student, trained, length, computes_in)

    element, width = dtype.itemsize, teacher.views[0].d_model
    held_teacher = {"teacher's weights": teacher_params * element}
    rate = gpus * peak * utilisation
    stages: dict[str, StageForecast] = {}
    share = -(-len(names) // gpus) / max(1, len(names))
    layer_values = max(_count(_layer(student, i).parameters()) for i in range(len(layout))) // width
    for stage, settings, extra in (
        ("1 (matrix)", distill.matrix, work.matrices),
        ("2 (hidden)", distill.hidden, 0.0),
    ):
        if not settings.tokens or (stage.startswith("1") and distill.start == "bank"):
            continue
        at_once = settings.batch_size * length
        # Each GPU runs the teacher over all of the text for its own layers.
        flops = settings.tokens * (gpus * work.forward + 3 * work.mixers + extra)
        stages[stage] = StageForecast(
            tokens=settings.tokens,
            steps=num_steps(settings, length),
            tokens_a_step=at_once,
            flops=flops,
            seconds=settings.tokens
            * (work.forward + share * (3 * work.mixers + extra))
            / (peak * utilisation),
            memory={
                **held_teacher,
                # Weights, gradients and two moments, in float32.
                "mixers in training": int(16 * mixer_params * share),
                "what one mixer's backward pass needs": settings.batch_size
                * max(kept_by_mixer, default=0),
                # All that a layer's projections put out.
                "the teacher's running layer": at_once * layer_values * element,
            },
            options={},
        )
    logits = distill.logits
    if logits.tokens:
        student_forward = work.forward + work.mixers - len(names) * work.attention
        teaching = count_work(guide, [], length)
        total = teaching.forward + teaching.head + 3 * (student_forward + work.head)
        frozen = stock_params - trained_stock
        # Beside a bfloat16 teacher: weights and gradients in both types, two moments in float32.
        states = trained_mixers * 16 + trained_stock * (20 if low else 16)
        if dtype != taught_in or dtype == torch.float16:
            # Else what is not trained is the teacher's own.
            states += frozen * (2 if low else 4)
        # `batch_size` counts blocks of all processes.
        blocks = -(-logits.batch_size // gpus)
        values = blocks * length * teacher.vocab_size
        head = 4 * 4 * min(HEAD_VALUES["cuda"], values)
        if values > HEAD_VALUES["cuda"] and trained_stock:
            # Added up in float32 over the pieces, a piece's own beside it.
            head += (4 + computes_in.itemsize) * teacher.vocab_size * width
        guides = _count(guide.model.parameters()) * taught_in.itemsize
        parts = bytes_of_parts(trained_mixers + trained_stock, frozen, gpus)
        gathered = 4 * trained_mixers + computes_in.itemsize * stock_params
        stages["3 (logits)"] = StageForecast(
            tokens=logits.tokens,
            steps=num_steps(logits, length) // logits.accumulate,
            tokens_a_step=logits.batch_size * logits.accumulate * length,
            flops=logits.tokens * total,
            seconds=logits.tokens * total / rate,
            memory={
                **held_teacher,
                **({} if guide is teacher else {"weights of stage 3's own teacher": guides}),
                "student: weights, masters, gradients, moments": states,
                "what the backward pass needs": blocks
                * (by_layers if logits.activation_checkpointing else whole),
                "logits a piece at a time, gradients of these and of the head": head,
            },
            options={
                **(
                    {"the backward pass with every layer checkpointed": blocks * by_layers}
                    if not logits.activation_checkpointing
                    else {}
                ),
                **(
                    {
                        f"the student sharded over {gpus} GPUs": parts,
                        "the same, layers kept from forward to backward": parts + gathered,
                        f"stage 3's teacher sharded over {gpus} GPUs": -(-guides // gpus),
                    }
                    if gpus > 1
                    else {}
                ),
            },
        )
    return Forecast(
        strip=layout.strip(space.symbols),
        teacher_params=teacher_params,
        student_params=stock_params + mixer_params,
        trained_params=_count(trained.values()),
        replaced=len(names),
        mixer_params=mixer_params,
        stages=stages,
        disk=_disk(config, mixer_params, stock_params, _count(trained.values())),
        dtype=str(dtype).removeprefix("torch."),
        gpus=gpus,
        peak=peak,
        utilisation=utilisation,
    )


def _disk(config: StudyConfig, mixers: int, stock: int, trained: int) -> dict[str, int]:
    distill, data = config.distill, config.data
    held_out = config.search.tokens + data.validation_tokens + data.test_tokens
    bank = max(config.bank.matrix.tokens, config.bank.hidden.tokens)
    text = max(distill.matrix.tokens, distill.hidden.tokens, distill.logits.tokens)
    scratch = distill.start == "scratch" and distill.matrix.tokens
    return {
        # In float32, with two moments.
        **(
            {"mixers of stages 1 and 2, unfinished": 12 * mixers}
            if distill.hidden.tokens or scratch
            else {}
        ),
        # In float32; written beside the last one, which then goes.
        "checkpoint of stage 3: weights and two moments, twice while it is written": 24 * trained,
        "best weights of stage 3": 4 * trained,
        "the student": 4 * (mixers + stock),
        "token cache": 4 * (held_out + bank + (0 if data.streaming else text)),
    }


def _blank(teacher: Teacher) -> Teacher:
    """The same model on the meta device, to be run there.

    Its windows are opened: transformers reads values to mask them, which a meta tensor has not, and
    autograd keeps as much of a layer without one.
    """
    config = copy.deepcopy(teacher.model.config)
    way = "eager" if config._attn_implementation == "eager" else "sdpa"
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * len(kinds)
    if way == "sdpa" and getattr(config, "sliding_window", None) is not None:
        config.sliding_window = None
    with torch.device("meta"):
        # By its own class, which may have come with the teacher.
        model = type(teacher.model)._from_config(config, attn_implementation=way)
    return Teacher(model, source=teacher.source)


def _dtype(config: TeacherConfig) -> torch.dtype:
    # A plan is for the machine that will run it, which seldom is this one.
    name = "bfloat16" if config.dtype == "auto" else config.dtype
    return getattr(torch, name)  # type: ignore[no-any-return]


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _layer(teacher: Teacher, number: int) -> nn.Module:
    """The decoder layer that holds a slot."""
    return teacher.model.get_submodule(teacher.slots[number].parent)  # type: ignore[no-any-return]


def _saved_by_mixer(mixer: Mixer, length: int, teacher: Teacher, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of one block in one mixer."""
    mixer.to(dtype)
    hidden = torch.zeros(1, length, teacher.views[0].d_model, dtype=dtype, device="meta")
    return sum(_saved(lambda: mixer(hidden), mixer.parameters()))


def _saved_by_student(
    student: Teacher, trained: dict[str, nn.Parameter], length: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Bytes that autograd keeps of one block: of all layers, or of inputs and the largest layer."""
    model = student.model.to(dtype)
    model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    # Attention's kernels keep no matrix of a head, but there are no kernels on the meta device.
    matrices: int | None = student.views[0].num_heads * length * length
    mask = None
    if model.config._attn_implementation == "eager":
        # It keeps them, and its own mask is made by reading values.
        matrices = None
        mask = torch.ones(1, length, dtype=torch.bool, device="meta")
    marks: list[int] = []
    saved: list[int] = []
    handles = [
        _layer(student, i).register_forward_pre_hook(lambda *_: marks.append(len(saved)))
        for i in range(student.num_layers)
    ]
    try:
        _saved(lambda: body(model, tokens, mask), model.parameters(), into=saved, matrices=matrices)
    finally:
        for handle in handles:
            handle.remove()
    layers = [
        sum(saved[start:end]) for start, end in zip(marks, [*marks[1:], len(saved)], strict=True)
    ]
    inputs = student.num_layers * length * student.views[0].d_model * dtype.itemsize
    return sum(saved), inputs + max(layers)


def _saved(
    run: Callable[[], Any],
    parameters: Iterable[nn.Parameter],
    *,
    into: list[int] | None = None,
    matrices: int | None = None,
) -> Sequence[int]:
    """Bytes of each tensor that autograd keeps of a run on the meta device, in order.

    Args:
        run: What is run.
        parameters: Not counted.
        into: Filled as it runs.
        matrices: Square matrices of so many entries in all are not counted, either.
    """
    sizes: list[int] = [] if into is None else into
    held: list[Tensor] = []
    seen = {parameter.untyped_storage()._cdata for parameter in parameters}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        left_out = tensor.numel() == matrices and tensor.shape[-1] == tensor.shape[-2]
        if storage._cdata not in seen and not left_out:
            seen.add(storage._cdata)
            sizes.append(storage.nbytes())
            # Kept, or the next storage might get its address.
            held.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sizes
