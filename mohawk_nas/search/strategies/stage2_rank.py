"""Attention where its replacement imitates it worst."""

from __future__ import annotations

from mohawk_nas.layout import Layout
from mohawk_nas.search.strategy import STRATEGIES, SearchContext, Selector, solve_local


@STRATEGIES.register("stage2_rank")
class Stage2Rank(Selector):
    """Keeps the layers with the largest relative stage-2 loss on the search split.

    Needs no probe: every layer is judged alone, on the teacher's input.
    """

    def layouts(self, context: SearchContext) -> list[tuple[str, Layout]]:
        losses = context.stage2_losses()
        return [("stage2_rank", solve_local(context.space, context.budget, losses))]
