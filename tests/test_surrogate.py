"""The surrogate: what it fits, and that its optimum is the one that looking at everything finds."""

import itertools
import random

import numpy as np
import pytest
from synthetic_search import SyntheticScorer, make, make_space

from mohawk_nas.layout import ATTENTION
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.strategies import surrogate
from mohawk_nas.search.strategies.surrogate import (
    PAIR_SCALES,
    RIDGES,
    Codes,
    Limit,
    LinearModel,
    fit,
    minimise,
)
from mohawk_nas.search.strategy import SearchContext, build_strategy

SPACES = {
    "plain": (9, 4, {}),
    "none kept": (4, 0, {"replacements": ("a", "b")}),
    "one kept": (8, 1, {}),
    "all but one kept": (8, 7, {}),
    "pinned": (9, 4, {"pinned": {0: ATTENTION, 3: "ssm", 8: ATTENTION}}),
    "three candidates": (5, 2, {"replacements": ("a", "b", "c")}),
    "both": (6, 3, {"replacements": ("a", "b"), "pinned": {1: "b", 2: ATTENTION}}),
}


def random_model(columns, seed, *, pairwise):
    rng = np.random.default_rng(seed)
    pairs = np.triu(rng.normal(size=(columns, columns)), 1)
    return LinearModel(effects=rng.normal(size=columns), pairs=pairs if pairwise else None)


def in_words(model, codes, layout):
    """The prediction, term by term."""
    held = [j for j, (layer, name) in enumerate(codes.choices) if layout[layer] == name]
    value = sum(model.effects[j] for j in held)
    if model.pairs is not None:
        value += sum(model.pairs[j, k] for j, k in itertools.combinations(held, 2))
    return value


@pytest.mark.parametrize("pairwise", [False, True])
@pytest.mark.parametrize("name", SPACES)
def test_the_programs_optima_are_those_of_enumeration_one_after_the_other(name, pairwise):
    num_layers, num_attention, options = SPACES[name]
    space, budget = make_space(num_layers, **options), Budget(attention_layers=num_attention)
    codes = Codes.of(space)
    layouts = list(budget.enumerate(space))
    for seed in range(2):
        model = random_model(len(codes.choices), seed, pairwise=pairwise)
        order = sorted(layouts, key=lambda layout: in_words(model, codes, layout))
        for most in (0, 4096):
            # Each optimum is cut off before the next is asked for.
            for i, expected in enumerate(order[:4]):
                found = minimise(model, space, budget, seen=order[:i], enumerated=most)
                assert found == expected
            last = minimise(model, space, budget, seen=order[:-1], enumerated=most)
            assert last == order[-1]
            assert minimise(model, space, budget, seen=order, enumerated=most) is None


@pytest.mark.parametrize("most", [0, 4096])
def test_further_limits_hold(most):
    space, budget = make_space(8, replacements=("a", "b")), Budget(attention_layers=3)
    codes = Codes.of(space)
    rng = np.random.default_rng(3)
    costs = {(i, name): float(rng.uniform()) for i in range(8) for name in space.candidates}
    early = Limit(costs={(i, ATTENTION): 1.0 for i in range(4)}, most=1.0)
    for seed in range(3):
        model = random_model(len(codes.choices), seed, pairwise=True)
        layouts = sorted(budget.enumerate(space), key=lambda layout: in_words(model, codes, layout))
        used = [sum(costs[i, name] for i, name in enumerate(x.candidates)) for x in layouts]
        dear = Limit(costs=costs, most=sorted(used)[len(used) // 8])
        expected = next(
            layout
            for layout, cost in zip(layouts, used, strict=True)
            if cost <= dear.most and sum(i < 4 for i in layout.attention_layers) <= 1
        )
        assert expected != layouts[0]
        found = minimise(model, space, budget, seen=(), limits=[early, dear], enumerated=most)
        assert found == expected
    never = Limit(costs=costs, most=-1.0)
    assert minimise(model, space, budget, seen=(), limits=[never], enumerated=most) is None


def test_a_space_too_large_to_look_at_is_solved():
    # 593,775 layouts; all single swaps around the answer are worse.
    space, budget = make_space(30), Budget(attention_layers=6)
    model = random_model(30, 5, pairwise=True)
    model = LinearModel(effects=2 * model.effects, pairs=model.pairs / 4)
    found = minimise(model, space, budget, seen=())
    codes = Codes.of(space)
    budget.check(found)
    for out in found.attention_layers:
        for into in found.replaced_layers:
            near = found.with_candidate(out, "ssm").with_candidate(into, ATTENTION)
            assert in_words(model, codes, near) > in_words(model, codes, found)


@pytest.mark.parametrize("options", [{}, {"replacements": ("a", "b")}])
@pytest.mark.parametrize("pairwise", [False, True])
def test_a_model_predicts_what_it_can_express(pairwise, options):
    _, space, budget = make(7, 3, **options)
    scorer = SyntheticScorer(7, pairs=3.0 if pairwise else 0.0, replacements=space.replacements)
    layouts = list(budget.enumerate(space))
    random.Random(0).shuffle(layouts)
    known, new = layouts[: len(layouts) * 4 // 5], layouts[len(layouts) * 4 // 5 :]
    codes = Codes.of(space)
    values = np.array([scorer.exact(layout) for layout in known])
    model = fit(codes.matrix(known), values, pairwise=pairwise)
    assert (model.pairs is not None) == pairwise
    predicted = model.predict(codes.matrix(new))
    assert predicted == pytest.approx([in_words(model, codes, layout) for layout in new])
    exact = np.array([scorer.exact(layout) for layout in new])
    # Up to a constant.
    errors = (predicted - predicted.mean()) - (exact - exact.mean())
    assert np.abs(errors).max() < 0.02 * exact.std()
    if pairwise:
        poor = fit(codes.matrix(known), values, pairwise=False).predict(codes.matrix(new))
        assert np.corrcoef(poor, exact)[0, 1] < 0.99


def test_the_penalty_has_the_smallest_error_of_leaving_one_out():
    rng = np.random.default_rng(1)
    _, space, budget = make(6, 2)
    codes = Codes.of(space).matrix(list(budget.enumerate(space)))[:11]
    values = codes @ rng.normal(size=6) + 0.3 * rng.normal(size=11)
    columns = list(itertools.combinations(range(6), 2))

    def predictions(train, scale, ridge, wanted):
        # Ridge regression written out, with an unpenalised constant.
        full = np.hstack([codes] + [scale**0.5 * codes[:, [j]] * codes[:, [k]] for j, k in columns])
        inner, mean = full[train] - full[train].mean(0), values[train].mean()
        weights = np.linalg.solve(
            inner.T @ inner + ridge * np.eye(full.shape[1]), inner.T @ (values[train] - mean)
        )
        return mean + (full[wanted] - full[train].mean(0)) @ weights

    everything = np.arange(11)
    found = {}
    for scale, share in itertools.product(PAIR_SCALES, RIDGES):
        inner = codes @ codes.T
        kernel = inner + scale * (inner**2 - inner) / 2
        centre = np.eye(11) - 1 / 11
        ridge = share * np.trace(centre @ kernel @ centre) / 11
        left_out = [predictions(np.delete(everything, i), scale, ridge, [i])[0] for i in range(11)]
        found[scale, ridge] = np.mean((np.array(left_out) - values) ** 2)
    scale, ridge = min(found, key=found.get)
    expected = predictions(everything, scale, ridge, everything)
    model = fit(codes, values, pairwise=True)
    predicted = model.predict(codes)
    assert predicted - predicted.mean() == pytest.approx(expected - expected.mean(), abs=1e-6)
    # The choice matters here: another penalty predicts something else.
    other = predictions(everything, scale, 30 * ridge, everything)
    assert np.abs(other - expected).max() > 0.01


@pytest.mark.parametrize("pairwise", [False, True])
def test_draws_scatter_around_the_fit_and_more_where_less_is_known(pairwise):
    rng = np.random.default_rng(0)
    _, space, budget = make(9, 3)
    layouts = list(budget.enumerate(space))
    random.Random(1).shuffle(layouts)
    codes = Codes.of(space).matrix(layouts)
    values = codes @ rng.normal(size=9) + 0.2 * rng.normal(size=len(layouts))

    def draws(count):
        drawn = [
            fit(codes[:count], values[:count], pairwise=pairwise, rng=rng).predict(codes)
            for _ in range(300)
        ]
        return np.array([each - each.mean() for each in drawn])

    mean = fit(codes[:20], values[:20], pairwise=pairwise).predict(codes)
    few, many = draws(20), draws(70)
    spread = few.std(axis=0)
    assert np.abs(few.mean(axis=0) - (mean - mean.mean())).max() < 5 * spread.max() / 300**0.5
    assert spread.min() > 0 and many.std() < few.std()
    assert many.std(axis=0).mean() < 0.8 * spread.mean()


def propose(choice, finished, space, budget, seed=0):
    return build_strategy(choice).propose(
        SearchContext(
            space=space,
            budget=budget,
            weights={"kl": 1.0},
            finished=finished,
            pending=[],
            seed=seed,
            probe=None,
            stage2_losses=None,
        )
    )


@pytest.mark.parametrize("model", ["additive", "pairwise"])
@pytest.mark.parametrize("solver", ["enumeration", "program"])
def test_it_proposes_the_best_of_what_is_unseen(model, solver, monkeypatch):
    monkeypatch.setattr(surrogate, "ENUMERATED", 4096 if solver == "enumeration" else 0)
    _, space, budget = make(9, 3)
    scorer = SyntheticScorer(9, pairs=0.0 if model == "additive" else 1.0)
    layouts = sorted(budget.enumerate(space), key=scorer.exact)
    # All but the best ten are known, and what is to be known of the others follows from them.
    finished = [(layout, scorer.exact(layout)) for layout in layouts[10:]]
    for expected in layouts[:10]:
        proposal = propose(
            {"name": "surrogate", "model": model, "explore": "none"}, finished, space, budget
        )
        # Some sums are equal.
        assert scorer.exact(proposal.layout) == pytest.approx(scorer.exact(expected))
        finished.append((proposal.layout, scorer.exact(proposal.layout)))


def test_draws_differ_from_seed_to_seed_and_the_mean_does_not():
    _, space, budget = make(9, 3)
    scorer = SyntheticScorer(9, pairs=2.0)
    finished = [(x, scorer.exact(x)) for x in list(budget.enumerate(space))[::7]]
    for explore, most in (("none", 1), ("thompson", 20)):
        choice = {"name": "surrogate", "explore": explore}
        found = {propose(choice, finished, space, budget, seed).layout for seed in range(20)}
        assert (len(found) == 1) == (most == 1)


def test_when_time_runs_out_a_layout_is_drawn(monkeypatch):
    monkeypatch.setattr(surrogate, "ENUMERATED", 0)
    _, space, budget = make(9, 3)
    finished = [(x, float(i)) for i, x in enumerate(budget.enumerate(space)) if i % 8 == 0]
    proposal = propose({"name": "surrogate", "time_limit": 0.0}, finished, space, budget)
    assert proposal.proposed_by == "surrogate(time_limit=0.0):fallback"
    assert proposal.layout not in dict(finished)
    budget.check(proposal.layout)


def test_the_design_comes_first():
    _, space, budget = make(9, 3)
    finished = [(x, float(i)) for i, x in enumerate(budget.enumerate(space))][:4]
    choice = {"name": "surrogate", "design": 5}
    assert propose(choice, finished, space, budget).proposed_by == "surrogate(design=5):design"
    finished = [(x, float(i)) for i, x in enumerate(budget.enumerate(space))][:5]
    assert propose(choice, finished, space, budget).proposed_by == "surrogate(design=5)"
