"""Rungs: who climbs, what survives a kill, what several workers share, what is distilled."""

import hashlib
import io
import multiprocessing
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import optuna
import pytest
import yaml
from rich.console import Console
from synthetic_search import SyntheticScorer, make
from tiny_study import make_study, make_teacher, make_text
from typer.testing import CliRunner

from mohawk_nas import pipeline, recall
from mohawk_nas.audit import audit
from mohawk_nas.cli import app
from mohawk_nas.config import LogitsConfig, RungsConfig, dump, short_recipe
from mohawk_nas.data import load_blocks
from mohawk_nas.distill.several import distil_layouts
from mohawk_nas.errors import ConfigError
from mohawk_nas.forecast import count_student_memory
from mohawk_nas.layout import Layout
from mohawk_nas.metrics import evaluate_blocks
from mohawk_nas.plan import make_plan
from mohawk_nas.ranks import GPU_SHARERS
from mohawk_nas.reporting import Silent
from mohawk_nas.reporting.console import print_result
from mohawk_nas.reporting.html import render_report
from mohawk_nas.reporting.text import layers, proposers, rung_counts, rung_table, verdict
from mohawk_nas.search.leases import Pace, Worker
from mohawk_nas.search.record import open_ledger
from mohawk_nas.search.rungs import (
    Halving,
    Wilcoxon,
    build_pruner,
    climb,
    most_in_run_off,
    rung_recipe,
)
from mohawk_nas.search.scoring import Score, compare
from mohawk_nas.search.study import load_result, plan_search, run_study, trial_seed
from mohawk_nas.workbench import Workbench

NOISE = np.random.default_rng(3).normal(size=(12, 32))


def rows(*means, noise=0.0):
    return [tuple(mean + noise * NOISE[i]) for i, mean in enumerate(means)]


# Pruners


def test_halving_takes_the_best_part_and_two_at_least():
    assert Halving(factor=4).climbers(rows(*range(12))) == [0, 1, 2]
    assert Halving(factor=2).climbers(rows(*range(9))) == [0, 1, 2, 3]
    assert Halving(factor=4).climbers(rows(*range(3))) == [0, 1]
    assert Halving(factor=4).climbers(rows(0)) == [0]
    assert Halving(factor=2, most=3).climbers(rows(*range(9))) == [0, 1, 2]
    assert Halving(factor=2, most=1).climbers(rows(*range(2))) == [0]
    assert Halving(factor=4, most=3).limit(8) == 2


def test_wilcoxon_takes_those_that_cannot_be_told_from_the_best():
    blocks = rows(0.0, 0.05, 3.0, 0.1, 4.0, noise=1.0)
    assert Wilcoxon().climbers(blocks) == [0, 1, 3]
    assert Wilcoxon(most=2).climbers(blocks) == [0, 1]
    # What lies above the best in every block is worse, however little; what equals it is not.
    assert Wilcoxon().climbers(rows(1.0, 1.0, 1.0 + 1e-6)) == [0, 1]
    assert Wilcoxon().climbers([blocks[0], (float("inf"),) * 32]) == [0]


def test_a_stricter_wilcoxon_lets_more_climb():
    # Two blocks of 32 speak for the second layout, with the largest differences.
    other = np.full(32, 0.1)
    other[:6] = -1.0
    blocks = [tuple(np.zeros(32)), tuple(other)]
    p = [Wilcoxon(p=p).climbers(blocks) for p in (1e-6, 0.9)]
    assert p == [[0, 1], [0]]


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("halve", "search.rungs.pruner: unknown pruner 'halve'; .* Did you mean 'halving'"),
        (["halving"], "search.rungs.pruner: unknown pruner"),
        (
            {"name": "halving", "p": 0.1},
            r"search.rungs.pruner.p: unknown option.*\['factor', 'most'\]",
        ),
        ({"name": "halving", "factor": 1}, "`factor >= 2` must hold, but got 1"),
        ({"name": "halving", "most": 0}, "`most >= 1` must hold, but got 0"),
        ({"name": "wilcoxon", "p": 1.0}, "`0 < p < 1` must hold"),
        ({"name": "wilcoxon", "most": 0}, "`most >= 1` must hold"),
    ],
    ids=str,
)
def test_what_a_pruner_cannot_be(choice, message):
    with pytest.raises(ConfigError, match=message):
        build_pruner(choice)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([32], r"search.rungs.tokens: each must be at least one step of 64 tokens"),
        ([640, 640], r"search.rungs.tokens: must rise from rung to rung, but got \[640, 640\]"),
        (64, "search.rungs.tokens: must be a list, but got 64"),
    ],
    ids=str,
)
def test_what_rungs_cannot_be(tmp_path, tokens, message):
    with pytest.raises(ConfigError, match=message):
        make_study(tmp_path, f"search.rungs.tokens={tokens}")


def test_a_rungs_steps_are_its_own(tmp_path):
    # A full distillation whose steps are longer than the rung.
    full = ["distill.logits.accumulate=64", "distill.logits.tokens=4096", "distill.logits.lr=1e-5"]
    short = ["search.rungs.tokens=[256]", "search.rungs.accumulate=2", "search.rungs.lr=1e-3"]
    config = make_study(tmp_path, *full, *short)
    whole = config.distill.logits
    wanted = replace(whole, tokens=256, accumulate=2, lr=1e-3)
    assert short_recipe(config, 256) == wanted != whole
    problems = {"batch_size": "at least 1", "accumulate": "at least 1", "lr": "above 0"}
    problems["seeds"] = "at least 1"
    for name, problem in problems.items():
        with pytest.raises(ConfigError, match=f"search.rungs.{name}: must be {problem}, but got 0"):
            make_study(tmp_path, *full, *short, f"search.rungs.{name}=0")


# Who climbs


def score(blocks):
    return Score(per_block={"kl": tuple(blocks)}, tokens=1, seconds=1.0)


def test_each_rung_decides_by_its_own_figures():
    layouts = [Layout.keeping((i,), num_layers=12, replacement="ssm") for i in range(12)]
    ranked = [(x, score(b)) for x, b in zip(layouts, rows(*range(12)), strict=True)]
    figures = {0: [5, 4, 3, 2, 1, 0], 1: [7, 8, 9, 7, 6, 7]}
    found = {
        (layouts[i], tokens, 0): score(rows(value)[0])
        for tokens, values in zip((100, 200), figures.values(), strict=True)
        for i, value in enumerate(values)
    }
    options = {"weights": {"kl": 1.0}, "tokens": [100, 200], "pruner": Halving(factor=2)}
    one, two = climb(ranked, found=found, **options)
    assert one.climbers == tuple(layouts[:6]) and one.ranking == tuple(layouts[5::-1])
    assert two.climbers == (layouts[5], layouts[4], layouts[3])
    # Of equal ones the better of the rung below is first.
    assert two.ranking == (layouts[4], layouts[5], layouts[3])
    assert one.complete and two.complete
    assert not one.left and not two.left
    del found[layouts[2], 100, 0]
    (partial,) = climb(ranked, found=found, **options)
    assert not partial.complete and len(partial.ranking) == 5 and partial.left == (layouts[2],)


def noisy(*means):
    """Scores of such means; two of them that are 0.1 apart are tied, at 0.6 they are not."""
    noise = 0.5 * (NOISE - NOISE.mean(axis=1, keepdims=True))
    return [score(mean + row) for mean, row in zip(means, noise, strict=False)]


def test_those_that_the_last_rung_leaves_tied_are_distilled_with_further_seeds():
    layouts = [Layout.keeping((i,), num_layers=12, replacement="ssm") for i in range(12)]
    ranked = [(x, score(b)) for x, b in zip(layouts, rows(*range(12)), strict=True)]
    options = {"weights": {"kl": 1.0}, "tokens": [100], "pruner": Halving(factor=2), "seeds": 3}
    found = {(layouts[i], 100, 0): s for i, s in enumerate(noisy(0.0, 0.05, 0.9, 0.1, 0.8, 0.7))}

    (first,) = climb(ranked, found=found, **options)
    assert first.complete and first.ranking[0] == layouts[0]
    # It chooses as before until all of them have the next seed.
    assert first.run_off == ((layouts[0], layouts[1], layouts[3]),) == (first.left,)
    found[layouts[0], 100, 1] = noisy(2.0)[0]
    (second,) = climb(ranked, found=found, **options)
    assert second.left == (layouts[1], layouts[3]) and second.ranking == first.ranking
    assert second.scores == first.scores and set(map(second.num_seeds, layouts[:6])) == {1}
    found |= {(layouts[i], 100, 1): s for i, s in zip((1, 3), noisy(0.1, -0.1), strict=True)}

    # By the mean of two seeds the first, which was lucky, is told from the others.
    (third,) = climb(ranked, found=found, **options)
    assert third.run_off[1] == third.left == (layouts[3], layouts[1])
    wanted = np.mean([found[layouts[3], 100, n].mean("kl") for n in (0, 1)])
    assert third.value(layouts[3]) == pytest.approx(wanted)
    assert third.scores[layouts[3]].tokens == 2 and third.scores[layouts[3]].seconds == 2.0
    # It was told from them with more seeds than those which fell behind with one, so it is ahead.
    assert third.value(layouts[0]) > third.value(layouts[5]) > third.value(layouts[1])
    assert third.ranking == tuple(layouts[i] for i in (3, 1, 0, 5, 4, 2))
    assert [third.num_seeds(layouts[i]) for i in (3, 1, 0, 5)] == [2, 2, 2, 1]

    assert third.overtaken == () == first.overtaken
    # One that had fallen behind is told of where the others turn out worse.
    worse = found | {(layouts[i], 100, 1): s for i, s in zip((1, 3), noisy(2.0, 3.0), strict=True)}
    (fourth,) = climb(ranked, found=worse, **options | {"seeds": 2})
    assert fourth.ranking[0] == layouts[0] and fourth.value(layouts[0]) == pytest.approx(1.0)
    assert fourth.overtaken == (layouts[5], layouts[4], layouts[2])

    # No seed is left after the third.
    found |= {(layouts[i], 100, 2): s for i, s in zip((1, 3), noisy(0.0, 0.4), strict=True)}
    (last,) = climb(ranked, found=found, **options)
    assert not last.left and len(last.run_off) == 2 and last.num_seeds(layouts[1]) == 3
    assert last.ranking[:3] == (layouts[1], layouts[3], layouts[0])
    (alone,) = climb(ranked, found=found, **options | {"seeds": 1})
    assert alone.run_off == () == alone.left and alone.ranking == first.ranking


def test_a_run_off_is_of_the_last_rung_and_half_of_it_at_most():
    layouts = [Layout.keeping((i,), num_layers=12, replacement="ssm") for i in range(12)]
    ranked = [(x, score([float(i)])) for i, x in enumerate(layouts)]
    # A single block tells nothing apart.
    found = {(x, n, 0): score([float(i)]) for i, x in enumerate(layouts) for n in (100, 200)}
    options = {"weights": {"kl": 1.0}, "found": found, "seeds": 2}
    one, two = climb(ranked, tokens=[100, 200], pruner=Halving(factor=2), **options)
    assert len(one.climbers) == 6 and not one.run_off
    assert len(two.climbers) == 3 and two.run_off == (tuple(layouts[:2]),) == (two.left,)
    (eight,) = climb(ranked, tokens=[100], pruner=Halving(factor=2), named=layouts[6:8], **options)
    assert len(eight.climbers) == 8 and eight.run_off == (tuple(layouts[:4]),)
    assert most_in_run_off(8, 2) == 4 and most_in_run_off(8, 3) == 8 and most_in_run_off(3, 2) == 2
    assert most_in_run_off(8, 1) == 0 == most_in_run_off(1, 3)
    # One alone is tied with nobody.
    (single,) = climb(ranked[:1], tokens=[100], pruner=Halving(), **options)
    assert single.run_off == () == single.left


def test_an_objective_that_is_not_measured_there_becomes_kl():
    layouts = [Layout.keeping((i,), num_layers=4, replacement="ssm") for i in range(4)]
    below = Score(per_block={"stage2_cascade": (1.0, 2.0)}, tokens=1, seconds=1.0)
    above = Score(per_block={"kl": (1.0, 3.0), "recall": (9.0, 9.0)}, tokens=1, seconds=1.0)
    options = {"tokens": [9], "pruner": Halving(), "found": {(x, 9, 0): above for x in layouts}}
    (rung,) = climb([(x, below) for x in layouts], weights={"stage2_cascade": 3.0}, **options)
    assert rung.value(layouts[0]) == 2.0
    below = above
    weights = {"kl": 1.0, "recall": 0.5}
    (rung,) = climb([(x, below) for x in layouts], weights=weights, **options)
    assert rung.value(layouts[0]) == 6.5


# Studies with made-up scores


class MadeUpDistiller:
    """Values of its own for each layout and budget; those of rung 0 say little about them."""

    at_once = 3

    def __init__(self, pause=0.0, noise=0.01):
        self.done = []
        self.pause = pause
        self.noise = noise

    def __call__(self, layouts, tokens, seed):
        time.sleep(self.pause)
        found = []
        for layout in layouts:
            digest = hashlib.sha256(f"{layout.key()} {tokens}".encode()).hexdigest()
            place = int(digest[:6], 16)
            blocks = place / 2**24 + self.noise * NOISE[(place + seed) % 12]
            found.append(Score(per_block={"kl": tuple(blocks)}, tokens=tokens, seconds=2.0))
            self.done.append((layout, tokens, seed))
        return found


class Stopper(MadeUpDistiller):
    def __init__(self, after, noise):
        super().__init__(noise=noise)
        self.after = after

    def __call__(self, layouts, tokens, seed):
        if not self.after:
            raise KeyboardInterrupt
        self.after -= 1
        return super().__call__(layouts, tokens, seed)


def study(
    distiller, run_dir, *, tokens=(100, 400), pruner="halving", seeds=3, worker=None, **options
):
    options = {"trials": 28, "baselines": [], **options}
    options["rungs"] = RungsConfig(tokens=list(tokens), pruner=pruner, seeds=seeds)
    config, space, budget = make(8, 2, **options)
    scorer = SyntheticScorer(8, pairs=1.0)
    pace = Pace(beat_every=0.1, patience=5.0, look_every=0.01)
    return run_study(
        config,
        space,
        budget,
        scorer,
        run_dir=run_dir,
        distiller=distiller,
        worker=worker,
        pace=pace,
    )


def essence(result):
    rungs = [(r.tokens, r.climbers, dict(r.scores), r.ranking, r.run_off) for r in result.rungs]
    trials = [(t.layout, t.score) for t in result.trials]
    return trials, rungs, result.best.layout, [t.layout for t in result.ties]


def rung_trials(path):
    return optuna.load_study(
        study_name="made-up.rungs", storage=f"sqlite:///{path}/study.db"
    ).trials


def test_the_best_of_the_highest_rung_is_the_best(tmp_path):
    distiller = MadeUpDistiller()
    result = study(distiller, tmp_path)
    one, two = result.rungs
    assert one.climbers == tuple(trial.layout for trial in result.ranking[:7])
    assert two.climbers == one.ranking[:2] and len(distiller.done) == 9 == len(set(distiller.done))
    assert result.best.layout == two.ranking[0] != result.ranking[0].layout
    versus = compare(two.scores[two.ranking[1]], two.scores[two.ranking[0]], two.weights)
    assert [t.layout for t in result.ties] == ([two.ranking[1]] if versus.tied else [])
    kept = rung_trials(tmp_path)
    assert [t.user_attrs["rung"] for t in kept] == [100] * 7 + [400] * 2
    assert kept[-1].value == two.scores[two.climbers[1]].mean("kl")
    assert sum(t.user_attrs["score"]["seconds"] for t in kept) == 18.0
    # Results load without a distiller, and an ended study distils nothing.
    again = MadeUpDistiller()
    assert essence(study(again, tmp_path)) == essence(result) and not again.done


def test_distillations_that_made_layouts_worse_are_told():
    class Learner(MadeUpDistiller):
        """Whose students' KL is so many times the undistilled one."""

        def __init__(self, times):
            super().__init__()
            self.times = times

        def __call__(self, layouts, tokens, seed):
            scores = map(SyntheticScorer(8, pairs=1.0).score, layouts)
            kl = [[self.times * x for x in score.per_block["kl"]] for score in scores]
            return [Score(per_block={"kl": x}, tokens=tokens, seconds=1.0) for x in kl]

    told = verdict(study(Learner(1.5), None, tokens=[100]))[-1]
    assert told.startswith("The 100 tokens of stage 3 made layouts worse: KL is 1.5 times ")
    assert "lower lr" in told
    for harmless in (study(Learner(1.1), None), study(None, None, tokens=[])):
        assert "worse" not in " ".join(verdict(harmless))


def test_the_best_layout_of_each_baseline_is_distilled_once(tmp_path):
    named = ["uniform", "last", "0,7"]
    result = study(MadeUpDistiller(), tmp_path, baselines=named, tokens=(100, 400))
    one, two = result.rungs
    ranked = [trial.layout for trial in result.ranking]
    uniform = [layout for label, layout in result.baselines.items() if "uniform/" in label]
    assert len(uniform) == 4
    wanted = {*ranked[:7], min(uniform, key=ranked.index)}
    wanted |= {result.space.parse(layout) for layout in ("6,7", "0,7")}
    assert 7 < len(wanted) == len(one.climbers) and set(one.climbers) == wanted
    # Best first, and nobody is favoured further up.
    assert list(one.climbers) == sorted(one.climbers, key=ranked.index)
    assert two.climbers == one.ranking[: max(2, len(wanted) // 4)]


def test_wilcoxon_climbs_in_a_study(tmp_path):
    result = study(MadeUpDistiller(), None, pruner={"name": "wilcoxon", "most": 5}, tokens=[100])
    (rung,) = result.rungs
    # Without noise every other layout is worse in each block.
    assert rung.climbers == (result.ranking[0].layout,) == (result.best.layout,)
    assert not result.ties


def test_without_rungs_a_study_is_as_before(tmp_path):
    result = study(None, tmp_path, tokens=[])
    assert result.rungs == () and result.best == result.ranking[0]
    names = optuna.get_all_study_names(f"sqlite:///{tmp_path}/study.db")
    assert sorted(names) == ["made-up", "made-up.probes"]


# Whose two layouts of the highest rung are tied, and those of which all are.
@pytest.mark.parametrize(
    ("noise", "stops_at", "at_once"),
    [(0.01, 3, [3, 3, 1, 2]), (3.0, 5, [3, 3, 1, 2, 2, 2])],
    ids=["told", "tied"],
)
def test_rungs_stopped_at_any_point_go_on_as_if_unbroken(tmp_path, noise, stops_at, at_once):
    whole = MadeUpDistiller(noise=noise)
    unbroken = study(whole, None)
    stops, done = 0, []
    while True:
        distiller = Stopper(after=1, noise=noise)
        try:
            result = study(distiller, tmp_path)
            break
        except KeyboardInterrupt:
            stops += 1
            done += distiller.done
    # The first rung takes 3, 3 and 1, the second 2, and twice more where these are tied.
    assert stops == stops_at and essence(result) == essence(unbroken)
    assert done + distiller.done == whole.done, "nothing is distilled twice"
    assert len(whole.done) == sum(at_once) == len(set(whole.done))
    trials = rung_trials(tmp_path)
    reasons = [t.user_attrs.get("reason") for t in trials]
    assert reasons.count("interrupted: KeyboardInterrupt") == sum(at_once[1:])
    kept = [t.user_attrs["seed"] for t in trials if t.state.name == "COMPLETE"]
    assert kept == [0] * 9 + [1] * 2 * (noise > 0.1) + [2] * 2 * (noise > 0.1)
    assert len(result.rungs[-1].run_off) == 2 * (noise > 0.1)


def test_the_choice_of_a_run_off_is_told(tmp_path):
    result = study(MadeUpDistiller(noise=3.0), tmp_path)
    top = result.rungs[-1]
    assert top.num_seeds(result.best.layout) == 3
    assert "after 400 tokens of stage 3 (mean of 3 seeds; " in verdict(result)[0]
    counted = rung_counts(result)
    again = ", then 2 tied ones with another seed"
    assert f"2 to 400 tokens of stage 3{again}{again}; " in counted
    assert f"{7 * 100 + 3 * 2 * 400:,} tokens" in counted
    assert not any("fewer seeds" in line for line in verdict(result))
    # As if the worse one alone had had another seed.
    lucky, worse = top.ranking
    told = verdict(replace(result, rungs=(*result.rungs[:-1], replace(top, run_off=((worse,),)))))
    assert f"they come to less: {layers(lucky)}. They may" in told[-1]
    columns, figures = rung_table(result)
    assert [row[columns.index("seeds")] for row in figures.values()] == ["3", "3"] + ["1"] * 5
    with pytest.raises(KeyboardInterrupt):
        study(Stopper(after=4, noise=3.0), tmp_path / "stopped")
    config, space, budget = make(
        8, 2, baselines=[], trials=28, rungs=RungsConfig(tokens=[100, 400])
    )
    half = load_result(config, space, budget, run_dir=tmp_path / "stopped")
    assert rung_counts(half).split(";")[0].endswith("with another seed (not done yet)")
    # As a study of before further seeds: its choice stands until it is searched again.
    assert half.best.layout == study(MadeUpDistiller(noise=3.0), None, seeds=1).best.layout


def killed(run_dir, after):
    class Killed(MadeUpDistiller):
        def __call__(self, layouts, tokens, seed):
            if len(self.done) >= after:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(layouts, tokens, seed)

    study(Killed(), run_dir)


def test_a_killed_study_ends_as_an_unbroken_one(tmp_path):
    for after in (0, 3, 1, 1):
        child = multiprocessing.get_context("fork").Process(target=killed, args=(tmp_path, after))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    distiller = MadeUpDistiller()
    assert essence(study(distiller, tmp_path)) == essence(study(MadeUpDistiller(), None))
    # The last kill came when the first rung was complete.
    assert [tokens for _, tokens, _ in distiller.done] == [400, 400]
    rungs = RungsConfig(tokens=[100, 400])
    config, space, budget = make(8, 2, baselines=[], trials=28, rungs=rungs)
    loaded = load_result(config, space, budget, run_dir=tmp_path)
    assert essence(loaded) == essence(study(MadeUpDistiller(), None))


def test_a_rung_added_later_keeps_what_was_distilled(tmp_path):
    study(MadeUpDistiller(), tmp_path, tokens=[100])
    distiller = MadeUpDistiller()
    result = study(distiller, tmp_path)
    assert essence(result) == essence(study(MadeUpDistiller(), None))
    assert [tokens for _, tokens, _ in distiller.done] == [400, 400]


def test_workers_share_the_distillations(tmp_path):
    storage = f"journal:{tmp_path / 'study.journal'}"
    distillers = [MadeUpDistiller(pause=0.05, noise=3.0) for _ in range(2)]

    def work(number):
        return study(
            distillers[number],
            None,
            pruner={"name": "halving", "factor": 2},
            storage=storage,
            worker=Worker(number=number),
        )

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(work, range(2)))
    assert essence(results[0])[1:] == essence(results[1])[1:]
    rungs = results[0].rungs
    assert [len(rung.climbers) for rung in rungs] == [14, 7]
    done = [x for distiller in distillers for x in distiller.done]
    again = sum(map(len, rungs[-1].run_off))
    assert again >= 4, "the last rung has left some tied"
    assert len(done) == 21 + again == len(set(done)), "nothing is distilled twice"
    for distiller in distillers:
        assert len(distiller.done) >= 7


def test_two_that_begin_the_same_layout_distil_it_once(tmp_path):
    storage = f"journal:{tmp_path / 'study.journal'}"
    config, space, budget = make(8, 2, storage=storage, rungs=RungsConfig(tokens=[100]))
    layouts, distiller, recipe = list(budget.enumerate(space))[:3], MadeUpDistiller(), {"lr": 1.0}
    options = {"tokens": 100, "seed": 0, "recipe": recipe}
    options["value"] = lambda score: score.mean("kl")
    with (
        open_ledger(config, space, run_dir=None, begin=True) as one,
        open_ledger(config, space, run_dir=None, begin=True) as other,
    ):

        def meanwhile(mine, tokens, seed):
            other.refresh()
            assert other.distilling == {(layout, 100, 0) for layout in layouts[:2]}
            # As one that had looked before the first began.
            other.run_rung(layouts[1:], distiller, **options)
            return distiller(mine, tokens, seed)

        one.run_rung(layouts[:2], meanwhile, **options)
        assert distiller.done == [(layouts[i], 100, 0) for i in (2, 0, 1)]
        one.run_rung(layouts, distiller, **options)
        assert len(distiller.done) == 3 == len(other.rung_scores(recipe))
        # Another recipe is another distillation.
        other.run_rung(layouts[:1], distiller, **{**options, "recipe": {"lr": 2.0}})
        assert len(distiller.done) == 4 and len(one.rung_scores(recipe)) == 3
        # So is another seed.
        other.run_rung(layouts[:1], distiller, **{**options, "seed": 1})
        assert len(distiller.done) == 5 and (layouts[0], 100, 1) in one.rung_scores(recipe)


def worker_to_be_killed(storage):
    class Killed(MadeUpDistiller):
        def __call__(self, layouts, tokens, seed):
            os.kill(os.getpid(), signal.SIGKILL)

    study(Killed(), None, storage=storage)


def test_what_a_killed_worker_was_at_is_taken_over(tmp_path):
    storage = f"journal:{tmp_path / 'study.journal'}"
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=worker_to_be_killed, args=(storage,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    result = study(MadeUpDistiller(), None, storage=storage)
    assert essence(result) == essence(study(MadeUpDistiller(), None))


def test_the_plan_counts_distillations():
    config, space, budget = make(8, 2, trials=20, rungs=RungsConfig(tokens=[100, 400]))
    plan = plan_search(config.search, space, budget)
    assert plan.rungs == {100: 5, 400: 2} and plan.run_off == 2 * 2
    rungs = RungsConfig(tokens=[100, 400], pruner={"name": "wilcoxon", "most": 4})
    config, space, budget = make(8, 2, trials=20, rungs=rungs)
    assert plan_search(config.search, space, budget).rungs == {100: 4, 400: 4}


# A tiny teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rungs")
    make_teacher(folder / "teacher", num_layers=4)
    make_text(folder / "text.jsonl")
    return folder


RUNGS = (
    "search.rungs.tokens=[256,1280]",
    "search.rungs.pruner.factor=2",
    "search.baselines=[]",
    "distill.logits.lr=1e-3",
)


@pytest.fixture(scope="module")
def searched(folder):
    return pipeline.search(make_study(folder, *RUNGS))


def distilled(config, layout, tokens, seed=None):
    """The layout's KL on the validation split, by the pieces that a rung is made of."""
    bench = Workbench(config)
    needed = {"bank": max(tokens, 64), "validation": config.data.validation_tokens}
    blocks = load_blocks(config.data, bench.teacher.tokenizer, needed=needed)
    recipe = pipeline.dataclasses.replace(config.distill.logits, tokens=tokens)
    (kl,) = distil_layouts(
        bench.teacher,
        [layout],
        bench.bank,
        train=blocks["bank"],
        config=recipe,
        seed=config.seed if seed is None else seed,
        measure=lambda student: (
            evaluate_blocks(bench.teacher, student, bench.blocks["validation"]).kl
        ),
    )
    return kl


def test_a_rung_is_what_distillation_gives(folder, searched):
    config, (result, _) = make_study(folder, *RUNGS), searched
    assert [len(rung.climbers) for rung in result.rungs] == [3, 2]
    for rung in result.rungs:
        for layout in rung.climbers[:2]:
            # Alone or in company, it is the same number.
            assert rung.scores[layout].per_block["kl"] == distilled(config, layout, rung.tokens)
            assert rung.scores[layout].tokens == rung.tokens
    top = result.rungs[-1]
    for layout in top.climbers:
        before = np.mean(distilled(config, layout, 0))
        assert top.scores[layout].mean("kl") < before, "distillation helps"


def test_a_run_off_is_other_distillations_of_the_same_layouts(folder):
    # One block tells nothing apart.
    block = make_study(folder).data.block_size
    options = (*RUNGS, "search.rungs.tokens=[256]", f"data.validation_tokens={block}")
    config = make_study(folder, *options, f"output={folder / 'tied'}")
    result, path = pipeline.search(config)
    (rung,) = result.rungs
    assert rung.run_off == (rung.run_off[0],) * 2 and len(rung.run_off[0]) == 2
    seeds = [config.seed, *(trial_seed(config.seed, n, "run-off") for n in (1, 2))]
    for layout in rung.run_off[0]:
        each = [distilled(config, layout, 256, seed) for seed in seeds]
        assert len(set(each)) == 3, "another seed gives another student"
        np.testing.assert_allclose(rung.scores[layout].per_block["kl"], np.mean(each, axis=0))
        assert rung.scores[layout].tokens == 3 * 256
    written = yaml.safe_load(path.read_text(encoding="utf-8"))["scores"]["rungs"]
    assert written[0]["seeds"] == 3


def test_a_rung_distils_by_its_own_recipe(folder, searched):
    own = [*RUNGS[:-1], "search.rungs.lr=1e-3", "distill.logits.lr=7e-6"]
    result, _ = pipeline.search(make_study(folder, *own, f"output={folder / 'own'}"))
    for one, other in zip(result.rungs, searched[0].rungs, strict=True):
        assert one.climbers == other.climbers
        assert all(one.scores[x].per_block == other.scores[x].per_block for x in one.climbers)


def test_a_search_stopped_between_two_rungs_goes_on(folder, searched):
    class Stopped(Silent):
        def say(self, text):
            if text == "2 layouts are distilled on 1,280 tokens; 0 done":
                raise KeyboardInterrupt

    config = make_study(folder, *RUNGS, f"output={folder / 'stopped'}")
    with pytest.raises(KeyboardInterrupt):
        pipeline.search(config, reporter=Stopped())
    result, _ = pipeline.search(config)
    assert result.best.layout == searched[0].best.layout
    for one, other in zip(result.rungs, searched[0].rungs, strict=True):
        assert one.ranking == other.ranking
        assert all(one.scores[x].per_block == other.scores[x].per_block for x in one.climbers)


def test_best_yaml_and_the_reports_name_the_rungs(folder, searched):
    result, path = searched
    written = yaml.safe_load(path.read_text(encoding="utf-8"))["scores"]["rungs"]
    best, top = result.best.layout, result.rungs[-1]
    assert [entry["tokens"] for entry in written] == [256, 1280]
    assert written[-1]["objectives"] == {"kl": top.scores[best].mean("kl")}
    assert written[-1]["value"] == top.value(best) and written[0]["layouts_distilled"] == 3
    console = Console(file=io.StringIO(), width=110)
    print_result(result, console=console)
    printed = " ".join(console.file.getvalue().split())
    page = render_report(result, make_study(folder, *RUNGS))
    for text in (printed, re.sub(r"<[^>]*>", " ", page)):
        assert "undistilled" in text and "(search text)" in text and "(validation text)" in text
        assert "KL at 256" in text and "KL at 1,280" in text and f"{top.value(best):.4f}" in text
        assert "3 to 256 tokens of stage 3, then 2 to 1,280" in text
        assert "; 3,328 tokens and " in text, "3 x 256 + 2 x 1,280"
        assert "after 1,280 tokens of stage 3" in text
        for layout in result.rungs[0].climbers:
            named = re.escape(proposers(result, layout))
            assert re.search(rf" {layers(layout)} +[\d.,\- ]+ {named}", text), layout


def test_as_many_students_are_distilled_at_once_as_there_is_room_for(folder, monkeypatch):
    config = make_study(folder, *RUNGS)
    bench, recipe = Workbench(config), short_recipe(config, 0)
    memory = count_student_memory(config, recipe, teacher=bench.teacher)
    each = sum(memory.values()) - memory["teacher's weights"]
    # A student's weights, gradients and two moments are the least.
    assert each > 16 * sum(p.numel() for p in bench.teacher.model.parameters())

    def with_room_for(students, **changes):
        free = int(students * each / 0.9) + 1
        monkeypatch.setattr("mohawk_nas.distill.several._available_bytes", lambda: free)
        return bench.students_at_once(replace(recipe, **changes))

    assert [with_room_for(n) for n in (0.5, 1, 1.9, 2, 3, 9)] == [1, 1, 1, 2, 3, 4]
    assert with_room_for(3, batch_size=4 * recipe.batch_size) == 1, "more of each step is kept"

    def reads_values(*_):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    with monkeypatch.context() as patch:
        # Somebody's mixer may; it is distilled all the same, and planned.
        patch.setattr("mohawk_nas.forecast._saved_by_student", reads_values)
        guess = count_student_memory(config, recipe)
        assert "what the backward pass needs, guessed" in guess and with_room_for(1e6) == 4
    monkeypatch.setenv(GPU_SHARERS, "2")
    assert [with_room_for(n) for n in (2, 4, 9)] == [1, 2, 4], "the other takes its half"
    # And who plans is told.
    monkeypatch.delenv(GPU_SHARERS)
    path = folder / "planned.yaml"
    path.write_text(dump(config), encoding="utf-8")
    told = CliRunner().invoke(app, ["search", str(path), "--dry-run"])
    assert told.exit_code == 0 and "Memory while a rung distils one layout" in told.output


def test_another_recipe_is_distilled_anew_and_never_mixed(folder, searched, tmp_path):
    config = make_study(folder, *RUNGS)
    other = make_study(folder, *RUNGS, "distill.logits.lr=1e-4")
    result, _ = pipeline.search(other)
    first = searched[0].rungs[0]
    assert [set(r.scores) for r in result.rungs[:1]] == [set(first.scores)]
    assert all(result.rungs[0].scores[x] != first.scores[x] for x in first.scores)
    # Going back costs nothing.
    again, _ = pipeline.search(config)
    assert essence(again) == essence(searched[0])
    assert rung_recipe(config.distill.logits) != rung_recipe(other.distill.logits)


def test_recall_that_is_asked_otherwise_is_another_recipe(monkeypatch):
    config = LogitsConfig()
    both = rung_recipe(config, {"kl": 1.0, "recall": 0.05})
    assert both == rung_recipe(config, ["recall"]) != rung_recipe(config, ["kl"])
    assert rung_recipe(config, ["kl"]) == rung_recipe(config)
    monkeypatch.setitem(recall.TEMPLATES, "validation", recall.TEMPLATES["validation"][:2])
    assert both != rung_recipe(config, ["recall"])


def test_score_and_audit_take_the_best_of_the_highest_rung(folder, searched, monkeypatch):
    result, _ = searched
    config = make_study(folder, *RUNGS)
    best = ",".join(map(str, result.best.layout.attention_layers))
    layout, _, placement, found = pipeline.score(config, best)
    assert found.best.layout == layout == result.best.layout
    assert placement.versus_best.difference == 0
    monkeypatch.setattr("mohawk_nas.audit.FEWEST", 6)
    said = []
    listener = Silent()
    monkeypatch.setattr(listener, "say", said.append, raising=False)
    report, _ = audit(config, hours=1, tokens=256, seeds=1, reporter=listener)
    # The rungs have told how long it takes.
    assert sum(text.startswith("a distillation takes") for text in said) == 2
    assert report.searched == result.best.layout and report.layouts == 6


def test_the_plan_says_what_rungs_take(folder):
    plan = make_plan(make_study(folder, *RUNGS))
    assert plan.search.rungs == {256: 3, 1280: 2}
    with_baselines = make_plan(
        make_study(folder, *RUNGS[:2], "search.baselines=[last]", "search.trials=6")
    )
    assert with_baselines.search.rungs == {256: 4, 1280: 2}
    less = make_plan(make_study(folder, *RUNGS, "search.rungs.tokens=[256]"))
    assert plan.flops["rungs"] / less.flops["rungs"] == (3 * 256 + 2 * 1280) / (3 * 256)
    # Two more seeds of those that are left tied, of two layouts at most: none need be.
    assert plan.search.run_off == 4 == less.search.run_off
    alone = make_plan(make_study(folder, *RUNGS, "search.rungs.seeds=1"))
    assert alone.search.run_off == 0 and alone.flops == plan.flops
    assert "rungs" not in make_plan(make_study(folder)).flops
