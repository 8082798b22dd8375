"""Attention where replacing that layer alone does most harm."""

from __future__ import annotations

from mohawk_nas.layout import Layout
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.space import SearchSpace
from mohawk_nas.search.strategy import STRATEGIES, SearchContext, Selector


@STRATEGIES.register("swap_one")
class SwapOne(Selector):
    """Replaces each free layer alone and keeps those whose replacement hurts most.

    Costs one probe a free layer. The pinned layers are as they are pinned in every probe.
    """

    def layouts(self, context: SearchContext) -> list[tuple[str, Layout]]:
        free = context.space.free_layers
        harm = context.values(
            {layer: context.keeping(other for other in free if other != layer) for layer in free}
        )
        return [("swap_one", context.keep_top(harm))]

    def num_probes(self, space: SearchSpace, budget: Budget) -> int:
        return len(space.free_layers)
