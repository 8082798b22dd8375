"""What the user sees: progress, the tables of a search, report.html."""

import io
import json
import math
import re
from dataclasses import replace

import pytest
from rich.console import Console
from synthetic_search import SyntheticScorer, make

from mohawk_nas.audit import AuditReport, Distilled, Trust
from mohawk_nas.distill.logits import LogitsResult
from mohawk_nas.layout import ATTENTION
from mohawk_nas.metrics import BlockFigures
from mohawk_nas.reporting import SILENT, progress, text
from mohawk_nas.reporting.audit_html import render_audit
from mohawk_nas.reporting.console import print_placement, print_result
from mohawk_nas.reporting.html import render_report, write_report
from mohawk_nas.reporting.progress import ConsoleReporter
from mohawk_nas.reporting.screen import show_distillation, show_names
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.scoring import Comparison
from mohawk_nas.search.statistics import Fit, Interval, Regret
from mohawk_nas.search.strategy import strategy_names
from mohawk_nas.search.study import run_study

BASELINES = ["uniform", "first", "swap_one", "add_one_in", "greedy", "1,5"]


def study(num_layers=8, num_attention=2, *, noise=0.3, replacements=("ssm",), **options):
    options = {"trials": 14, "baselines": BASELINES, "strategy": "random", **options}
    config, space, budget = make(num_layers, num_attention, replacements=replacements, **options)
    scorer = SyntheticScorer(num_layers, pairs=1.0, noise=noise, replacements=replacements)
    return config, run_study(config, space, budget, scorer, run_dir=None)


def printed(result, *, width=100, next_command=None):
    console = Console(file=io.StringIO(), width=width)
    print_result(result, console=console, next_command=next_command)
    return console.file.getvalue()


def test_a_search_ends_with_everything_it_has_to_say():
    _, result = study()
    text = printed(result, next_command="mohawk-nas distill runs/made-up/best.yaml")
    assert "14 distinct layouts of the 28 that keep 2 attention layers were scored." in text
    assert "Probes of other layouts: swap_one 8, add_one_in 8, greedy 15" in text
    best = result.best
    first_row = next(line for line in text.splitlines() if line.strip().startswith("1 "))
    assert best.layout.strip(result.space.symbols) in first_row
    assert f"{best.value:.4f}" in first_row and "the best" in first_row
    for label in result.baselines:
        assert re.search(rf"^{re.escape(label)} .*\d\.\d{{4}}", text, re.MULTILINE), label
    assert "What each layer is worth as attention" in text and "adjusted R²" in text
    assert "Lower is better." in text and "nats a token" in text
    layers = ",".join(map(str, best.layout.attention_layers))
    assert f"Best: attention in layers {layers}, kl {best.value:.4f}." in text
    assert text.rstrip().endswith("Next:  mohawk-nas distill runs/made-up/best.yaml")
    versus = result.versus_best(result.ranking[9])
    assert f"{versus.difference:+.4f} ± {versus.standard_error:.4f}" in text


def test_ties_are_marked_and_named():
    _, result = study(noise=3.0)
    assert result.ties
    text = printed(result)
    assert "tied with it within noise: " in text
    marked = [line for line in text.splitlines() if line.rstrip().split("≈")[0] != line.rstrip()]
    named = {t.layout.strip(result.space.symbols) for t in result.ties}
    shown = {t.layout.strip(result.space.symbols) for t in result.ranking[:10]} & named
    assert all(any(strip in line for line in marked) for strip in shown)
    _, clear = study(noise=0.0)
    assert "No other layout that was scored is tied with it." in printed(clear)


def test_a_search_of_the_whole_space_says_so():
    assert "Exhaustive: all 28 layouts" in printed(study(trials=28)[1])
    _, solved = study(objective={"stage2_local": 1.0}, baselines=[])
    text = printed(solved)
    assert "Solved exactly, since stage2_local is a sum over layers" in text
    assert "Baselines" not in text


def test_layers_are_worth_what_replacing_them_costs_if_their_number_is_free():
    config, space, _ = make(6, 2, trials=22)
    scorer = SyntheticScorer(6)
    result = run_study(config, space, Budget(at_most=2), scorer, run_dir=None)
    assert result.exhaustive and len(result.trials) == 22
    costs = {layer: scorer.cost(layer, "ssm") for layer in range(6)}
    assert result.worth.fitted == pytest.approx(costs)
    assert "told against replacing it, by" in " ".join(printed(result).split())
    assert "told against keeping an average layer" in " ".join(printed(study()[1]).split())


def test_weighted_objectives_show_each_part():
    _, result = study(objective={"kl": 1.0, "stage2_local": 0.25})
    text = printed(result)
    assert "value = 1 kl + 0.25 stage2_local." in text
    header = next(line for line in text.splitlines() if line.strip().startswith("#"))
    assert header.split()[3:6] == ["kl", "stage2_local", "value"]


@pytest.mark.parametrize(
    ("num_layers", "num_attention", "options"),
    [(8, 2, {}), (24, 4, {"trials": 30}), (48, 6, {}), (8, 0, {}), (3, 3, {})],
)
def test_tables_fit_a_hundred_columns(num_layers, num_attention, options):
    baselines = [b for b in BASELINES if b != "1,5"]
    _, result = study(num_layers, num_attention, baselines=baselines, **options)
    text = printed(result)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "…" not in text, "nothing is cut off"
    rows = [line for line in text.splitlines() if re.match(r" *\d+ +[AM\d]", line)]
    assert len(rows) >= min(10, len(result.trials))


def test_pinned_layers_and_several_candidates_are_shown():
    _, result = study(
        6, 2, replacements=("a", "b"), pinned={0: ATTENTION}, baselines=["swap_one"], trials=20
    )
    text = printed(result)
    assert "(A = attention, M = a, M2 = b)" in text
    assert re.search(r"^ +0 +A +pinned +pinned", text, re.MULTILINE)


def test_layouts_of_several_mixers_are_told_apart():
    _, result = study(replacements=("ssm", "conv"))
    strip = f"({result.best.layout.strip(result.space.symbols)})"
    assert strip in text.verdict(result)[0]
    console = Console(file=io.StringIO(), width=100)
    trial = result.ranking[1]
    placement = result.place(trial.layout, trial.score)
    print_placement(placement, trial.layout, trial.value, result, console=console)
    assert f"against the best, {text.layers(result.best.layout)} {strip}" in console.file.getvalue()
    assert "(" not in text.named(study()[1], result.best.layout)


def test_recall_that_was_left_out_is_told():
    config, result = study()
    search = replace(config.search, objective={"kl": 1.0, "recall": 0.05})
    config = replace(config, search=search)
    said = "recall is left out of the objective: the teacher solves no probe."
    assert said in render_report(result, config)
    console = Console(file=io.StringIO(), width=100)
    print_result(result, console=console, notes=text.left_out(result, config))
    assert console.file.getvalue().rstrip().endswith(said)
    asked = replace(config, search=replace(search, pareto=["kl", "recall"]))
    assert "of the objective and the Pareto set: " in text.left_out(result, asked)[0]
    assert text.left_out(*reversed(study())) == []


def test_small_differences_keep_their_digits():
    assert text.difference(Comparison(difference=0.01, standard_error=2e-5)) == "+0.0100 ± 0.0000"
    assert text.difference(Comparison(difference=2e-5, standard_error=3e-6)) == "+2.0e-05 ± 3.0e-06"
    assert text.difference(Comparison(difference=0.0, standard_error=0.0)) == "+0.0000 ± 0.0000"


def test_a_distillation_that_gained_nothing_says_how_often_it_was_looked_at(tmp_path, capsys):
    figures = BlockFigures(kl=(0.2, 0.3), cross_entropy=(1.0, 1.1))
    rows = [{"loss": 1.0}, {"loss": 1.0, "validation_kl": 0.3}]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    result = LogitsResult(before=figures, after=figures, best_step=0, tokens=64)
    show_distillation(result, tmp_path, next_command="x")
    assert "Stage 3 was looked at 1 time on the validation split" in capsys.readouterr().out


def test_a_users_layout_is_placed():
    _, result = study()
    trial = result.ranking[3]
    console = Console(file=io.StringIO(), width=100)
    placement = result.place(trial.layout, trial.score)
    print_placement(placement, trial.layout, trial.value, result, console=console)
    text = console.file.getvalue()
    assert f"kl {trial.value:.4f}, rank 4 of 14 (the study has scored it too)" in text
    assert "against the best, " in text


def test_the_report_is_one_file_that_needs_nothing_else(tmp_path):
    config, result = study()
    path = write_report(tmp_path / "report.html", result, config)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(https?:)?//\w", text), "no address of any other file"
    assert "<script" not in text and "<link" not in text and "@import" not in text
    for tag in ("html", "body", "table", "svg", "h2", "p", "tr", "td"):
        assert text.count(f"<{tag}>") + text.count(f"<{tag} ") == text.count(f"</{tag}>"), tag
    assert text.count("<svg") == 2
    for label in result.baselines:
        assert f"<td>{label}</td>" in text
    assert text.count("<circle") == len(result.trials)
    assert "attention_layers: 2" in text, "the settings are in it"
    assert f"kl {result.best.value:.4f}." in text


def test_the_report_escapes_what_the_user_named():
    config, result = study(6, 2, replacements=("<b>",), baselines=[], trials=3)
    assert "<b>" not in render_report(result, config).replace("<b>A</b>", "")


def test_a_report_of_few_layouts_is_drawn_too():
    for options in ({"trials": 1}, {"num_attention": 8}, {"num_attention": 0}):
        config, result = study(baselines=[], **options)
        assert "nan" not in render_report(result, config).partition("Settings")[0]


def audited(*, several=True, broken=False):
    """An audit of twelve layouts whose best is not the study's."""
    _, result = study(trials=12, baselines=[])
    layouts = [trial.layout for trial in result.ranking]
    distilled = [
        Distilled(
            layout=layout,
            score=0.1 * place,
            figures={"kl": (0.2 + 0.01 * (place - 1) ** 2, 0.25), "recall": (0.5, 0.6)},
        )
        for place, layout in enumerate(layouts)
    ]
    if broken:
        distilled[5] = replace(distilled[5], score=math.inf)
    kl = Trust(
        figure="kl",
        spearman=Interval(value=0.7, low=0.4, high=0.9),
        kendall=Interval(value=0.5, low=0.2, high=0.8),
        best_quarter=None,
        reliability=0.75 if several else None,
        ceiling=0.87 if several else None,
        fit=Fit(additive=0.5, pairwise=0.6),
        regret=Regret(objective=0.25, strategy=-0.05) if several else None,
    )
    return AuditReport(
        layouts=12,
        seeds=2 if several else 1,
        repeated=12 if several else 0,
        tokens=4096,
        trusts=(kl, replace(kl, figure="recall")),
        best=layouts[1],
        tied=(layouts[2],),
        searched=layouts[0],
        objective="kl + 0.5 recall",
        distilled=tuple(distilled),
    )


def test_an_audits_page_draws_each_layout_and_says_what_it_means():
    report = audited()
    page = render_audit(report, name="<tiny>")
    assert not re.search(r"(https?:)?//\w", page) and "<tiny>" not in page
    for tag in ("html", "body", "svg", "h2", "p", "circle", "text"):
        closed = page.count(f"</{tag}>") + page.count('r="9"/>') * (tag == "circle")
        assert page.count(f"<{tag}>") + page.count(f"<{tag} ") == closed, tag
    plots = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(plots) == 2
    for plot in plots:
        assert plot.count('class="dot"') == 11 and plot.count('class="seeds"') == 12
        # The study's best stands leftmost, the ring around the second.
        (mine,) = re.findall(r'class="keep" cx="([\d.]+)"', plot)
        places = sorted(float(x) for x in re.findall(r'class="dot" cx="([\d.]+)"', plot))
        (ring,) = re.findall(r'class="best" cx="([\d.]+)"', plot)
        assert float(mine) < places[0] == float(ring)
    assert "score: kl + 0.5 recall" in page and "is not among them" in page
    # Kendall's 0.5: three pairs in four.
    assert "in 75% of all pairs (60% to 90%)" in page
    assert "Regret 20.0% of" in page and "Reliability 0.75" in page


def test_an_audits_page_says_what_cannot_be_told():
    page = render_audit(audited(several=False), name="tiny")
    assert "give more --seeds" in page and "Regret cannot be told" in page
    page = render_audit(audited(broken=True), name="tiny")
    assert page.count('class="dot"') == 20 and not re.search(r"\b(nan|inf)\b", page)


def reporter(*, terminal):
    console = Console(
        file=io.StringIO(), width=100, force_terminal=terminal, legacy_windows=False, _environ={}
    )
    return ConsoleReporter(console), console.file


def test_progress_off_a_terminal_is_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    show, out = reporter(terminal=False)
    with show.stage("stage 2 (hidden)", 100, "step", done=40) as task:
        for _ in range(60):
            now[0] += 1.0
            task.advance(1, tokens=500, loss=0.25)
    lines = out.getvalue().splitlines()
    assert lines[0] == "stage 2 (hidden): 55/100 steps · 500 tokens/s · 45 s left · loss 0.25"
    assert len(lines) == 5
    assert lines[-1] == "stage 2 (hidden): 100/100 steps · 500 tokens/s · loss 0.25 · took 1:00 min"
    show.say("done [all of it]")
    assert out.getvalue().splitlines()[-1] == "done [all of it]"


def test_another_amount_may_turn_out_to_be_all(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    show, out = reporter(terminal=False)
    with show.stage("stage 3 (logits)", 100, "step") as task:
        for _ in range(20):
            now[0] += 1.0
            task.advance()
            task.expect(20)
    first, last = out.getvalue().splitlines()
    assert first == "stage 3 (logits): 15/20 steps · 5 s left"
    assert last == "stage 3 (logits): 20/20 steps · took 20 s"
    show, out = reporter(terminal=True)
    with show.stage("stage 3 (logits)", 100, "step") as task:
        task.advance(20)
        task.expect(20)
    assert "20/20 steps" in out.getvalue().rpartition("stage 3")[2]


def test_a_stage_without_work_says_nothing():
    show, out = reporter(terminal=False)
    with show.stage("search", 10, "layout", done=10):
        pass
    assert out.getvalue() == ""


def test_progress_on_a_terminal_shows_bars_also_within_each_other():
    show, out = reporter(terminal=True)
    with show.stage("search", None, "layout") as outer:
        with show.stage("stage 2", 1, "step") as inner:
            inner.advance(1, loss=1.5)
        outer.advance(1, value=0.1234567, best="M A M")
        show.say("a line above")
    text = out.getvalue()
    assert "1/1 step" in text and "loss 1.5" in text
    assert "1 layout" in text and "value 0.1235 · best M A M" in text
    assert "a line above" in text


def test_inner_stages_of_one_name_share_a_line():
    show, out = reporter(terminal=True)
    with show.stage("audit", 3, "distillation") as outer:
        for loss in (0.5, 0.25, 0.125):
            with show.stage("stage 3", 2, "step") as inner:
                inner.advance(2, loss=loss)
            outer.advance(1)
    last = out.getvalue().rpartition("3/3 distillations")[2]
    assert last.count("stage 3") == 1 and "loss 0.125" in last


def test_an_error_ends_the_bars():
    show, _ = reporter(terminal=True)
    with pytest.raises(KeyboardInterrupt), show.stage("search", 3, "layout"):
        raise KeyboardInterrupt
    with show.stage("search", 3, "layout") as task:
        task.advance(3)


def test_silence_has_the_same_interface():
    with SILENT.stage("search", 3, "layout", done=1) as task:
        task.advance(1, tokens=3, loss=0.1)
        task.expect(1)
    SILENT.say("nothing")


def test_strategies_are_listed_with_their_options(capsys):
    show_names("strategies")
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert sorted(lines) == strategy_names()
    assert lines["greedy"] == "Short for {name: beam, width: 1}."
    assert lines["beam"].endswith("Options: width: 4, direction: add, swaps: 0.")
    assert lines["uniform"] == "Every distinct phase of an even spacing."
