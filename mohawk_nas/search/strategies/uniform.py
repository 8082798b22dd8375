"""Attention layers at even distances."""

from __future__ import annotations

import math

from mohawk_nas.layout import Layout
from mohawk_nas.search.strategy import STRATEGIES, SearchContext, Selector


@STRATEGIES.register("uniform")
class Uniform(Selector):
    """Every distinct phase of an even spacing.

    K of L layers with phase p keep attention in layers floor((i + p) L / K), i = 0 .. K-1. As p
    goes from 0 to 1 this gives L / gcd(L, K) distinct sets, the sets that are labelled
    ``uniform/0``, ``uniform/1`` and so on; in set j they are floor((i L + j gcd(L, K)) / K). For 4
    of 24 layers these are 0, 6, 12, 18 moved up by 0 to 5, among them 4, 10, 16, 22. Pinned layers
    are left out of the count, so L and K are those that are free. Where K is not fixed, it is the
    largest with which a phase meets the budget.
    """

    def layouts(self, context: SearchContext) -> list[tuple[str, Layout]]:
        free = context.space.free_layers
        for kept in range(context.num_kept, -1, -1):
            # With nothing to keep all phases are the same.
            step = math.gcd(len(free), kept) or 1
            phases = [
                [free[(i * len(free) + j * step) // kept] for i in range(kept)]
                for j in range(len(free) // step)
            ]
            layouts = [(f"uniform/{j}", context.on_budget(phase)) for j, phase in enumerate(phases)]
            if found := [(label, layout) for label, layout in layouts if layout is not None]:
                return found
        return []
