"""The table of what layouts are worth, made and continued on a tiny teacher."""

import dataclasses
import importlib.util
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_study import make_study

from mohawk_nas import pipeline
from mohawk_nas.config import dump, load_study
from mohawk_nas.data import load_blocks
from mohawk_nas.distill.several import distil_layouts
from mohawk_nas.metrics import evaluate_blocks
from mohawk_nas.workbench import Workbench

FOLDER = Path(__file__).parents[1] / "studies" / "ground_truth"


def load(stem, folder=FOLDER):
    spec = importlib.util.spec_from_file_location(f"{folder.name}_{stem}", folder / f"{stem}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up, and scripts import each other.
    sys.modules[spec.name] = module
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table():
    return load("table")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ground")
    config = make_study(folder)
    path = folder / "study.yaml"
    path.write_text(dump(config), encoding="utf-8")
    return path, config


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_table_is_made_and_continued(table, study, tmp_path, monkeypatch, capsys):
    path, _ = study
    out = tmp_path / "tiny.jsonl"
    options = ["--out", str(out), "--distil", "5", "--tokens", "0,640", "--at-once", "2"]
    # Stopped in the middle of a line: that layout is scored again.
    assert table.main([str(path), "--out", str(out), "--zero-shot", "4"]) == 0
    assert len(rows_of(out)) == 6
    out.write_text(out.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    assert table.main([str(path), *options]) == 0
    rows = rows_of(out)
    zero = {row["layout"]: row for row in rows if row["kind"] == "zero_shot"}
    assert len(zero) == sum(row["kind"] == "zero_shot" for row in rows) == 6
    assert all({"kl", "stage2_local", "stage2_cascade"} <= set(row) for row in zero.values())
    distilled = [row for row in rows if row["kind"] == "distilled"]
    assert {(row["layout"], row["tokens"]) for row in distilled} == {
        (layout, tokens) for layout in {r["layout"] for r in distilled} for tokens in (0, 640)
    }
    assert len(distilled) == 10
    best = min(zero.values(), key=lambda row: row["kl"])["layout"]
    assert all("best kl" in row["chosen_as"] for row in distilled if row["layout"] == best)
    assert all(row["chosen_as"] for row in distilled)
    assert any("uniform/0" in row["chosen_as"] for row in distilled)
    assert all(math.isclose(sum(r["kl_blocks"]) / 8, r["kl"], abs_tol=1e-4) for r in distilled)
    seen = [row["validation"] for row in distilled]
    assert all(math.isclose(sum(r["kl_blocks"]) / 8, r["kl"], abs_tol=1e-4) for r in seen)
    assert [r["kl_blocks"] for r in seen] != [r["kl_blocks"] for r in distilled]
    # A second seed of two of them, and nothing else again.
    assert table.main([str(path), *options, "--seeds", "0,1", "--seeds-of", "2"]) == 0
    more = rows_of(out)
    assert more[: len(rows)] == rows
    assert [(row["seed"], row["tokens"]) for row in more[len(rows) :]] == [(1, 640)] * 2
    assert more[-1]["kl"] not in {row["kl"] for row in distilled}
    # Another bank stands in the same table, another recipe does not.
    assert table.main([str(path), "seed=1", "--out", str(out)]) == 0
    other = [r for r in rows_of(out) if r["kind"] == "zero_shot" and r["bank_seed"] == 1]
    assert len(other) == 6 and all(row["kl"] != zero[row["layout"]]["kl"] for row in other)
    assert table.main([str(path), "distill.logits.lr=0.5", "--out", str(out)]) == 2
    assert "was begun with another study" in capsys.readouterr().err
    # Patience is never had here, so it changes nothing.
    assert table.main([str(path), "distill.logits.patience=3", "--out", str(out)]) == 0


@pytest.mark.parametrize("stem", ["table", "recipe"])
def test_a_budget_reads_the_same_text_beside_a_larger_one(stem, study, tmp_path, monkeypatch):
    script, blocks = load(stem), {}

    def spy(*args, train, config, **kwargs):
        blocks[config.tokens] = len(train)
        config = dataclasses.replace(config, tokens=0)
        return distil_layouts(*args, train=train, config=config, **kwargs)

    monkeypatch.setattr(script, "distil_layouts", spy)
    count = {"table": "--distil", "recipe": "--layouts"}[stem]
    options = [count, "3", "--tokens", "0,64,640", "--out", str(tmp_path / "rows.jsonl")]
    assert script.main([str(study[0]), *options]) == 0
    assert blocks == {0: 1, 64: 4, 640: 40}


def test_recipes_of_another_study_are_tried_anew(study, tmp_path, monkeypatch, capsys):
    recipe, out = load("recipe"), tmp_path / "recipe.jsonl"
    monkeypatch.setenv("COLUMNS", "120")

    def rows_after(*overrides):
        options = ["--tokens", "64", "--layouts", "3", "--out", str(out)]
        assert recipe.main([str(study[0]), *overrides, *options]) == 0
        return rows_of(out)

    def shown():
        return [line for line in capsys.readouterr().out.splitlines() if "the study's" in line]

    first, said = rows_after(), shown()
    assert len(first) == 6 and len(said) == 1
    # Undistilled layouts do not depend on stage 3, but on the bank.
    assert len(rows_after("distill.logits.lr=0.5")) == 9
    assert shown() != said
    assert len(rows_after("seed=1")) == 15
    shown()
    assert len(rows_after()) == 15 and shown() == said


def test_what_selectors_looked_at_is_kept(table, study, tmp_path):
    path, _ = study
    out = tmp_path / "probes.jsonl"
    assert table.main([str(path), "--out", str(out), "--distil", "1"]) == 0
    rows = rows_of(out)
    probes = [row["layout"] for row in rows if row["kind"] == "probe"]
    assert len(probes) == len(set(probes)) > 0
    # Greedy begins with one attention layer, where the budget has two.
    assert {"0", "1", "2", "3"} <= set(probes)
    assert not set(probes) & {row["layout"] for row in rows if row["kind"] == "zero_shot"}
    assert table.main([str(path), "--out", str(out), "--distil", "1"]) == 0
    assert rows_of(out) == rows


def test_where_all_layouts_are_scored_so_are_those_that_keep_fewer(table, study, tmp_path):
    path, _ = study
    out = tmp_path / "fewer.jsonl"
    for _ in range(2):
        assert table.main([str(path), "budget.attention_layers=3", "--out", str(out)]) == 0
        probes = [row["layout"] for row in rows_of(out) if row["kind"] == "probe"]
        pairs = itertools.combinations("0123", 2)
        assert sorted(probes) == sorted([*"0123", *map(",".join, pairs)])


def test_picks_are_found_once(table, study, tmp_path, monkeypatch):
    path, _ = study
    out = tmp_path / "picks.jsonl"
    assert table.main([str(path), "--out", str(out), "--picks"]) == 0
    (found,) = (row for row in rows_of(out) if row["kind"] == "picks")
    assert {"uniform/0", "stage2_rank"} <= {label for label, _ in found["named"]}
    assert not any(row["kind"] == "zero_shot" for row in rows_of(out))
    # Whoever comes later takes them from the table.
    monkeypatch.setattr(table, "_picks", None)
    assert table.main([str(path), "--out", str(out), "--distil", "5"]) == 0
    rows = [row for row in rows_of(out) if row["kind"] == "distilled"]
    chosen = {why: row["layout"] for row in rows for why in row["chosen_as"]}
    assert all(chosen[label] == layout for label, layout in found["named"])


def test_processes_share_the_work(table, study, tmp_path, capsys):
    path, _ = study
    out = tmp_path / "shared.jsonl"
    options = ["--out", str(out), "--workers", "2", "--distil", "5", "--tokens", "0,640"]
    assert table.main([str(path), *options, "--seeds", "0,1", "--seeds-of", "2"]) == 0
    rows = rows_of(out)
    assert len({r["layout"] for r in rows if r["kind"] == "zero_shot"}) == 6
    assert sum(row["kind"] == "zero_shot" for row in rows) == 6
    done = [(r["layout"], r["tokens"], r["seed"]) for r in rows if r["kind"] == "distilled"]
    assert len(done) == len(set(done)) == 12
    # One process alone finds nothing left to do.
    alone = [str(path), "--out", str(out), "--distil", "5", "--tokens", "0,640"]
    assert table.main(alone) == 0
    assert rows_of(out) == rows
    # What a process says of its failure is told.
    assert (
        table.main([str(path), "distill.logits.lr=0.5", "--out", str(out), "--workers", "2"]) == 2
    )
    assert "was begun with another study" in capsys.readouterr().err


def test_layouts_can_be_asked_for(table, study, tmp_path, capsys):
    path, _ = study
    out, asked = tmp_path / "asked.jsonl", tmp_path / "asked.txt"
    asked.write_text("0,3\n1,2\n", encoding="utf-8")
    assert table.main([str(path), "--out", str(out), "--layouts", str(asked)]) == 0
    distilled = [row for row in rows_of(out) if row["kind"] == "distilled"]
    assert [(row["layout"], row["chosen_as"]) for row in distilled] == [
        ("0,3", ["asked for"]),
        ("1,2", ["asked for"]),
    ]
    asked.write_text("0\n", encoding="utf-8")
    assert table.main([str(path), "--out", str(out), "--layouts", str(asked)]) == 2
    assert "exactly 2 attention layers" in capsys.readouterr().err


def test_regret_of_what_strategies_pick(table, study, tmp_path, capsys):
    regret = load("regret")
    path, _ = study
    out, report, missing = (tmp_path / name for name in ("tiny.jsonl", "r.json", "missing.txt"))
    assert table.main([str(path), "--out", str(out), "--distil", "6"]) == 0
    options = [
        "--strategies",
        "random",
        "swap_one",
        "--seeds",
        "3",
        "--out",
        str(report),
        "--workers",
        "1",
    ]
    regret.main([str(out), *options, "--missing", str(missing)])
    (outcome,) = json.loads(report.read_text(encoding="utf-8"))["outcomes"]
    rows = {row["strategy"]: row for row in outcome["rows"]}
    assert set(rows) == {
        "best distilled by it",
        "optimum",
        "default study",
        "random",
        "swap_one",
    }
    assert rows["best distilled by it"]["regret"] == 0
    # By hand: all six layouts are distilled, so all of them stand for the mean.
    distilled = {r["layout"]: r["kl"] for r in rows_of(out) if r["kind"] == "distilled"}
    scored = {r["layout"]: r["kl"] for r in rows_of(out) if r["kind"] == "zero_shot"}
    best, mean = min(distilled.values()), np.mean(list(distilled.values()))
    optimum = (distilled[min(scored, key=scored.get)] - best) / (mean - best)
    assert math.isclose(rows["optimum"]["regret"], optimum, abs_tol=1e-3)
    # One layout short of all, so that it is no exhaustive search; its probes count.
    assert rows["default study"]["layouts"] > 5
    assert rows["default study"]["worst"] >= optimum - 1e-3
    assert rows["random"]["layouts"] == 5 and rows["random"]["worst"] >= optimum - 1e-3
    assert rows["random"]["p"] is not None and rows["default study"]["p"] is None
    assert missing.read_text(encoding="utf-8") == ""
    # By the score itself the optimum costs nothing, and a strategy what it has not found.
    regret.main([str(out), *options, "--undistilled"])
    (outcome,) = json.loads(report.read_text(encoding="utf-8"))["outcomes"]
    row = {row["strategy"]: row for row in outcome["rows"]}["optimum"]
    assert outcome["judged_by"] == "the score" and outcome["layouts"] == 6 and row["regret"] == 0
    with pytest.raises(SystemExit):
        regret.main([str(out), *options, "--undistilled", "--finalists", "4"])
    # Another strategy may follow the baselines, a wrong one included.
    assert regret.main([str(out), *options, "--then", "tpe"]) == 0
    assert regret.main([str(out), *options, "--then", "tpee"]) == 2
    assert "unknown strategy 'tpee'" in capsys.readouterr().err
    # Of finalists that is picked which distils best on other text than it is judged on.
    regret.main([str(out), *options, "--finalists", "6", "2"])
    (outcome,) = json.loads(report.read_text(encoding="utf-8"))["outcomes"]
    row = next(r for r in outcome["rows"] if r["strategy"] == "optimum, rung of 6")
    validated = {
        r["layout"]: r["validation"]["kl"] for r in rows_of(out) if r["kind"] == "distilled"
    }
    assert validated != distilled
    picked = min(validated, key=validated.get)
    best, mean = min(distilled.values()), np.mean(list(distilled.values()))
    assert math.isclose(row["regret"], (distilled[picked] - best) / (mean - best), abs_tol=1e-3)
    assert row["p"] is not None
    # The study's own rung distils half of five layouts, and what its baselines name: never six.
    (row,) = (r for r in outcome["rows"] if r["strategy"].startswith("default study, rung of"))
    assert row["strategy"] == "default study, rung of 2" and row["missing"] == 0
    # Picks that nobody distilled are named.
    left = [row for row in rows_of(out) if row["kind"] != "distilled"]
    kept = [row for row in rows_of(out) if row["kind"] == "distilled"][:3]
    # As if three of them had been drawn from all tenths.
    tenths = [f"tenth {number}" for number in range(1, 11)]
    left += [row | {"chosen_as": tenths} for row in kept]
    out.write_text("".join(json.dumps(row) + "\n" for row in left), encoding="utf-8")
    regret.main([str(out), *options, "--by", "stage2_local", "--missing", str(missing)])
    named = missing.read_text(encoding="utf-8").split()
    distilled = {row["layout"] for row in kept}
    zero_shot = {row["layout"]: row["stage2_local"] for row in left if row["kind"] == "zero_shot"}
    picked = min(zero_shot, key=zero_shot.__getitem__)
    assert not set(named) & distilled
    assert picked in distilled or picked in named
    # Finalists too, all of them at once.
    regret.main([str(out), *options, "--finalists", "6", "--missing", str(missing)])
    named = missing.read_text(encoding="utf-8").split()
    assert sorted(named) == sorted(set(zero_shot) - distilled)
    # Before anything is distilled that is all there is to tell, and nothing is judged.
    left = [row for row in left if row["kind"] != "distilled"]
    out.write_text("".join(json.dumps(row) + "\n" for row in left), encoding="utf-8")
    report.unlink()
    assert regret.main([str(out), *options, "--finalists", "6", "--missing", str(missing)]) == 0
    assert sorted(missing.read_text(encoding="utf-8").split()) == sorted(zero_shot)
    assert not report.exists()
    assert regret.main([str(out), *options]) == 2
    assert "--missing FILE" in capsys.readouterr().err
    # A few that stand for nothing are no more to judge by, but need not be distilled again.
    few = [*left, *(row | {"chosen_as": ["asked for"]} for row in kept)]
    out.write_text("".join(json.dumps(row) + "\n" for row in few), encoding="utf-8")
    assert regret.main([str(out), *options, "--finalists", "6", "--missing", str(missing)]) == 0
    assert sorted(missing.read_text(encoding="utf-8").split()) == sorted(set(zero_shot) - distilled)
    assert not report.exists()


def test_an_optimum_that_is_computed_is_nobodys_pick(tmp_path):
    regret, out = load("regret"), tmp_path / "made-up.jsonl"
    rows = [{"kind": "head", "study": {"budget": {"attention_layers": 2}}}]
    rows.append({"kind": "stage2", "losses": {str(layer): layer for layer in range(6)}})
    for kept in itertools.combinations(range(6), 2):
        layout = ",".join(map(str, kept))
        rows.append({"kind": "zero_shot", "layout": layout, "stage2_local": 15 - sum(kept)})
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found, how = regret.GroundTruth.read(out), {"seeds": 1, "most": 4, "run_all": map}
    assert found.best({"stage2_local": 1.0}, 1) == ["4,5"]
    (picks,) = regret.replay(found, {"stage2_local": 1.0}, "first", **how)
    assert picks.picks == ["0,1"]
    with pytest.raises(regret.DataError, match="stage2_local alone is solved exactly"):
        regret.replay(found, {"stage2_local": 1.0}, "random", **how)


def test_what_is_best_by_a_sum_may_be_best_by_neither_figure():
    regret = load("regret")
    kl = regret.Truth("kl", {"0,1": 1.0, "0,2": 1.2, "0,3": 2.0}, None, [])
    recall = regret.Truth("recall", {"0,1": -0.1, "0,2": -0.5, "0,3": -0.6}, None, [])
    both = [kl, recall, regret.Truth.sum_of([(1.0, kl), (1.0, recall)])]
    (found,) = regret.best_distilled(both, {"kl": 1.0, "recall": 1.0})
    assert found.picks == ["0,2"] and found.layouts == 3
    (found,) = regret.best_distilled([kl, recall], {"recall": 1.0})
    assert found.picks == ["0,3"]
    assert regret.best_distilled([kl, recall], {"stage2_local": 1.0}) == []


def test_a_finalist_is_picked_by_what_the_objective_weighs(table, study, tmp_path):
    regret = load("regret")
    path, _ = study
    out = tmp_path / "tiny.jsonl"
    assert table.main([str(path), "--out", str(out), "--distil", "6"]) == 0
    rows = rows_of(out)
    rows[0]["teacher_recall"] = {"validation": 0.8}
    kls, shares = iter((1.0, 1.1, 1.2, 1.3, 1.4, 1.5)), iter((0.0, 0.4, 0.8, 0.1, 0.1, 0.1))
    names = []
    for row in rows:
        if row["kind"] == "distilled":
            names.append(row["layout"])
            row["validation"] = {"kl": next(kls), "recall": next(shares)}
        elif row["kind"] == "zero_shot":
            row["recall"] = 0.5
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = regret.GroundTruth.read(out)

    def pick_of(table, objective, seeds=1):
        return regret._name(table.rung_of(names, objective, seeds=seeds).ranking[0])

    assert pick_of(found, {"kl": 1.0}) == names[0]
    assert pick_of(found, {"stage2_local": 1.0}) == names[0]
    assert pick_of(found, {"recall": 1.0}) == names[2]
    # 0.1 of KL for half of the teacher's recall, twice.
    assert pick_of(found, {"kl": 1.0, "recall": 0.19}) == names[0]
    assert pick_of(found, {"kl": 1.0, "recall": 0.21}) == names[2]
    lacking = dataclasses.replace(found, distilled=found.distilled[:-1])
    assert pick_of(lacking, {"kl": 1.0}, 3) == names[-1] != names[0]


def test_tied_finalists_are_picked_by_further_seeds(table, study, tmp_path):
    regret = load("regret")
    path, _ = study
    out = tmp_path / "tiny.jsonl"
    assert table.main([str(path), "--out", str(out), "--distil", "6", "--tokens", "64"]) == 0
    rows = rows_of(out)
    names = [row["layout"] for row in rows if row["kind"] == "distilled"]
    noise = np.random.default_rng(0).normal(size=(6, 8))
    noise -= noise.mean(axis=1, keepdims=True)

    def seen(mean, number, lost=0.0):
        blocks = (mean + 0.2 * noise[number]).tolist()
        return {"kl": mean, "recall": 0.8, "kl_blocks": blocks, "recall_blocks": [lost] * 8}

    def picks(first, second, weights, seeds, blocks=True):
        """What is picked, by the means of two seeds: of the second only some are known."""
        made = [row for row in rows if row["kind"] != "distilled"]
        for number in range(6):
            row = next(row for row in rows if row.get("layout") == names[number] and "seed" in row)
            for seed, means in enumerate((first, second)):
                if means[number] is not None:
                    found = seen(means[number], number)
                    if not blocks:
                        found = {"kl": means[number], "recall": None}
                        test = (5 + 0.2 * noise[number]).tolist()
                        row = row | {"kl_blocks": test}
                    made.append(row | {"seed": seed, "validation": found})
        out.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
        found = regret.GroundTruth.read(out)
        rung = found.rung_of(names, weights, seeds=seeds)
        lacking = [names.index(name) for name in found.lacking(rung)]
        return regret._name(rung.ranking[0]), lacking

    # The first two are tied and the third is told from them, whatever it comes to next.
    first, second = (1.0, 1.05, 2.0, 3.0, 3.0, 3.0), (1.3, 1.1, 0.0, None, None, None)
    for blocks in (True, False):
        assert picks(first, second, {"kl": 1.0}, 1, blocks) == (names[0], [])
        assert picks(first, second, {"kl": 1.0}, 2, blocks) == (names[1], [])
    # Of one without a second seed, the first stands for it.
    assert picks(first, (1.3, None, *second[2:]), {"kl": 1.0}, 2) == (names[1], [1])
    assert picks(first, (0.9, None, *second[2:]), {"kl": 1.0}, 2) == (names[0], [1])


def test_recall_has_an_interval_where_its_sequences_are_kept(table, study, tmp_path):
    regret = load("regret")
    path, _ = study
    out = tmp_path / "tiny.jsonl"
    assert table.main([str(path), "--out", str(out), "--distil", "6"]) == 0
    rows, shares = rows_of(out), iter((0.9, 0.8, 0.7, 0.4, 0.2, 0.0))
    for row in rows:
        if row["kind"] == "distilled":
            row["recall"] = next(shares)

    def recall():
        out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return regret.GroundTruth.read(out).truths[1]

    assert recall().blocks is None
    rng = np.random.default_rng(0)
    # What tables of before kept, and what those of now do.
    for key in ("recall_sequences", "recall_parts"):
        for row in rows:
            if row["kind"] == "distilled":
                row[key] = (row["recall"] + 0.1 * rng.normal(size=20)).tolist()
        truth = recall()
        (name, blocks), *_ = truth.blocks.items()
        assert -np.mean([r[key] for r in rows if r.get("layout") == name and key in r], axis=0) == (
            pytest.approx(blocks)
        )
    second = next(name for name, lost in truth.values.items() if lost == -0.8)
    picks = regret.Picks("x", 1, [second])
    told = regret.judge(picks, truth)
    assert (
        told["low"] < told["regret"] == pytest.approx(0.1 / 0.4) and told["regret"] < told["high"]
    )


def test_gates_name_what_they_named_when_the_table_was_made(table, study, tmp_path):
    regret = load("regret")
    path, _ = study
    out = tmp_path / "tiny.jsonl"
    assert table.main([str(path), "--out", str(out), "--distil", "6"]) == 0
    rows = [row for row in rows_of(out) if row["kind"] != "picks"]
    named = [["gates", "0,2"], ["gates:2", "1,3"], ["gates:3", "0,2"], ["swap_one", "2,3"]]
    rows.append({"kind": "picks", "bank_seed": 0, "named": named})
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = regret.GroundTruth.read(out)
    result = found.study({"kl": 1.0}, seed=3, strategy="random", trials=1, baselines=["gates"])
    kept = {label: layout.attention_layers for label, layout in result.baselines.items()}
    assert kept == {"gates": (0, 2), "gates:2": (1, 3), "gates:3": (0, 2)}
    for other in ({"tokens": 64}, {"restarts": 4}):
        choice = {"name": "gates", **other}
        with pytest.raises(regret.DataError, match="must hold gates learnt"):
            found.study({"kl": 1.0}, seed=3, strategy="random", trials=1, baselines=[choice])


def test_layouts_of_ones_own_are_scored_beside_those_drawn(table, study, tmp_path):
    path, _ = study
    out, asked = tmp_path / "tiny.jsonl", tmp_path / "asked.txt"
    assert table.main([str(path), "--out", str(out), "--zero-shot", "2"]) == 0
    drawn = {row["layout"] for row in rows_of(out) if row["kind"] == "zero_shot"}
    asked.write_text("0,1\n1,2\n2,3\n", encoding="utf-8")
    options = ["--zero-shot", "2", "--score", str(asked)]
    assert table.main([str(path), "--out", str(out), *options]) == 0
    scored = [row["layout"] for row in rows_of(out) if row["kind"] == "zero_shot"]
    assert sorted(scored) == sorted(drawn | {"0,1", "1,2", "2,3"})
    assert not any(row["kind"] == "distilled" for row in rows_of(out))


def test_p_tells_a_worse_strategy_from_an_equal_one():
    regret = load("regret")
    rng = np.random.default_rng(0)
    text = rng.normal(size=40)
    means = {"a": 1, "b": 1, "c": 3}
    blocks = {name: mean + text + 0.1 * rng.normal(size=40) for name, mean in means.items()}
    values = {name: float(found.mean()) for name, found in blocks.items()}
    truth = regret.Truth("kl", values, blocks, [list(means)])
    picks = {name: regret.Picks(name, 8, [name] * 4) for name in means}
    p = regret.compare(picks["a"], [picks["b"], picks["c"]], truth)
    assert p["c", 8] < 0.01 < p["b", 8]
    row = regret.judge(picks["c"], truth)
    assert row["low"] < row["regret"] < row["high"]
    assert math.isclose(min(truth.regret(name) for name in "abc"), 0)


def test_where_nothing_varies_there_is_no_interval():
    regret = load("regret")
    values = {"a": 1.0, "b": 2.0, "c": 4.0}
    # A part of the budget counts once, however many were drawn from it.
    truth = regret.Truth("recall", values, None, [["a"], ["b", "c"]])
    assert truth.regret("c") == (4 - 1) / ((1 + 3) / 2 - 1)
    one, other = (regret.Picks(name, 8, [name] * 5) for name in "ac")
    assert "low" not in regret.judge(one, truth)
    assert regret.compare(one, [other], truth) == {}
    mixed, same = (regret.Picks(name, 8, list("aabbc")) for name in ("mixed", "same"))
    row, p = regret.judge(mixed, truth), regret.compare(mixed, [same], truth)
    assert row["low"] < row["regret"] < row["high"] and p["same", 8] > 0.5


def test_parts_share_the_work(table, study, tmp_path):
    path, _ = study
    out = tmp_path / "parts.jsonl"
    assert table.main([str(path), "--out", str(out), "--zero-shot", "0"]) == 0
    for part in ("1/2", "2/2"):
        assert table.main([str(path), "--out", str(out), "--part", part, "--distil", "5"]) == 0
    rows = rows_of(out)
    assert sum(row["kind"] == "zero_shot" for row in rows) == 6
    # Only the second found all layouts scored.
    assert sum(row["kind"] == "distilled" for row in rows) == 2
    for part in ("1/2", "2/2"):
        assert table.main([str(path), "--out", str(out), "--part", part, "--distil", "5"]) == 0
    distilled = [row["layout"] for row in rows_of(out) if row["kind"] == "distilled"]
    assert len(distilled) == len(set(distilled)) == 5


def test_a_part_needs_the_bank(table, study, tmp_path, capsys):
    path, _ = study
    options = [f"bank.path={tmp_path / 'bank'}", "--out", str(tmp_path / "x.jsonl")]
    assert table.main([str(path), *options, "--part", "1/2"]) == 2
    assert "needs the whole bank" in capsys.readouterr().err


def test_a_layout_is_distilled_the_same_in_any_company(study):
    bench = Workbench(study[1])
    bench.bank.train(bench.space.replaceable, reporter=bench.reporter)
    config = study[1].distill.logits
    needed = {"bank": config.tokens}
    train = load_blocks(bench.config.data, bench.teacher.tokenizer, needed=needed)["bank"]
    layouts = list(bench.budget.enumerate(bench.space))[:3]

    def figures(some, **settings):
        return distil_layouts(
            bench.teacher,
            some,
            bench.bank,
            train=train,
            config=config,
            seed=settings.get("seed", 0),
            measure=lambda m: evaluate_blocks(bench.teacher, m, bench.blocks["validation"]).mean_kl,
        )

    together = figures(layouts)
    alone = [figures([layout])[0] for layout in layouts]
    assert together == alone
    assert len(set(together)) == 3
    assert figures(layouts[:1], seed=1) != together[:1]
    # The bank and the teacher are as they were.
    assert figures(layouts[:1]) == together[:1]
    assert not any(p.requires_grad for p in bench.teacher.model.parameters())
    assert torch.is_grad_enabled()


def test_the_report_tells_which_score_predicts(tmp_path, monkeypatch, capsys):
    """Made-up layouts: the truth is known, `kl` follows it closely, `stage2_local` not at all."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=80)
    rows = [{"kind": "head", "study": {"bank": {"hidden": {"tokens": 64}}}}]
    for i, value in enumerate(truth):
        rows.append(
            {
                "kind": "zero_shot",
                "bank_seed": 0,
                "layout": str(i),
                "kl": value + 0.1 * rng.normal(),
                "stage2_local": rng.normal(),
                "recall": -value,
            }
        )
        for tokens, noise, seeds in ((0, 1.0, 3), (640, 0.05, 3)):
            for seed in range(seeds if i < 30 else 1):
                kl = value + noise * rng.normal()
                # A rung would have the first seed alone.
                kl += 99 * rng.normal() if tokens == 0 and seed > 0 else 0
                # A budget foretells by the first half of these, and is foretold on the other.
                blocks = [kl, 9 * rng.normal()] if tokens == 0 else [9 * rng.normal(), kl]
                found = {"kl": kl, "kl_blocks": 3 * blocks, "recall": value}
                # The first seed's alone says anything.
                seen = value if seed == 0 else rng.normal()
                found["validation"] = {"kl": seen, "recall": -seen}
                row = {"kind": "distilled", "bank_seed": 0, "seed": seed, "tokens": tokens}
                rows.append(row | {"layout": str(i)} | found)
    # Another bank's rows stand apart.
    rows.append({"kind": "zero_shot", "bank_seed": 1, "layout": "0", "kl": 99.0})
    path = tmp_path / "made-up.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["report.py", str(path)])
    load("report").main()
    said = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    found = {(row["truth"], row["score"]): row["overall"] for row in said["predictions"]}
    assert found["kl", "kl"]["low"] > 0.95
    assert found["kl", "stage2_local"]["low"] < 0 < found["kl", "stage2_local"]["high"]
    assert 0.5 < found["kl", "0 tokens"]["value"] < 0.9
    # More recall is better, and the objective of that name is what is lost of it.
    assert found["kl", "640 tokens, validation text"]["low"] > 0.95
    assert found["recall", "640 tokens, validation text"]["value"] == -1
    assert found["recall", "recall"]["value"] == 1 == found["recall", "0 tokens"]["value"]
    assert found["recall", "kl"]["high"] < -0.95
    assert all(row["layouts"] == 80 for row in said["predictions"])
    seeds = {row["truth"]: row for row in said["seeds"]}
    assert (seeds["kl"]["layouts"], seeds["kl"]["seeds"]) == (30, 3)
    assert seeds["kl"]["reliability"] > 0.98 and seeds["kl"]["ceiling"] > 0.98
    assert "stage2_local" in capsys.readouterr().out
    assert said["banks"] == [], "of one layout nothing is told"
    # Cut short while the third seed was distilled: what all 30 have counts.
    cut = [r for r in rows if r.get("seed") != 2 or int(r["layout"]) < 5]
    seeds = load("report").seeds_of("cut", cut, "kl")
    assert (seeds.layouts, seeds.seeds) == (30, 2)


def test_the_report_tells_what_makes_two_measurements_differ():
    """Made-up layouts, the first 16 of which are the best by far."""
    rng, noise_of = np.random.default_rng(0), load("report").noise_of
    rows = []
    for i in range(40):
        worth = 0.01 * i if i < 16 else 9.0
        for seed in (0, 1):
            share = 0.5 - 0.02 * worth + 0.03 * rng.normal()
            row = {"kind": "distilled", "bank_seed": 0, "seed": seed, "tokens": 640}
            row |= {"layout": str(i), "kl": worth, "recall": share}
            # Blocks differ by 1 between layouts, however much they differ from one another.
            row["kl_blocks"] = (worth + np.arange(50) + rng.normal(size=50)).tolist()
            row["recall_parts"] = (share + 0.2 * rng.normal(size=400)).tolist()
            row["validation"] = {"kl": worth + 0.5 * rng.normal(), "recall": share + 0.1}
            rows.append(row)
    kl, share = (noise_of("made-up", rows, truth) for truth in ("kl", "recall"))
    assert kl.layouts == share.layouts == 16
    assert kl.splits == pytest.approx(0.5, rel=0.4) and share.splits == pytest.approx(0, abs=1e-9)
    assert kl.drawing == pytest.approx((2 / 50) ** 0.5, rel=0.1)
    assert share.drawing == pytest.approx(0.2 * (2 / 400) ** 0.5, rel=0.1)
    assert kl.seeds == 0 and share.seeds == pytest.approx(0.03, rel=0.3)
    # What a table lacks is not told.
    of_one = [{k: v for k, v in row.items() if k != "recall_parts"} for row in rows[::2]]
    found = noise_of("made-up", of_one, "recall")
    assert found.drawing is None and found.seeds is None and found.splits == share.splits
    assert noise_of("made-up", rows[:20], "kl") is None
    assert noise_of("made-up", [row | {"recall": None} for row in rows], "kl") is None


def test_the_report_compares_banks(tmp_path, monkeypatch):
    """Made-up layouts: half the tokens order them well, a quarter of them by chance."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=60)

    def write(name, tokens, noises):
        rows = [{"kind": "head", "study": {"bank": {"hidden": {"tokens": tokens}}}}]
        rows += [
            {"kind": "zero_shot", "bank_seed": s, "layout": str(i), "kl": v + n * rng.normal()}
            for s, n in noises.items()
            for i, v in enumerate(truth)
        ]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    own = write("own.jsonl", 64, {0: 0.0, 1: 0.1})
    half, quarter = write("half.jsonl", 32, {0: 0.1}), write("quarter.jsonl", 16, {0: 99.0})
    with own.open("a", encoding="utf-8") as file:
        for i, value in enumerate(truth[:20]):
            row = {"kind": "distilled", "bank_seed": 0, "seed": 0, "tokens": 640, "recall": None}
            row |= {"layout": str(i), "kl": value, "kl_blocks": [value, value]}
            file.write(json.dumps(row) + "\n")
    # As many tokens by another recipe.
    other, report = write("other.jsonl", 64, {0: 99.0}), load("report")
    options = [str(own), "--banks", str(half), str(quarter), str(other)]
    monkeypatch.setattr(sys, "argv", ["report.py", *options])
    report.main()
    said = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["banks"]
    found = {(row["table"], row["tokens"], row["seed"]): row for row in said}
    assert set(found) == {(0, 64, 0), (0, 64, 1), (1, 32, 0), (2, 16, 0), (3, 64, 0)}
    assert found[0, 64, 0]["agreement"] == 1 and found[0, 64, 0]["distilled"] == pytest.approx(1)
    assert found[0, 64, 1]["agreement"] > 0.95 and found[0, 64, 1]["distilled"] is None
    assert found[1, 32, 0]["distilled"] > 0.95
    assert all(abs(found[key]["agreement"]) < 0.5 for key in ((2, 16, 0), (3, 64, 0)))
    assert {(row["layouts"], row["shared"]) for row in said} == {(60, 20)}
    # Tables that have no layout in common say nothing of each other.
    rows = rows_of(own)
    banks = report.compare_banks(rows, rows[:21], [rows[0], *rows[21:41]])
    assert {(bank.table, bank.seed) for bank in banks} == {(0, 1)}


def test_a_search_is_compared_at_equal_distillation(study, tmp_path, monkeypatch, capsys):
    versus, blocks = load("versus"), {}
    path, config = study

    def spy(*args, train, config, **kwargs):
        blocks[config.tokens] = len(train)
        return distil_layouts(*args, train=train, config=config, **kwargs)

    monkeypatch.setattr(versus, "distil_layouts", spy)
    out = tmp_path / "versus.json"
    fixed = ["search.trials=4", "search.strategy=random", f"output={tmp_path}"]
    # Nobody has any here.
    fixed.append("distill.logits.patience=2")
    rivals = ["--rivals", "last", "random", "0,1", "uniform"]
    options = ["--tokens", "128", "--seeds", "0,1", "--out", str(out), *rivals]
    assert versus.main([str(path), *fixed, *options, "--part", "1/2"]) == 2
    assert "must hold a finished search" in capsys.readouterr().err
    assert versus.main([str(path), *fixed, *options]) == 0
    said = json.loads(out.read_text(encoding="utf-8"))
    run = tmp_path / config.name
    rows = [r for r in rows_of(run / "versus.jsonl") if r["kind"] == "distilled"]
    best, *others = said["rows"]
    # By hand: what the search read, given to the others.
    trials = Workbench(load_study(path, fixed)).result()
    assert said["search_tokens"] == 128 * (len(trials.trials) + len(trials.probes))
    budgets = {128, 128 + said["search_tokens"]}
    # The text of a budget is its own.
    assert blocks == {tokens: tokens // 16 for tokens in budgets}
    searched = {(r["layout"], r["tokens"]) for r in rows}
    for line in others:
        layout = ",".join(map(str, line["attention_layers"]))
        same = line["attention_layers"] == best["attention_layers"]
        assert same == line["chosen_as"].endswith("= searched")
        assert same or {(layout, tokens) for tokens in budgets} <= searched
        mean, low, high = line["more_than_searched"]["kl"] if not same else (0, 0, 0)
        assert low <= mean <= high
        values = [
            np.mean(r["kl"]) for r in rows if (r["layout"], r["tokens"]) == (layout, line["tokens"])
        ]
        assert len(values) == 2 and math.isclose(np.mean(values), line["kl"])
        assert same or math.isclose(mean, line["kl"] - best["kl"], abs_tol=1e-9)
    assert len(rows) == len({(r["layout"], r["tokens"], r["seed"]) for r in rows})
    # Every figure of every row that is compared: KL and cross-entropy, the teacher recalls nothing.
    apart = [row for row in others if row["more_than_searched"]]
    assert apart and said["comparisons"] == 2 * len(
        {(tuple(row["attention_layers"]), row["tokens"]) for row in apart}
    )
    # Nothing is distilled twice, nor drawn.
    before = rows_of(run / "versus.jsonl")
    assert versus.main([str(path), *fixed, *options]) == 0
    assert rows_of(run / "versus.jsonl") == before
    assert "| searched |" in capsys.readouterr().out
    assert versus.main([str(path), *fixed, *options, "--rivals", "nobody"]) == 2
    assert "--rivals: nobody" in capsys.readouterr().err


def test_intervals_of_several_comparisons_hold_together():
    versus = load("versus")
    rng = np.random.default_rng(0)
    text = rng.normal(size=40)
    one, other = (
        versus.Figures({"kl": mean + text + 0.1 * rng.normal(size=(3, 40))}) for mean in (1.2, 1.0)
    )
    mean, low, high = one.minus(other, 1)["kl"]
    assert 0.1 < low < mean < high < 0.3, "what both share is no noise"
    _, wider_low, wider_high = one.minus(other, 10)["kl"]
    assert wider_low < low and high < wider_high


def test_a_search_becomes_a_table_of_scores(study, tmp_path, monkeypatch, capsys):
    script = load("scores_table", FOLDER.parent / "benchmarks")
    monkeypatch.setattr(script, "RESULTS", tmp_path)

    def write(name, *overrides):
        fixed = [f"name={name}", f"output={tmp_path}", "search.baselines=[uniform]"]
        config = load_study(study[0], [*fixed, *overrides])
        pipeline.search(config)
        monkeypatch.setattr(sys, "argv", ["scores_table.py", str(config.run_dir)])
        return script.main()

    assert write("pareto", "search.pareto=[kl,cache]") == 0
    said = json.loads((tmp_path / "scores_pareto.json").read_text(encoding="utf-8"))
    assert said["possible"] == len(said["layouts"]) == 6 and said["objective"] == "kl"
    for name, *budget in (
        ["fewer", "budget.attention_layers={at_most: 2}"],
        ["cached", "budget.cache.mib=1", "budget.cache.context=64"],
    ):
        assert write(name, *budget) == 2
        assert "an exact number of attention layers alone" in capsys.readouterr().err
