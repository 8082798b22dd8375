"""Attention where a score of each layer alone says that it matters most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mohawk_nas.layout import Layout
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.space import SearchSpace
from mohawk_nas.search.strategy import STRATEGIES, SearchContext, Selector, solve_local


@STRATEGIES.register("ranking")
@dataclass(frozen=True, kw_only=True)
class Ranking(Selector):
    """Keeps the layers with the highest score, each layer judged alone.

    ``stage2`` is the relative stage-2 loss of its replacement on the search split, on the teacher's
    input, and needs no probe. ``swap_one`` is the objective with only this layer replaced,
    ``add_one_in`` how low the objective is with only this layer kept; both cost one probe a free
    layer, in which the pinned layers are as they are pinned. KL-guided layer selection
    (arXiv 2512.20569) is ``add_one_in`` with a distillation before each probe.
    """

    score: Literal["stage2", "swap_one", "add_one_in"] = "stage2"

    def layouts(self, context: SearchContext) -> list[tuple[str, Layout]]:
        free = context.space.free_layers
        if self.score == "stage2":
            layout = solve_local(context.space, context.budget, context.stage2_losses())
        elif self.score == "swap_one":
            others = {layer: [other for other in free if other != layer] for layer in free}
            harm = context.values({layer: context.keeping(others[layer]) for layer in free})
            layout = context.keep_top(harm)
        else:
            value = context.values({layer: context.keeping([layer]) for layer in free})
            layout = context.keep_top({layer: -v for layer, v in value.items()})
        return [(self.label, layout)]

    def num_probes(self, space: SearchSpace, budget: Budget) -> int:
        return 0 if self.score == "stage2" else len(space.free_layers)
