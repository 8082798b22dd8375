"""Attention in the first layers."""

from __future__ import annotations

from mohawk_nas.layout import Layout
from mohawk_nas.search.strategy import STRATEGIES, SearchContext, Selector


@STRATEGIES.register("first")
class First(Selector):
    """Keeps attention in the first layers that are free."""

    def layouts(self, context: SearchContext) -> list[tuple[str, Layout]]:
        return [("first", context.keeping(context.space.free_layers[: context.num_kept]))]
