"""Attention in the last layers."""

from __future__ import annotations

from mohawk_nas.layout import Layout
from mohawk_nas.search.strategy import STRATEGIES, SearchContext, Selector


@STRATEGIES.register("last")
class Last(Selector):
    """Keeps attention in the last layers that are free."""

    def layouts(self, context: SearchContext) -> list[tuple[str, Layout]]:
        free = context.space.free_layers
        return [("last", context.keeping(free[len(free) - context.num_kept :]))]
