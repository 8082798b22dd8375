"""The search space: which mixers each layer may take, and which layers are pinned."""

from __future__ import annotations

import importlib.resources
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from mohawk_nas.config import SpaceConfig
from mohawk_nas.errors import ConfigError, LayoutError, RegistryError, did_you_mean
from mohawk_nas.layout import ATTENTION, Layout, assign_symbols
from mohawk_nas.mixer import MixerConfig, mixer_config

__all__ = ["SearchSpace", "check_pins", "load_candidates", "load_space", "space_names"]


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """One of the candidates for each layer, except where a layer is pinned."""

    num_layers: int
    candidates: Mapping[str, MixerConfig]
    """Name -> configuration; ``attention`` comes first."""
    pinned: Mapping[int, str]
    """Layer -> the candidate it must take."""

    @cached_property
    def symbols(self) -> dict[str, str]:
        """Candidate -> its symbol in a printed layout."""
        return assign_symbols({name: config.symbol for name, config in self.candidates.items()})

    @property
    def replacements(self) -> tuple[str, ...]:
        """Every candidate but attention."""
        return tuple(name for name in self.candidates if name != ATTENTION)

    @cached_property
    def free_layers(self) -> tuple[int, ...]:
        """Layers that are not pinned."""
        return tuple(i for i in range(self.num_layers) if i not in self.pinned)

    @cached_property
    def replaceable(self) -> tuple[tuple[int, str], ...]:
        """Every (layer, candidate besides attention) that some layout may hold."""
        return tuple(
            (i, name)
            for i in range(self.num_layers)
            for name in ((self.pinned[i],) if i in self.pinned else self.replacements)
            if name != ATTENTION
        )

    @property
    def num_pinned_attention(self) -> int:
        """Layers that are pinned to attention."""
        return sum(name == ATTENTION for name in self.pinned.values())

    def fill(self, chosen: Mapping[int, str]) -> Layout:
        """The layout with these candidates in the free layers and the pins everywhere else."""
        names = {**chosen, **self.pinned}
        return Layout(tuple(names[i] for i in range(self.num_layers)))

    def neighbours(self, layout: Layout) -> Iterator[Layout]:
        """Layouts that differ by a swap, each once; a budget may not allow all of them.

        A swap exchanges the candidates of two free layers, or gives one of them another.
        """
        free = self.free_layers
        for one, other in itertools.combinations(free, 2):
            if layout[one] != layout[other]:
                moved = layout.with_candidate(one, layout[other])
                yield moved.with_candidate(other, layout[one])
        for layer in free:
            for name in (ATTENTION, *self.replacements):
                if name != layout[layer]:
                    yield layout.with_candidate(layer, name)

    def check(self, layout: Layout) -> None:
        """Raise LayoutError unless the layout is in the space."""
        layout.check(tuple(self.candidates), num_layers=self.num_layers)
        for layer, name in sorted(self.pinned.items()):
            if layout[layer] != name:
                raise LayoutError(
                    f"layer {layer}: is pinned to {name!r} by space.pinned, but the layout has "
                    f"{layout[layer]!r} there"
                )

    def parse(self, text: str) -> Layout:
        """Read a layout as the user types it: ``"4,10,16,22"`` or a strip.

        In the comma form, layers that are pinned to a replacement take that replacement.

        Raises:
            LayoutError: The text is no layout of this space.
        """
        layout = Layout.parse(text, num_layers=self.num_layers, symbols=self.symbols)
        if not text.strip()[:1].isalpha():
            for layer, name in self.pinned.items():
                if layout[layer] != ATTENTION and name != ATTENTION:
                    layout = layout.with_candidate(layer, name)
        self.check(layout)
        return layout


def space_names() -> list[str]:
    """Search spaces that come with the package."""
    folder = importlib.resources.files("mohawk_nas.search_spaces")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith("yaml"))


def load_space(config: SpaceConfig, *, num_layers: int) -> SearchSpace:
    """The space that a study describes, for a teacher of ``num_layers`` layers.

    Raises:
        ConfigError: Every problem of the space.
    """
    merged = _merge(config)
    problems: list[str] = []
    candidates: Mapping[str, MixerConfig] = {}
    try:
        candidates = load_candidates(merged)
    except ConfigError as e:
        problems += e.problems
    problems += check_pins(merged, num_layers=num_layers)
    if problems:
        raise ConfigError(problems)
    return SearchSpace(num_layers=num_layers, candidates=candidates, pinned=dict(merged.pinned))


def load_candidates(config: SpaceConfig) -> dict[str, MixerConfig]:
    """The space's candidates, attention first; this much can be checked without a teacher.

    Raises:
        ConfigError: The named space cannot be read, or a candidate is wrong; all problems at once.
    """
    config = _merge(config)
    problems: list[str] = []
    candidates = {ATTENTION: mixer_config({"mixer": ATTENTION})}
    for name, choices in config.candidates.items():
        where = f"space.candidates.{name}"
        if name == ATTENTION:
            problems.append(
                f"{where}: is always there; remove it, or call this candidate otherwise"
            )
            continue
        try:
            candidate = mixer_config(choices, where=where)
        except ConfigError as e:
            problems += e.problems
        except RegistryError as e:
            problems.append(f"{where}.mixer: {e}")
        else:
            if candidate.keeps_attention:
                problems.append(
                    f"{where}: mixer {choices['mixer']!r} keeps attention, which every space has "
                    f"under the name {ATTENTION!r}; remove this candidate"
                )
            symbol = getattr(candidate, "symbol", None)
            if not (isinstance(symbol, str) and len(symbol) == 1 and symbol.isupper()):
                problems.append(
                    f"{where}: symbol of {type(candidate).__name__} must be one upper-case letter, "
                    f"for printed layouts, but is {symbol!r}"
                )
            candidates[name] = candidate
    if not config.candidates:
        problems.append(
            "space.candidates: must name at least one mixer besides attention; for example "
            "space.candidates.mamba2.mixer=mamba2, or space.name: hybrid_phi_mamba"
        )
    if problems:
        raise ConfigError(problems)
    return candidates


def check_pins(config: SpaceConfig, *, num_layers: int | None = None) -> list[str]:
    """Problems of the pinned layers; without ``num_layers`` only what is wrong for any teacher."""
    config = _merge(config)
    known = [ATTENTION, *config.candidates]
    problems = []
    for layer, name in config.pinned.items():
        if layer < 0 or (num_layers is not None and layer >= num_layers):
            limit = "at least 0" if num_layers is None else f"within 0 and {num_layers - 1}"
            problems.append(
                f"space.pinned.{layer}: layers are counted from 0, so this must be {limit}, "
                f"but got {layer}"
            )
        if name not in known:
            problems.append(
                f"space.pinned.{layer}: unknown candidate {name!r}; available: "
                f"{', '.join(known)}.{did_you_mean(name, known)}"
            )
    return problems


def _merge(config: SpaceConfig) -> SpaceConfig:
    # The named space first; what the study says itself is added to it or takes its place.
    if config.name is None:
        return config
    named = _read(config.name)
    return SpaceConfig(
        candidates={**named.candidates, **config.candidates},
        pinned={**named.pinned, **config.pinned},
    )


def _read(name: str) -> SpaceConfig:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"space.name: must be a YAML file, but there is no {path}")
        source: Any = path
    elif name in space_names():
        source = importlib.resources.files("mohawk_nas.search_spaces") / f"{name}.yaml"
    else:
        known = space_names()
        raise ConfigError(
            f"space.name: unknown search space {name!r}; available: {', '.join(known)}, or the "
            f"path of a YAML file.{did_you_mean(name, known)}"
        )
    try:
        raw = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"space.name: {name} cannot be read: {' '.join(str(e).split())}") from e
    return _checked(raw, where=f"space.name: {name}")


def _checked(raw: object, *, where: str) -> SpaceConfig:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{where} must hold a mapping with `candidates`")
    known = [f.name for f in fields(SpaceConfig) if f.name != "name"]
    problems = [
        f"{where}: unknown key {key!r}; known: {', '.join(known)}.{did_you_mean(str(key), known)}"
        for key in raw
        if key not in known
    ]
    candidates, pinned = raw.get("candidates") or {}, raw.get("pinned") or {}
    if not isinstance(candidates, Mapping):
        problems.append(f"{where}: candidates must map names to mixers, but got {candidates!r}")
    if not isinstance(pinned, Mapping) or not all(isinstance(layer, int) for layer in pinned):
        problems.append(f"{where}: pinned must map layer numbers to names, but got {pinned!r}")
    if problems:
        raise ConfigError(problems)
    return SpaceConfig(
        candidates={str(key): value for key, value in candidates.items()},
        pinned={layer: str(value) for layer, value in pinned.items()},
    )
