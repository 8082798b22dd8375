"""Attention in neighbouring layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mohawk_nas.layout import Layout
from mohawk_nas.search.strategy import STRATEGIES, SearchContext, Selector


@STRATEGIES.register("block")
@dataclass(frozen=True, kw_only=True)
class Block(Selector):
    """Keeps attention in neighbours among the free layers: the first, the middle or the last.

    As many of them as the budget allows there.
    """

    at: Literal["first", "middle", "last"] = "middle"

    def layouts(self, context: SearchContext) -> list[tuple[str, Layout]]:
        free = context.space.free_layers
        for kept in range(context.num_kept, -1, -1):
            spare = len(free) - kept
            start = {"first": 0, "middle": spare // 2, "last": spare}[self.at]
            if layout := context.on_budget(free[start : start + kept]):
                return [(self.label, layout)]
        return []
