"""What the search asks of whoever scores layouts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mohawk_nas.layout import Layout

__all__ = ["Learnt", "Score", "Scorer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What one layout scored on the search blocks."""

    per_block: dict[str, tuple[float, ...]]
    """Objective's name -> one value a block of the search split; lower is better."""
    tokens: int
    """Tokens the layout was run on."""
    seconds: float

    def mean(self, name: str) -> float:
        """An objective's mean over the blocks."""
        values = self.per_block[name]
        return math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf

    def value(self, weights: Mapping[str, float]) -> float:
        """Weighted sum of the objectives' means.

        A layout whose score is not finite is worse than any other, so the value is then infinite
        and never NaN.
        """
        value = math.fsum(weight * self.mean(name) for name, weight in weights.items())
        return value if math.isfinite(value) else math.inf

    def blocks(self, weights: Mapping[str, float]) -> tuple[float, ...]:
        """Weighted sum in each block, for comparing two layouts over the same blocks."""
        columns = [[weight * x for x in self.per_block[name]] for name, weight in weights.items()]
        return tuple(math.fsum(row) for row in zip(*columns, strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, which :meth:`from_dict` reads back unchanged."""
        return {
            "mean": {name: self.mean(name) for name in self.per_block},
            "per_block": {name: list(values) for name, values in self.per_block.items()},
            "tokens": self.tokens,
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Score:
        """The score that :meth:`to_dict` wrote."""
        return cls(
            per_block={name: tuple(values) for name, values in data["per_block"].items()},
            tokens=data["tokens"],
            seconds=data["seconds"],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Learnt:
    """What a selector learnt of the layers by training, and what it cost."""

    worth: Mapping[int, float]
    """Free layer -> what its attention is worth; higher is better."""
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, which :meth:`from_dict` reads back unchanged."""
        worth = {str(layer): value for layer, value in self.worth.items()}
        return {"worth": worth, "tokens": self.tokens, "seconds": self.seconds}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Learnt:
        """What :meth:`to_dict` wrote."""
        return cls(
            worth={int(layer): value for layer, value in data["worth"].items()},
            tokens=data["tokens"],
            seconds=data["seconds"],
        )


class Scorer(Protocol):
    """Scores layouts, each on the same blocks; deterministic, so that a run can be resumed."""

    @property
    def num_layers(self) -> int:
        """Layers of the teacher."""

    def score(self, layout: Layout) -> Score:
        """Every objective of the study for one layout."""

    def stage2_losses(self) -> Mapping[tuple[int, str], float]:
        """(layer, candidate) -> relative stage-2 distance on the search split.

        Attention has none. The scorer keeps the result: selectors ask again and again.
        """
