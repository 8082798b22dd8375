"""Attention where a score of each layer alone says that it matters most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mohawk_nas.config import StudyConfig
from mohawk_nas.layout import Layout
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.space import SearchSpace
from mohawk_nas.search.strategy import STRATEGIES, SearchContext, Selector, solve_local


@STRATEGIES.register("ranking")
@dataclass(frozen=True, kw_only=True)
class Ranking(Selector):
    """Keeps the layers with the highest score, each layer judged alone.

    ``stage1`` is the loss with which its replacement's stage 1 ended in the bank, ``stage2`` the
    relative stage-2 loss of its replacement on the search split, on the teacher's input; neither
    needs a probe. ``swap_one`` is the objective with only this layer replaced,
    ``add_one_in`` how low the objective is with only this layer kept; both cost one probe a free
    layer, in which the pinned layers are as they are pinned. KL-guided layer selection
    (arXiv 2512.20569) is ``add_one_in`` with a distillation before each probe. ``recall_drop`` is
    the recall that is lost with only this layer replaced, whatever the objective says of the rest,
    with the probes of ``swap_one``; HALO ranks by it, divided by what reasoning tasks lose.
    """

    score: Literal["stage1", "stage2", "swap_one", "add_one_in", "recall_drop"] = "stage2"

    def problems(self, config: StudyConfig) -> list[str]:
        found = []
        if self.score == "stage1" and not config.bank.matrix.tokens:
            found.append(
                "bank.matrix.tokens: must be above 0, so that the bank has a stage 1, but is 0; "
                "give it tokens or leave this out"
            )
        if self.score == "stage1" and config.search.evaluation != "bank":
            found.append(
                "search.evaluation: must be bank, whose records tell the stage-1 losses, but is "
                f"{config.search.evaluation}"
            )
        if self.score == "recall_drop" and "recall" not in config.search.weights:
            found.append(
                "search.objective: must score recall, with any weight, or search.pareto name it, "
                f"but only {', '.join(config.search.weights)} is scored; add recall or leave this "
                "out"
            )
        return found

    def layouts(self, context: SearchContext) -> list[tuple[str, Layout]]:
        free = context.space.free_layers
        if self.score == "stage2":
            layout = solve_local(context.space, context.budget, context.stage2_losses())
        elif self.score == "stage1":
            losses, replaced = context.stage1_losses(), context.keeping([])
            layout = context.keep_top({layer: losses[layer, replaced[layer]] for layer in free})
        elif self.score in ("swap_one", "recall_drop"):
            others = {layer: [other for other in free if other != layer] for layer in free}
            swapped = {layer: context.keeping(others[layer]) for layer in free}
            if self.score == "swap_one":
                harm = context.values(swapped)
            else:
                context.prepare(list(swapped.values()))
                harm = {layer: context.probe(swapped[layer]).mean("recall") for layer in free}
            layout = context.keep_top(harm)
        else:
            value = context.values({layer: context.keeping([layer]) for layer in free})
            layout = context.keep_top({layer: -v for layer, v in value.items()})
        return [(self.label, layout)]

    def num_probes(self, space: SearchSpace, budget: Budget) -> int:
        return 0 if self.score in ("stage1", "stage2") else len(space.free_layers)
