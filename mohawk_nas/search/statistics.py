"""How far a cheap score can be trusted: figures of a table of layouts scored and distilled.

Everything here works on plain arrays. N layouts, S seeds of the distillation, L free layers.

Intervals are percentiles of a bootstrap over layouts: they say how the figure would move with other
layouts of the same space, and know nothing of other teachers or banks. A regret's is one over text,
and over the layouts that stand for all.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = [
    "Fit",
    "Interval",
    "Regret",
    "ceiling",
    "fit_layers",
    "kendall",
    "paired",
    "regret",
    "regret_within",
    "reliability",
    "spearman",
    "tied_with_best",
]

Values = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

REPEATS = 2000
"""Bootstrap samples."""
COVERAGE = 0.95
"""Of an interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A figure and where it may lie."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def spearman(score: Values, truth: Values, *, seed: int = 0) -> Interval:
    """Rank correlation of a score with the truth, ``(N,)`` each; N must be at least 3."""
    return _bootstrapped(_spearman, score, truth, seed=seed)


def kendall(score: Values, truth: Values, *, seed: int = 0) -> Interval:
    """Kendall's tau-b of a score with the truth, ``(N,)`` each; N must be at least 3."""
    return _bootstrapped(_kendall, score, truth, seed=seed)


def reliability(values: Values) -> float:
    """Share of the variance of single distillations that the layouts make, and not the seeds.

    The intraclass correlation ICC(1, 1) of Shrout and Fleiss (1979): 1 if seeds change nothing, 0
    (or below) if layouts do not.

    Args:
        values: ``(N, S)``, with at least two of each.
    """
    num, seeds = values.shape
    if num < 2 or seeds < 2:
        raise ValueError(f"at least two layouts and two seeds are needed, but got {num} x {seeds}")
    means = values.mean(axis=1)
    between = seeds * means.var(ddof=1)
    within = values.var(axis=1, ddof=1).mean()
    return float((between - within) / (between + (seeds - 1) * within))


def ceiling(values: Values) -> float | None:
    """Rank correlation that even a perfect score could expect with one distillation each.

    The mean over pairs of seeds of Spearman's correlation between them is the square of what each
    has with the truth behind both, so the ceiling is its root. A seed in which all layouts are
    equal has no order and is left out.

    Args:
        values: ``(N, S)``, with at least two seeds.

    Returns:
        None if fewer than two seeds tell layouts apart.
    """
    telling = [seed for seed in values.T if np.ptp(seed)]
    whole = np.arange(len(values))[None]
    found = [_spearman(*pair, whole) for pair in itertools.combinations(telling, 2)]
    return float(np.sqrt(max(0.0, float(np.mean(found))))) if found else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Regret:
    """What a choice costs, as shares of (mean of layouts drawn at random - best)."""

    objective: float
    """The truth of the objective's own optimum: what a perfect search for it would cost."""
    strategy: float
    """What the pick costs beyond that: below 0 where missing the optimum was lucky."""
    within: tuple[float, float] | None = None
    """Where the total lies with 95 %, see :func:`regret_within`; None where that is not known."""

    @property
    def total(self) -> float:
        return self.objective + self.strategy


def regret(
    score: Values, truth: Values, pick: int, *, drawn: Sequence[int] | None = None
) -> Regret:
    """Regret of picking one layout, split into what the objective and what the strategy costs.

    The best layout of a noisy truth was lucky too. So each seed judges what is best by the others,
    and the mean over the seeds is told; with a single seed what is best by it.

    Args:
        score: What was searched by, ``(N,)``; lower is better.
        truth: Of each layout distilled with each seed, ``(N, S)``; lower is better.
        pick: The strategy's choice, a place in both.
        drawn: Places of the layouts that were drawn at random; None if all of them were.

    Raises:
        ValueError: By a seed, the best layout is not better than the mean of all.
    """
    optimum, found = int(np.argmin(score)), []
    for chosen, judged in _turns(truth):
        best = judged[int(np.argmin(chosen))]
        scale = (judged if drawn is None else judged[list(drawn)]).mean() - best
        if scale <= 0:
            raise ValueError("the best layout must be better than the mean of all, but is not")
        found.append(((judged[optimum] - best) / scale, (judged[pick] - judged[optimum]) / scale))
    objective, strategy = np.mean(found, axis=0)
    return Regret(objective=float(objective), strategy=float(strategy))


def regret_within(
    truth: Values, pick: int, *, drawn: Sequence[int] | None = None, seed: int = 0
) -> tuple[float, float]:
    """Where 95 % of a pick's total regrets lie over resampled text and layouts drawn at random.

    Args:
        truth: ``(N, S, B)``, the same B blocks of text or parts of a probe for each layout and
            seed; lower is better. In each sample the best is chosen anew.
        pick: The strategy's choice.
        drawn: As of :func:`regret`.
        seed: Of the samples.

    Raises:
        ValueError: In no sample is the best layout better than the mean of all.
    """
    size = truth.shape[2]
    rng = np.random.default_rng(seed)
    times = rng.multinomial(size, np.full(size, 1 / size), size=REPEATS)
    again = None
    if drawn is not None:
        again = np.array(drawn)[rng.integers(len(drawn), size=(len(drawn), REPEATS))]
    turns = []
    for chosen, judged in _turns(truth @ times.T / size):
        best = judged[chosen.argmin(axis=0), np.arange(REPEATS)]
        some = judged if again is None else judged[again, np.arange(REPEATS)]
        mean = some.mean(axis=0)
        # Where the best is no better than the mean of all, there is nothing to choose.
        scale = np.where(mean > best, mean - best, np.nan)
        turns.append((judged[pick] - best) / scale)
    regrets = np.mean(turns, axis=0)
    regrets = regrets[np.isfinite(regrets)]
    if not len(regrets):
        raise ValueError("the best layout must be better than the mean of all, but is not")
    low, high = np.quantile(regrets, [0.025, 0.975])
    return float(low), float(high)


def _turns(truth: Values) -> Iterator[tuple[Values, Values]]:
    """``(N, S, ...)`` -> for each seed the mean of the others, and itself; a single one twice."""
    if truth.shape[1] == 1:
        yield truth[:, 0], truth[:, 0]
        return
    for seed in range(truth.shape[1]):
        yield np.delete(truth, seed, axis=1).mean(axis=1), truth[:, seed]


def paired(
    gaps: Sequence[tuple[float, Values]], *, spread: float = 0.0, several: int = 1
) -> Interval:
    """Weighted sum of mean gaps between two layouts, with a t interval (Welch 1947).

    A bootstrap's percentiles are too narrow for a few items, the more so far out in the tails.

    Args:
        gaps: Weight, and gaps ``(B,)`` over blocks of text or parts of a probe, two at least. Two
            figures' items have nothing to do with each other.
        spread: Variance of the sum that comes from elsewhere, such as seeds.
        several: Comparisons of which the intervals are to hold together (Bonferroni).
    """
    errors = [weight**2 * values.var(ddof=1) / len(values) for weight, values in gaps]
    value = float(sum(weight * values.mean() for weight, values in gaps))
    total = sum(errors) + spread
    if not total:
        return Interval(value=value, low=value, high=value)
    unsure = sum(e**2 / (len(values) - 1) for e, (_, values) in zip(errors, gaps, strict=True))
    freedom = total**2 / unsure if unsure else np.inf
    tail = (1 - COVERAGE) / 2 / several
    half = float(stats.t.ppf(1 - tail, freedom) * np.sqrt(total))
    return Interval(value=value, low=value - half, high=value + half)


def tied_with_best(blocks: Values, *, within: float = 2.0) -> list[int]:
    """Layouts whose mean over blocks is within noise of the lowest one's, that one included.

    Args:
        blocks: ``(N, B)``, the same B blocks of text for each.
        within: Standard errors of the mean paired difference.
    """
    best = int(blocks.mean(axis=1).argmin())
    gaps = blocks - blocks[best]
    errors = gaps.std(axis=1, ddof=1) / np.sqrt(blocks.shape[1])
    return [i for i in range(len(blocks)) if i == best or gaps[i].mean() <= within * errors[i]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """How much of a value the layers tell, on layouts that a model has not seen."""

    additive: float
    """R² of a sum of one effect a layer."""
    pairwise: float
    """R² with an effect of each pair of layers too, shrunk as suits these layouts best, which
    flatters it a little."""


def fit_layers(kept: Values, values: Values, *, folds: int = 5, seed: int = 0) -> Fit:
    """Cross-validated R² of additive and pairwise models.

    Args:
        kept: 1 where a layout keeps attention in a layer, else 0, ``(N, L)``.
        values: ``(N,)``
        folds: Parts, each predicted by a fit to the others.
        seed: Of the parts.
    """
    order = np.random.default_rng(seed).permutation(len(values))
    parts = np.array_split(order, folds)
    upper = np.triu_indices(kept.shape[1], 1)
    pairs = kept[:, upper[0]] * kept[:, upper[1]]
    both = np.concatenate([kept, pairs], axis=1)

    def explained(features: Values, strengths: tuple[float, ...]) -> float:
        best = -np.inf
        for strength in strengths:
            missed = 0.0
            for part in parts:
                rest = np.setdiff1d(order, part)
                predicted = _ridge(features[rest], values[rest], features[part], strength)
                missed += float(((values[part] - predicted) ** 2).sum())
            best = max(best, 1 - missed / float(((values - values.mean()) ** 2).sum()))
        return float(best)

    return Fit(
        additive=explained(kept, (1e-6,)), pairwise=explained(both, (1e-3, 1e-2, 0.1, 1.0, 10.0))
    )


def _ridge(features: Values, values: Values, wanted: Values, strength: float) -> Values:
    centre, mean = features.mean(axis=0), values.mean()
    x = features - centre
    gram = x.T @ x + strength * np.eye(x.shape[1])
    found: Values = mean + (wanted - centre) @ np.linalg.solve(gram, x.T @ (values - mean))
    return found


def _bootstrapped(
    figure: Callable[[Values, Values, Places], Values], one: Values, other: Values, *, seed: int
) -> Interval:
    size = len(one)
    if size != len(other) or size < 3:
        raise ValueError(f"needs as many of both, three at least, but got {size}, {len(other)}")
    places = np.random.default_rng(seed).integers(size, size=(REPEATS, size))
    found = figure(one, other, places)
    # A sample of one layout alone has no order; where all are equal there is none at all.
    drawn = found[np.isfinite(found)] if np.isfinite(found).any() else [np.nan]
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    (value,) = figure(one, other, np.arange(size)[None])
    return Interval(value=float(value), low=float(low), high=float(high))


def _spearman(one: Values, other: Values, places: Places) -> Values:
    """In each sample: ``(N,)``, ``(N,)``, places ``(R, N)`` -> ``(R,)``; nan without an order."""
    x, y = (stats.rankdata(values[places], axis=1) for values in (one, other))
    x, y = (ranks - ranks.mean(axis=1, keepdims=True) for ranks in (x, y))
    return _share((x * y).sum(axis=1), (x * x).sum(axis=1), (y * y).sum(axis=1))


def _kendall(one: Values, other: Values, places: Places) -> Values:
    """Tau-b, as :func:`_spearman`, from how often a sample holds each pair of layouts.

    Products of matrices in place of thousands of sorted samples.
    """
    samples, size = places.shape
    rows = size * np.arange(samples)[:, None]
    times = np.bincount((rows + places).ravel(), minlength=samples * size)
    times = times.reshape(samples, size).astype(np.float64)
    x, y = (np.sign(values[:, None] - values) for values in (one, other))
    return _share(*(((times @ pairs) * times).sum(axis=1) for pairs in (x * y, x * x, y * y)))


def _share(both: Values, first: Values, second: Values) -> Values:
    with np.errstate(invalid="ignore"):
        found: Values = both / np.sqrt(first * second)
    return found
