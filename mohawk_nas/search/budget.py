"""The hard budget that every layout must meet.

Every limit is a sum over layers: what a layer's candidate costs does not depend on the others. In
whole numbers (layers, bytes, nanoseconds) such sums are exact, so all layouts on the budget can be
counted, listed and drawn by going through the layers one by one and keeping apart only what has
been spent so far. Layers of one shape cost the same, which keeps these sums few.
"""

from __future__ import annotations

import decimal
import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mohawk_nas.config import BudgetConfig
from mohawk_nas.errors import ConfigError, LayoutError
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.mixer import AttentionView
from mohawk_nas.search.space import SearchSpace

__all__ = ["Budget", "DecodeTimes", "Limit", "make_budget"]

MOST_SUMS = 1_000_000
"""Different sums that are kept apart, at most."""
DIGITS = 6
"""Of a limit that a message names."""


_Spent = tuple[float, ...]
"""Sum of the costs so far, limit by limit."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """The costs of what the layers hold add up to at most ``most``."""

    costs: Mapping[tuple[int, str], float]
    """(layer, candidate) -> cost, whole numbers in a budget; what is not named costs nothing."""
    most: float
    least: float = -math.inf
    rest: float = 0
    """What comes on top, whatever the layers hold."""
    name: str = "limit"
    """Dotted path of the setting."""
    unit: str = ""
    per_unit: int = 1
    """Costs in one unit of the setting."""
    where: str = ""
    """What the costs were counted for."""

    def cost(self, layout: Layout) -> float:
        """What a layout costs."""
        return self.rest + sum(self.costs.get(pair, 0) for pair in enumerate(layout.candidates))

    def meets(self, layout: Layout) -> bool:
        """Whether a layout is within the limit."""
        return self.least <= self.cost(layout) <= self.most

    def shown(self, cost: float, *, up: bool = True) -> str:
        """A cost in the setting's unit, rounded up (or down), so that it is enough as a limit."""
        rounding = decimal.ROUND_CEILING if up else decimal.ROUND_FLOOR
        context = decimal.Context(prec=DIGITS, rounding=rounding)
        value = context.divide(decimal.Decimal(cost), self.per_unit)
        return f"{value.normalize():f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeTimes:
    """What a decode step takes, measured; ``search/decode.py`` does."""

    layers: Mapping[tuple[int, str], int]
    """(layer, candidate) -> nanoseconds of its mixer."""
    rest: int
    """Nanoseconds of everything else."""

    def of(self, layout: Layout) -> int:
        """Nanoseconds of a student: the sum over its layers, and the rest."""
        return self.rest + sum(self.layers[pair] for pair in enumerate(layout.candidates))

    @property
    def digest(self) -> str:
        """Short hash of all figures."""
        text = f"{self.rest} {sorted(self.layers.items())}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Knows which layouts of a space meet it, how many, and how to draw one."""

    attention_layers: int | None = None
    """Layers that keep attention, exactly; None if that is not fixed."""
    at_most: int | None = None
    """Layers that keep attention, at most."""
    limits: tuple[Limit, ...] = ()
    """What must hold besides; their costs name every (layer, candidate) that costs something."""
    _known: dict[object, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def counts_only(self) -> bool:
        """Whether it is a number of attention layers, exactly, and nothing else."""
        return self.attention_layers is not None and not self.limits

    @property
    def text(self) -> str:
        """What layouts on the budget do: ``keep 4 attention layers``."""
        found = []
        exact = self.attention_layers is not None
        wanted = self.attention_layers if exact else self.at_most
        if wanted is not None:
            plural = "" if wanted == 1 else "s"
            found.append(f"keep {'' if exact else 'at most '}{wanted} attention layer{plural}")
        for limit in self.limits:
            most = f"at most {limit.shown(limit.most, up=False)} {limit.unit}"
            found.append(f"take {most} {limit.where}")
        return " and ".join(found) or "are in the space"

    def problems(self, space: SearchSpace) -> list[str]:
        """Why no layout of the space meets the budget; empty if one does."""
        if problems := self._miscounted(space):
            return problems
        try:
            if self.counts_only or self.count(space):
                return []
        except ConfigError as e:
            return e.problems
        limits = self.linear(space)
        given = " within the other limits" if len(limits) > 1 else ""
        ways = []
        for limit in limits:
            others = [other for other in limits if other is not limit]
            if (nearest := _nearest(space, limit, others)) is not None:
                bound = "least" if nearest > limit.most else "most"
                came = limit.shown(limit.most, up=False)
                ways.append(
                    f"{limit.name}: must be at {bound} {limit.shown(nearest)}, the nearest that a "
                    f"layout of this space can have{given}, but got {came}"
                )
        if not ways:
            alone = [(limit, _nearest(space, limit, [])) for limit in limits]
            named = ", ".join(
                f"{limit.name} {limit.shown(limit.most if found is None else found)}"
                for limit, found in alone
            )
            ways = [
                "budget: no layout of this space meets all of its limits, and changing one of them "
                f"is not enough; each for itself could be {named}, so raise several"
            ]
        return ["; or ".join(ways)]

    def _miscounted(self, space: SearchSpace) -> list[str]:
        """What is wrong with the number of attention layers, whatever else must hold."""
        exact = self.attention_layers is not None
        wanted = self.attention_layers if exact else self.at_most
        name = self._count_name
        if wanted is None:
            return []
        if wanted > space.num_layers:
            return [
                f"{name}: must be at most {space.num_layers}, the teacher's layers, "
                f"but got {wanted}"
            ]
        least = space.num_pinned_attention
        most = least + len(space.free_layers)
        if wanted < least:
            return [
                f"{name}: must be at least {least}, since space.pinned keeps attention in as many "
                f"layers, but got {wanted}"
            ]
        if exact and wanted > most:
            return [
                f"{name}: must be at most {most}, since space.pinned replaces "
                f"{space.num_layers - most} of {space.num_layers} layers, but got {wanted}"
            ]
        return []

    @property
    def _count_name(self) -> str:
        """The setting that limits the number of attention layers."""
        exact = self.attention_layers is not None
        return "budget.attention_layers" if exact else "budget.attention_layers.at_most"

    def linear(self, space: SearchSpace) -> list[Limit]:
        """Every limit, the number of attention layers among them."""
        limits = list(self.limits)
        wanted = self.at_most if self.attention_layers is None else self.attention_layers
        if wanted is not None:
            count = Limit(
                costs={(layer, ATTENTION): 1 for layer in range(space.num_layers)},
                most=wanted,
                least=-math.inf if self.attention_layers is None else wanted,
                name=self._count_name,
            )
            limits.insert(0, count)
        return limits

    def num_free(self, space: SearchSpace) -> int:
        """Attention layers to choose besides the pinned ones, the most that a layout can keep."""
        pinned = space.num_pinned_attention
        if self.counts_only:
            assert self.attention_layers is not None
            return self.attention_layers - pinned
        if not self.limits:
            free = len(space.free_layers)
            return free if self.at_most is None else min(free, self.at_most - pinned)

        def most() -> int:
            attention = {(layer, ATTENTION): -1 for layer in space.free_layers}
            found = _cheapest(space, self.linear(space), attention)
            return 0 if found is None else len(found.attention_layers) - pinned

        return self._once("free", space, most)

    def meets(self, layout: Layout) -> bool:
        """Whether the layout is within the budget."""
        return self.excess(layout) is None

    def check(self, layout: Layout) -> None:
        """Raise LayoutError unless the layout meets the budget."""
        if (excess := self.excess(layout)) is not None:
            raise LayoutError(excess)

    def excess(self, layout: Layout) -> str | None:
        """Which limits a layout breaks, and by how much; None if it meets the budget."""
        found, kept = [], len(layout.attention_layers)
        if self.attention_layers is not None and kept != self.attention_layers:
            found.append(
                f"the budget is exactly {self.attention_layers} attention layers, but the layout "
                f"keeps {kept}: {list(layout.attention_layers)}"
            )
        if self.at_most is not None and kept > self.at_most:
            found.append(
                f"the budget is at most {self.at_most} attention layers, but the layout keeps "
                f"{kept}: {list(layout.attention_layers)}"
            )
        for limit in self.limits:
            if not limit.meets(layout):
                cost, most = limit.cost(layout), limit.shown(limit.most, up=False)
                found.append(
                    f"{limit.name} is {most}, but the layout takes {limit.shown(cost)} "
                    f"{limit.unit} {limit.where}, {limit.shown(cost - limit.most)} too much"
                )
        return "; ".join(found) or None

    def count(self, space: SearchSpace) -> int:
        """How many layouts of the space meet the budget.

        Raises:
            ConfigError: Too many different sums of costs would have to be told apart.
        """
        if not self.counts_only:
            return self._once("count", space, lambda: self._completions(space).count())
        free, kept = len(space.free_layers), self.num_free(space)
        if not 0 <= kept <= free:
            return 0
        replaced: int = len(space.replacements) ** (free - kept)
        return math.comb(free, kept) * replaced

    def enumerate(self, space: SearchSpace) -> Iterator[Layout]:
        """Every layout that meets the budget, in a fixed order."""
        if not self.counts_only:
            for names in self._completions(space).all():
                yield space.fill(dict(zip(space.free_layers, names, strict=True)))
            return
        for kept in itertools.combinations(space.free_layers, self.num_free(space)):
            replaced = [layer for layer in space.free_layers if layer not in kept]
            chosen = dict.fromkeys(kept, ATTENTION)
            for names in itertools.product(space.replacements, repeat=len(replaced)):
                yield space.fill(chosen | dict(zip(replaced, names, strict=True)))

    def random(self, space: SearchSpace, rng: random.Random) -> Layout:
        """One of them, all with the same chance."""
        if not self.counts_only:
            names = self._completions(space).draw(rng)
            return space.fill(dict(zip(space.free_layers, names, strict=True)))
        kept = rng.sample(space.free_layers, self.num_free(space))
        return space.fill(
            {
                layer: ATTENTION if layer in kept else rng.choice(space.replacements)
                for layer in space.free_layers
            }
        )

    def grant(self, space: SearchSpace, wishes: Mapping[int, Sequence[str]]) -> Layout | None:
        """Go through the free layers and give each the first of its wishes that the budget allows.

        A wish is allowed if the layers after it can then still be given one of theirs each.

        Args:
            space: What may be chosen.
            wishes: Free layer -> candidates, the dearest wish first. All free layers, the first to
                be served first.

        Returns:
            None if no layout on the budget gives each layer one of its wishes.
        """
        names = _Completions(space, self.linear(space), wishes).first()
        return None if names is None else space.fill(dict(zip(wishes, names, strict=True)))

    def cheapest(self, space: SearchSpace, costs: Mapping[tuple[int, str], float]) -> Layout | None:
        """The layout on the budget with the smallest sum of some other costs; None if none is.

        Args:
            space: What may be chosen.
            costs: (layer, candidate) -> cost; what is not named costs nothing.
        """
        return _cheapest(space, self.linear(space), costs)

    def _completions(self, space: SearchSpace) -> _Completions:
        return _Completions(space, self.linear(space), _every_wish(space))

    def _once(self, what: str, space: SearchSpace, compute: Callable[[], int]) -> int:
        # Asked before every proposal.
        key = what, space.num_layers, tuple(space.candidates), tuple(sorted(space.pinned.items()))
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


class _Completions:
    """The ways to go through some layers, given what has been spent on those before.

    Args:
        space: What may be chosen.
        limits: All that must hold.
        wishes: Layer -> the candidates it may take; pinned layers are added.

    Raises:
        ConfigError: From all methods: there are too many different sums.
    """

    def __init__(
        self, space: SearchSpace, limits: Sequence[Limit], wishes: Mapping[int, Sequence[str]]
    ) -> None:
        self._names = [tuple(names) for names in wishes.values()]
        self._costs = [
            [tuple(limit.costs.get((layer, name), 0) for limit in limits) for name in names]
            for layer, names in wishes.items()
        ]
        self._bounds = [(limit.least, limit.most) for limit in limits]
        self._start = tuple(
            limit.rest + sum(limit.costs.get(pair, 0) for pair in space.pinned.items())
            for limit in limits
        )
        # What the layers from the i-th on cost at least and at most, limit by limit.
        nothing = (0.0,) * len(limits)
        self._low, self._high = [nothing], [nothing]
        for costs in reversed(self._costs):
            for bounds, extreme in ((self._low, min), (self._high, max)):
                ends = map(extreme, zip(*costs, strict=True))
                bounds.insert(0, tuple(a + b for a, b in zip(bounds[0], ends, strict=True)))
        self._ways: dict[tuple[int, _Spent], int] = {}
        self._can: dict[tuple[int, _Spent], bool] = {}

    def count(self, i: int = 0, spent: _Spent | None = None) -> int:
        """How many ways there are."""
        spent = self._start if spent is None else spent
        if self._hopeless(i, spent):
            return 0
        if self._safe(i, spent):
            return math.prod(map(len, self._names[i:]))
        if (found := self._ways.get((i, spent))) is None:
            found = sum(self.count(i + 1, after) for _, after in self._next(i, spent))
            _keep(self._ways, (i, spent), found)
        return found

    def can(self, i: int, spent: _Spent) -> bool:
        """Whether there is one; cheaper than to count them."""
        if self._hopeless(i, spent):
            return False
        if self._safe(i, spent):
            return True
        if (found := self._can.get((i, spent))) is None:
            found = any(self.can(i + 1, after) for _, after in self._next(i, spent))
            _keep(self._can, (i, spent), found)
        return found

    def first(self) -> list[str] | None:
        """The first way: each layer's first candidate that leaves one open."""
        spent, chosen = self._start, []
        if not self.can(0, spent):
            return None
        for i in range(len(self._names)):
            name, spent = next(step for step in self._next(i, spent) if self.can(i + 1, step[1]))
            chosen.append(name)
        return chosen

    def all(self, i: int = 0, spent: _Spent | None = None) -> Iterator[tuple[str, ...]]:
        """Every way, first candidates first."""
        spent = self._start if spent is None else spent
        if not self.can(i, spent):
            return
        if i == len(self._names):
            yield ()
            return
        for name, after in self._next(i, spent):
            for rest in self.all(i + 1, after):
                yield (name, *rest)

    def draw(self, rng: random.Random) -> list[str]:
        """One way, all with the same chance."""
        spent, chosen = self._start, []
        place = rng.randrange(self.count())
        for i in range(len(self._names)):
            for name, after in self._next(i, spent):
                if place < (ways := self.count(i + 1, after)):
                    chosen.append(name)
                    spent = after
                    break
                place -= ways
        return chosen

    def cheapest(self, costs: Sequence[Sequence[float]]) -> list[str] | None:
        """The way with the smallest sum of some other costs; of equal ones the first."""
        found: dict[tuple[int, _Spent], tuple[float, str]] = {}

        def least(i: int, spent: _Spent) -> float:
            if self._hopeless(i, spent):
                return math.inf
            if i == len(self._names):
                return 0
            if (i, spent) not in found:
                best = math.inf, ""
                for own, (name, after) in zip(costs[i], self._next(i, spent), strict=True):
                    value = own + least(i + 1, after)
                    if value < best[0]:
                        best = value, name
                _keep(found, (i, spent), best)
            return found[i, spent][0]

        spent, chosen = self._start, []
        if least(0, spent) == math.inf:
            return None
        for i in range(len(self._names)):
            name = found[i, spent][1]
            spent = next(after for other, after in self._next(i, spent) if other == name)
            chosen.append(name)
        return chosen

    def _next(self, i: int, spent: _Spent) -> Iterator[tuple[str, _Spent]]:
        for name, costs in zip(self._names[i], self._costs[i], strict=True):
            yield name, tuple(a + b for a, b in zip(spent, costs, strict=True))

    def _hopeless(self, i: int, spent: _Spent) -> bool:
        return any(
            done + low > most or done + high < least
            for done, low, high, (least, most) in zip(
                spent, self._low[i], self._high[i], self._bounds, strict=True
            )
        )

    def _safe(self, i: int, spent: _Spent) -> bool:
        return all(
            done + low >= least and done + high <= most
            for done, low, high, (least, most) in zip(
                spent, self._low[i], self._high[i], self._bounds, strict=True
            )
        )


def _keep(memory: dict[tuple[int, _Spent], Any], key: tuple[int, _Spent], value: object) -> None:
    memory[key] = value
    if len(memory) > MOST_SUMS:
        raise ConfigError(
            f"budget: its limits must leave at most {MOST_SUMS:,} different sums of costs to tell "
            "apart, but leave more; name fewer candidates, pin layers, or give fewer limits"
        )


def _every_wish(space: SearchSpace) -> dict[int, tuple[str, ...]]:
    return dict.fromkeys(space.free_layers, (ATTENTION, *space.replacements))


def _cheapest(
    space: SearchSpace, limits: Sequence[Limit], costs: Mapping[tuple[int, str], float]
) -> Layout | None:
    wishes = _every_wish(space)
    own = [[costs.get((layer, name), 0) for name in names] for layer, names in wishes.items()]
    names = _Completions(space, limits, wishes).cheapest(own)
    return None if names is None else space.fill(dict(zip(wishes, names, strict=True)))


def _nearest(space: SearchSpace, limit: Limit, others: Sequence[Limit]) -> float | None:
    """The bound nearest to a limit's own with which a layout meets it and the other limits."""
    if limit.least == -math.inf:
        found = _cheapest(space, others, limit.costs)
        return None if found is None else limit.cost(found)
    possible = []
    above = replace(limit, least=limit.most, most=math.inf)
    below = replace(limit, least=-math.inf, most=limit.most)
    for sign, side in ((1, above), (-1, below)):
        costs = {pair: sign * cost for pair, cost in limit.costs.items()}
        if (found := _cheapest(space, [*others, side], costs)) is not None:
            possible.append(limit.cost(found))
    return min(possible, key=lambda value: (abs(value - limit.most), value), default=None)


def make_budget(
    config: BudgetConfig,
    space: SearchSpace,
    views: Sequence[AttentionView],
    *,
    bytes_per_element: int,
    decode: DecodeTimes | None,
) -> Budget:
    """The budget that a study describes.

    Args:
        config: The study's section.
        space: What may be chosen.
        views: The teacher's attention layers; only their shapes are read.
        bytes_per_element: Of the type in which the student runs.
        decode: What was measured; None leaves that limit out, for planning.
    """
    wanted = config.attention_layers
    at_most = wanted["at_most"] if isinstance(wanted, Mapping) else None
    limits = []
    if config.cache.mib is not None:
        batch, context = config.cache.batch, config.cache.context
        assert context is not None
        costs = {
            (layer, name): candidate.state_bytes(
                view, batch=batch, context=context, bytes_per_element=bytes_per_element
            )
            for layer, view in enumerate(views)
            for name, candidate in space.candidates.items()
        }
        limits.append(
            Limit(
                costs=costs,
                most=config.cache.mib * 2**20,
                name="budget.cache.mib",
                unit="MiB",
                per_unit=2**20,
                where=f"of cache and states at context {context:,} and batch {batch}",
            )
        )
    if config.decode.milliseconds is not None and decode is not None:
        batch, context = config.decode.batch, config.decode.context
        limits.append(
            Limit(
                costs=decode.layers,
                rest=decode.rest,
                most=round(config.decode.milliseconds * 1e6),
                name="budget.decode.milliseconds",
                unit="ms",
                per_unit=10**6,
                where=f"a decode step at context {context:,} and batch {batch}",
            )
        )
    return Budget(
        attention_layers=wanted if at_most is None else None,
        at_most=at_most,
        limits=tuple(limits),
    )
