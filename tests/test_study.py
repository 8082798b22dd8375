"""Studies: what is scored, in which order, what survives a kill, and what the result says."""

import contextlib
import math
import multiprocessing
import os
import random
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from threading import Timer

import optuna
import pytest
from synthetic_search import SyntheticScorer, make

from mohawk_nas.config import study_from_dict
from mohawk_nas.errors import ConfigError, RegistryError, RunError, TrainingError
from mohawk_nas.layout import ATTENTION
from mohawk_nas.registry import load_plugin
from mohawk_nas.reporting import Silent
from mohawk_nas.search.scoring import Score, compare, compare_blocks
from mohawk_nas.search.strategy import STRATEGIES, build_strategy
from mohawk_nas.search.study import check_search, load_result, plan_search, run_study, trial_seed

BASELINES = ["uniform", "first", "last", "stage2_rank", "swap_one", "add_one_in", "greedy"]


class Listener(Silent):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


def run(num_layers, num_attention, *, scorer=None, run_dir=None, reporter=None, **options):
    config, space, budget = make(num_layers, num_attention, **options)
    scorer = scorer or SyntheticScorer(num_layers, pairs=1.0, replacements=space.replacements)
    result = run_study(
        config, space, budget, scorer, run_dir=run_dir, reporter=reporter or Silent()
    )
    for trial in result.trials:
        space.check(trial.layout)
        budget.check(trial.layout)
    layouts = [trial.layout for trial in result.trials]
    assert len(layouts) == len(set(layouts))
    assert len(scorer.scored) == len(set(scorer.scored)), "no layout is scored twice"
    return result, scorer


def essence(result):
    """All that must not depend on when and how often a study was stopped."""
    return (
        [
            (t.number, t.layout, t.score, t.value, t.proposed_by, t.provenance)
            for t in result.trials
        ],
        [(p.layout, p.score, p.charged_to) for p in result.probes],
        result.baselines,
        result.asked,
        result.best.layout,
    )


@pytest.mark.parametrize("strategy", ["tpe", "random", "exhaustive"])
def test_a_space_that_fits_the_trials_is_scored_whole(strategy):
    listener = Listener()
    result, scorer = run(8, 2, trials=28, strategy=strategy, reporter=listener)
    assert result.exhaustive and len(result.trials) == 28 == len(scorer.scored)
    assert {trial.proposed_by for trial in result.trials} == {"exhaustive"}
    assert listener.said == [
        "28 layouts meet the budget, no more than search.trials = 28: every one of them is scored"
    ]
    assert result.best.value == min(trial.value for trial in result.trials)


@pytest.mark.parametrize("strategy", ["tpe", "random"])
def test_a_space_of_220_is_searched_without_repeats(strategy):
    result, scorer = run(12, 3, trials=40, strategy=strategy)
    assert len(result.trials) == 40 == len(scorer.scored)
    assert result.num_possible == 220 and not result.exhaustive
    assert all(trial.proposed_by.startswith(strategy) for trial in result.trials)


def test_baselines_come_first_and_nothing_is_scored_twice():
    result, scorer = run(8, 2, trials=20, baselines=BASELINES)
    assert list(result.baselines) == [f"uniform/{i}" for i in range(4)] + BASELINES[1:]
    named = set(result.baselines.values())
    assert {trial.layout for trial in result.trials[: len(named)]} == named
    assert len(result.trials) == 20
    # 8 layouts with one layer replaced, 8 with one kept, and greedy's 7 on the budget.
    assert {name: cost.asked for name, cost in result.probe_costs.items()} == {
        "swap_one": 8,
        "add_one_in": 8,
        "greedy": 15,
    }
    scored = {name: cost.scored for name, cost in result.probe_costs.items()}
    assert scored["swap_one"] == 8 and scored["add_one_in"] == 8
    assert len(scorer.scored) == len({t.layout for t in [*result.trials, *result.probes]})


def test_a_layout_that_two_baselines_name_is_one_trial():
    # In a sum over layers all rankings agree.
    result, _ = run(8, 2, scorer=SyntheticScorer(8), trials=12, baselines=BASELINES)
    best = result.by_layout[result.baselines["greedy"]]
    assert result.labels(best.layout) == ("stage2_rank", "swap_one", "add_one_in", "greedy")
    assert best.proposed_by == "stage2_rank"


def test_a_probe_on_the_budget_becomes_a_trial_without_a_second_score():
    # With one layer to keep, add_one_in has looked at all eight layouts there are.
    result, scorer = run(8, 1, trials=8, baselines=["add_one_in"])
    assert result.exhaustive and len(result.trials) == 8 == len(scorer.scored)


def test_layouts_can_be_given_as_baselines():
    result, _ = run(8, 2, trials=6, baselines=["1,5", "MMMAMMMA", "first"])
    assert [t.layout.attention_layers for t in result.trials[:3]] == [(1, 5), (3, 7), (0, 1)]
    assert [t.proposed_by for t in result.trials[:3]] == ["1,5", "MMMAMMMA", "first"]
    assert list(result.baselines) == ["1,5", "MMMAMMMA", "first"]


def test_baselines_are_scored_even_if_they_are_more_than_the_trials():
    listener = Listener()
    result, _ = run(8, 2, trials=2, baselines=["uniform"], reporter=listener)
    assert len(result.trials) == 4
    assert "the baselines alone name 4 layouts, more than search.trials = 2" in listener.said[0]


def test_a_selector_as_the_strategy_ends_when_it_has_no_more():
    listener = Listener()
    result, _ = run(8, 2, trials=10, strategy="uniform", reporter=listener)
    assert len(result.trials) == 4
    assert listener.said == ["uniform has nothing left to propose"]


def test_pins_and_several_candidates_hold_everywhere():
    result, _ = run(
        6,
        3,
        trials=30,
        baselines=BASELINES,
        replacements=("a", "b"),
        pinned={0: "b", 2: ATTENTION},
    )
    assert result.num_possible == 6 * 4
    assert result.exhaustive


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_stage2_local_alone_is_solved_and_not_sampled(weight):
    listener = Listener()
    scorer = SyntheticScorer(10)
    result, _ = run(
        10,
        3,
        scorer=scorer,
        trials=100,
        objective={"stage2_local": weight},
        baselines=["first"],
        reporter=listener,
    )
    assert result.solved and not result.exhaustive
    assert [trial.proposed_by for trial in result.trials] == ["first", "exact"]
    assert listener.said == [
        "stage2_local is a sum over single layers: solved exactly, nothing to search"
    ]
    space, budget = result.space, result.budget
    brute = min(budget.enumerate(space), key=lambda x: scorer.score(x).value(result.weights))
    assert result.best.layout == brute


def test_the_seed_decides(tmp_path):
    one, two = (run(12, 3, trials=15, strategy="tpe")[0] for _ in range(2))
    assert essence(one) == essence(two)
    other, _ = run(12, 3, trials=15, strategy="tpe", seed=1)
    assert [t.layout for t in other.trials] != [t.layout for t in one.trials]
    assert trial_seed(0, 1) != trial_seed(1, 0)


def test_memory_and_sqlite_give_the_same_study(tmp_path):
    options = {"trials": 20, "baselines": BASELINES}
    one, _ = run(8, 3, **options)
    two, _ = run(8, 3, run_dir=tmp_path, **options)
    assert essence(one) == essence(two)


class Stopper(SyntheticScorer):
    """Raises at one call, before or after the score is known."""

    def __init__(self, *args, at, error, **kwargs):
        super().__init__(*args, **kwargs)
        self.at, self.error = at, error

    def score(self, layout):
        if len(self.scored) == self.at:
            raise self.error
        return super().score(layout)


STRATEGIES_OF_STUDIES = [
    "tpe",
    "random",
    {"name": "tpe", "encoding": "slots"},
    {"name": "gp", "encoding": "bits"},
    {"name": "nsga2", "population": 6},
    "surrogate",
    {"name": "surrogate", "model": "additive", "explore": "none"},
    {"name": "beam", "width": 3, "swaps": 2},
]


@pytest.mark.parametrize("strategy", STRATEGIES_OF_STUDIES, ids=str)
def test_a_study_stopped_at_any_point_goes_on_as_if_unbroken(tmp_path, strategy):
    label = build_strategy(strategy).label
    # A beam would find what greedy has found.
    baselines = ["uniform", *([] if "beam" in label else [{"name": "greedy", "swaps": 2}])]
    options = {"trials": 22, "strategy": strategy, "baselines": baselines}
    unbroken, whole = run(8, 3, **options)
    assert label in {trial.proposed_by.partition(":")[0] for trial in unbroken.trials}
    at, stops = 0, 0
    while True:
        # Every fifth layout ends the run, among baselines, probes and proposals.
        scorer = Stopper(8, pairs=1.0, at=5, error=KeyboardInterrupt())
        try:
            result, _ = run(8, 3, scorer=scorer, run_dir=tmp_path, **options)
            break
        except KeyboardInterrupt:
            at, stops = at + len(scorer.scored), stops + 1
    assert essence(result) == essence(unbroken)
    assert stops == at / 5 >= 6
    assert at + len(scorer.scored) == len(whole.scored), "nothing is scored twice"


@pytest.mark.parametrize("strategy", ["tpe", "random"])
def test_raising_the_trials_goes_on_as_if_they_had_been_there_at_once(tmp_path, strategy):
    options = {"baselines": ["uniform", "greedy"], "strategy": strategy}
    whole, _ = run(12, 3, trials=24, **options)
    run(12, 3, trials=12, run_dir=tmp_path, **options)
    listener = Listener()
    result, scorer = run(12, 3, trials=24, run_dir=tmp_path, reporter=listener, **options)
    assert essence(result) == essence(whole)
    # Fewer where greedy had looked at a layout already.
    assert 0 < len(scorer.scored) <= 12
    assert listener.said == ["continuing: 12 layouts are scored already"]


def test_an_ended_study_run_again_scores_nothing(tmp_path):
    options = {"trials": 14, "baselines": BASELINES, "run_dir": tmp_path}
    first, _ = run(8, 2, **options)
    again, scorer = run(8, 2, **options)
    assert essence(first) == essence(again)
    assert not scorer.scored


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("no memory")])
def test_an_exception_leaves_a_study_that_goes_on(tmp_path, error):
    options = {"trials": 20, "baselines": ["uniform", "swap_one"]}
    unbroken, _ = run(8, 3, **options)
    # One of uniform's 8 layouts, one of 8 probes, and one that the strategy proposed.
    for at in (2, 9, 18):
        folder = tmp_path / str(at)
        scorer = Stopper(8, pairs=1.0, at=at, error=error)
        with pytest.raises(type(error)):
            run(8, 3, scorer=scorer, run_dir=folder, **options)
        result, _ = run(8, 3, run_dir=folder, **options)
        assert essence(result) == essence(unbroken)
    study = optuna.load_study(study_name="made-up", storage=f"sqlite:///{folder}/study.db")
    (failed,) = [t for t in study.trials if t.state == optuna.trial.TrialState.FAIL]
    assert failed.user_attrs["reason"].startswith(f"interrupted: {type(error).__name__}")


class Killer(SyntheticScorer):
    """Sends its own process SIGKILL, some milliseconds after it began so many layouts."""

    def __init__(self, *args, after, seconds, **settings):
        super().__init__(*args, **settings)
        self.left, self.seconds = after, seconds

    def score(self, layout):
        self.left -= 1
        if self.left == 0:
            Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return super().score(layout)


def study_to_be_killed(run_dir: Path, after: int = 0, seconds: float = 0.0) -> None:
    """What the child processes run."""
    config, space, budget = make(8, 3, trials=32, strategy="tpe", baselines=BASELINES)
    scorer = Killer(8, pairs=1.0, noise=0.1, pause=0.005, after=after, seconds=seconds)
    (run_dir / "running").touch()
    run_study(
        config,
        space,
        budget,
        scorer,
        run_dir=run_dir,
        provenance=lambda layout: {"bank": {str(i): layout[i] for i in layout.replaced_layers}},
    )


def test_a_study_killed_at_random_moments_ends_like_an_unbroken_one(tmp_path):
    # Children are forked from a server that has imported what they need, so that they start fast.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["synthetic_search", "mohawk_nas.search.study"])
    broken, unbroken, rng = tmp_path / "broken", tmp_path / "unbroken", random.Random(1)
    broken.mkdir()
    unbroken.mkdir()
    study_to_be_killed(unbroken)
    # Three kills while the storage is being made, seven among 55 layouts.
    for after in (0, 0, 0, 5, 5, 5, 5, 5, 5, 5):
        (broken / "running").unlink(missing_ok=True)
        child = processes.Process(
            target=study_to_be_killed, args=(broken, after, rng.uniform(0.0, 0.02))
        )
        child.start()
        if not after:
            while not (broken / "running").exists():
                time.sleep(0.002)
            child.join(rng.uniform(0.0, 0.15))
            child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    study_to_be_killed(broken)
    config, space, budget = make(8, 3, trials=32, strategy="tpe", baselines=BASELINES)
    results = [load_result(config, space, budget, run_dir=d) for d in (broken, unbroken)]
    assert essence(results[0]) == essence(results[1])
    assert "tpe" in {trial.proposed_by for trial in results[0].trials}
    frozen = optuna.load_study(study_name="made-up", storage=f"sqlite:///{broken}/study.db").trials
    states = {t.state for t in frozen}
    assert states <= {optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL}


def test_optuna_can_open_the_study(tmp_path):
    config, space, budget = make(4, 1, trials=3)
    run_study(
        config,
        space,
        budget,
        SyntheticScorer(4),
        run_dir=tmp_path,
        provenance=lambda layout: {"bank": ["key of the bank"]},
    )
    study = optuna.load_study(study_name="made-up", storage=f"sqlite:///{tmp_path}/study.db")
    trial = study.trials[0]
    assert list(trial.params) == [f"layer_{i:02d}.mixer" for i in range(4)]
    assert sorted(trial.params.values()) == [ATTENTION, "ssm", "ssm", "ssm"]
    attrs = trial.user_attrs
    assert attrs["layout"].split().index("A") == attrs["attention_layers"][0]
    assert attrs["proposed_by"] == "swaps:start"
    assert attrs["seed"] == trial_seed(0, 0)
    assert attrs["provenance"] == {"bank": ["key of the bank"]}
    assert attrs["score"]["mean"]["kl"] == trial.value
    assert len(attrs["score"]["per_block"]["kl"]) == 16
    assert attrs["score"]["tokens"] == 4096


def test_what_is_no_trial_names_its_layout_without_parameters(tmp_path):
    found, _ = run(8, 2, trials=4, baselines=["swap_one"], run_dir=tmp_path)
    storage = f"sqlite:///{tmp_path}/study.db"
    probes = optuna.load_study(study_name="made-up.probes", storage=storage).trials
    assert len(probes) == len(found.probes) > 0
    assert not any(probe.params for probe in probes)
    again, _ = run(8, 2, trials=4, baselines=["swap_one"], run_dir=tmp_path)
    assert [p.layout for p in again.probes] == [p.layout for p in found.probes]


def test_a_study_with_other_settings_is_refused_by_name(tmp_path):
    run(8, 2, trials=4, run_dir=tmp_path)
    for changed in ({"seed": 3}, {"strategy": "random"}, {"objective": {"stage2_local": 1.0}}):
        key = next(iter(changed))
        with pytest.raises(RunError, match=f"{key} was .* and is now .*; give the study another"):
            run(8, 2, trials=4, run_dir=tmp_path, **changed)
    with pytest.raises(RunError, match=r"budget\.attention_layers was 2 and is now 3"):
        run(8, 3, trials=4, run_dir=tmp_path)
    with pytest.raises(RunError, match=r"space.pinned was {} and is now {'0': 'attention'}"):
        run(8, 2, trials=4, run_dir=tmp_path, pinned={0: ATTENTION})
    result, _ = run(8, 2, trials=5, run_dir=tmp_path)
    assert len(result.trials) == 5


def test_a_damaged_study_is_one_line(tmp_path):
    run(8, 2, trials=4, run_dir=tmp_path)
    file = tmp_path / "study.db"
    file.write_bytes(b"not a database" + file.read_bytes()[14:])
    with pytest.raises(TrainingError, match=r"study\.db: .*storage says: .*not a database") as e:
        run(8, 2, trials=4, run_dir=tmp_path)
    assert "\n" not in str(e.value)


def test_results_load_without_a_scorer(tmp_path):
    config, space, budget = make(8, 2, trials=14, baselines=BASELINES)
    with pytest.raises(RunError, match=r"study\.db: must hold a study, but there is none"):
        load_result(config, space, budget, run_dir=tmp_path)
    result = run_study(config, space, budget, SyntheticScorer(8), run_dir=tmp_path)
    assert load_result(config, space, budget, run_dir=tmp_path) == result
    other = replace(config, name="another")
    with pytest.raises(RunError, match="there must be a study 'another', but there is none"):
        load_result(other, space, budget, run_dir=tmp_path)


def test_reading_a_result_does_not_disturb_the_search(tmp_path):
    config, space, budget = make(8, 2, trials=6)

    class Reading(SyntheticScorer):
        def score(self, layout):
            if len(self.scored) == 3:
                assert len(load_result(config, space, budget, run_dir=tmp_path).trials) == 3
            return super().score(layout)

    assert len(run_study(config, space, budget, Reading(8), run_dir=tmp_path).trials) == 6


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"strategy": "tpee"}, r"search.strategy: unknown strategy 'tpee'.*Did you mean 'tpe'\?"),
        (
            {"baselines": ["first", "unifrom"]},
            r"search.baselines\[1\]: 'unifrom' must be a selector .*Did you mean 'uniform'\?",
        ),
        ({"baselines": ["tpe"]}, r"search.baselines\[0\]: 'tpe' proposes layouts one by one"),
        (
            {"baselines": ["1,5,6"]},
            r"search.baselines\[0\]: '1,5,6': the budget is exactly 2 attention layers",
        ),
        ({"baselines": ["1,9"]}, r"search.baselines\[0\]: '1,9': layer 9 is out of range"),
        ({"baselines": ["MMA"]}, r"search.baselines\[0\]: 'MMA': a layout must name all 8"),
    ],
)
def test_what_a_study_cannot_do_is_said_before_anything_is_scored(search, message):
    scorer = SyntheticScorer(8)
    with pytest.raises(ConfigError, match=message):
        run(8, 2, scorer=scorer, **search)
    assert not scorer.scored


@pytest.mark.parametrize(
    ("search", "problems"),
    [
        (
            {
                "strategy": {"name": "surrogate", "modle": "additive", "design": "many"},
                "baselines": [
                    "first",
                    {"name": "beam", "width": 0},
                    {"name": "greedy", "direction": "up", "swap": 1},
                    {"name": "greedy", "width": 4},
                    {"name": "uniform", "width": 4},
                    {"name": "bem"},
                    {"name": "tpe", "encoding": "slots"},
                ],
            },
            [
                "search.strategy.modle: unknown option. Did you mean 'model'?",
                "search.strategy.design: Value 'many' of type 'str' could not be converted",
                "search.baselines[1]: `width >= 1` must hold, but got 0",
                "search.baselines[2].direction: Invalid value 'up', expected one of ['add', 'rem",
                "search.baselines[2].swap: unknown option. Did you mean 'swaps'?",
                "search.baselines[3].width: 'greedy' is short for {'name': 'beam', 'width': 1}, so",
                "search.baselines[4].width: unknown option. Options of uniform: []",
                "search.baselines[5]: unknown strategy 'bem'; available: add_one_in, beam, ",
                "search.baselines[6]: 'tpe(encoding=slots)' proposes layouts one by one",
            ],
        ),
        (
            {"strategy": {"name": "surrogate", "design": 1}},
            ["search.strategy: `design >= 2` must hold, but got 1"],
        ),
    ],
)
def test_every_problem_of_options_is_told_at_once(search, problems):
    config, space, budget = make(8, 2, **search)
    found = check_search(config.search, space=space, budget=budget)
    assert found == check_search(config.search), "none of it needs a teacher"
    for problem, start in zip(found, problems, strict=True):
        assert problem.startswith(start)


def test_labels_tell_selectors_with_other_options_apart():
    baselines = [
        "greedy",
        {"name": "beam", "width": 1},
        {"name": "beam", "width": 2},
        {"name": "greedy", "swaps": 3},
        {"name": "ranking", "score": "add_one_in"},
        "add_one_in",
    ]
    config, space, budget = make(8, 2, baselines=baselines, trials=12)
    labels = ["greedy", "beam(width=2)", "greedy(swaps=3)", "add_one_in"]
    result, _ = run(8, 2, baselines=baselines, trials=12)
    assert list(result.baselines) == labels == list(result.asked)
    assert list(plan_search(config.search, space, budget).probes) == labels
    assert {probe.charged_to for probe in result.probes} == {"greedy", *labels[1:3]}
    # Whatever it is called, the answer is no worse than any of them.
    assert result.best.value <= min(result.by_layout[x].value for x in result.baselines.values())


def test_a_study_goes_on_whichever_way_its_names_are_written(tmp_path):
    """A study from before strategies had options holds plain names in its settings."""
    raw = {"name": "x", "data": {"source": "a"}, "budget": {"attention_layers": 2}}
    raw |= {"teacher": {"source": "b"}}
    plain = {"strategy": "random", "baselines": ["first", "1"]}
    spelled = {"strategy": {"name": "random"}, "baselines": [{"name": "first"}, 1]}
    one, two = (study_from_dict(raw | {"search": search}) for search in (plain, spelled))
    assert one == two and one.search.strategy == "random"
    assert one.search.baselines == ["first", "1"]
    run(8, 2, trials=4, run_dir=tmp_path, strategy={"name": "tpe", "encoding": "bits"})
    with pytest.raises(RunError, match=r"strategy was {'name': 'tpe', 'encoding': 'bits'} and is "):
        run(8, 2, trials=4, run_dir=tmp_path, strategy="tpe")


def test_the_documented_strategy_has_options_like_a_built_in(tmp_path):
    page = Path(__file__).parents[1].joinpath("docs/searching.md").read_text(encoding="utf-8")
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "every_nth" in c)
    (tmp_path / "mine.py").write_text(code)
    load_plugin(tmp_path / "mine.py")
    try:
        result, _ = run(6, 2, trials=14, strategy={"name": "every_nth", "n": 4})
        assert len(result.trials) == 4
        assert {trial.proposed_by for trial in result.trials} == {"every_nth(n=4)"}
        with pytest.raises(ConfigError, match=r"search.strategy.m: unknown option. Options of eve"):
            run(6, 2, trials=14, strategy={"name": "every_nth", "m": 4})
        with pytest.raises(ConfigError, match=r"search.strategy: `n >= 1` must hold, but got 0"):
            run(6, 2, trials=14, strategy={"name": "every_nth", "n": 0})
    finally:
        mine = STRATEGIES._items.pop("every_nth")
    with pytest.raises(RegistryError, match="strategy 'greedy' is a short name that comes with"):
        STRATEGIES.register("greedy")(mine)


MINE = """
from dataclasses import dataclass
from mohawk_nas.layout import Layout
from mohawk_nas.search.strategy import STRATEGIES, Proposal, Selector, Strategy

@STRATEGIES.register("mine")
@dataclass(frozen=True, kw_only=True)
class Mine({base}):
    def {method}(self, context):
        layouts = list(context.budget.enumerate(context.space))
        return {answer}
"""


@pytest.mark.parametrize(
    ("method", "answer", "message"),
    [
        ("propose", "layouts[99]", r"failed \(.*mine.py, line 11\): IndexError: list"),
        ("propose", "layouts[0]", r"must give a Proposal or None, but gives Layout\("),
        (
            "propose",
            "Proposal(layout=Layout(('x',) * 6), proposed_by='mine')",
            r"proposed a layout that cannot be: layer 0: unknown candidate 'x'",
        ),
        (
            "propose",
            "Proposal(layout=Layout(('attention',) * 6), proposed_by='mine')",
            r"proposed a layout that cannot be: the budget is exactly 2 attention",
        ),
        ("layouts", "None", r"failed \(.*mine.py\): TypeError: 'NoneType' object is not iterable"),
        ("layouts", "layouts", r"must name pairs of a label and a Layout, but names Layout\("),
        ("layouts", "[('mine', 'x')]", r"pairs of a label and a Layout, but names \('mine', 'x'\)"),
        (
            "layouts",
            "[('foo', layouts[0])]",
            r": its labels must begin with its own, but one is 'foo'",
        ),
        (
            "layouts",
            "[('mine', Layout(('attention',) * 6))]",
            r"proposed a layout that cannot be: the budget is exactly 2 attention",
        ),
    ],
)
def test_a_users_strategy_is_told_of_its_mistakes(method, answer, message, tmp_path):
    base, search = {
        "propose": ("Strategy", {"strategy": "mine"}),
        "layouts": ("Selector", {"baselines": ["mine"]}),
    }[method]
    with (
        plugged(tmp_path, base=base, method=method, answer=answer),
        pytest.raises(RegistryError, match=f"strategy 'mine'.*{message}"),
    ):
        run(6, 2, trials=4, **search)


@contextlib.contextmanager
def plugged(folder, **parts):
    (folder / "mine.py").write_text(MINE.format(**parts))
    load_plugin(folder / "mine.py")
    try:
        yield
    finally:
        del STRATEGIES._items["mine"]


def test_what_is_registered_as_a_strategy_is_one():
    STRATEGIES.register("mine")(type("Mine", (), {}))
    try:
        with pytest.raises(ConfigError, match=r"search.strategy: what .* registers as 'mine' must"):
            run(6, 2, trials=4, strategy="mine")
    finally:
        del STRATEGIES._items["mine"]


def test_names_are_checked_without_a_teacher():
    config, _, _ = make(8, 2, strategy="greedi", baselines=["lats", "1,99"])
    assert len(check_search(config.search)) == 2
    with pytest.raises(ConfigError, match="must be at most 8, the teacher's layers, but got 9"):
        run(8, 9)


def test_the_plan_is_what_happens():
    config, space, budget = make(8, 2, trials=20, baselines=BASELINES)
    plan = plan_search(config.search, space, budget)
    assert (plan.possible, plan.trials, plan.exhaustive, plan.solved) == (28, 20, False, False)
    result, _ = run(8, 2, trials=20, baselines=BASELINES)
    assert plan.probes == result.asked
    assert plan.trials == len(result.trials)
    whole = plan_search(replace(config.search, trials=28), space, budget)
    assert whole.exhaustive and whole.trials == 28


def test_layouts_within_noise_are_tied():
    result, _ = run(8, 2, trials=28, scorer=SyntheticScorer(8, noise=1.0))
    best = result.best.score
    for trial in result.ranking[1:]:
        versus = compare(trial.score, best, {"kl": 1.0})
        pairs = zip(trial.score.per_block["kl"], best.per_block["kl"], strict=True)
        differences = [a - b for a, b in pairs]
        mean = sum(differences) / 16
        error = math.sqrt(sum((d - mean) ** 2 for d in differences) / 15 / 16)
        assert versus.difference == pytest.approx(mean)
        assert versus.difference == pytest.approx(trial.value - result.best.value)
        assert versus.standard_error == pytest.approx(error)
        assert (trial in result.ties) == (mean <= 2 * error)
    assert 0 < len(result.ties) < 27


def test_blocks_are_compared_in_pairs():
    # Blocks differ by thousands, layouts by one: unpaired they could not be told apart.
    versus = compare_blocks([1001.0, 5001.0, 3000.9], [1000.0, 5000.0, 3000.0])
    assert versus.difference == pytest.approx(0.9667, abs=1e-4) and not versus.tied
    assert compare_blocks([2.0], [1.0]).tied, "a single block tells nothing apart"
    assert compare_blocks([1.0, 2.0], [1.0, 2.0]).tied


def test_the_additive_fit_recovers_what_layers_are_worth():
    scorer = SyntheticScorer(8)
    result, _ = run(8, 3, trials=30, strategy="random", scorer=scorer)
    costs = [scorer.cost(layer, "ssm") for layer in range(8)]
    mean = sum(costs) / 8
    worth = result.worth
    assert worth.fitted is not None and worth.r_squared == pytest.approx(1.0)
    assert [worth.fitted[i] for i in range(8)] == pytest.approx([c - mean for c in costs])
    assert worth.swap_one is None and worth.add_one_in is None


def test_the_fit_says_when_layers_interact():
    alone, _ = run(8, 3, trials=40, strategy="random", scorer=SyntheticScorer(8))
    mixed, _ = run(8, 3, trials=40, strategy="random", scorer=SyntheticScorer(8, pairs=8.0))
    assert mixed.worth.r_squared < 0.9 < alone.worth.r_squared


def test_too_few_trials_fit_nothing():
    assert run(8, 3, trials=10)[0].worth.fitted is None
    # Twelve trials that never keep some of the layers tell nothing about those.
    result, _ = run(24, 2, trials=12, strategy="uniform")
    assert result.worth.fitted is None and result.worth.r_squared is None


def test_probes_say_what_single_layers_do():
    scorer = SyntheticScorer(6, pairs=1.0)
    pins = {0: ATTENTION}
    result, _ = run(
        6, 3, scorer=scorer, trials=3, baselines=["swap_one", "add_one_in"], pinned=pins
    )
    assert result.worth.swap_one is not None and result.worth.add_one_in is not None
    assert list(result.worth.swap_one) == list(result.worth.add_one_in) == [1, 2, 3, 4, 5]
    alone = result.space.parse("0,2,3,4,5")
    assert result.worth.swap_one[1] == pytest.approx(scorer.exact(alone))
    kept = result.space.parse("0,4")
    assert result.worth.add_one_in[4] == pytest.approx(scorer.exact(kept))


def test_any_layout_has_its_place():
    scorer = SyntheticScorer(8, pairs=1.0, noise=0.1)
    result, _ = run(8, 2, trials=10, scorer=scorer)
    for rank, trial in enumerate(result.ranking, start=1):
        placement = result.place(trial.layout, trial.score)
        assert (placement.rank, placement.num_trials) == (rank, 10)
        assert placement.trial == trial
    unseen = next(x for x in result.budget.enumerate(result.space) if x not in result.by_layout)
    placement = result.place(unseen, scorer.score(unseen))
    assert placement.num_trials == 11 and placement.trial is None
    assert placement.versus_best.difference == pytest.approx(
        scorer.score(unseen).value({"kl": 1.0}) - result.best.value
    )


def test_the_anytime_curve_never_rises():
    result, _ = run(12, 3, trials=20)
    curve = result.anytime()
    assert curve == sorted(curve, reverse=True) and curve[-1] == result.best.value
    assert curve[0] == result.trials[0].value


class Diverging(SyntheticScorer):
    def score(self, layout):
        score = super().score(layout)
        if layout[0] != ATTENTION:
            score.per_block["kl"] = (math.nan, *score.per_block["kl"][1:])
        return score


def test_a_score_that_is_not_finite_is_the_worst_and_ends_nothing(tmp_path):
    options = {"trials": 20, "baselines": BASELINES}
    result, _ = run(8, 2, scorer=Diverging(8, pairs=1.0), run_dir=tmp_path, **options)
    assert len(result.trials) == 20
    assert result.best.layout[0] == ATTENTION and math.isfinite(result.best.value)
    assert result.ranking[-1].value == math.inf
    assert result.ranking[-1] not in result.ties
    again, scorer = run(8, 2, scorer=Diverging(8, pairs=1.0), run_dir=tmp_path, **options)
    assert [t.layout for t in again.trials] == [t.layout for t in result.trials]
    assert not scorer.scored


def test_scores_come_back_from_their_dictionary():
    score = Score(per_block={"kl": (0.1, 0.2), "stage2_local": (1.0, 3.0)}, tokens=8, seconds=0.5)
    assert Score.from_dict(score.to_dict()) == score
    assert score.value({"kl": 2.0, "stage2_local": 0.5}) == pytest.approx(0.3 + 1.0)
    assert score.blocks({"kl": 2.0, "stage2_local": 0.5}) == pytest.approx((0.7, 1.9))
