"""Pareto sets: what no other beats in all figures at once, and how much of the range they cover.

The study's Optuna trials hold one value all the same, the objective's: it ranks the layouts and
decides ``best.yaml``, and dashboards draw its history. Every figure stands in a trial's score, and
only the scratch study in which a sampler proposes has several values.

N layouts, F figures of each; lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["dominates", "hypervolumes", "pareto_ranks"]

Figures = Sequence[float]


def dominates(one: Figures, other: Figures) -> bool:
    """Whether one is at least as good in every figure and better in one."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def pareto_ranks(rows: Sequence[Figures]) -> list[int]:
    """The rank of each row by non-dominated sorting (Deb et al. 2002): 0 for the Pareto set.

    Rank r is the Pareto set of what is left when lower ranks are taken away. Equal rows do not
    dominate each other. Takes O(N^2 F) for each rank.
    """
    table = np.array(rows, dtype=float)
    ranks = np.zeros(len(rows), dtype=int)
    left, rank = np.arange(len(rows)), 0
    while len(left):
        beaten = np.array([_is_beaten(table[i], table[left]) for i in left])
        ranks[left[~beaten]] = rank
        left, rank = left[beaten], rank + 1
    return [int(rank) for rank in ranks]


def hypervolumes(rows: Sequence[Figures]) -> list[float]:
    """How much the first 1, 2, ... rows cover of the range between best and worst figures, 0 to 1.

    A point of the range is covered if some row is at least as good in every figure. Each figure is
    scaled to its range over all rows; figures that are the same in all rows are left out, and a row
    with a figure that is not finite covers nothing. Each row adds what it covers alone, and that is
    sliced figure by figure, so time grows steeply with the figures: meant for two to four.
    """
    table = np.array(rows, dtype=float)
    finite = np.isfinite(table).all(axis=1)
    if not finite.any():
        return [0.0] * len(rows)
    low, high = table[finite].min(axis=0), table[finite].max(axis=0)
    differ = high > low
    # A point a figure below its worst, as a share of the figure's range.
    gains = ((high - table) / np.where(differ, high - low, 1.0))[:, differ]
    covered, front, found = 0.0, gains[:0], []
    for gain, usable in zip(gains, finite, strict=True):
        if usable and differ.any() and not (front >= gain).all(axis=1).any():
            shared = np.unique(np.minimum(gain, front), axis=0)
            within = (shared[:, None] <= shared).all(axis=2).sum(axis=1) > 1
            covered += math.prod(map(float, gain)) - _union(shared[~within])
            front = np.vstack([front[~(front <= gain).all(axis=1)], gain])
        found.append(covered)
    return found


def _is_beaten(row: NDArray[np.float64], others: NDArray[np.float64]) -> bool:
    return bool(((others <= row).all(axis=1) & (others < row).any(axis=1)).any())


def _union(boxes: NDArray[np.float64]) -> float:
    """The volume of all boxes between 0 and one of the rows, ``(N, F)``."""
    if not len(boxes):
        return 0.0
    if boxes.shape[1] == 1:
        return float(boxes.max())
    boxes = boxes[np.argsort(-boxes[:, 0])]
    # Slices of the first figure, from each row's end down to the next row's; what covers a slice
    # are the rows that reach it.
    lengths = boxes[:, 0] - np.append(boxes[1:, 0], 0.0)
    if boxes.shape[1] == 2:
        return float(lengths @ np.maximum.accumulate(boxes[:, 1]))
    slices = (_union(boxes[: n + 1, 1:]) if lengths[n] else 0.0 for n in range(len(boxes)))
    return math.fsum(length * area for length, area in zip(lengths, slices, strict=True))
