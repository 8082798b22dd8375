"""Budgets beyond a fixed number of attention layers, and every strategy under them."""

import dataclasses
import itertools
import math
import random

import pytest
import torch
from synthetic_search import SyntheticScorer, make, make_space
from transformers import DynamicCache

from mohawk_nas.config import BudgetConfig, CacheBudgetConfig, DecodeBudgetConfig
from mohawk_nas.errors import ConfigError, LayoutError, RunError
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.mixer import mixer_config
from mohawk_nas.search import budget as budgets
from mohawk_nas.search.budget import Budget, DecodeTimes, Limit, make_budget
from mohawk_nas.search.space import SearchSpace
from mohawk_nas.search.strategies.surrogate import Codes, LinearModel, minimise
from mohawk_nas.search.strategy import SearchContext, build_strategy, solve_local
from mohawk_nas.search.study import run_study
from mohawk_nas.student import assemble
from mohawk_nas.teacher import Teacher, cache_name
from mohawk_nas.testing import perturb, tiny_model


def every_layout(space):
    names = (ATTENTION, *space.replacements)
    for chosen in itertools.product(names, repeat=len(space.free_layers)):
        yield space.fill(dict(zip(space.free_layers, chosen, strict=True)))


def made_up(seed):
    """A small space, a budget of up to three limits, and the layouts that meet it."""
    rng = random.Random(seed)
    num_layers, replacements = rng.randint(2, 6), ("a", "b")[: rng.randint(1, 2)]
    names = (ATTENTION, *replacements)
    pinned = {i: rng.choice(names) for i in range(num_layers) if rng.random() < 0.2}
    space = make_space(num_layers, replacements=replacements, pinned=pinned)
    limits = tuple(
        Limit(
            costs={(i, name): rng.randint(0, 9) for i in range(num_layers) for name in names},
            most=rng.randint(2 * num_layers, 6 * num_layers),
            rest=rng.randint(0, 3),
            name=f"limit{k}",
        )
        for k in range(rng.randint(0, 2))
    )
    number = rng.randint(space.num_pinned_attention, num_layers)
    kind = rng.choice(["attention_layers", "at_most", None])
    budget = Budget(limits=limits, **({kind: number} if kind else {}))

    def meets(layout):
        kept = len(layout.attention_layers)
        spent = [
            limit.rest + sum(limit.costs[pair] for pair in enumerate(layout.candidates))
            for limit in limits
        ]
        ok = all(cost <= limit.most for cost, limit in zip(spent, limits, strict=True))
        return ok and (kind is None or kept == number or (kind == "at_most" and kept < number))

    return space, budget, [layout for layout in every_layout(space) if meets(layout)]


@pytest.mark.parametrize("seed", range(60))
def test_a_budget_counts_lists_and_draws_what_brute_force_finds(seed):
    space, budget, expected = made_up(seed)
    assert {x for x in every_layout(space) if budget.meets(x)} == set(expected)
    assert budget.count(space) == len(expected)
    listed = list(budget.enumerate(space))
    assert set(listed) == set(expected) and len(listed) == len(expected)
    assert listed == list(budget.enumerate(space))
    assert bool(budget.problems(space)) == (not expected)
    if expected:
        most = max(len(layout.attention_layers) for layout in expected)
        assert budget.num_free(space) == most - space.num_pinned_attention
        assert budget.random(space, random.Random(seed)) in expected


@pytest.mark.parametrize("seed", range(60))
def test_the_cheapest_layout_is_the_one_of_brute_force(seed):
    space, budget, expected = made_up(seed)
    rng = random.Random(seed)
    names = (ATTENTION, *space.replacements)
    losses = {(i, n): rng.random() * (n != ATTENTION) for i in range(len(names) * 6) for n in names}

    def total(layout):
        return math.fsum(losses[pair] for pair in enumerate(layout.candidates))

    found = budget.cheapest(space, losses)
    if not expected:
        assert found is None
        return
    assert found in expected
    assert total(found) == pytest.approx(min(map(total, expected)))
    local = solve_local(space, budget, losses)
    assert local in expected
    assert total(local) == pytest.approx(min(map(total, expected)))


def test_the_setting_that_limits_too_much_is_named():
    cache = Limit(costs={(i, "ssm"): 10 for i in range(4)}, most=20, name="budget.cache.mib")
    (message,) = Budget(at_most=1, limits=(cache,)).problems(make_space(4))
    assert message.startswith("budget.attention_layers.at_most: must be at least 2, ")


def test_all_layouts_have_the_same_chance():
    space = make_space(4, replacements=("a", "b"))
    costs = {(i, name): cost for i in range(4) for name, cost in ((ATTENTION, 5), ("a", 2))}
    budget = Budget(at_most=2, limits=(Limit(costs=costs, most=9),))
    count = dict.fromkeys(budget.enumerate(space), 0)
    rng = random.Random(3)
    for _ in range(100 * len(count)):
        count[budget.random(space, rng)] += 1
    # The standard deviation of each is 10.
    assert all(50 < each < 150 for each in count.values())


def test_a_large_space_of_like_layers_is_counted_at_once():
    num_layers = 48
    space = make_space(num_layers)
    cache = {(i, n): c for i in range(num_layers) for n, c in ((ATTENTION, 10**9), ("ssm", 12345))}
    time = {(i, n): c for i in range(num_layers) for n, c in ((ATTENTION, 987654), ("ssm", 54321))}
    limits = (
        Limit(costs=cache, most=9 * 10**9 + 12345 * 39),
        Limit(costs=time, most=987654 * 20, rest=1000),
    )
    budget = Budget(at_most=12, limits=limits)
    assert budget.count(space) == sum(math.comb(num_layers, k) for k in range(10))
    assert budget.num_free(space) == 9


def test_too_many_different_sums_are_an_error(monkeypatch):
    monkeypatch.setattr(budgets, "MOST_SUMS", 100)
    space = make_space(12)
    costs = {(i, ATTENTION): 2**i for i in range(12)}
    budget = Budget(limits=(Limit(costs=costs, most=2**11 + 77),))
    with pytest.raises(ConfigError, match="must leave at most 100 different sums of costs to tell"):
        budget.count(space)
    (problem,) = budget.problems(space)
    assert problem.startswith("budget: its limits must leave at most 100 different sums")


def cached(most, **options):
    """At most so many MiB, where attention takes 10 and a replacement 1."""
    costs = {(i, n): c * 2**20 for i in range(8) for n, c in ((ATTENTION, 10), ("ssm", 1))}
    limit = Limit(
        costs=costs,
        most=most * 2**20,
        name="budget.cache.mib",
        unit="MiB",
        per_unit=2**20,
        where="of cache and states at context 9 and batch 1",
    )
    return Budget(limits=(limit,), **options)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            cached(7.5),
            "budget.cache.mib: must be at least 8, the nearest that a layout of this space can "
            "have, but got 7.5",
        ),
        (
            cached(30, attention_layers=4),
            "budget.attention_layers: must be at most 2, the nearest that a layout of this space "
            "can have within the other limits, but got 4; or budget.cache.mib: must be at least "
            "44, the nearest that a layout of this space can have within the other limits, but got "
            "30",
        ),
        (
            Budget(at_most=9),
            "budget.attention_layers.at_most: must be at most 8, the teacher's layers, but got 9",
        ),
    ],
)
def test_an_impossible_budget_names_the_nearest_possible_one(budget, message):
    assert budget.problems(make_space(8)) == [message]


def test_the_nearest_possible_value_is_possible_and_one_less_is_not():
    space = make_space(8)
    assert cached(44, attention_layers=4).count(space) == math.comb(8, 4)
    assert cached(43.999999, attention_layers=4).count(space) == 0
    limit = Limit(costs={(i, "ssm"): 1234567 for i in range(3)}, most=0, per_unit=10**6)
    named = limit.shown(3 * 1234567)
    assert float(named) * 10**6 >= 3 * 1234567 and named == "3.70371"


def test_a_layout_off_the_budget_is_told_by_how_much():
    layout = Layout((ATTENTION,) * 3 + ("ssm",) * 5)
    cached(35).check(layout)
    with pytest.raises(LayoutError) as caught:
        cached(30, at_most=2).check(layout)
    assert str(caught.value) == (
        "the budget is at most 2 attention layers, but the layout keeps 3: [0, 1, 2]; "
        "budget.cache.mib is 30, but the layout takes 35 MiB of cache and states at context 9 and "
        "batch 1, 5 too much"
    )
    assert cached(30, at_most=2).text == (
        "keep at most 2 attention layers and take at most 30 MiB of cache and states at context 9 "
        "and batch 1"
    )


# From the study's section


class FreshMixers:
    def __init__(self, teacher, space):
        self.teacher, self.space = teacher, space

    def mixer(self, layer, candidate):
        mixer = self.space.candidates[candidate].build(self.teacher.views[layer])
        perturb(mixer, scale=0.05)
        return mixer.to(self.teacher.model.dtype).requires_grad_(False)


def mamba_space(num_layers, **options):
    candidates = {
        ATTENTION: mixer_config({"mixer": "attention"}),
        "small": mixer_config({"mixer": "mamba2", "init": "random", "d_state": 4}),
        "large": mixer_config({"mixer": "mamba2", "init": "random", "d_conv": 3}),
    }
    return SearchSpace(num_layers=num_layers, candidates=candidates, pinned={}, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("phi", {"num_hidden_layers": 4}),
        ("llama", {"num_hidden_layers": 3}),
        ("mistral", {"sliding_window": 5, "num_hidden_layers": 3}),
        (
            "gemma3_text",
            {
                "num_hidden_layers": 4,
                "sliding_window": 5,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
        ),
    ],
)
@torch.no_grad()
def test_a_layouts_cache_is_what_its_student_holds_after_a_prefill(family, options, dtype):
    teacher = Teacher(tiny_model(family, **options).to(dtype))
    space = mamba_space(teacher.num_layers)
    batch, context = 3, 13
    config = BudgetConfig(cache=CacheBudgetConfig(mib=1.0, context=context, batch=batch))
    budget = make_budget(
        config, space, teacher.views, bytes_per_element=dtype.itemsize, decode=None
    )
    (limit,) = budget.limits
    tokens = torch.randint(0, teacher.vocab_size, (batch, context))
    names = [ATTENTION, "small", "large"]
    for shift in range(3):
        layout = Layout(tuple(names[(i + shift) % 3] for i in range(teacher.num_layers)))
        student = assemble(teacher, layout, FreshMixers(teacher, space))
        cache = DynamicCache(config=student.config)
        student(input_ids=tokens, use_cache=True, **{cache_name(student): cache})
        held = 0
        for layer in cache.layers:
            tensors = getattr(layer, "tensors", None) or {"k": layer.keys, "v": layer.values}
            held += sum(t.numel() * t.element_size() for t in tensors.values())
        assert limit.cost(layout) == held


def test_a_study_section_becomes_limits():
    space = make_space(3, pinned={0: ATTENTION})
    times = DecodeTimes(
        layers={(0, ATTENTION): 5, (1, ATTENTION): 5, (2, ATTENTION): 5, (1, "ssm"): 2}
        | {(2, "ssm"): 2},
        rest=10**6,
    )
    config = BudgetConfig(
        attention_layers={"at_most": 2},
        decode=DecodeBudgetConfig(milliseconds=1.000012, context=7),
    )
    budget = make_budget(config, space, [None] * 3, bytes_per_element=4, decode=times)
    assert [x.attention_layers for x in budget.enumerate(space)] == [(0, 1), (0, 2), (0,)]
    config = BudgetConfig(decode=DecodeBudgetConfig(milliseconds=1.00001, context=7))
    budget = make_budget(config, space, [None] * 3, bytes_per_element=4, decode=times)
    assert [x.attention_layers for x in budget.enumerate(space)] == [(0,)]
    unmeasured = make_budget(config, space, [None] * 3, bytes_per_element=4, decode=None)
    assert unmeasured.count(space) == 4, "planning does not know the times"


@pytest.mark.parametrize("limited_first", [True, False])
def test_a_study_does_not_go_on_with_a_limit_more_or_less(tmp_path, limited_first):
    config, space, budget = make(6, 2, trials=3)
    cache = CacheBudgetConfig(mib=1.0, context=8)
    limited = dataclasses.replace(config, budget=dataclasses.replace(config.budget, cache=cache))
    first, second = (limited, config) if limited_first else (config, limited)
    run_study(first, space, budget, SyntheticScorer(6), run_dir=tmp_path)
    with pytest.raises(RunError, match=r"other settings: budget.cache.mib was"):
        run_study(second, space, budget, SyntheticScorer(6), run_dir=tmp_path)
    # As often as one likes with the same.
    assert len(run_study(first, space, budget, SyntheticScorer(6), run_dir=tmp_path).trials) == 3


# Strategies


def uneven(num_layers, replacements=("ssm",), pinned=None, **options):
    """Attention costs more in every second layer, and each replacement something else."""
    space = make_space(num_layers, replacements=replacements, pinned=pinned)
    costs = {(i, ATTENTION): 40 + 35 * (i % 2) for i in range(num_layers)}
    costs |= {(i, n): 7 - 3 * k for i in range(num_layers) for k, n in enumerate(replacements)}
    return space, Budget(limits=(Limit(costs=costs, most=150, rest=3),), **options)


SETTINGS = {
    "at most": (make_space(6), Budget(at_most=2)),
    "at most, pinned": (
        make_space(5, replacements=("a", "b"), pinned={1: "b", 4: ATTENTION}),
        Budget(at_most=2),
    ),
    "limit": uneven(6),
    "limit, two replacements": uneven(4, ("a", "b"), {1: "b"}, at_most=3),
    "exactly and limit": uneven(6, attention_layers=2),
}
ANY_ORDER = (
    "exhaustive",
    "random",
    "tpe",
    {"name": "tpe", "encoding": "slots"},
    {"name": "tpe", "encoding": "bits"},
    "surrogate",
    "swaps",
)
SELECTORS = (
    "uniform",
    "first",
    "middle",
    "last",
    "stage2_rank",
    "swap_one",
    "add_one_in",
    "greedy",
    {"name": "greedy", "direction": "remove"},
    {"name": "beam", "swaps": 2},
    {"name": "beam", "width": 2, "direction": "remove"},
)


def label(choice):
    return build_strategy(choice).label


def context(space, budget, scorer, finished=()):
    return SearchContext(
        space=space,
        budget=budget,
        weights={"kl": 1.0},
        finished=list(finished),
        pending=[],
        seed=len(finished),
        probe=scorer.score,
        stage2_losses=scorer.stage2_losses,
    )


def search(choice, space, budget, *, num_trials=10**6):
    scorer = SyntheticScorer(space.num_layers, pairs=1.0, replacements=space.replacements)
    strategy, finished, names = build_strategy(choice), [], []
    while len(finished) < num_trials:
        proposal = strategy.propose(context(space, budget, scorer, finished))
        if proposal is None:
            break
        space.check(proposal.layout)
        budget.check(proposal.layout)
        finished.append((proposal.layout, scorer.exact(proposal.layout)))
        names.append(proposal.proposed_by)
    return finished, names


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("choice", ANY_ORDER, ids=label)
def test_samplers_visit_every_layout_on_the_budget_once(choice, setting):
    space, budget = SETTINGS[setting]
    finished, names = search(choice, space, budget)
    assert len(finished) == len(dict(finished)) == budget.count(space)
    if choice not in ("exhaustive", "random"):
        assert names.count(label(choice)) >= 3, "not all are drawn at random"


@pytest.mark.parametrize("encoding", ["priority", "slots", "bits"])
def test_the_gaussian_process_takes_layouts_that_keep_fewer(encoding):
    finished, names = search(
        {"name": "gp", "encoding": encoding}, make_space(5), Budget(at_most=2), num_trials=9
    )
    assert len({len(layout.attention_layers) for layout, _ in finished}) > 1
    assert sum(not name.endswith(":startup") for name in names) == 4


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("choice", SELECTORS, ids=label)
def test_selectors_stay_on_the_budget_and_use_it_up(choice, setting):
    space, budget = SETTINGS[setting]
    scorer = SyntheticScorer(space.num_layers, replacements=space.replacements)
    selector = build_strategy(choice)
    found = dict(selector.layouts(context(space, budget, scorer)))
    assert found
    every = list(budget.enumerate(space))
    for layout in found.values():
        assert layout in every
        if label(choice).startswith(("greedy", "beam")) or choice in ("swap_one", "add_one_in"):
            kept = set(layout.attention_layers)
            assert not any(kept < set(other.attention_layers) for other in every)
    assert len(set(scorer.scored)) <= selector.num_probes(space, budget)


def test_baselines_keep_as_many_as_the_budget_allows():
    space, budget = make_space(8), Budget(at_most=2)
    scorer = SyntheticScorer(8)

    def kept(choice, budget):
        found = build_strategy(choice).layouts(context(space, budget, scorer))
        return [layout.attention_layers for _, layout in found]

    assert kept("uniform", budget) == kept("uniform", Budget(attention_layers=2))
    assert kept("last", budget) == [(6, 7)]
    assert kept("last", cached(36)) == [(5, 6, 7)], "a cache for three layers"
    space, budget = uneven(8)
    # Attention costs 40 and 75 in turns: of two layers both must be even ones.
    assert kept("first", budget) == [(0,)]
    assert kept("uniform", budget) == [(0, 4), (2, 6)]


def test_a_beam_grows_to_the_best_layout_where_layers_add_up():
    space, budget = uneven(6)
    scorer = SyntheticScorer(6)
    best = min(budget.enumerate(space), key=scorer.exact)
    wide = build_strategy({"name": "beam", "width": 99}).layouts(context(space, budget, scorer))
    assert wide[0][1] == best


def test_a_beam_looks_at_what_the_budget_allows():
    names = ("big", "small")
    space = make_space(4, replacements=names)
    costs = {
        (i, n): {ATTENTION: 10, "big": 5, "small": 1}[n]
        for i in range(4)
        for n in (ATTENTION, *names)
    }
    budget = Budget(attention_layers=1, limits=(Limit(costs=costs, most=14),))
    scorer = SyntheticScorer(4, replacements=names)
    # The bigger mixer suits every layer better, and there is no room for it.
    losses = {(i, n): {"big": 0.1, "small": 0.9}[n] for i in range(4) for n in names}
    looked = dataclasses.replace(context(space, budget, scorer), stage2_losses=lambda: losses)
    ((_, found),) = build_strategy({"name": "greedy", "swaps": 1}).layouts(looked)
    assert scorer.scored and found in scorer.scored
    assert all(map(budget.meets, scorer.scored))


def test_a_mixer_that_has_diverged_is_the_last_choice():
    space = make_space(8)
    costs = {(i, n): {ATTENTION: 5, "ssm": 1}[n] for i in range(8) for n in (ATTENTION, "ssm")}
    budget = Budget(limits=(Limit(costs=costs, most=24),))
    losses = {(i, "ssm"): math.inf if i > 1 else 0.1 for i in range(8)}
    assert len(solve_local(space, budget, losses).attention_layers) == 4
    assert not {0, 1} & set(solve_local(space, budget, losses).attention_layers)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("pairs", [False, True])
def test_highs_finds_what_looking_at_all_layouts_finds(setting, pairs):
    space, budget = SETTINGS[setting]
    rng = torch.Generator().manual_seed(3)
    columns = len(Codes.of(space).choices)
    effects = torch.randn(columns, generator=rng, dtype=torch.float64).numpy()
    products = torch.randn(columns, columns, generator=rng, dtype=torch.float64).triu(1).numpy()
    model = LinearModel(effects=effects, pairs=products if pairs else None)
    codes = Codes.of(space)
    order = sorted(
        budget.enumerate(space), key=lambda layout: model.predict(codes.matrix([layout]))[0]
    )
    for num_seen in (0, 1, 3, len(order) - 1):
        found = minimise(model, space, budget, seen=order[:num_seen], enumerated=0)
        assert found == order[num_seen]
    assert minimise(model, space, budget, seen=order, enumerated=0) is None
