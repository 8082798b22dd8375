"""What a decode step takes on this machine: of each kind of layer, of the rest, of a whole student.

A layer's mixer is measured where it will stand: in the model, with its weights, caches and launches
beside those of its neighbours. First the model runs with nothing in its attention slots, then with
one candidate in all layers of one shape that may hold it; the difference, divided by the number of
these layers, is what one of them takes. The sum over a student's layers is a model of its time, and
:func:`measure_step` says how good a model.

Everything runs as a user's decoding would: in the teacher's type, with transformers' growing cache,
without padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mohawk_nas.bench.timing import Effort, release, stopwatch, time_calls
from mohawk_nas.errors import RunError, TrainingError
from mohawk_nas.files import DamagedFile, read_json, write_json
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.mixer import AttentionView, Mixer, MixerState, build_mixer
from mohawk_nas.precision import run_mixer
from mohawk_nas.search.budget import DecodeTimes
from mohawk_nas.search.space import SearchSpace
from mohawk_nas.search.storages import opened
from mohawk_nas.student import MixerSlot, MixerSource, Padding, assemble
from mohawk_nas.teacher import Slot, Teacher, cache_name

__all__ = [
    "Step",
    "UntrainedMixers",
    "agreed_times",
    "fill_cache",
    "measure_layers",
    "measure_step",
    "read_times",
    "write_times",
]

EFFORT = Effort(groups=10, group_seconds=0.2, max_seconds=20.0)
"""Of each figure."""
PREFILL = 512
"""Tokens that fill a mixer's state at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One more token for each of ``batch`` sequences after ``context`` tokens."""

    context: int
    batch: int


def measure_layers(teacher: Teacher, space: SearchSpace, step: Step) -> DecodeTimes:
    """Measure every candidate in every kind of layer, and the rest of the model.

    The mixers need no training for it: what they compute does not change how long it takes.

    Args:
        teacher: The teacher, with its weights.
        space: What is measured.
        step: What is timed.

    Raises:
        TrainingError: It does not fit into memory.
    """
    slots, every = teacher.slots, range(teacher.num_layers)
    untrained = UntrainedMixers(teacher, space)
    layout = Layout.keeping(every, num_layers=len(every), replacement=ATTENTION)
    model = assemble(teacher, layout, untrained)
    attention = [slot.get(model) for slot in slots]
    padding = Padding()

    def seconds(standing: Mapping[int, nn.Module]) -> float:
        for i, slot in enumerate(slots):
            slot.put(model, standing[i] if i in standing else _Nothing())
        return _time_step(model, slots, step, shared=True)

    rest = seconds({})
    costs: dict[tuple[int, str], int] = {}
    for name in space.candidates:
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for i, view in enumerate(teacher.views):
            if space.pinned.get(i, name) == name:
                kinds.setdefault(_shape(view), []).append(i)
        for layers in kinds.values():
            standing = {
                i: attention[i]
                if name == ATTENTION
                else MixerSlot(untrained.mixer(i, name), layer_idx=i, padding=padding)
                for i in layers
            }
            # What takes less than the clock can tell apart takes nothing.
            each = max(0.0, seconds(standing) - rest) / len(layers)
            costs |= {(i, name): round(each * 1e9) for i in layers}
    return DecodeTimes(layers=costs, rest=round(rest * 1e9))


def measure_step(teacher: Teacher, layout: Layout, bank: MixerSource, step: Step) -> float:
    """Seconds of a decode step of an assembled student.

    Args:
        teacher: The teacher.
        layout: Which student.
        bank: Where its mixers come from.
        step: What is timed.

    Raises:
        TrainingError: It does not fit into memory.
    """
    student = assemble(teacher, layout, _InType(bank, teacher.model.dtype))
    return _time_step(student, teacher.slots, step, shared=False)


def write_times(path: Path, asked: Mapping[str, Any], times: DecodeTimes) -> None:
    """Keep what was measured.

    Args:
        path: JSON file.
        asked: What it was measured for.
        times: What was found.
    """
    write_json(path, {"measured for": dict(asked), **_plain(times)})


def read_times(path: Path, asked: Mapping[str, Any]) -> DecodeTimes | None:
    """What :func:`write_times` kept; None if it was measured for something else.

    Raises:
        RunError: The file is damaged.
    """
    try:
        kept = read_json(path)
        return _times(kept) if kept["measured for"] == asked else None
    except (DamagedFile, KeyError, TypeError, ValueError) as e:
        raise RunError(
            f"{path}: must hold the decode times that the study was begun with, but is damaged "
            f"({type(e).__name__}); use --force to set the run aside and start anew"
        ) from e


def agreed_times(
    url: str, study: str, asked: Mapping[str, Any], measure: Callable[[], DecodeTimes]
) -> DecodeTimes:
    """Times that are the same for all hosts of a study: those that were stored first.

    They stand in a study of their own called ``NAME.decode``, each measurement as a trial; trials
    are numbered in one order for all.

    Args:
        url: The study's storage.
        study: Its name.
        asked: What is measured.
        measure: Called if nobody has.

    Raises:
        TrainingError: The storage cannot be used, or as ``measure``.
    """

    def stored() -> DecodeTimes | None:
        with opened(url, lock=True) as storage:
            kept = optuna.create_study(
                study_name=f"{study}.decode", storage=storage, load_if_exists=True
            )
            for trial in sorted(kept.get_trials(deepcopy=False), key=lambda trial: trial.number):
                if trial.user_attrs.get("measured for") == dict(asked):
                    return _times(trial.user_attrs)
        return None

    if (found := stored()) is None:
        attrs = {"measured for": dict(asked), **_plain(measure())}
        with opened(url, lock=True) as storage:
            kept = optuna.load_study(study_name=f"{study}.decode", storage=storage)
            kept.add_trial(optuna.trial.create_trial(value=0.0, user_attrs=attrs))
        found = stored()
    assert found is not None
    return found


def _plain(times: DecodeTimes) -> dict[str, Any]:
    layers = [
        {"layer": layer, "candidate": name, "nanoseconds": cost}
        for (layer, name), cost in sorted(times.layers.items())
    ]
    return {"rest": times.rest, "layers": layers}


def _times(plain: Mapping[str, Any]) -> DecodeTimes:
    layers = {(e["layer"], e["candidate"]): int(e["nanoseconds"]) for e in plain["layers"]}
    return DecodeTimes(layers=layers, rest=int(plain["rest"]))


@torch.no_grad()
def fill_cache(model: Any, slots: Sequence[Slot], step: Step, *, shared: bool) -> Any:
    """A transformers cache as ``step.context`` tokens of every sequence would leave it.

    Keys and values are random numbers; states are those of one random sequence, repeated.

    Args:
        model: A student; its mixers stand in ``MixerSlot``.
        slots: Where they stand.
        step: How much is in it.
        shared: Whether layers of one shape hold the same keys and values, which saves memory.
    """
    device, dtype = model.device, model.dtype
    generator = torch.Generator(device).manual_seed(0)
    cache = DynamicCache(config=model.config)
    known: dict[tuple[Any, ...], Any] = {}
    for i, slot in enumerate(slots):
        module, view = slot.get(model), slot.view
        if isinstance(module, MixerSlot):
            state = cache.layers[i] = module.mixer.new_state()
            for begin in range(0, step.context, PREFILL):
                length = min(PREFILL, step.context - begin)
                hidden = torch.randn(
                    (1, length, view.d_model), generator=generator, device=device, dtype=dtype
                )
                run_mixer(module.mixer, hidden, cache=state)
            state.batch_repeat_interleave(step.batch)
        elif isinstance(module, _Nothing):
            cache.layers[i] = MixerState()
            cache.layers[i].num_tokens = step.context
        elif shared and _shape(view) in known:
            cache.layers[i] = copy.copy(known[_shape(view)])
        else:
            size = step.batch, view.num_kv_heads, step.context, view.head_dim
            keys = torch.randn(size, generator=generator, device=device, dtype=dtype)
            cache.layers[i].update(keys, keys)
            known[_shape(view)] = cache.layers[i]
    return cache


@torch.no_grad()
def _time_step(model: Any, slots: Sequence[Slot], step: Step, *, shared: bool) -> float:
    """Seconds, the median."""
    handles = []
    try:
        cache = fill_cache(model, slots, step, shared=shared)
        for slot, layer in zip(slots, cache.layers, strict=True):
            handles.append(slot.get(model).register_forward_hook(_Restore(layer)))
        tokens = torch.zeros((step.batch, 1), dtype=torch.long, device=model.device)
        inputs = {"input_ids": tokens, cache_name(model): cache}
        timing = time_calls(
            lambda _: model(**inputs, use_cache=True),
            stopwatch=stopwatch(model.device),
            effort=EFFORT,
        )
    except torch.OutOfMemoryError as e:
        raise TrainingError(
            f"budget.decode: a step at context {step.context:,} and batch {step.batch} must fit "
            "into memory to be measured, but does not; lower one of the two"
        ) from e
    finally:
        for handle in handles:
            handle.remove()
        release(model.device)
    return timing.median


class _Restore:
    """Forward hook that takes a layer's cache back to what it was before the step.

    At once, as keys and values of all layers would otherwise stand in memory twice.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        self._before = _copied(vars(layer))

    def __call__(self, *_: object) -> None:
        vars(self._layer).update(_copied(self._before))


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    # Tensors are replaced by a step, or overwritten with others of the same size; a mapping of them
    # is changed.
    return {name: dict(v) if isinstance(v, dict) else v for name, v in values.items()}


class _Nothing(nn.Module):
    """Stands in an attention slot and takes no time."""

    def __init__(self) -> None:
        super().__init__()
        self._zeros: Tensor | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if self._zeros is None:
            self._zeros = torch.zeros_like(hidden_states)
        return self._zeros, None


@dataclass(frozen=True, slots=True)
class UntrainedMixers:
    """A space's mixers as they are built, in the teacher's type: as fast as trained ones."""

    teacher: Teacher
    space: SearchSpace

    def mixer(self, layer: int, candidate: str) -> Mixer:
        """A new one, initialised at random."""
        with torch.random.fork_rng(devices=[]):
            mixer = build_mixer(self.space.candidates[candidate], self.teacher.views[layer])
        return mixer.to(self.teacher.device, self.teacher.model.dtype).eval()


@dataclass(frozen=True, slots=True)
class _InType:
    bank: MixerSource
    dtype: torch.dtype

    def mixer(self, layer: int, candidate: str) -> Mixer:
        return copy.deepcopy(self.bank.mixer(layer, candidate)).to(self.dtype)


def _shape(view: AttentionView) -> tuple[Any, ...]:
    heads = view.num_heads, view.num_kv_heads, view.head_dim
    return type(view.module), view.d_model, *heads, view.sliding_window
