"""What the search asks of whoever scores layouts, and how two scores compare.

Two layouts are compared block by block over the same text: the differences within a block spread
far less than the blocks do. A layout counts as tied with another if the mean difference is at most
two standard errors of that mean.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mohawk_nas.layout import Layout

__all__ = ["Comparison", "Learnt", "Score", "Scorer", "compare", "compare_blocks"]

TIED_WITHIN = 2.0
"""Standard errors of the paired mean difference."""


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

    @classmethod
    def mean_of(cls, scores: Sequence[Score]) -> Score:
        """Of one layout on the same blocks: the mean in each block, and what all of them took."""
        per_block = {}
        for name in scores[0].per_block:
            rows = zip(*(score.per_block[name] for score in scores), strict=True)
            per_block[name] = tuple(math.fsum(row) / len(row) for row in rows)
        return cls(
            per_block=per_block,
            tokens=sum(score.tokens for score in scores),
            seconds=math.fsum(score.seconds for score in scores),
        )

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
class Comparison:
    """A layout against another over the same blocks."""

    difference: float
    """Mean over the blocks; above 0 means worse than the other."""
    standard_error: float
    """Of that mean; infinite with a single block, which tells nothing apart."""

    @property
    def tied(self) -> bool:
        """Whether the difference may be noise."""
        return abs(self.difference) <= TIED_WITHIN * self.standard_error


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


def compare(one: Score, other: Score, weights: Mapping[str, float]) -> Comparison:
    """Paired comparison of two scores over the same blocks."""
    values = one.value(weights), other.value(weights)
    if not all(map(math.isfinite, values)):
        difference = 0.0 if values[0] == values[1] else values[0] - values[1]
        return Comparison(difference=difference, standard_error=0.0)
    return compare_blocks(one.blocks(weights), other.blocks(weights))


def compare_blocks(one: Sequence[float], other: Sequence[float]) -> Comparison:
    """Paired comparison of one figure a block."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    error = math.inf
    if len(differences) > 1:
        error = statistics.stdev(differences) / math.sqrt(len(differences))
    return Comparison(difference=statistics.fmean(differences), standard_error=error)
