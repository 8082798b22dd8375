"""Attention where a gate between it and its replacement, learnt by gradient, stays open."""

from __future__ import annotations

from dataclasses import dataclass

from mohawk_nas.config import StudyConfig
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.space import SearchSpace
from mohawk_nas.search.strategy import STRATEGIES, SearchContext, Selector, at_least


@STRATEGIES.register("gates")
@dataclass(frozen=True, kw_only=True)
class Gates(Selector):
    """Learns one gate a layer on the bank's text, with all weights frozen, and keeps the most open.

    In every free layer attention and the bank's mixer both run, weighed by a gate; the open gates
    sum to the layers that may keep attention while they are pushed to be open or shut. The loss is
    the KL divergence to the teacher and the cross-entropy of a recall probe's answers, which asks
    for other words than the search. After DASH (arXiv 2605.20936) and FlashMorph (arXiv
    2606.30562); see ``search/gates.py``. Each restart names a layout.
    """

    tokens: int = 1_048_576
    """Of each restart; text of the bank split, again and again where it is shorter."""
    restarts: int = 3
    """Times that the gates are learnt, each from another start and in another order of the text."""
    batch_size: int = 8
    """Blocks a step."""
    lr: float = 0.1
    """Of the gates."""
    recall_weight: float = 1.0
    """Of the recall probe's cross-entropy; 0 learns from the text alone, and so does a teacher that
    solves no probe."""

    def __post_init__(self) -> None:
        at_least(1, tokens=self.tokens, restarts=self.restarts, batch_size=self.batch_size)
        at_least(0, lr=self.lr, recall_weight=self.recall_weight)

    def problems(self, config: StudyConfig) -> list[str]:
        if config.search.evaluation == "bank":
            return []
        return [
            "search.evaluation: must be bank, whose mixers stand behind the gates, but is "
            f"{config.search.evaluation}"
        ]

    def num_tokens(self, space: SearchSpace, budget: Budget) -> int:
        learns = 0 < budget.num_free(space) < len(space.free_layers)
        return self.tokens * self.restarts if learns else 0

    def layouts(self, context: SearchContext) -> list[tuple[str, Layout]]:
        space, kept = context.space, context.num_kept
        free = space.free_layers
        if not 0 < kept < len(free):
            # There is no choice of layers to learn.
            return [(self.label, context.keep_top(dict.fromkeys(free, 0.0)))]
        replaced = context.keeping([])
        worths = context.learn_gates(
            replacements={layer: replaced[layer] for layer in free},
            pinned={layer: name for layer, name in space.pinned.items() if name != ATTENTION},
            kept=kept,
            restarts=self.restarts,
            tokens=self.tokens,
            batch_size=self.batch_size,
            lr=self.lr,
            recall_weight=self.recall_weight,
        )
        return [
            (f"{self.label}:{number}" if number > 1 else self.label, context.keep_top(worth))
            for number, worth in enumerate(worths, start=1)
        ]
