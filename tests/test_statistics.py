import itertools

import numpy as np
import pytest
from scipy import stats

from mohawk_nas.search import statistics


def sample(num=60, noise=0.3, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=num)
    return truth + noise * rng.normal(size=num), truth


def test_rank_correlations_are_scipys_and_lie_in_their_intervals():
    score, truth = sample()
    score[:5] = score[0]
    for found, expected in (
        (statistics.spearman(score, truth), stats.spearmanr(score, truth).statistic),
        (statistics.kendall(score, truth), stats.kendalltau(score, truth).statistic),
    ):
        assert found.value == pytest.approx(expected, rel=1e-9)
        assert found.low < found.value < found.high <= 1
    assert statistics.spearman(truth, truth).low == 1
    assert str(statistics.spearman(truth, -truth)) == "-1.00 [-1.00, -1.00]"


@pytest.mark.parametrize(
    ("figure", "alone"),
    [(statistics.spearman, stats.spearmanr), (statistics.kendall, stats.kendalltau)],
)
def test_intervals_are_those_of_samples_taken_one_by_one(figure, alone, monkeypatch):
    monkeypatch.setattr(statistics, "REPEATS", 200)
    score, truth = (values[:12].round(1) for values in sample())
    rng = np.random.default_rng(3)
    places = [rng.integers(12, size=12) for _ in range(200)]
    drawn = [alone(score[some], truth[some]).statistic for some in places]
    found = figure(score, truth, seed=3)
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]))


def test_an_interval_holds_the_truth_as_often_as_it_says():
    # Of a bivariate normal Spearman's correlation is 6/pi asin(r/2).
    expected = 6 / np.pi * np.arcsin(0.8 / 2)
    held = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=80)
        y = 0.8 * x + 0.6 * rng.normal(size=80)
        found = statistics.spearman(x, y, seed=seed)
        held += found.low <= expected <= found.high
    assert 50 <= held <= 60


def test_fewer_layouts_give_wider_intervals():
    score, truth = sample(200)
    whole, part = statistics.spearman(score, truth), statistics.spearman(score[:30], truth[:30])
    assert part.high - part.low > 1.5 * (whole.high - whole.low)
    with pytest.raises(ValueError, match="three at least"):
        statistics.spearman(score[:2], truth[:2])


@pytest.mark.parametrize("noise", [0.1, 1.0, 3.0])
def test_reliability_is_the_share_of_variance_between_layouts(noise):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4000, 1)) + noise * rng.normal(size=(4000, 3))
    assert statistics.reliability(values) == pytest.approx(1 / (1 + noise**2), abs=0.03)
    with pytest.raises(ValueError, match="two seeds"):
        statistics.reliability(values[:, :1])


def test_the_ceiling_is_what_a_perfect_score_reaches():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=4000)
    values = truth[:, None] + 0.7 * rng.normal(size=(4000, 3))
    reached = stats.spearmanr(truth, values[:, 0]).statistic
    assert statistics.ceiling(values) == pytest.approx(reached, abs=0.02)
    # A seed in which nothing is told apart says nothing of the others.
    same = np.zeros(len(truth))
    assert statistics.ceiling(np.column_stack([same, truth, truth + 1])) == pytest.approx(1)
    assert statistics.ceiling(np.column_stack([same, truth])) is None


def test_where_all_are_equal_there_is_no_order():
    assert np.isnan(statistics.spearman(np.arange(12.0), np.zeros(12)).low)


def test_regret_is_split_and_normalised():
    truth = np.array([1.0, 2.0, 3.0, 6.0])  # mean 3, best 1
    score = np.array([9.0, 5.0, 7.0, 8.0])
    one = truth[:, None]
    found = statistics.regret(score, one, pick=2)
    assert (found.objective, found.strategy, found.total) == (0.5, 0.5, 1.0)
    # A lucky pick: the search missed the objective's optimum.
    assert statistics.regret(score, one, pick=0).strategy == -0.5
    # Each seed judges what the other finds best: the first 1 of a mean of 3, the second, by which
    # it is the second place, 1.5 of 3.5.
    both = np.stack([truth, [2.0, 1.0, 3.0, 8.0]], axis=1)
    found = statistics.regret(score, both, pick=2)
    assert found.total == pytest.approx(((3 - 2) / (3 - 2) + (3 - 2) / (3.5 - 2)) / 2)
    assert found.objective == pytest.approx(((2 - 2) / 1 + (1 - 2) / 1.5) / 2)
    with pytest.raises(ValueError, match="better than the mean"):
        statistics.regret(score, np.ones((4, 1)), pick=0)
    with pytest.raises(ValueError, match="better than the mean"):
        statistics.regret(score, np.stack([truth, [9.0, 1.0, 1.0, 1.0]], axis=1), pick=0)
    # A share of what layouts drawn at random give: (3 + 6) / 2 - 1.
    drawn = statistics.regret(score, one, pick=2, drawn=[2, 3])
    assert drawn.total == pytest.approx(2 / 3.5) and drawn.objective == pytest.approx(1 / 3.5)


def test_regret_lies_within_its_interval():
    rng = np.random.default_rng(0)
    # 40 blocks differ by far more than layouts do, but are the same for all of them.
    means, blocks = np.array([1.0, 1.2, 2.0, 3.8]), 5 * rng.normal(size=40)
    truth = means[:, None, None] + blocks + 0.2 * rng.normal(size=(4, 1, 40))
    low, high = statistics.regret_within(truth, 1)
    told = statistics.regret(means, truth.mean(axis=2), 1).total
    assert low < told < high and low > 0.02 and high < 0.3
    assert statistics.regret_within(truth, 0) == (0.0, 0.0)
    # Of two drawn layouts the mean may be that of either; of one, it is that one.
    low, high = statistics.regret_within(truth, 1, drawn=[2, 3])
    assert low < 0.2 / 2.8 + 0.03 and high > 0.2 / 1.0 - 0.03 and high > 0.1 > low
    low, high = statistics.regret_within(truth, 1, drawn=[3])
    assert low < 0.2 / 2.8 < high < 0.15
    with pytest.raises(ValueError, match="better than the mean"):
        statistics.regret_within(np.ones((4, 1, 40)), 1)
    # The best of a tie is chosen by some seeds and judged by another, so it may lose there.
    tied = np.array([1.0, 1.0, 2.0, 3.8])[:, None, None] + 0.2 * rng.normal(size=(4, 3, 40))
    low, high = statistics.regret_within(tied, 1)
    told = statistics.regret(means, tied.mean(axis=2), 1).total
    assert low < 0 < high and low < told < high


def test_paired_gaps_lie_in_their_intervals_as_often_as_these_say():
    rng, within = np.random.default_rng(0), 0
    alone, number = {8: 0, 48: 0}, 2000
    for _ in range(number):
        blocks, notations = rng.normal(0.1, 1.0, 48), rng.normal(-0.3, 0.5, 8)
        found = statistics.paired([(1.0, blocks), (2.0, notations)])
        assert found.value == pytest.approx(blocks.mean() + 2 * notations.mean())
        within += found.low < 0.1 - 2 * 0.3 < found.high
        for items, truth in ((blocks, 0.1), (notations, -0.3)):
            found = statistics.paired([(1.0, items)])
            alone[len(items)] += found.low < truth < found.high
    # Within three standard errors of 95 %.
    assert all(0.935 < count / number < 0.965 for count in (within, *alone.values()))
    one, ten = (statistics.paired([(1.0, blocks)], several=n) for n in (1, 10))
    half = stats.t.ppf(1 - 0.0025, 47) * blocks.std(ddof=1) / 48**0.5
    assert ten.high - ten.value == pytest.approx(half) and one.high < ten.high
    # What seeds do besides comes on top, and is known well.
    wide = statistics.paired([(1.0, 1e-9 * blocks)], spread=0.04)
    assert wide.high - wide.value == pytest.approx(1.96 * 0.2, rel=1e-3)
    same = statistics.paired([(1.0, np.ones(4))])
    assert (same.low, same.value, same.high) == (1.0, 1.0, 1.0)


def test_the_tied_layouts_are_those_a_paired_test_cannot_tell():
    rng = np.random.default_rng(0)
    common = 5 * rng.normal(size=100)
    means = np.array([0.0, 0.01, 0.5, 3.0])
    blocks = means[:, None] + common + 0.2 * rng.normal(size=(4, 100))
    assert set(statistics.tied_with_best(blocks)) == {0, 1}
    # Unpaired, the text's own spread would hide 0.5.
    assert blocks.std() > 4


def test_models_explain_what_they_can():
    layouts = np.array(list(itertools.product([0.0, 1.0], repeat=8)))
    kept = layouts[layouts.sum(axis=1) == 4]
    rng = np.random.default_rng(0)
    effects = rng.normal(size=8)
    additive = statistics.fit_layers(kept, kept @ effects)
    assert additive.additive == pytest.approx(1, abs=1e-4)
    pairs = rng.normal(size=(8, 8))
    interacting = np.einsum("ni,ij,nj->n", kept, pairs, kept)
    found = statistics.fit_layers(kept, interacting)
    assert found.pairwise > 0.95 > 0.8 > found.additive
    noise = statistics.fit_layers(kept, rng.normal(size=len(kept)))
    assert noise.additive < 0.2 and noise.pairwise < 0.2
