"""The strategies: rules checked by hand, samplers that never repeat or leave the budget."""

import importlib.util
import itertools
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from synthetic_search import SyntheticScorer, make, make_space

from mohawk_nas.config import MatrixConfig
from mohawk_nas.errors import ConfigError, RunError
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.strategies._sampling import _ENCODINGS, _decode, _nearest_unseen
from mohawk_nas.search.strategy import (
    SearchContext,
    Selector,
    build_strategy,
    random_unseen,
    solve_local,
    strategy_names,
)
from mohawk_nas.search.study import check_needs, plan_search, run_study, trial_seed

SAMPLERS = (
    "tpe",
    {"name": "tpe", "encoding": "slots"},
    {"name": "tpe", "encoding": "bits"},
    "gp",
    {"name": "gp", "encoding": "slots"},
    {"name": "gp", "encoding": "bits"},
    {"name": "nsga2", "population": 5},
    {"name": "nsga2", "encoding": "priority"},
    {"name": "nsga2", "encoding": "slots"},
    "surrogate",
    {"name": "surrogate", "model": "additive"},
    {"name": "surrogate", "explore": "none", "design": 3},
    "random",
    "exhaustive",
    "swaps",
)
RANKINGS = (
    "stage2_rank",
    "swap_one",
    "add_one_in",
    "greedy",
    {"name": "greedy", "direction": "remove"},
    {"name": "beam", "swaps": 2},
    {"name": "beam", "width": 2, "direction": "remove"},
)
SEEDED = [choice for choice in SAMPLERS if choice not in ("exhaustive", "swaps")]


def label(choice):
    return build_strategy(choice).label


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
    assert kept(chosen("middle", 7, 2)) == [(2, 3)]
    assert kept(chosen("middle", 6, 2)) == [(2, 3)]
    assert kept(chosen("first", 6, 2, pinned={0: "ssm", 5: ATTENTION})) == [(1, 5)]
    assert kept(chosen("last", 6, 0)) == [()]


@pytest.mark.parametrize("name", RANKINGS, ids=label)
@pytest.mark.parametrize("num_attention", [0, 1, 3, 7, 8])
def test_a_sum_over_layers_is_solved_by_every_ranking(name, num_attention):
    scorer = SyntheticScorer(8)
    _, space, budget = make(8, num_attention)
    best = min(budget.enumerate(space), key=scorer.exact)
    assert list(chosen(name, 8, num_attention, scorer=scorer).values()) == [best]


@pytest.mark.parametrize("name", RANKINGS, ids=label)
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


def stepwise(scorer, num_layers, num_attention, *, remove):
    """Greedy in the plainest words."""

    def value(kept):
        return scorer.exact(Layout.keeping(kept, num_layers=num_layers, replacement="ssm"))

    kept = list(range(num_layers)) if remove else []
    while len(kept) != num_attention:
        if remove:
            kept.remove(min(kept, key=lambda out: value([i for i in kept if i != out])))
        else:
            rest = [i for i in range(num_layers) if i not in kept]
            kept.append(min(rest, key=lambda i: value([*kept, i])))
    return tuple(sorted(kept))


@pytest.mark.parametrize("direction", ["add", "remove"])
def test_a_beam_of_one_is_greedy_in_both_directions(direction):
    found = set()
    for strength in (0.0, 3.0, 6.0):
        scorer = SyntheticScorer(7, pairs=strength)
        choice = {"name": "greedy", "direction": direction}
        one = chosen(choice, 7, 3, scorer=scorer)
        assert kept(chosen({**choice, "name": "beam", "width": 1}, 7, 3, scorer=scorer)) == kept(
            one
        )
        assert kept(one) == [stepwise(scorer, 7, 3, remove=direction == "remove")]
        found.add(tuple(kept(one)))
    assert len(found) > 1


@pytest.mark.parametrize("direction", ["add", "remove"])
@pytest.mark.parametrize("num_attention", [0, 1, 3, 6])
def test_a_beam_that_keeps_everything_finds_the_best(direction, num_attention):
    scorer = SyntheticScorer(6, pairs=8.0)
    _, space, budget = make(6, num_attention)
    best = min(budget.enumerate(space), key=scorer.exact)
    choice = {"name": "beam", "width": 99, "direction": direction}
    assert list(chosen(choice, 6, num_attention, scorer=scorer).values()) == [best]


class Alone(SyntheticScorer):
    """Layer 0 is best alone, but the best pair is 2 and 3, and single swaps lead there."""

    def exact(self, layout):
        kept = layout.attention_layers
        values = {(0,): 1, (2,): 2, (3,): 3, (0, 1): 5, (0, 2): 4, (0, 3): 6, (2, 3): 0, (2, 4): 3}
        return float(values.get(kept, 9))


def test_a_wider_beam_and_swaps_find_what_greedy_misses():
    scorer = Alone(5)
    assert kept(chosen("greedy", 5, 2, scorer=scorer)) == [(0, 2)]
    for choice in ({"name": "beam", "width": 2}, {"name": "greedy", "swaps": 1}):
        assert kept(chosen(choice, 5, 2, scorer=scorer)) == [(2, 3)]


class Rugged(SyntheticScorer):
    """Every layout has a value of its own."""

    def __init__(self, num_layers, seed):
        super().__init__(num_layers)
        self.seed = seed

    def exact(self, layout):
        return random.Random(f"{self.seed}{layout.key()}").random()


@pytest.mark.parametrize(("direction", "seed"), [("add", 3), ("remove", 1)])
def test_swaps_go_on_until_none_helps(direction, seed):
    scorer = Rugged(9, seed)
    plain, once, often = (
        chosen({"name": "greedy", "direction": direction, "swaps": n}, 9, 4, scorer=scorer)
        for n in (0, 1, 99)
    )
    values = [scorer.exact(next(iter(found.values()))) for found in (plain, once, often)]
    assert values[0] > values[1] > values[2], "the case is one in which two passes help"
    (best,) = kept(often)
    for out in best:
        for into in set(range(9)) - set(best):
            swapped = [i for i in best if i != out] + [into]
            layout = Layout.keeping(swapped, num_layers=9, replacement="ssm")
            assert scorer.exact(layout) >= values[2]


@pytest.mark.parametrize("name", strategy_names())
def test_planned_probes_are_those_made(name):
    strategy = build_strategy(name)
    if not isinstance(strategy, Selector):
        pytest.skip("makes no probes")
    _, space, budget = make(6, 3, pinned={2: ATTENTION})
    scorer = WithRecall(6)
    asked = replace(
        context(space, budget, scorer),
        stage1_losses=scorer.stage2_losses,
        learn_gates=lambda restarts, **_: [dict.fromkeys(space.free_layers, 0.0)] * restarts,
    )
    strategy.layouts(asked)
    assert len(scorer.scored) == strategy.num_probes(space, budget)


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("direction", ["add", "remove"])
@pytest.mark.parametrize("num_attention", [0, 1, 4, 7])
def test_a_beam_plans_no_fewer_probes_than_it_makes(width, direction, num_attention):
    for swaps in (0, 1, 3):
        _, space, budget = make(7, num_attention)
        scorer = SyntheticScorer(7, pairs=9.0)
        beam = build_strategy(
            {"name": "beam", "width": width, "direction": direction, "swaps": swaps}
        )
        beam.layouts(context(space, budget, scorer))
        made, planned = len(set(scorer.scored)), beam.num_probes(space, budget)
        assert made <= planned
        if width == 1 and not swaps:
            assert made == planned


@pytest.mark.parametrize("encoding", list(_ENCODINGS))
@pytest.mark.parametrize("num_attention", [0, 1, 3, 5])
def test_encodings_give_back_every_layout_and_always_meet_the_budget(encoding, num_attention):
    _, space, budget = make(6, num_attention + 1, pinned={2: ATTENTION})
    layouts = list(budget.enumerate(space))
    seen = context(space, budget, SyntheticScorer(6), finished=[(layouts[0], 1.0)])
    code, rng = _ENCODINGS[encoding](seen), random.Random(0)
    for layout in layouts:
        params = code.params(layout)
        assert params.keys() == code.distributions().keys()
        assert all(code.distributions()[name]._contains(value) for name, value in params.items())
        assert _decode(code.worth(params), {}, seen) == layout
    for _ in range(50):
        drawn = {
            name: rng.uniform(0, 1) if encoding == "priority" else rng.randint(each.low, each.high)
            for name, each in code.distributions().items()
        }
        budget.check(_decode(code.worth(drawn), {}, seen))


def test_bits_are_repaired_by_what_the_best_trials_keep():
    _, space, budget = make(5, 2)
    values = {(1, 4): 0.1, (1, 3): 0.2, (0, 2): 5.0, (2, 3): 6.0, (0, 3): 7.0, (0, 4): 8.0}
    known = [(space.parse(",".join(map(str, layers))), v) for layers, v in values.items()]
    code = _ENCODINGS["bits"](context(space, budget, SyntheticScorer(5), finished=known))

    def decoded(*bits):
        worth = code.worth({f"layer_{i:03d}.attention": bit for i, bit in enumerate(bits)})
        return sorted(sorted(worth, key=lambda layer: (-worth[layer], layer))[:2])

    assert decoded(0, 0, 0, 0, 0) == [1, 4]
    assert decoded(1, 0, 0, 0, 0) == [0, 1]
    assert decoded(1, 1, 1, 0, 1) == [1, 4]
    assert decoded(1, 0, 1, 0, 0) == [0, 2]


def test_a_selector_as_the_strategy_proposes_its_layouts_one_by_one():
    _, space, budget = make(8, 2)
    layouts, names = search("uniform", space, budget, SyntheticScorer(8), num_trials=99)
    assert [layout.attention_layers for layout in layouts] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert names == [f"uniform/{i}" for i in range(4)]


@pytest.mark.parametrize("name", SAMPLERS, ids=label)
@pytest.mark.parametrize(
    "options", [{}, {"replacements": ("a", "b"), "pinned": {1: "b", 4: ATTENTION}}]
)
def test_samplers_visit_the_whole_space_once_and_stop(name, options):
    # 28 and 24 layouts, or 10 and 12 where Optuna's Gaussian process takes long.
    slow = label(name).startswith("gp")
    num_layers, num_attention = (5, 2) if slow else (6, 3) if options else (8, 2)
    _, space, budget = make(num_layers, num_attention, **options)
    scorer = SyntheticScorer(num_layers, pairs=1.0, replacements=space.replacements)
    layouts, names = search(name, space, budget, scorer, num_trials=999)
    assert len(layouts) == budget.count(space) == len(set(layouts))
    assert {each.partition(":")[0] for each in names} == {label(name)}
    assert names.count(label(name)) >= (3 if slow else 6), "not all are drawn at random"
    again = search(name, space, budget, scorer, num_trials=8 if slow else 16)
    assert again == (layouts[: len(again[0])], names[: len(again[1])]) and len(again[0]) >= 8


@pytest.mark.parametrize("name", SEEDED, ids=label)
def test_samplers_depend_on_the_seed(name):
    _, space, budget = make(8, 2)
    scorer = SyntheticScorer(8, pairs=1.0)
    one, _ = search(name, space, budget, scorer, num_trials=10, seed=1)
    assert one != search(name, space, budget, scorer, num_trials=10, seed=2)[0]


@pytest.mark.parametrize(
    "name", ["tpe", "surrogate", {"name": "tpe", "encoding": "bits"}], ids=label
)
def test_samplers_find_good_layouts_sooner_than_chance(name):
    _, space, budget = make(12, 3)
    scorer = SyntheticScorer(12, pairs=0.5)
    values = sorted(scorer.exact(layout) for layout in budget.enumerate(space))
    mean = sum(values) / len(values)

    def regret(name, seed):
        layouts, _ = search(name, space, budget, scorer, num_trials=24, seed=seed)
        best = min(scorer.exact(layout) for layout in layouts)
        return (best - values[0]) / (mean - values[0])

    found = sum(regret(name, seed) for seed in range(3)) / 3
    chance = sum(regret("random", seed) for seed in range(20)) / 20
    assert found < chance / 2


@pytest.mark.parametrize("name", SAMPLERS, ids=label)
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


@pytest.mark.parametrize("name", SEEDED, ids=label)
def test_samplers_take_scores_that_are_not_finite(name):
    _, space, budget = make(6, 2)
    scorer = SyntheticScorer(6)
    finished = [(layout, scorer.exact(layout)) for layout in budget.enumerate(space)][:8]
    finished[2] = (finished[2][0], float("inf"))
    proposal = build_strategy(name).propose(context(space, budget, scorer, finished=finished))
    assert proposal is not None and proposal.proposed_by == label(name)
    # With nothing finite there is nothing to go by, and it goes on all the same.
    finished = [(layout, float("inf")) for layout, _ in finished]
    proposal = build_strategy(name).propose(context(space, budget, scorer, finished=finished))
    assert proposal is not None and proposal.layout not in dict(finished)


def test_swaps_score_the_neighbours_of_the_best_first():
    _, space, budget = make(6, 2)
    scorer = SyntheticScorer(6)
    losses = scorer.stage2_losses()

    def local(layout):
        loss = sum(losses[layer, layout[layer]] for layer in layout.replaced_layers)
        return loss, layout.candidates

    layouts, names = search("swaps", space, budget, scorer, num_trials=15)
    assert len(set(layouts)) == 15 == budget.count(space)
    assert names == ["swaps:start"] + ["swaps"] * 14
    # Where layers do not interact the smallest sum is the best, and its eight neighbours follow.
    best = min(budget.enumerate(space), key=scorer.exact)
    around = [layout for layout in space.neighbours(best) if budget.meets(layout)]
    assert layouts[0] == best and len(around) == 8
    assert layouts[1:9] == sorted(around, key=local)
    # Then come those of the second best.
    second = min(layouts[1:9], key=scorer.exact)
    assert layouts[9] in list(space.neighbours(second))


def test_swaps_go_on_around_what_is_better():
    _, space, budget = make(8, 2)
    scorer = SyntheticScorer(8)
    worst = max(budget.enumerate(space), key=scorer.exact)
    finished = [(worst, scorer.exact(worst))]
    while True:
        proposal = build_strategy("swaps").propose(
            context(space, budget, scorer, finished=finished)
        )
        best = min(finished, key=lambda pair: pair[1])[0]
        if proposal.layout not in list(space.neighbours(best)):
            break
        finished.append((proposal.layout, scorer.exact(proposal.layout)))
    assert best == min(budget.enumerate(space), key=scorer.exact)
    assert len(finished) < budget.count(space)


def test_swaps_beside_a_first_layout_that_another_worker_scores():
    _, space, budget = make(6, 2)
    scorer = SyntheticScorer(6)
    start = build_strategy("swaps").propose(context(space, budget, scorer)).layout
    beside = build_strategy("swaps").propose(context(space, budget, scorer, pending=[start]))
    assert beside.proposed_by == "swaps" and beside.layout in list(space.neighbours(start))


def test_swaps_of_a_pareto_study_begin_with_the_set():
    _, space, budget = make(6, 2)
    scorer = SyntheticScorer(6)
    one, two, beaten = (space.parse(text) for text in ("0,1", "4,5", "2,3"))
    finished = [(beaten, 0.0), (one, 2.0), (two, 1.0)]
    # By value the first would be the best.
    figures = [(3.0, 3.0), (1.0, 2.0), (2.0, 1.0)]
    known = replace(context(space, budget, scorer, finished=finished), figures=figures)
    proposal = build_strategy("swaps").propose(known)
    assert proposal.layout in list(space.neighbours(two))


def test_swaps_jump_where_no_swap_leads():
    # Two replacements, of which a budget takes one or the other in both layers.
    class Both(Budget):
        def meets(self, layout):
            return layout.candidates in (("a", "a"), ("b", "b"))

    _, space, budget = make(2, 0, replacements=("a", "b"))
    scorer = SyntheticScorer(2, replacements=("a", "b"))
    budget = Both(attention_layers=0)
    first = space.fill({0: "a", 1: "a"})
    proposal = build_strategy("swaps").propose(
        context(space, budget, scorer, finished=[(first, 1.0)])
    )
    assert proposal.proposed_by == "swaps:fallback" and proposal.layout != first


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
    arguments = ["--seeds", "2", "--out", str(out), "--selectors", "swap_one", "greedy"]
    arguments += ["{name: greedy, direction: remove}", "stage2_rank"]
    arguments += ["--strategies", "random", "swaps", "{name: surrogate, model: additive}"]
    arguments += ["--made-up", "pairs,7,2", "roles,7,2", "roles,7,1"]
    replay.main([str(tmp_path / "table.json"), *arguments])
    found, *made_up, single = json.loads(out.read_text())["tables"]
    assert single["layouts"] == 7 and single["additive_r_squared"] == 1.0
    assert set(found["regret"]) == {"random", "surrogate(model=additive)"}
    assert found["additive_r_squared"] == pytest.approx(1.0)
    for space in made_up:
        assert space["layouts"] == 21 and space["additive_r_squared"] < 0.99
        assert len(set(map(tuple, space["regret"]["random"]))) == 2, "a space for each seed"
        assert len(space["picks"]["greedy(direction=remove)"]["regrets"]) == 2
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
    printed = capsys.readouterr().out
    assert "made-up: 2 of 7 layers, 21 layouts, kl" in printed
    # The table has only the others' probes.
    assert printed.count("greedy(direction=remove): left out, made-up: has no value for [") == 1
    # Nor has it stage-2 losses, which are all 0 in made-up spaces.
    for label in ("swaps", "stage2_rank"):
        assert printed.count(f"{label}: left out, made-up: knows no stage-2 losses") == 1
    assert all(set(space["regret"]) == {*found["regret"], "swaps"} for space in made_up)
    # Behind a baseline a strategy begins with what that found.
    arguments += ["--baselines", "first", "greedy", "--most", "8"]
    replay.main(arguments)
    for space in json.loads(out.read_text())["tables"][:2]:
        assert space["baselines"] == ["first", "greedy"] and space["steps"] == [4, 8]
        greedy = space["picks"]["greedy"]["regrets"]
        for seeds in space["regret"].values():
            assert all(curve[0] <= regret for curve, regret in zip(seeds, greedy, strict=True))


def test_a_known_layout_gives_way_to_the_cheapest_unseen_swap():
    space = make_space(5, replacements=("a", "b"))
    worth = dict(enumerate([0.9, 0.5, 0.45, 0.1, 0.8]))
    params = {f"layer_{i:03d}.replacement": "b" for i in range(5)}

    def keeping(*kept):
        return Layout(tuple(ATTENTION if i in kept else "b" for i in range(5)))

    budget = Budget(attention_layers=2)

    def nearest(seen):
        known = [(layout, 1.0) for layout in seen]
        here = context(space, budget, SyntheticScorer(5), finished=known)
        return _nearest_unseen(layout, worth, params, here)

    layout = keeping(0, 4)
    # By what the swap costs: 0.3 for 4 -> 1, then 0.35 for 4 -> 2.
    order = [layout, keeping(0, 1), keeping(0, 2)]
    seen = set()
    for expected in order:
        assert nearest(seen) == expected
        seen.add(expected)
    # With every swap known, one layer takes another replacement.
    seen |= {keeping(*pair) for pair in itertools.combinations(range(5), 2)}
    flipped = nearest(seen)
    assert flipped.attention_layers == (0, 4) and flipped.candidates.count("a") == 1


# Rankings by what else is known of a layer


class WithRecall(SyntheticScorer):
    """Recall is lost in other layers than the rest."""

    def score(self, layout):
        score = super().score(layout)
        lost = sum(1.0 for layer in layout.replaced_layers if layer in (2, 5))
        lost += 0.01 * len(layout.replaced_layers)
        return replace(score, per_block=score.per_block | {"recall": (lost,) * 16})


def test_recall_drop_keeps_what_recall_needs_whatever_the_objective_says_of_the_rest():
    baselines = ["swap_one", "recall_drop"]
    objective = {"kl": 1.0, "recall": 1e-6}
    config, space, budget = make(7, 2, trials=2, baselines=baselines, objective=objective)
    scorer = WithRecall(7)
    result = run_study(config, space, budget, scorer, run_dir=None)
    kept = {label: layout.attention_layers for label, layout in result.baselines.items()}
    assert kept["recall_drop"] == (2, 5) != kept["swap_one"]
    # Both look at the same layouts, which are scored once.
    assert result.asked == {"swap_one": 7, "recall_drop": 7}
    assert result.probe_costs["recall_drop"].scored == 0
    assert plan_search(config.search, space, budget).probes == result.asked


def test_what_a_selector_looks_at_counts_where_it_is_the_strategy():
    config, space, budget = make(8, 2, trials=3, strategy="greedy", baselines=[])
    plan = plan_search(config.search, space, budget)
    assert plan.probes == {"greedy": 8 + 7}
    result = run_study(config, space, budget, SyntheticScorer(8), run_dir=None)
    cost = result.probe_costs["greedy"]
    assert 0 < cost.asked == cost.scored == len(result.probes) <= plan.probes["greedy"]


def test_stage1_rank_keeps_what_stage_1_imitates_worst():
    options = {"replacements": ("a", "b"), "pinned": {5: "b"}, "baselines": ["stage1_rank"]}
    config, space, budget = make(6, 2, trials=1, **options)
    scorer = SyntheticScorer(6, replacements=("a", "b"))
    # The candidate with the lower stage-2 loss counts, "b" in odd layers.
    losses = {(layer, "a"): [0.1, 9.0, 0.8, 0.2, 0.3, 9.0][layer] for layer in range(6)}
    losses |= {(layer, "b"): [9.0, 0.4, 9.0, 0.7, 9.0, 9.0][layer] for layer in range(6)}
    with pytest.raises(ConfigError, match=r"bank.matrix.tokens: must be above 0.*stage1_rank"):
        run_study(config, space, budget, scorer, run_dir=None, stage1_losses=lambda: losses)
    config = replace(config, bank=replace(config.bank, matrix=MatrixConfig(tokens=4096)))
    with pytest.raises(RunError, match="here are scores alone"):
        run_study(config, space, budget, scorer, run_dir=None)
    result = run_study(config, space, budget, scorer, run_dir=None, stage1_losses=lambda: losses)
    assert result.baselines["stage1_rank"].attention_layers == (2, 3)
    assert not result.probes


def test_what_a_ranking_needs_is_told_at_once():
    baselines = ["recall_drop", {"name": "ranking", "score": "stage1"}, "nonsense"]
    config, _, _ = make(6, 2, strategy="stage1_rank", baselines=baselines, evaluation="per_trial")
    lacks = "bank.matrix.tokens: must be above 0, so that the bank has a stage 1, but is 0; "
    assert [problem for problem in check_needs(config) if problem.startswith(lacks)] == [
        f"{lacks}give it tokens or leave this out ({where}: stage1_rank)"
        for where in ("search.strategy", "search.baselines[1]")
    ]
    others = [problem for problem in check_needs(config) if not problem.startswith(lacks)]
    assert [problem.partition(":")[0] for problem in others] == [
        "search.evaluation",
        "search.objective",
        "search.evaluation",
    ]
