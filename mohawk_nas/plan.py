"""What a study will do, and what is wrong with it, before anything is run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from mohawk_nas.config import StudyConfig
from mohawk_nas.data import find_parts
from mohawk_nas.distill.trainer import num_steps
from mohawk_nas.errors import ConfigError, InputError, LayoutError, MixerError, TeacherError
from mohawk_nas.mixer import Mixer, MixerConfig
from mohawk_nas.mixer_check import check_mixer, tried
from mohawk_nas.registry import load_plugin
from mohawk_nas.reporting.board import missing_package
from mohawk_nas.search.budget import Budget, make_budget
from mohawk_nas.search.space import SearchSpace, check_pins, load_candidates, load_space
from mohawk_nas.search.study import SearchPlan, check_needs, check_search, plan_search
from mohawk_nas.teacher import (
    Teacher,
    check_tokenizer,
    check_vocabularies,
    check_weights,
    load_teacher,
    load_tokenizer,
    pick_device,
    teacher_dtype,
)

__all__ = ["Plan", "Work", "check_searchable", "count_work", "find_problems", "make_plan"]


def find_problems(config: StudyConfig) -> list[str]:
    """Every problem of a study that can be told without loading weights or reading text."""
    problems: list[str] = []
    for plugin in config.plugins:
        _collect(problems, lambda path=plugin: load_plugin(Path(path)))
    before = len(problems)
    _collect(problems, lambda: load_candidates(config.space))
    problems += check_pins(config.space)
    space_ok = len(problems) == before
    device, device_ok = torch.device("cpu"), True
    try:
        device = pick_device(config.teacher.device)
    except TeacherError as e:
        problems.append(str(e))
        device_ok = False
    _collect(problems, lambda: find_parts(config.data))
    problems += _misplaced_folders(config)
    problems += check_needs(config)
    if config.teacher.architecture is None:
        _collect(problems, lambda: check_weights(config.teacher))
    try:
        teacher = load_teacher(config.teacher, meta=True)
    except TeacherError as e:
        if str(e) not in problems:
            problems.append(str(e))
        return problems + check_search(config.search)
    if (kind := teacher.model.config.model_type) not in CONFIG_MAPPING:
        problems.append(
            f"teacher.source: {config.teacher.source} is of type {kind!r}, which transformers "
            "itself does not have, so a student of it could not be saved; name a teacher of a type "
            "that it has"
        )
    if Path(config.teacher.tokenizer or config.teacher.source).is_dir():
        # One of the hub is asked for when the weights are.
        _collect(problems, lambda: check_tokenizer(load_tokenizer(config.teacher), teacher))
    problems += _guide_problems(config, teacher)
    if config.data.block_size > teacher.context:
        problems.append(
            f"data.block_size: must be at most {teacher.context}, the teacher's context, "
            f"but got {config.data.block_size}"
        )
    if not space_ok:
        return problems + check_search(config.search)
    space: list[SearchSpace] = []
    _collect(
        problems, lambda: space.append(load_space(config.space, num_layers=teacher.num_layers))
    )
    if not space:
        return problems + check_search(config.search)
    # On another device than the study's it may not run.
    dtype = teacher_dtype(config.teacher, device) if device_ok else None
    wrong = _wrong_mixers(config, teacher, space[0], device=device, dtype=dtype)
    problems += wrong
    misfits = _misfits(config, teacher, space[0]) if not wrong else []
    if config.layout is not None:
        try:
            space[0].parse(config.layout)
        except LayoutError as e:
            problems.append(f"layout: {e}")
        return problems + misfits
    budget = None
    # A mixer that is wrong need not know what it costs.
    if not wrong:
        try:
            budget = _known_budget(config, teacher, space[0], device)
        except InputError as e:
            misfits += [str(e)] if str(e) not in misfits else []
    problems += check_search(config.search, space=space[0], budget=budget)
    return problems + misfits


def _guide_problems(config: StudyConfig, teacher: Teacher) -> list[str]:
    """What is wrong with stage 3's own teacher and its curves, as far as it can be told."""
    problems: list[str] = []
    if config.distill.tensorboard and (problem := missing_package()):
        problems.append(problem)
    if config.distill.teacher.source:
        try:
            if config.distill.teacher.architecture is None:
                check_weights(config.distill.teacher)
            guide = load_teacher(config.distill.teacher, meta=True)
        except TeacherError as e:
            return [*problems, str(e).replace("teacher.", "distill.teacher.", 1)]
        _collect(problems, lambda: check_vocabularies(guide, teacher))
        if config.data.block_size > guide.context:
            problems.append(
                f"data.block_size: must be at most {guide.context}, the context of "
                f"distill.teacher, but got {config.data.block_size}"
            )
    return problems


def check_searchable(config: StudyConfig) -> None:
    """Raise ConfigError if the study leaves nothing to search."""
    if config.layout is not None:
        raise ConfigError(
            f"layout: is given ({config.layout or 'no attention layers'}), so there is nothing to "
            "search; distil it, or search with layout=null and another name"
        )


def _known_budget(
    config: StudyConfig, teacher: Teacher, space: SearchSpace, device: torch.device
) -> Budget:
    """The budget as far as it can be told without measuring."""
    return make_budget(
        config.budget,
        space,
        teacher.views,
        bytes_per_element=teacher_dtype(config.teacher, device).itemsize,
        decode=None,
    )


def _collect(problems: list[str], attempt: Any) -> None:
    try:
        attempt()
    except ConfigError as e:
        problems += e.problems
    except InputError as e:
        problems.append(str(e))


def _misplaced_folders(config: StudyConfig) -> list[str]:
    problems = []
    for name, folder in (
        ("output", config.output),
        ("bank.path", config.bank.path),
        ("data.cache", config.data.cache),
    ):
        there = Path(folder)
        while not there.exists() and there != there.parent:
            there = there.parent
        if not there.is_dir():
            problems.append(
                f"{name}: must be a folder, there or to be made, but {there} is a file; name "
                "another"
            )
    return problems


def _wrong_mixers(
    config: StudyConfig,
    teacher: Teacher,
    space: SearchSpace,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
) -> list[str]:
    """What is wrong with mixers of the user's own."""
    problems = []
    for name in space.replacements:
        try:
            check_mixer(
                space.candidates[name],
                teacher.views[0],
                factors=_needs_factors(config),
                device=device,
                dtype=dtype,
            )
        except MixerError as e:
            problems.append(f"space.candidates.{name}: {e}")
    return problems


def _misfits(config: StudyConfig, teacher: Teacher, space: SearchSpace) -> list[str]:
    """Mixers that do not fit the teacher, or the stages."""
    problems: list[str] = []
    for name in space.replacements:

        def build(name: str = name) -> None:
            mixer = _on_meta(space, teacher, name)
            if _needs_factors(config) and type(mixer).factors is Mixer.factors:
                raise ConfigError(
                    f"space.candidates.{name}: {type(mixer).__name__} offers no matrix factors, so "
                    f"stage 1 cannot train it; set {_stage(config)}.matrix.tokens to 0"
                )

        _collect(problems, build)
    return problems


def _stage(config: StudyConfig) -> str:
    # A layout of one's own may do without the bank.
    return "bank" if config.distill.start == "bank" else "distill"


def _needs_factors(config: StudyConfig) -> bool:
    tokens: int = getattr(config, _stage(config)).matrix.tokens
    return tokens > 0


def _on_meta(space: SearchSpace, teacher: Teacher, name: str) -> Mixer:
    config, view = space.candidates[name], teacher.views[0]
    with torch.device("meta"):
        mixer = config.build(view)
        if config.init == "attention":
            try:
                tried(config, "init_from_attention", lambda: mixer.init_from_attention(view))
            except MixerError as e:
                raise ConfigError(f"space.candidates.{name}.init: {e}") from e
    return mixer


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Floating-point operations a token, two a multiply-add."""

    forward: float
    """The teacher's body."""
    head: float
    """Its logits."""
    attention: float
    """One layer's attention, of what ``forward`` counts: projections and both products."""
    mixers: float
    """All the mixers, forwards."""
    matrices: float
    """Stage 1's matrices of all the mixers, with their gradients."""


def count_work(teacher: Teacher, mixers: Sequence[MixerConfig], length: int) -> Work:
    """Count operations of a teacher, which may stand on the meta device, and of mixers for it.

    Args:
        teacher: The teacher.
        mixers: One for each that is trained.
        length: Tokens a block.
    """
    view, vocab = teacher.views[0], teacher.vocab_size
    heads = view.num_heads * view.head_dim
    body_params = sum(p.numel() for p in teacher.model.parameters()) - sum(
        p.numel() for p in teacher.model.get_input_embeddings().parameters()
    )
    if not teacher.model.config.tie_word_embeddings:
        body_params -= vocab * view.d_model
    # The two products of attention over half a block.
    products = 2 * length * heads
    return Work(
        # Two operations a parameter and token.
        forward=2 * body_params + products * teacher.num_layers,
        head=2 * vocab * view.d_model,
        attention=2 * sum(p.numel() for p in view.module.parameters()) + products,
        mixers=sum(mixer.flops_per_token(view, length) for mixer in mixers),
        # Stage 1 makes both matrices in the forward pass, again in the backward, and two gradients.
        matrices=len(mixers) * 4 * 2 * length * heads,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a search and the distillation after it will do, and the least it can cost."""

    teacher_params: int
    num_layers: int
    candidate_params: dict[str, int]
    """Replacement -> parameters in one layer."""
    num_entries: int
    """Bank entries to train, fewer if some are there already."""
    bank_tokens: dict[str, int]
    """Stage -> tokens."""
    bank_steps: dict[str, int]
    search: SearchPlan
    score_tokens: int
    """Tokens a layout is scored on."""
    distill_tokens: dict[str, int]
    memory_bytes: dict[str, int]
    """Part -> bytes at the same time while the bank is trained."""
    disk_bytes: int
    """Finished bank; while it is trained, four times as much at most."""
    flops: dict[str, float]
    """Phase -> floating-point operations, counted."""
    flops_per_second: float
    """Of a matrix product in the teacher's type, measured on this machine just now."""
    device: str

    @property
    def seconds(self) -> dict[str, float]:
        """Phase -> seconds below which it cannot be done here; real runs take a few times that."""
        return {name: flops / self.flops_per_second for name, flops in self.flops.items()}


def make_plan(config: StudyConfig) -> Plan:
    """Plan a study on the meta device: no weights are loaded and no text is read.

    Raises:
        ConfigError: Every problem of the study.
    """
    check_searchable(config)
    if problems := find_problems(config):
        raise ConfigError(problems)
    teacher = load_teacher(config.teacher, meta=True)
    space = load_space(config.space, num_layers=teacher.num_layers)
    device = pick_device(config.teacher.device)
    budget = _known_budget(config, teacher, space, device)
    plan = plan_search(config.search, space, budget)
    view, length = teacher.views[0], config.data.block_size
    params = {name: space.candidates[name].num_params(view) for name in space.replacements}
    entries = [name for _, name in space.replaceable]
    dtype = teacher_dtype(config.teacher, device)
    element = dtype.itemsize

    width = view.d_model
    model_params = sum(p.numel() for p in teacher.model.parameters())
    work = count_work(teacher, [space.candidates[name] for name in entries], length)
    forward, head, mixers, matrices = work.forward, work.head, work.mixers, work.matrices
    bank = config.bank
    flops = {
        "bank, stage 1": bank.matrix.tokens * (forward + 3 * mixers + matrices),
        "bank, stage 2": bank.hidden.tokens * (forward + 3 * mixers),
        "search": (plan.trials + sum(plan.probes.values()))
        * config.search.tokens
        * (forward + head),
        # The teacher, the student with both branches, and its backward pass without weights.
        "search, learning": sum(plan.learning.values())
        * (3 * (forward + head) + 2 * mixers / len(space.replacements)),
    }
    distill, logits = config.distill, config.distill.logits
    # The student's passes alone: several share the teacher's.
    flops["rungs"] = 3 * (forward + head) * sum(n * count for n, count in plan.rungs.items())
    entry_params = sum(params[name] for name in entries)
    batch_tokens = max(bank.hidden.batch_size, bank.matrix.batch_size) * length
    return Plan(
        teacher_params=model_params,
        num_layers=teacher.num_layers,
        candidate_params=params,
        num_entries=len(entries),
        bank_tokens={"matrix": bank.matrix.tokens, "hidden": bank.hidden.tokens},
        bank_steps={
            "matrix": num_steps(bank.matrix, length),
            "hidden": num_steps(bank.hidden, length),
        },
        search=plan,
        score_tokens=config.search.tokens,
        distill_tokens={
            **({"matrix": distill.matrix.tokens} if distill.start == "scratch" else {}),
            "hidden": distill.hidden.tokens,
            "logits": logits.tokens,
        },
        memory_bytes={
            "teacher": model_params * element,
            # Weights, gradients and the optimizer's two moments, in float32.
            "candidates in training": entry_params * 16,
            "one batch's hidden states": batch_tokens * width * element * 8,
            "teacher's results on the search split": config.search.tokens * width * element,
        },
        disk_bytes=entry_params * 4,
        flops={name: value for name, value in flops.items() if value},
        flops_per_second=_measure_rate(device, dtype),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    )


def _measure_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product, the best of a few."""
    size = 4096 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(4):
        began = time.perf_counter()
        product = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
        del product
    return best
