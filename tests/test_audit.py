"""An audit of a finished search on a tiny teacher of six layers."""

import contextlib
import dataclasses
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from tiny_study import make_study, make_teacher, make_text
from typer.testing import CliRunner

from mohawk_nas.audit import _report, _Work, audit, choose_layouts, expected_interval
from mohawk_nas.cli import app
from mohawk_nas.config import dump
from mohawk_nas.errors import InputError, RunError, TrainingError
from mohawk_nas.layout import Layout
from mohawk_nas.pipeline import search
from mohawk_nas.reporting import SILENT
from mohawk_nas.reporting.audit_html import render_audit
from mohawk_nas.reporting.screen import show_audit
from mohawk_nas.reporting.text import rivals_reading
from mohawk_nas.search.statistics import reliability
from mohawk_nas.workbench import Workbench

TEST_TOKENS = 144
"""A block more than any other split has, which tells what was measured on."""


class Listener(type(SILENT)):
    def __init__(self):
        self.said, self.stages = [], []

    def say(self, text):
        self.said.append(text)

    @contextlib.contextmanager
    def stage(self, name, total, unit, *, done=0):
        amounts = []
        yield SimpleNamespace(advance=lambda amount, **_: amounts.append(amount))
        self.stages.append((name, total, done, sum(amounts)))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audit")
    make_teacher(folder / "teacher", num_layers=6)
    make_text(folder / "text.jsonl")
    config = make_study(
        folder, "budget.attention_layers=3", "search.trials=20", f"data.test_tokens={TEST_TOKENS}"
    )
    assert search(config)[0].exhaustive
    return config


def blocks_of(rows, layout):
    return [row["kl_blocks"] for row in rows if tuple(row["layout"]) == layout]


def rows_of(config):
    path = config.run_dir / "audit" / "distilled.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_an_audit_goes_on_and_reports(study, tmp_path, monkeypatch):
    # What the baselines name is distilled in any case; too few are refused before any is.
    few = "1 asked for in all, 5 named by the search and 0 drawn at random make 5 layouts; "
    with pytest.raises(RunError, match=few):
        audit(study, hours=1, tokens=256, layouts=1, seeds=1)
    assert not (study.run_dir / "audit" / "distilled.jsonl").exists()
    with monkeypatch.context() as patched:
        # As where time is up before there are enough.
        patched.setattr(_Work, "check", lambda *args: None)
        with pytest.raises(RunError, match=r"only 5 layouts are distilled.* more --hours$"):
            audit(study, hours=1, tokens=256, layouts=1, seeds=1)
    listener = Listener()
    report, path = audit(study, hours=1, tokens=256, reporter=listener)
    outlook = next(line for line in listener.said if line.startswith("a distillation takes"))
    assert "20 layouts x 2 seeds" in outlook and "0.8 would be known" in outlook
    # One seed of five layouts was there.
    assert listener.stages[-1] == ("audit", 40, 5, 35)
    rows = rows_of(study)
    assert len(rows) == 40 == len({(tuple(row["layout"]), row["seed"]) for row in rows})
    assert {row["seed"] for row in rows} == {1, 2}, "rungs distil with the study's own"
    # Rungs choose by the validation split.
    assert {len(row["kl_blocks"]) for row in rows} == {TEST_TOKENS // 16}
    assert (report.layouts, report.seeds, report.tokens) == (20, 2, 256)
    (trust,) = report.trusts
    assert trust.figure == "kl"
    # Hardly distilled, so the undistilled score still orders them.
    assert trust.spearman.low > 0.5 < trust.kendall.value < trust.spearman.value <= 1
    assert 0.5 < trust.reliability <= 1 and 0.5 < trust.ceiling <= 1
    assert trust.regret.total == trust.regret.objective + trust.regret.strategy
    assert trust.regret.strategy == 0, "every layout was scored"
    means = {}
    for row in rows:
        means.setdefault(tuple(row["layout"]), []).append(np.mean(row["kl_blocks"]))
    best = min(means, key=lambda layout: np.mean(means[layout]))
    assert report.best.candidates == best and report.best not in report.tied
    said = json.loads(path.read_text(encoding="utf-8"))
    assert said["best"] == list(best) and said["trusts"][0]["spearman"]["low"] > 0.5
    kept = {tuple(one["layout"]): one for one in said["distilled"]}
    assert len(kept) == 20 and kept[best]["kl"] == pytest.approx(
        [np.mean(x) for x in blocks_of(rows, best)]
    )
    # Nothing is distilled twice, and another recipe is another audit.
    again, _ = audit(study, hours=1, tokens=256)
    assert again == report and rows_of(study) == rows
    with pytest.raises(RunError, match="an audit with another tokens"):
        audit(study, hours=1, tokens=512)
    settings = study.run_dir / "audit" / "settings.json"
    kept = settings.read_text(encoding="utf-8")
    # As earlier versions did.
    settings.write_text(json.dumps({"logits": json.loads(kept)["logits"]}), encoding="utf-8")
    with pytest.raises(RunError, match="an audit with another split, texts; remove the folder"):
        audit(study, hours=1, tokens=256)
    # One of an earlier version, which said nothing of recall, goes on where none is asked.
    plain = {key: value for key, value in json.loads(kept).items() if key != "recall"}
    settings.write_text(json.dumps(plain), encoding="utf-8")
    assert audit(study, hours=1, tokens=256)[0] == report
    settings.write_text(json.dumps(plain | {"recall": "otherwise"}), encoding="utf-8")
    with pytest.raises(RunError, match="an audit with another recall; remove the folder"):
        audit(study, hours=1, tokens=256)
    # A setting that one of the two leaves out.
    other = json.loads(kept)
    other["logits"]["schedule"] = "cosine"
    settings.write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(RunError, match="an audit with another schedule; remove the folder"):
        audit(study, hours=1, tokens=256)
    settings.write_text(kept, encoding="utf-8")
    # A third seed of a few layouts does not take the others' two away.
    with (study.run_dir / "audit" / "distilled.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, "seed": 3}) + "\n" for row in rows[:3])
    report, _ = audit(study, hours=0, tokens=256)
    assert (report.layouts, report.seeds, report.repeated) == (20, 2, 20)


def test_a_second_seed_of_some_layouts_takes_no_other_away(study, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(study, output=str(tmp_path))
    shutil.copytree(study.run_dir, config.run_dir)
    shutil.rmtree(config.run_dir / "audit", ignore_errors=True)
    one, _ = audit(config, hours=1, tokens=256, seeds=1)
    assert (one.layouts, one.seeds, one.repeated) == (20, 1, 0)
    assert one.trusts[0].reliability is None
    rows = rows_of(config)
    # As if time had ended there.
    again = [
        {**row, "seed": 2, "kl_blocks": [x + 0.01 * i for x in row["kl_blocks"]]}
        for i, row in enumerate(rows[:6])
    ]
    file = config.run_dir / "audit" / "distilled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *again]), encoding="utf-8")
    monkeypatch.setattr("mohawk_nas.audit.FEWEST", 6)
    report, _ = audit(config, hours=0, tokens=256)
    assert (report.layouts, report.seeds, report.repeated) == (20, 1, 6)
    values = [
        [np.mean(row["kl_blocks"]) for row in pair] for pair in zip(rows[:6], again, strict=True)
    ]
    (trust,) = report.trusts
    assert trust.reliability == pytest.approx(reliability(np.array(values)))
    assert trust.spearman == one.trusts[0].spearman
    show_audit(report, files=[])
    assert re.search(r"by layouts with several seeds +6", capsys.readouterr().out)
    assert "by 6 layouts with several seeds" in render_audit(report, name="tiny")


def audited(study, folder):
    """A copy of the study with an audit of two seeds."""
    config = dataclasses.replace(study, output=str(folder))
    shutil.copytree(study.run_dir, config.run_dir)
    shutil.rmtree(config.run_dir / "audit", ignore_errors=True)
    audit(config, hours=1, tokens=256, seeds=2)
    return config


def test_a_figure_that_is_the_same_for_all_foretells_nothing(study, tmp_path, capsys):
    config = audited(study, tmp_path)
    file = config.run_dir / "audit" / "distilled.jsonl"
    # As where no student recalls anything, or all of the best everything.
    for best in (0.0, 1.0):
        rows = [{**row, "recall": best, "recall_parts": [best] * 3} for row in rows_of(config)]
        if best:
            for row in rows:
                if np.mean(row["kl_blocks"]) > np.median([np.mean(r["kl_blocks"]) for r in rows]):
                    row.update(recall=0.5, recall_parts=[0.5] * 3)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        report, _ = audit(config, hours=0, tokens=256)
        kl, recall = report.trusts
        assert kl.spearman and kl.kendall and kl.reliability is not None
        assert recall.best_quarter is None
        assert (recall.spearman is None) == (best == 0) == (recall.fit is None)
        show_audit(report, files=[])
        assert "pairs of layouts in another order" in capsys.readouterr().out
        page = render_audit(report, name="tiny")
        assert ("All layouts have the same distilled recall" in page) == (best == 0)
        assert not re.search(r"\b(nan|inf)\b", page)


def test_baselines_are_held_against_the_studys_best(study, tmp_path, capsys):
    config = audited(study, tmp_path)
    result, rows = Workbench(config).result(), rows_of(config)
    best = result.best.layout
    report = _report(result, rows, tokens=256, drawn={})
    named = {layout for layout in result.baselines.values() if layout != best}
    assert named and {rival.layout for rival in report.rivals} == named
    for rival in report.rivals:
        assert {result.baselines[label] for label in rival.labels} == {rival.layout}
        gap = np.mean(blocks_of(rows, rival.layout.candidates)) - np.mean(
            blocks_of(rows, best.candidates)
        )
        lost = rival.loses["kl"]
        assert set(rival.loses) == {"kl"} and lost.value == pytest.approx(gap)
        assert lost.low < gap < lost.high
    assert json.loads(json.dumps(report.to_dict()))["rivals"][0]["loses"]["kl"]["low"]
    # A study that goes by both is told of their sum as well, recall as a share of the teacher's.
    answers = {best.candidates: [0.8, 0.6, 0.7]}
    both = [
        {**row, "recall": np.mean(parts), "recall_parts": parts}
        for row in rows
        for parts in [answers.get(tuple(row["layout"]), [0.5, 0.5, 0.5])]
    ]
    weighed = dataclasses.replace(result, weights={"kl": 1.0, "recall": 0.2})
    report = _report(weighed, both, tokens=256, drawn={}, teacher_recall=0.8)
    figures = ("kl", "recall", "kl + 0.2 recall")
    # So many intervals hold together.
    half = stats.t.ppf(1 - 0.025 / (len(report.rivals) * 3), 2) * 0.1 / 3**0.5
    for rival in report.rivals:
        loses = rival.loses
        assert tuple(loses) == figures
        assert loses["recall"].value == pytest.approx(0.2)
        assert loses["recall"].high - 0.2 == pytest.approx(half)
        assert loses[figures[2]].value == pytest.approx(loses["kl"].value + 0.2 * 0.2 / 0.8)
    show_audit(report, files=[])
    shown = capsys.readouterr().out
    first = report.rivals[0]
    lost = first.loses["kl"]
    whole = f"{lost.value:+.4f} [{lost.low:+.4f}, {lost.high:+.4f}]"
    assert re.search(rf"{re.escape(first.labels[0])}.* kl +{re.escape(whole)}", shown)
    assert whole in render_audit(report, name="tiny")
    assert "Better beyond them: none" in " ".join(shown.split()) and "not seeds" not in shown
    # A baseline that is better is named, and by what.
    better = [{**row, "kl_blocks": list(np.array(row["kl_blocks"]) + 9)} for row in rows]
    named = {layout.candidates for layout in named}
    better = [
        new if tuple(new["layout"]) not in named else old
        for new, old in zip(better, rows, strict=True)
    ]
    reading = rivals_reading(_report(result, better, tokens=256, drawn={}))
    assert re.search(r"Better beyond them: (?!none).*\bby kl\.$", reading)
    # One that lacks a seed is named, and not held against anything.
    lacking = report.rivals[0]
    fewer = [r for r in rows if tuple(r["layout"]) != lacking.layout.candidates or r["seed"] == 1]
    found = _report(result, fewer, tokens=256, drawn={})
    assert lacking.layout not in {rival.layout for rival in found.rivals}
    assert found.not_held == lacking.labels == tuple(found.to_dict()["not_held"])
    assert f"Not distilled as often: {', '.join(lacking.labels)}." in rivals_reading(found)
    # Where the best itself was not distilled there is nothing to hold them against.
    others = [row for row in rows if tuple(row["layout"]) != best.candidates]
    assert _report(result, others, tokens=256, drawn={}).rivals == ()


def test_a_score_that_is_the_same_for_all_foretells_nothing(study, tmp_path):
    config = audited(study, tmp_path)
    result, rows = Workbench(config).result(), rows_of(config)
    alike = [dataclasses.replace(trial, value=1.0) for trial in result.trials]
    report = _report(dataclasses.replace(result, trials=tuple(alike)), rows, tokens=256, drawn={})
    assert report.trusts[0].spearman is None and report.trusts[0].fit is not None


def test_seeds_that_say_the_same_tell_no_more_layouts_apart(study, tmp_path):
    config = audited(study, tmp_path)
    result, rows = Workbench(config).result(), rows_of(config)
    rng = np.random.default_rng(0)
    rows = [{**row, "kl_blocks": rng.normal(size=24).tolist()} for row in rows if row["seed"] == 1]

    def tied(seeds):
        # A block that is hard for a layout is so in each seed.
        again = [{**row, "seed": seed} for row in rows for seed in seeds]
        return _report(result, again, tokens=256, drawn={}).tied

    assert tied([1]) and tied([1, 2, 3, 4]) == tied([1])


def test_regret_is_a_share_of_what_chance_gives(study, tmp_path):
    config = dataclasses.replace(study, output=str(tmp_path))
    config = dataclasses.replace(config, search=dataclasses.replace(config.search, trials=4))
    result, _ = search(config)
    report, path = audit(config, hours=1, tokens=256, seeds=1)
    drawn = json.loads((path.parent / "drawn.json").read_text(encoding="utf-8"))
    assert len(drawn) == 10 == report.drawn
    scorer = Workbench(config).scorer()
    for names, value in drawn:
        layout = Layout(tuple(names))
        assert scorer.score(layout).mean("kl") == pytest.approx(value, rel=1e-5)
    # Every layout of the search and every one that was drawn.
    kl = {tuple(row["layout"]): np.mean(row["kl_blocks"]) for row in rows_of(config)}
    assert set(kl) == {trial.layout.candidates for trial in result.trials} | {
        tuple(names) for names, _ in drawn
    }
    (trust,) = report.trusts
    best, mean = min(kl.values()), np.mean([kl[tuple(names)] for names, _ in drawn])
    told = (kl[result.best.layout.candidates] - best) / (mean - best)
    assert trust.regret.total == pytest.approx(told)
    low, high = trust.regret.within
    assert low <= told <= high
    # Once drawn they stay, and a finished audit draws none anew.
    again, _ = audit(config, hours=1, tokens=256, seeds=1)
    assert again == report
    # Had one of those drawn distilled best, the search's choice would cost something.
    file = config.run_dir / "audit" / "distilled.jsonl"
    lucky = next(tuple(x) for x, _ in drawn if tuple(x) != result.best.layout.candidates)
    rows = rows_of(config)
    for row in rows:
        if tuple(row["layout"]) == lucky:
            row["kl_blocks"] = [best - 0.1 + value / 100 for value in row["kl_blocks"]]
            kl[lucky] = np.mean(row["kl_blocks"])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (trust,) = audit(config, hours=0, tokens=256, seeds=1)[0].trusts
    mean = np.mean([kl[tuple(names)] for names, _ in drawn])
    told = (kl[result.best.layout.candidates] - kl[lucky]) / (mean - kl[lucky])
    assert told > 0 and abs(np.mean(list(kl.values())) - mean) > 1e-6
    assert trust.regret.total == pytest.approx(told)
    assert trust.regret.within[0] < told < trust.regret.within[1]


def test_the_teacher_itself_is_not_audited(tmp_path):
    config = make_study(tmp_path, "budget.attention_layers={at_most: 4}", "search.trials=16")
    result, _ = search(config)
    # The whole space, of which the best keeps everything.
    assert len(result.trials) == 16 and not result.best.layout.replaced_layers
    report, _ = audit(config, hours=1, tokens=256, seeds=1)
    assert report.layouts == 15 and report.best.replaced_layers
    (trust,) = report.trusts
    assert trust.regret is None, "what the search chose was not distilled"


def test_a_space_of_few_layouts_is_refused_before_any_is_distilled(tmp_path):
    config = make_study(tmp_path)
    search(config)
    with pytest.raises(RunError, match="only 6 of 6 layouts are scored or drawn at random; at le"):
        audit(config, hours=1, tokens=256, seeds=1)
    assert not (config.run_dir / "audit" / "distilled.jsonl").exists()


def test_tokens_of_less_than_a_step_are_refused(study, tmp_path):
    config = dataclasses.replace(study, output=str(tmp_path))
    search(config)
    with pytest.raises(InputError, match="at least one step of 64 tokens"):
        audit(config, hours=1, tokens=63)


def test_the_command_prints_what_was_found(study, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(study), encoding="utf-8")
    found = CliRunner().invoke(app, ["audit", str(path), "--tokens", "256", "--hours", "1"])
    assert found.exit_code == 0, found.output
    for text in ("Spearman", "distilled kl", "regret", "study's own best", "audit.json"):
        assert text in found.output
    page = study.run_dir / "audit" / "audit.html"
    assert str(page) in found.output.replace("\n", "")
    # A mark a layout, a ring around the best when distilled.
    assert page.read_text(encoding="utf-8").count("<circle") == 21


def test_time_that_is_up_begins_nothing(study, tmp_path):
    before = rows_of(study)
    audit(study, hours=0, tokens=256)
    assert rows_of(study) == before


def test_workers_distil_what_one_process_does(study, tmp_path):
    config = dataclasses.replace(study, output=str(tmp_path))
    search(config)
    listener = Listener()
    report, _ = audit(config, hours=1, tokens=256, layouts=14, seeds=1, reporter=listener)
    alone = rows_of(config)
    shutil.rmtree(config.run_dir / "audit")
    listener = Listener()
    # One of them goes on with what was there before.
    (config.run_dir / "audit").mkdir()
    kept = config.run_dir / "audit" / "distilled.jsonl"
    kept.write_text(json.dumps(alone[0]) + "\n", encoding="utf-8")
    shared, _ = audit(
        config, hours=1, tokens=256, layouts=14, seeds=1, workers=2, reporter=listener
    )
    assert listener.stages[-1] == ("audit", 14, 1, 13)

    def key(row):
        return row["layout"], row["seed"]

    assert sorted(rows_of(config), key=key) == sorted(alone, key=key)
    assert shared.to_dict() == report.to_dict()
    # What stops them is told.
    with pytest.raises(TrainingError, match="no worker came to its end"):
        audit(
            dataclasses.replace(config, output=str(tmp_path)),
            hours=1,
            tokens=256,
            layouts=20,
            seeds=2,
            workers=2,
            reporter=Breaking(kept),
        )


class Breaking(Listener):
    """Damages the rows before the workers read them."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    @contextlib.contextmanager
    def stage(self, name, total, unit, *, done=0):
        if name == "audit":
            self.path.write_text("nothing\n", encoding="utf-8")
        yield SimpleNamespace(advance=lambda amount, **_: None)


def test_an_audit_needs_a_search(tmp_path):
    config = make_study(tmp_path)
    with pytest.raises(RunError, match="must hold a finished search"):
        audit(config, hours=1, tokens=256)


def layouts_of(count):
    return [
        Layout(tuple("attention" if i >> b & 1 else "mamba2" for b in range(8)))
        for i in range(count)
    ]


def test_layouts_come_from_every_tenth_of_the_score():
    layouts = layouts_of(200)
    scored = {layout: float(i) for i, layout in enumerate(layouts)}
    chosen = choose_layouts(scored, [("best", layouts[0]), ("uniform/0", layouts[0])], 31)
    assert len(chosen) == 31 and chosen[layouts[0]] == ["best", "uniform/0"]
    tenths = [layouts.index(layout) // 20 for layout in chosen]
    assert all(tenths.count(tenth) >= 3 for tenth in range(10))
    assert chosen == choose_layouts(scored, [("best", layouts[0]), ("uniform/0", layouts[0])], 31)
    assert len(choose_layouts(scored, [], 1000)) == 200
    near = choose_layouts(scored, [], 30, neighbours=layouts[100:120])
    assert sum(why == ["neighbour"] for why in near.values()) == 5


def test_the_expected_interval_is_that_of_simulations():
    rng = np.random.default_rng(0)
    # A bivariate normal whose Spearman's correlation is 0.8.
    r = 2 * math.sin(math.pi * 0.8 / 6)
    found = []
    for _ in range(2000):
        x = rng.normal(size=40)
        y = r * x + math.sqrt(1 - r**2) * rng.normal(size=40)
        ranks = [np.argsort(np.argsort(v)) for v in (x, y)]
        found.append(np.corrcoef(*ranks)[0, 1])
    low, high = expected_interval(40)
    assert np.quantile(found, [0.025, 0.975]) == pytest.approx([low, high], abs=0.05)
