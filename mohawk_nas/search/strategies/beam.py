"""Attention layers added or taken away one by one, with the best few partial layouts kept."""

from __future__ import annotations

import math
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
    budget. A pass of swaps adds K * (L-K) at most, all on the budget.
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
        free, num_kept = context.space.free_layers, context.num_kept
        adding = self.direction == "add"

        def kept(moved: frozenset[int]) -> list[int]:
            return [layer for layer in free if (layer in moved) == adding]

        def best(found: set[frozenset[int]]) -> list[frozenset[int]]:
            values = context.values(
                {moved: context.keeping(kept(moved)) for moved in _sorted(found)}
            )
            # Of two equal ones that with the lower layers.
            return sorted(values, key=lambda moved: (values[moved], sorted(moved)))

        beam: list[frozenset[int]] = [frozenset()]
        for _ in range(num_kept if adding else len(free) - num_kept):
            grown = {moved | {layer} for moved in beam for layer in free if layer not in moved}
            beam = best(grown)[: self.width]
        for _ in range(self.swaps):
            moved = beam[0]
            rest = [layer for layer in free if layer not in moved]
            swapped = {moved - {out} | {into} for out in moved for into in rest}
            if not swapped:
                break
            beam = best(swapped | {moved})
            if beam[0] == moved:
                break
        return [(self.label, context.keeping(kept(beam[0])))]

    def num_probes(self, space: SearchSpace, budget: Budget) -> int:
        free, kept = len(space.free_layers), budget.num_free(space)
        steps = kept if self.direction == "add" else free - kept
        widths = [min(self.width, math.comb(free, k)) for k in range(steps)]
        grown = [min(math.comb(free, k + 1), w * (free - k)) for k, w in enumerate(widths)]
        return sum(grown) + self.swaps * kept * (free - kept)


def _sorted(found: set[frozenset[int]]) -> list[frozenset[int]]:
    # Probes are made in an order that is the same in every process.
    return sorted(found, key=sorted)
