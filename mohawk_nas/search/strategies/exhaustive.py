"""Every layout on the budget, in a fixed order."""

from __future__ import annotations

from mohawk_nas.search.strategy import STRATEGIES, Proposal, SearchContext, Strategy


@STRATEGIES.register("exhaustive")
class Exhaustive(Strategy):
    """Goes through the space until all is scored or the study's trials are used up."""

    def propose(self, context: SearchContext) -> Proposal | None:
        for layout in context.budget.enumerate(context.space):
            if layout not in context.seen:
                return Proposal(layout=layout, proposed_by=self.label)
        return None
