"""Attention where keeping that layer alone helps most."""

from __future__ import annotations

from mohawk_nas.layout import Layout
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.space import SearchSpace
from mohawk_nas.search.strategy import STRATEGIES, SearchContext, Selector


@STRATEGIES.register("add_one_in")
class AddOneIn(Selector):
    """Replaces all free layers but one and keeps those that bring the objective lowest.

    Costs one probe a free layer. The pinned layers are as they are pinned in every probe.
    """

    def layouts(self, context: SearchContext) -> list[tuple[str, Layout]]:
        value = context.values(
            {layer: context.keeping([layer]) for layer in context.space.free_layers}
        )
        return [("add_one_in", context.keep_top({layer: -v for layer, v in value.items()}))]

    def num_probes(self, space: SearchSpace, budget: Budget) -> int:
        return len(space.free_layers)
