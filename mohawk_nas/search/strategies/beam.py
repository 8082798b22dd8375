"""Attention layers added or taken away one by one, with the best few partial layouts kept."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from mohawk_nas.layout import Layout
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.space import SearchSpace
from mohawk_nas.search.strategy import STRATEGIES, SearchContext, Selector, at_least


@STRATEGIES.register("beam")
@dataclass(frozen=True, kw_only=True)
class Beam(Selector):
    """Grows layouts one layer a step and keeps the best ``width`` of each step; greedy keeps one.

    PostNAS (Jet-Nemotron) and a script that Fast-LLM once had search so in a trained supernet;
    Distill-then-Replace (arXiv 2601.11667) is ``remove`` with a width of 1.

    With L free layers and K of them to keep, step k looks at width * (L-k+1) layouts at most and at
    L if it is the first. ``add`` takes K steps, ``remove`` L-K, so ``add`` is the cheap direction
    while K is small: with a width of 1 L + (L-1) + ... + (L-K+1) probes, of which the first L are
    those of ``add_one_in`` (for ``remove`` those of ``swap_one``) and the last step's are on the
    budget. A pass of swaps adds K * (L-K) at most, all on the budget. Where the budget does not fix
    K, ``add`` goes on as long as it allows one layer more, and ``remove`` until it is met.
    """

    width: int = 4
    """Partial layouts kept after each step."""
    direction: Literal["add", "remove"] = "add"
    """Start with all free layers replaced and put attention back, or with none replaced."""
    swaps: int = 0
    """Passes, at most, in which the best single swap around the best layout is made if it helps."""

    def __post_init__(self) -> None:
        at_least(1, width=self.width)
        at_least(0, swaps=self.swaps)

    def layouts(self, context: SearchContext) -> list[tuple[str, Layout]]:
        free = context.space.free_layers
        adding = self.direction == "add"

        def kept(moved: frozenset[int]) -> list[int]:
            return [layer for layer in free if (layer in moved) == adding]

        def looked_at(moved: frozenset[int]) -> Layout:
            # On the budget other mixers may have to stand in than those that suit the layers best.
            return context.on_budget(kept(moved)) or context.keeping(kept(moved))

        values: dict[frozenset[int], float] = {}

        def best(found: Collection[frozenset[int]]) -> list[frozenset[int]]:
            unknown = [moved for moved in _sorted(found) if moved not in values]
            values.update(context.values({moved: looked_at(moved) for moved in unknown}))
            # Of two equal ones that with the lower layers.
            return sorted(found, key=lambda moved: (values[moved], sorted(moved)))

        def onwards(moved: frozenset[int]) -> list[frozenset[int]]:
            if not adding and context.on_budget(kept(moved)):
                return []
            further = [moved | {layer} for layer in free if layer not in moved]
            return [more for more in further if context.may_keep(kept(more), others=adding)]

        beam: list[frozenset[int]] = [frozenset()]
        ended: list[frozenset[int]] = []
        while beam:
            steps = {moved: onwards(moved) for moved in beam}
            ended += [moved for moved, further in steps.items() if not further]
            grown = {more for further in steps.values() for more in further}
            beam = best(grown)[: self.width]
        beam = best(ended) if len(ended) > 1 else ended
        for _ in range(self.swaps):
            moved = beam[0]
            rest = [layer for layer in free if layer not in moved]
            swapped = {moved - {out} | {into} for out in moved for into in rest}
            swapped = {other for other in swapped if context.on_budget(kept(other))}
            if not swapped:
                break
            beam = best(swapped | {moved})
            if beam[0] == moved:
                break
        layout = context.on_budget(kept(beam[0]))
        assert layout is not None
        return [(self.label, layout)]

    def num_probes(self, space: SearchSpace, budget: Budget) -> int:
        free, kept = len(space.free_layers), budget.num_free(space)
        # Where the number is not fixed, other layers may cost more, and more must be removed.
        least = kept if budget.counts_only or not budget.limits else 0
        steps = kept if self.direction == "add" else free - least
        widths = [min(self.width, math.comb(free, k)) for k in range(steps)]
        grown = [min(math.comb(free, k + 1), w * (free - k)) for k, w in enumerate(widths)]
        return sum(grown) + self.swaps * kept * (free - kept)


def _sorted(found: Collection[frozenset[int]]) -> list[frozenset[int]]:
    # Probes are made in an order that is the same in every process.
    return sorted(found, key=sorted)
