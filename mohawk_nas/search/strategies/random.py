"""Layouts at random, each once."""

from __future__ import annotations

import random

from mohawk_nas.search.strategy import (
    STRATEGIES,
    Proposal,
    SearchContext,
    Strategy,
    random_unseen,
)


@STRATEGIES.register("random")
class RandomSearch(Strategy):
    """Draws without replacement, all layouts on the budget with the same chance."""

    def propose(self, context: SearchContext) -> Proposal | None:
        rng = random.Random(context.seed)
        layout = random_unseen(context.space, context.budget, context.seen, rng)
        return None if layout is None else Proposal(layout=layout, proposed_by=self.label)
