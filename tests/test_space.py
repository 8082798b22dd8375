"""The search space and the budget."""

import itertools
import random
from dataclasses import dataclass

import pytest
from synthetic_search import FakeMixer, make_space

from mohawk_nas.config import SpaceConfig
from mohawk_nas.errors import ConfigError, LayoutError
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.mixer import MIXERS
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.space import (
    check_pins,
    load_candidates,
    load_space,
    space_names,
)


@dataclass(frozen=True, kw_only=True)
class Narrow(FakeMixer):
    symbol = "N"


@pytest.fixture(autouse=True)
def narrow_mixer(monkeypatch):
    monkeypatch.setitem(MIXERS._items, "narrow", Narrow)


def test_the_packaged_space_is_attention_or_mamba2_in_every_layer():
    space = load_space(SpaceConfig(name="hybrid_phi_mamba"), num_layers=24)
    assert list(space.candidates) == [ATTENTION, "mamba2"]
    assert space.symbols == {ATTENTION: "A", "mamba2": "M"}
    assert space.free_layers == tuple(range(24))


def test_neighbours_differ_by_a_swap():
    space = make_space(4, pinned={3: "ssm"})
    layout = Layout.keeping((0, 2), num_layers=4, replacement="ssm")
    found = [other.attention_layers for other in space.neighbours(layout)]
    # Two exchanges, then one more or fewer; the pinned layer stays as it is.
    assert found == [(1, 2), (0, 1), (2,), (0, 1, 2), (0,)]
    several = make_space(2, replacements=("a", "b"))
    found = {other.candidates for other in several.neighbours(several.fill({0: "a", 1: "b"}))}
    exchanged, changed = {("b", "a")}, {(ATTENTION, "b"), ("b", "b"), ("a", ATTENTION), ("a", "a")}
    assert found == exchanged | changed


def test_every_packaged_space_loads():
    for name in space_names():
        assert load_candidates(SpaceConfig(name=name))


def test_a_study_adds_to_the_space_it_names(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("candidates: {a: {mixer: narrow}, b: {mixer: narrow}}\npinned: {0: a, 1: b}\n")
    config = SpaceConfig(
        name=str(file), candidates={"b": {"mixer": "narrow", "width": 9}}, pinned={1: ATTENTION}
    )
    space = load_space(config, num_layers=3)
    assert [c.width for c in space.candidates.values() if isinstance(c, FakeMixer)] == [4, 9]
    assert space.pinned == {0: "a", 1: ATTENTION}
    assert space.symbols == {ATTENTION: "A", "a": "N", "b": "N2"}


def test_all_problems_of_a_space_are_reported_at_once():
    config = SpaceConfig(
        candidates={
            "a": {"mixer": "narow"},
            "b": {"mixer": "narrow", "widht": 3},
            "c": {"mixer": "attention"},
            "d": {"width": 3},
        },
        pinned={8: "a", -1: "b", 2: "bb"},
    )
    with pytest.raises(ConfigError) as caught:
        load_space(config, num_layers=8)
    problems = caught.value.problems
    for start, rest in (
        ("space.candidates.a.mixer: unknown mixer 'narow'", "Did you mean 'narrow'?"),
        ("space.candidates.b.widht: unknown option", "Did you mean 'width'?"),
        ("space.candidates.c: mixer 'attention' keeps attention", "remove this candidate"),
        ("space.candidates.d: a candidate must be a mapping", "mixer: NAME"),
        ("space.pinned.8: ", "within 0 and 7, but got 8"),
        ("space.pinned.-1: ", "within 0 and 7, but got -1"),
        ("space.pinned.2: unknown candidate 'bb'", "available: attention, a, b, c, d"),
    ):
        assert any(p.startswith(start) and rest in p for p in problems), (start, problems)
    assert len(problems) == 7
    assert len(check_pins(config)) == 2, "without a teacher no layer number is too large"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SpaceConfig(), "space.candidates: must name at least one mixer besides attention"),
        (
            SpaceConfig(name="hybrid_phi_manba"),
            r"space.name: unknown search space.*Did you mean 'hybrid_phi_mamba'\?",
        ),
        (SpaceConfig(name="nowhere.yaml"), "space.name: must be a YAML file, but there is no"),
    ],
)
def test_a_space_that_names_nothing(config, message):
    with pytest.raises(ConfigError, match=message):
        load_candidates(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "must hold a mapping"),
        ("candidate: {}", r"unknown key 'candidate'.*Did you mean 'candidates'\?"),
        ("pinned: {first: attention}", "pinned must map layer numbers to names"),
        ("candidates: [a]", "candidates must map names to mixers"),
        ("a: {", "cannot be read"),
        ("candidates: {attention: {mixer: mamba2}}", "candidates.attention: is always there"),
    ],
)
def test_a_space_file_with_something_else_in_it(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_candidates(SpaceConfig(name=str(file)))


def test_typed_layouts_respect_the_pins():
    space = make_space(5, replacements=("a", "b"), pinned={0: ATTENTION, 4: "b"})
    assert space.parse("0,2") == Layout((ATTENTION, "a", ATTENTION, "a", "b"))
    assert space.parse("A M A M2 M2") == space.parse("AMAM2M2")
    with pytest.raises(LayoutError, match="layer 0: is pinned to 'attention'"):
        space.parse("1,2")
    with pytest.raises(LayoutError, match="layer 4: is pinned to 'b'"):
        space.parse("0,4")
    with pytest.raises(LayoutError, match=r"layer 4: is pinned to 'b' .* has 'a' there"):
        space.parse("A M A M M")


@pytest.mark.parametrize("num_attention", range(6))
@pytest.mark.parametrize("replacements", [("a",), ("a", "b", "c")])
@pytest.mark.parametrize("pinned", [{}, {1: ATTENTION}, {0: "a", 3: ATTENTION}])
def test_counting_enumerating_and_drawing_agree_with_brute_force(
    num_attention, replacements, pinned
):
    space = make_space(5, replacements=replacements, pinned=pinned)
    budget = Budget(attention_layers=num_attention)
    every = [Layout(names) for names in itertools.product(space.candidates, repeat=5)]
    expected = {
        layout
        for layout in every
        if len(layout.attention_layers) == num_attention
        and all(layout[layer] == name for layer, name in pinned.items())
    }
    assert budget.count(space) == len(expected)
    assert bool(budget.problems(space)) == (not expected)
    if not expected:
        return
    listed = list(budget.enumerate(space))
    assert len(listed) == len(expected) and set(listed) == expected
    assert listed == list(budget.enumerate(space))
    rng = random.Random(0)
    drawn = {budget.random(space, rng) for _ in range(200)}
    assert drawn <= expected
    assert len(drawn) >= min(len(expected), 20)


def test_drawing_has_no_favourites():
    space, budget, rng = make_space(5), Budget(attention_layers=2), random.Random(3)
    count = dict.fromkeys(budget.enumerate(space), 0)
    for _ in range(5000):
        count[budget.random(space, rng)] += 1
    # Ten layouts of 500 draws each, with a standard deviation of 21.
    assert all(400 < times < 600 for times in count.values())


@pytest.mark.parametrize(
    ("num_attention", "pinned", "message"),
    [
        (
            9,
            {},
            "budget.attention_layers: must be at most 8, the teacher's layers, but got 9",
        ),
        (
            1,
            {0: ATTENTION, 1: ATTENTION},
            "budget.attention_layers: must be at least 2, since space.pinned keeps attention in "
            "as many layers, but got 1",
        ),
        (
            8,
            {0: "ssm"},
            "budget.attention_layers: must be at most 7, since space.pinned replaces 1 of 8 "
            "layers, but got 8",
        ),
    ],
)
def test_an_impossible_budget_names_the_nearest_possible_one(num_attention, pinned, message):
    budget = Budget(attention_layers=num_attention)
    assert budget.problems(make_space(8, pinned=pinned)) == [message]


def test_a_layout_off_the_budget_is_refused():
    space = make_space(4)
    Budget(attention_layers=2).check(space.parse("0,1"))
    with pytest.raises(LayoutError, match=r"exactly 2 attention layers, .* keeps 3: \[0, 1, 3\]"):
        Budget(attention_layers=2).check(space.parse("0,1,3"))
