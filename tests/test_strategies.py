"""The strategies: rules checked by hand, samplers that never repeat or leave the budget."""

import importlib.util
import itertools
import json
import random
import sys
from pathlib import Path

import pytest
from synthetic_search import SyntheticScorer, make, make_space

from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.search.strategies._sampling import _nearest_unseen
from mohawk_nas.search.strategy import (
    SearchContext,
    Selector,
    build_strategy,
    random_unseen,
    solve_local,
    strategy_names,
)
from mohawk_nas.search.study import trial_seed

SAMPLERS = ("tpe", "random", "exhaustive")


def context(space, budget, scorer, *, finished=(), pending=(), seed=0):
    return SearchContext(
        space=space,
        budget=budget,
        weights={"kl": 1.0},
        finished=list(finished),
        pending=list(pending),
        seed=seed,
        probe=scorer.score,
        stage2_losses=scorer.stage2_losses,
    )


def chosen(name, num_layers, num_attention, *, scorer=None, **space_options):
    _, space, budget = make(num_layers, num_attention, **space_options)
    scorer = scorer or SyntheticScorer(num_layers, replacements=space.replacements)
    found = build_strategy(name).layouts(context(space, budget, scorer))
    for _, layout in found:
        space.check(layout)
        budget.check(layout)
    return dict(found)


def kept(layouts):
    return [layout.attention_layers for layout in layouts.values()]


def search(name, space, budget, scorer, *, num_trials, seed=0):
    strategy, finished, names = build_strategy(name), [], []
    while len(finished) < num_trials:
        seeded = trial_seed(seed, len(finished))
        proposal = strategy.propose(context(space, budget, scorer, finished=finished, seed=seeded))
        if proposal is None:
            break
        space.check(proposal.layout)
        budget.check(proposal.layout)
        finished.append((proposal.layout, scorer.exact(proposal.layout)))
        names.append(proposal.proposed_by)
    return [layout for layout, _ in finished], names


def test_every_registered_strategy_loads():
    for name in strategy_names():
        strategy = build_strategy(name)
        assert strategy.__doc__
        # Without options these two are the same as a short name.
        expected = {"block": "middle", "ranking": "stage2_rank"}.get(name, name)
        assert strategy.label == expected


def test_uniform_takes_every_phase():
    assert kept(chosen("uniform", 24, 4)) == [(s, s + 6, s + 12, s + 18) for s in range(6)], (
        "the authors' layout 4, 10, 16, 22 is phase 4"
    )
    assert kept(chosen("uniform", 8, 2)) == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert kept(chosen("uniform", 5, 2)) == [(0, 2), (0, 3), (1, 3), (1, 4), (2, 4)]
    assert kept(chosen("uniform", 4, 4)) == [(0, 1, 2, 3)]
    assert kept(chosen("uniform", 4, 0)) == [()]
    assert list(chosen("uniform", 4, 2)) == ["uniform/0", "uniform/1"]


def test_uniform_matches_its_formula_for_a_fine_grid_of_phases():
    for num_layers, num_attention in itertools.product(range(1, 13), range(1, 8)):
        if num_attention > num_layers:
            continue
        grid = {
            tuple(
                (i * 997 + phase) * num_layers // (997 * num_attention)
                for i in range(num_attention)
            )
            for phase in range(997)
        }
        assert set(kept(chosen("uniform", num_layers, num_attention))) == grid


def test_uniform_spaces_the_layers_that_are_free():
    # Layers 0 and 5 are pinned, so one of 1, 2, 3, 4 is to choose.
    found = kept(chosen("uniform", 6, 2, pinned={0: ATTENTION, 5: "ssm"}))
    assert found == [(0, 1), (0, 2), (0, 3), (0, 4)]


def test_first_and_last():
    assert kept(chosen("first", 6, 2)) == [(0, 1)]
    assert kept(chosen("last", 6, 2)) == [(4, 5)]
    assert kept(chosen("first", 6, 2, pinned={0: "ssm", 5: ATTENTION})) == [(1, 5)]
    assert kept(chosen("last", 6, 0)) == [()]


@pytest.mark.parametrize("name", ["stage2_rank", "swap_one", "add_one_in", "greedy"])
@pytest.mark.parametrize("num_attention", [0, 1, 3, 7, 8])
def test_a_sum_over_layers_is_solved_by_every_ranking(name, num_attention):
    scorer = SyntheticScorer(8)
    _, space, budget = make(8, num_attention)
    best = min(budget.enumerate(space), key=scorer.exact)
    assert list(chosen(name, 8, num_attention, scorer=scorer).values()) == [best]


@pytest.mark.parametrize("name", ["stage2_rank", "swap_one", "add_one_in", "greedy"])
def test_rankings_respect_pins_and_take_the_better_replacement(name):
    options = {"replacements": ("a", "b"), "pinned": {0: "b", 3: ATTENTION}}
    _, space, budget = make(7, 3, **options)
    scorer = SyntheticScorer(7, replacements=("a", "b"))
    best = min(budget.enumerate(space), key=scorer.exact)
    assert list(chosen(name, 7, 3, scorer=scorer, **options).values()) == [best]
    assert {"a", "b"} < set(best.candidates)


def test_greedy_goes_step_by_step_where_layers_interact():
    scorer = SyntheticScorer(7, pairs=3.0)
    layout = chosen("greedy", 7, 3, scorer=scorer)["greedy"]
    expected: list[int] = []
    for _ in range(3):
        rest = [i for i in range(7) if i not in expected]
        expected.append(
            min(
                rest,
                key=lambda i: scorer.exact(
                    Layout.keeping([*expected, i], num_layers=7, replacement="ssm")
                ),
            )
        )
    assert layout.attention_layers == tuple(sorted(expected))


@pytest.mark.parametrize("name", strategy_names())
def test_planned_probes_are_those_made(name):
    strategy = build_strategy(name)
    if not isinstance(strategy, Selector):
        pytest.skip("makes no probes")
    _, space, budget = make(6, 3, pinned={2: ATTENTION})
    scorer = SyntheticScorer(6)
    strategy.layouts(context(space, budget, scorer))
    assert len(scorer.scored) == strategy.num_probes(space, budget)


def test_a_selector_as_the_strategy_proposes_its_layouts_one_by_one():
    _, space, budget = make(8, 2)
    layouts, names = search("uniform", space, budget, SyntheticScorer(8), num_trials=99)
    assert [layout.attention_layers for layout in layouts] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert names == [f"uniform/{i}" for i in range(4)]


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    "options", [{}, {"replacements": ("a", "b"), "pinned": {1: "b", 4: ATTENTION}}]
)
def test_samplers_visit_the_whole_space_once_and_stop(name, options):
    num_layers, num_attention = (8, 2) if not options else (5, 3)
    _, space, budget = make(num_layers, num_attention, **options)
    scorer = SyntheticScorer(num_layers, pairs=1.0, replacements=space.replacements)
    layouts, names = search(name, space, budget, scorer, num_trials=999)
    assert len(layouts) == budget.count(space) == len(set(layouts))
    assert {each.partition(":")[0] for each in names} == {name}
    assert search(name, space, budget, scorer, num_trials=999) == (layouts, names)


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_samplers_depend_on_the_seed(name):
    _, space, budget = make(8, 2)
    scorer = SyntheticScorer(8, pairs=1.0)
    one, _ = search(name, space, budget, scorer, num_trials=10, seed=1)
    assert one != search(name, space, budget, scorer, num_trials=10, seed=2)[0]


def test_tpe_finds_good_layouts_sooner_than_chance():
    _, space, budget = make(12, 3)
    scorer = SyntheticScorer(12, pairs=0.5)
    values = sorted(scorer.exact(layout) for layout in budget.enumerate(space))
    mean = sum(values) / len(values)

    def regret(name, seed):
        layouts, _ = search(name, space, budget, scorer, num_trials=24, seed=seed)
        best = min(scorer.exact(layout) for layout in layouts)
        return (best - values[0]) / (mean - values[0])

    tpe = sum(regret("tpe", seed) for seed in range(3)) / 3
    chance = sum(regret("random", seed) for seed in range(20)) / 20
    assert tpe < chance / 2


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_leave_out_what_others_are_scoring(name):
    _, space, budget = make(5, 2)
    scorer = SyntheticScorer(5)
    every = list(budget.enumerate(space))
    finished = [(layout, scorer.exact(layout)) for layout in every[:6]]
    for seed in range(5):
        proposal = build_strategy(name).propose(
            context(space, budget, scorer, finished=finished, pending=every[6:9], seed=seed)
        )
        assert proposal is not None and proposal.layout == every[9]


def test_tpe_takes_scores_that_are_not_finite():
    _, space, budget = make(6, 2)
    scorer = SyntheticScorer(6)
    finished = [(layout, scorer.exact(layout)) for layout in budget.enumerate(space)][:8]
    finished[2] = (finished[2][0], float("inf"))
    proposal = build_strategy("tpe").propose(context(space, budget, scorer, finished=finished))
    assert proposal is not None and proposal.proposed_by.startswith("tpe")


def test_random_unseen_draws_every_layout_with_the_same_chance():
    _, space, budget = make(5, 2)
    every = list(budget.enumerate(space))
    for num_seen in (3, 7):
        rng, count = random.Random(0), dict.fromkeys(every[num_seen:], 0)
        for _ in range(2000):
            layout = random_unseen(space, budget, frozenset(every[:num_seen]), rng)
            count[layout] += 1
        expected = 2000 / len(count)
        assert all(abs(times - expected) < 5 * expected**0.5 for times in count.values())
    assert random_unseen(space, budget, frozenset(every), rng) is None


@pytest.mark.parametrize("num_attention", [0, 2, 5])
def test_stage2_local_is_solved_exactly(num_attention):
    for options in ({}, {"replacements": ("a", "b", "c")}):
        _, space, budget = make(5, num_attention, **options)
        scorer = SyntheticScorer(5, replacements=space.replacements)
        losses = scorer.stage2_losses()
        best = min(
            budget.enumerate(space),
            key=lambda layout: sum(losses[i, layout[i]] for i in layout.replaced_layers),
        )
        assert solve_local(space, budget, losses) == best


def test_the_replay_of_a_table_tells_regrets(tmp_path, capsys, monkeypatch):
    file = Path(__file__).parents[1] / "studies/benchmarks/replay.py"
    spec = importlib.util.spec_from_file_location("replay", file)
    replay = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "replay", replay)
    spec.loader.exec_module(replay)
    _, space, budget = make(7, 2)
    scorer = SyntheticScorer(7)
    probes = [*itertools.combinations(range(7), 1), *itertools.combinations(range(7), 6)]
    table = {
        "name": "made-up",
        "num_layers": 7,
        "attention_layers": 2,
        "possible": 21,
        "objective": "kl",
        "layouts": [
            {"layout": list(x.attention_layers), "value": scorer.exact(x)}
            for x in budget.enumerate(space)
        ],
        "probes": {
            ",".join(map(str, p)): scorer.exact(space.parse(",".join(map(str, p)))) for p in probes
        },
    }
    (tmp_path / "table.json").write_text(json.dumps(table))
    out = tmp_path / "replay.json"
    replay.main([str(tmp_path / "table.json"), "--seeds", "2", "--out", str(out)])
    (found,) = json.loads(out.read_text())["tables"]
    assert found["layouts"] == 21 and found["steps"] == [4, 8, 16]
    assert all(len(seeds) == 2 for seeds in found["regret"].values())
    for curve in itertools.chain(*found["regret"].values()):
        assert curve == sorted(curve, reverse=True) and curve[-1] >= 0
    values = [row["value"] for row in table["layouts"]]
    best, mean = min(values), sum(values) / len(values)
    fours = [min(four) for four in itertools.combinations(values, 4)]
    expected = (sum(fours) / len(fours) - best) / (mean - best)
    assert found["random_expected"][0] == pytest.approx(expected)
    # The table is a sum over layers, so both selectors find its best.
    assert {n: (p["evaluations"], p["regret"]) for n, p in found["picks"].items()} == {
        "swap_one": (8, 0.0),
        "greedy": (13, 0.0),
    }
    assert "made-up: 2 of 7 layers, 21 layouts, kl" in capsys.readouterr().out


def test_a_known_layout_gives_way_to_the_cheapest_unseen_swap():
    space = make_space(5, replacements=("a", "b"))
    worth = dict(enumerate([0.9, 0.5, 0.45, 0.1, 0.8]))
    params = {f"layer_{i:03d}.replacement": "b" for i in range(5)}

    def keeping(*kept):
        return Layout(tuple(ATTENTION if i in kept else "b" for i in range(5)))

    layout = keeping(0, 4)
    # By what the swap costs: 0.3 for 4 -> 1, then 0.35 for 4 -> 2.
    order = [layout, keeping(0, 1), keeping(0, 2)]
    seen = set()
    for expected in order:
        assert _nearest_unseen(layout, worth, params, space=space, seen=seen) == expected
        seen.add(expected)
    # With every swap known, one layer takes another replacement.
    seen |= {keeping(*pair) for pair in itertools.combinations(range(5), 2)}
    flipped = _nearest_unseen(layout, worth, params, space=space, seen=seen)
    assert flipped.attention_layers == (0, 4) and flipped.candidates.count("a") == 1
