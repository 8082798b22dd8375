"""The contract between a study and whatever chooses its layouts.

A strategy proposes one layout at a time, knowing what has been scored so far. A selector is a
strategy that names all its layouts at once, from rules or from probes; every selector can also be
entered as a baseline of a study. Both are frozen dataclasses whose fields are the options that a
study may give them, ``{name: beam, width: 8}``. They are registered under the stem of their file in
``strategies/``; a third party's takes part through an entry point or the study's ``plugins``.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

from mohawk_nas.config import StudyConfig, read_options
from mohawk_nas.errors import ConfigError, RunError, did_you_mean
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.registry import Registry
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.scoring import Score
from mohawk_nas.search.space import SearchSpace

__all__ = [
    "SHORT_NAMES",
    "STRATEGIES",
    "Proposal",
    "SearchContext",
    "Selector",
    "Strategy",
    "at_least",
    "build_strategy",
    "local_replacement",
    "named_baselines",
    "random_unseen",
    "solve_local",
    "strategy_names",
]


K = TypeVar("K")


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """A layout to score next."""

    layout: Layout
    proposed_by: str
    """Strategy's name; where it has several ways to choose, ``name:way``."""


def _no_teacher(*_: Any, **__: Any) -> Any:
    raise RunError(
        "search.strategy, search.baselines: what is learnt or read of the bank's mixers needs the "
        "teacher and the bank, but here are scores alone; leave gates and stage1_rank out"
    )


@dataclass(frozen=True, kw_only=True)
class SearchContext:
    """What a strategy may know and do."""

    space: SearchSpace
    budget: Budget
    weights: Mapping[str, float]
    """Objective -> weight, for the value of a score."""
    finished: Sequence[tuple[Layout, float]]
    """Scored layouts and their values, in the order in which they were scored."""
    pending: Sequence[Layout]
    """Layouts that are being scored by others at this moment."""
    seed: int
    """Follows from the study's seed and the number of finished trials, so that a resumed study
    proposes what an unbroken one would have."""
    probe: Callable[[Layout], Score]
    """Scores any layout of the space, also one that is off the budget. Nothing is scored twice;
    what had to be scored is kept apart from the trials and charged to the strategy."""
    stage2_losses: Callable[[], Mapping[tuple[int, str], float]]
    """(layer, candidate) -> relative stage-2 distance on the search split."""
    figures: Sequence[tuple[float, ...]] = ()
    """Of each finished layout the figures that ``search.pareto`` names; lower is better. Empty in a
    study of one objective."""
    prepare: Callable[[Sequence[Layout]], None] = lambda layouts: None
    """Says which layouts will be probed next, whatever they score, so that several workers can
    share them. Probes may come without it; they are then scored one after the other."""
    stage1_losses: Callable[[], Mapping[tuple[int, str], float]] = _no_teacher
    """(layer, candidate) -> stage-1 loss with which the bank's training left it."""
    learn_gates: Callable[..., Sequence[Mapping[int, float]]] = _no_teacher
    """Learns on the bank split, by gradient, what each free layer's attention is worth; takes
    ``restarts`` and what ``Workbench.learn_gates`` takes besides the seed, and gives free layer ->
    worth for each restart. What was learnt is kept with the study, so nothing is learnt twice, and
    is charged to the strategy."""

    @cached_property
    def seen(self) -> frozenset[Layout]:
        """Layouts that must not be proposed again."""
        return frozenset([*(layout for layout, _ in self.finished), *self.pending])

    @property
    def num_kept(self) -> int:
        """Free layers that keep attention in a layout on the budget, at most."""
        return self.budget.num_free(self.space)

    def value(self, layout: Layout) -> float:
        """The study's objective for any layout, by a probe."""
        return self.probe(layout).value(self.weights)

    def values(self, layouts: Mapping[K, Layout]) -> dict[K, float]:
        """The same for several layouts at once, which several workers share."""
        self.prepare(list(layouts.values()))
        return {key: self.value(layout) for key, layout in layouts.items()}

    def keeping(self, layers: Iterable[int]) -> Layout:
        """Attention in these free layers, the replacement that suits a layer best in the others.

        With several candidates that is the one with the smallest relative stage-2 loss there.
        """
        kept = set(layers)
        return self.space.fill(
            {
                layer: ATTENTION if layer in kept else self._replacement(layer)
                for layer in self.space.free_layers
            }
        )

    def keep_top(self, worth: Mapping[int, float]) -> Layout:
        """Keep the free layers that are worth most, the lower layer where two are equal.

        Layer by layer, attention stays where the budget can still be met with it.
        """
        ranked = sorted(self.space.free_layers, key=lambda layer: (-worth[layer], layer))
        found = self.budget.grant(
            self.space, {layer: (ATTENTION, *self._replacements(layer)) for layer in ranked}
        )
        assert found is not None, "a study whose budget is impossible has not begun"
        return found

    def on_budget(self, layers: Iterable[int]) -> Layout | None:
        """As :meth:`keeping`, with less suited replacements where the budget needs them.

        None if there is no such layout on the budget.
        """
        kept = set(layers)
        return self.budget.grant(
            self.space,
            {
                layer: (ATTENTION,) if layer in kept else self._replacements(layer)
                for layer in self.space.free_layers
            },
        )

    def may_keep(self, layers: Iterable[int], *, others: bool) -> bool:
        """Whether some layout on the budget keeps attention in these free layers.

        Args:
            layers: If ``others``, all of them and perhaps more, else some of them at most.
            others: Which of the two is asked.
        """
        named, names = set(layers), self.space.replacements
        either = (ATTENTION, *names)
        found = self.budget.grant(
            self.space,
            {
                layer: ((ATTENTION,) if others else either)
                if layer in named
                else (either if others else names)
                for layer in self.space.free_layers
            },
        )
        return found is not None

    def _replacement(self, layer: int) -> str:
        return self._replacements(layer)[0]

    def _replacements(self, layer: int) -> tuple[str, ...]:
        """The most suited one first."""
        names = self.space.replacements
        if len(names) == 1:
            return names
        losses = self.stage2_losses()
        return tuple(sorted(names, key=lambda name: losses[layer, name]))


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """Chooses layouts, one after the other. Keeps nothing between two calls.

    Subclasses that have options are frozen keyword-only dataclasses and give each a default;
    ``__post_init__`` raises ValueError for values that cannot be.
    """

    @property
    def label(self) -> str:
        """Name and the options that are not as they come, ``beam(width=8)``, in every record."""
        name, chosen = STRATEGIES.name_of(type(self)), self._chosen()
        for short, meant in SHORT_NAMES.items():
            fixed = {option: value for option, value in meant.items() if option != "name"}
            if meant["name"] == name and fixed.items() <= vars(self).items():
                name = short
                chosen = {option: value for option, value in chosen.items() if option not in fixed}
        told = ", ".join(f"{option}={value}" for option, value in chosen.items())
        return f"{name}({told})" if told else name

    def _chosen(self) -> dict[str, Any]:
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def problems(self, config: StudyConfig) -> list[str]:
        """What this strategy needs and the study lacks: a setting, what it must be, what to do."""
        return []

    @abstractmethod
    def propose(self, context: SearchContext) -> Proposal | None:
        """The next layout, on the budget and not seen before; None when there is no other."""


class Selector(Strategy):
    """Names its layouts up front. As the study's strategy it proposes them one by one."""

    @abstractmethod
    def layouts(self, context: SearchContext) -> list[tuple[str, Layout]]:
        """Labelled layouts on the budget; a label is unique and starts with the selector's own.

        Called again when a study resumes, and then its probes cost nothing. It must not look at
        the finished trials.
        """

    def num_probes(self, space: SearchSpace, budget: Budget) -> int:
        """Layouts that :meth:`layouts` will look at by probes, at most; for planning."""
        return 0

    def num_tokens(self, space: SearchSpace, budget: Budget) -> int:
        """Tokens that :meth:`layouts` will learn from; for planning."""
        return 0

    def propose(self, context: SearchContext) -> Proposal | None:
        for label, layout in self.layouts(context):
            if layout not in context.seen:
                return Proposal(layout=layout, proposed_by=label)
        return None


SHORT_NAMES: Mapping[str, Mapping[str, Any]] = {
    "first": {"name": "block", "at": "first"},
    "middle": {"name": "block", "at": "middle"},
    "last": {"name": "block", "at": "last"},
    "stage1_rank": {"name": "ranking", "score": "stage1"},
    "stage2_rank": {"name": "ranking", "score": "stage2"},
    "swap_one": {"name": "ranking", "score": "swap_one"},
    "add_one_in": {"name": "ranking", "score": "add_one_in"},
    "recall_drop": {"name": "ranking", "score": "recall_drop"},
    "greedy": {"name": "beam", "width": 1},
}
"""Short name -> the strategy and the options it stands for; further options may be given to it."""

STRATEGIES: Registry[Strategy] = Registry(
    "strategy",
    package="mohawk_nas.search.strategies",
    entry_points="mohawk_nas.strategies",
    reserved=SHORT_NAMES,
)


def at_least(least: float, **options: float) -> None:
    """Raise ValueError for the first option that is below ``least``."""
    for name, value in options.items():
        if not value >= least:
            raise ValueError(f"`{name} >= {least}` must hold, but got {value}")


def strategy_names() -> list[str]:
    """Every name that a study may use, short ones included, sorted."""
    return sorted({*STRATEGIES.names(), *SHORT_NAMES})


def build_strategy(choice: str | Mapping[str, Any], *, where: str = "strategy") -> Strategy:
    """The strategy that a name or ``{"name": NAME, option: value}`` describes.

    Args:
        choice: What stands in the YAML file.
        where: Dotted path for messages.

    Raises:
        ConfigError: There is no such strategy, or every unknown option and impossible value.
    """
    options = {"name": choice} if isinstance(choice, str) else dict(choice)
    name, known = options.pop("name", None), strategy_names()
    if name not in known:
        raise ConfigError(
            f"{where}: unknown strategy {name!r}; available: {', '.join(known)}."
            f"{did_you_mean(str(name), known)}"
        )
    meant = dict(SHORT_NAMES.get(name, {"name": name}))
    cls = STRATEGIES.get(meant.pop("name"))
    if fixed := [option for option in options if option in meant]:
        raise ConfigError(
            [
                f"{where}.{option}: {name!r} is short for {dict(SHORT_NAMES[name])}, so this must "
                f"not be given; name {SHORT_NAMES[name]['name']!r} to choose it"
                for option in fixed
            ]
        )
    if not (isinstance(cls, type) and issubclass(cls, Strategy)):
        raise ConfigError(
            f"{where}: what {STRATEGIES.origin(name)} registers as {name!r} must be a Strategy"
        )
    return read_options(cls, meant | options, where=where, owner=name)


def named_baselines(entries: Iterable[str | Mapping[str, Any]]) -> dict[str, Selector | None]:
    """Label -> selector of a study's baselines, each once; None where a layout is named."""
    found: dict[str, Selector | None] = {}
    known = strategy_names()
    for entry in entries:
        if isinstance(entry, str) and entry not in known:
            found[entry] = None
        else:
            selector = build_strategy(entry)
            assert isinstance(selector, Selector)
            found[selector.label] = selector
    return found


def random_unseen(
    space: SearchSpace, budget: Budget, seen: Collection[Layout], rng: random.Random
) -> Layout | None:
    """A layout on the budget that is not among ``seen``, all with the same chance.

    Args:
        space: Where to draw.
        budget: What the layout must meet.
        seen: Distinct layouts, all of them on the budget.
        rng: Where the chance comes from.

    Returns:
        None if every layout was seen.
    """
    # Drawing until one is new takes two draws at most on average, as long as half of them are new.
    if 2 * len(seen) < budget.count(space):
        while (layout := budget.random(space, rng)) in seen:
            pass
        return layout
    unseen = [layout for layout in budget.enumerate(space) if layout not in seen]
    return rng.choice(unseen) if unseen else None


def local_replacement(
    space: SearchSpace, losses: Mapping[tuple[int, str], float], layer: int
) -> str:
    """The candidate with the smallest relative stage-2 loss in a layer."""
    return min(space.replacements, key=lambda name: losses[layer, name])


def solve_local(
    space: SearchSpace, budget: Budget, losses: Mapping[tuple[int, str], float]
) -> Layout:
    """The layout on the budget with the smallest sum of stage-2 losses.

    A layer's loss does not depend on the other layers, so where only the attention layers are
    counted the optimum keeps attention where the best replacement loses most.
    """
    if budget.limits:
        # A mixer that has diverged is the last choice, but one.
        most = sum(abs(loss) for loss in losses.values() if math.isfinite(loss)) + 1
        known = {pair: x if math.isfinite(x) else most for pair, x in losses.items()}
        found = budget.cheapest(space, known)
        assert found is not None, "a study whose budget is impossible has not begun"
        return found
    best = {layer: local_replacement(space, losses, layer) for layer in space.free_layers}
    ranked = sorted(space.free_layers, key=lambda layer: (-losses[layer, best[layer]], layer))
    return space.fill(best | dict.fromkeys(ranked[: budget.num_free(space)], ATTENTION))
