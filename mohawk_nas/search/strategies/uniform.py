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
    are left out of the count, so L and K are those that are free.
    """

    def layouts(self, context: SearchContext) -> list[tuple[str, Layout]]:
        free, kept = context.space.free_layers, context.num_kept
        if kept == 0:
            return [("uniform/0", context.keeping([]))]
        step = math.gcd(len(free), kept)
        return [
            (
                f"uniform/{j}",
                context.keeping(free[(i * len(free) + j * step) // kept] for i in range(kept)),
            )
            for j in range(len(free) // step)
        ]
