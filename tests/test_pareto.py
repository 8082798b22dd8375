"""Pareto sets: the sorting, the samplers that look for one, and studies whose result it is."""

import io
import itertools
import json
import math
import random
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import optuna
import pytest
import torch
import yaml
from crew import QUICK
from rich.console import Console
from synthetic_search import SyntheticScorer, make
from tiny_study import make_study

from mohawk_nas import pipeline
from mohawk_nas.errors import RunError
from mohawk_nas.layout import ATTENTION
from mohawk_nas.reporting import text
from mohawk_nas.reporting.console import print_placement, print_result
from mohawk_nas.reporting.html import render_report
from mohawk_nas.search.leases import Worker
from mohawk_nas.search.pareto import dominates, hypervolumes, pareto_ranks
from mohawk_nas.search.scoring import Score
from mohawk_nas.search.strategies._sampling import _ENCODINGS
from mohawk_nas.search.strategy import SearchContext, build_strategy
from mohawk_nas.search.study import run_study, trial_seed
from mohawk_nas.student import assemble
from mohawk_nas.teacher import cache_name
from mohawk_nas.workbench import Workbench

REPLACEMENTS = ("small", "large")
BYTES = {ATTENTION: 8.0, "small": 1.0, "large": 3.0}


class Costly(SyntheticScorer):
    """Besides its KL a layout has a recall of its own and takes memory.

    The large replacement loses less of both figures.
    """

    def __init__(self, num_layers, **options):
        super().__init__(num_layers, pairs=1.0, replacements=REPLACEMENTS, **options)
        self.lost = random.Random(5).sample(range(num_layers), num_layers)

    def cost(self, layer, candidate):
        factor = 0.4 if candidate == "large" else 1.0
        return factor * super().cost(layer, "small" if candidate == "large" else candidate)

    def figures(self, layout):
        lost = sum(
            self.lost[i] * (0.6 if layout[i] == "large" else 1.0) for i in layout.replaced_layers
        )
        return {
            "kl": self.exact(layout),
            "recall": lost / 100,
            "cache": sum(BYTES[name] for name in layout.candidates),
        }

    def score(self, layout):
        score = super().score(layout)
        figures = self.figures(layout)
        columns = {name: (figures[name],) * 16 for name in ("recall", "cache")}
        return replace(score, per_block=score.per_block | columns)


def brute_rank(rows):
    """Non-dominated sorting in the plainest words."""
    ranks, left, rank = [0] * len(rows), set(range(len(rows))), 0
    while left:
        front = {i for i in left if not any(dominates(rows[j], rows[i]) for j in left)}
        for i in front:
            ranks[i] = rank
        left, rank = left - front, rank + 1
    return ranks


def drawn(num_figures, *, size, seed=0):
    """Rows of few whole numbers, so that many are equal in some figures or in all."""
    rng = random.Random(seed)
    return [tuple(float(rng.randrange(5)) for _ in range(num_figures)) for _ in range(size)]


def test_domination_asks_every_figure():
    assert dominates((1, 2), (1, 3)) and dominates((0, 0), (1, 1))
    assert not dominates((1, 2), (1, 2)), "equal layouts do not beat each other"
    assert not dominates((1, 3), (2, 2)) and not dominates((2, 2), (1, 3))


@pytest.mark.parametrize("num_figures", [2, 3, 4])
def test_ranks_are_those_of_non_dominated_sorting(num_figures):
    for seed in range(5):
        rows = drawn(num_figures, size=40, seed=seed)
        ranks = pareto_ranks(rows)
        assert ranks == brute_rank(rows) and max(ranks) >= 2
    assert pareto_ranks([]) == []


@pytest.mark.parametrize("num_figures", [2, 3, 4])
def test_hypervolumes_are_the_cells_that_are_covered(num_figures):
    for seed in range(3):
        rows = [*drawn(num_figures, size=10, seed=seed), (0.0, *[4.0] * (num_figures - 1))]
        rows += [(4.0, *[0.0] * (num_figures - 1)), (math.nan,) * num_figures]
        expected, covered = [], set()
        # The figures lie within 0 and 4, so the range falls into 4^F cells.
        for row in rows:
            if all(map(math.isfinite, row)):
                covered |= set(itertools.product(*(range(int(value), 4) for value in row)))
            expected.append(len(covered) / 4**num_figures)
        assert hypervolumes(rows) == pytest.approx(expected)
        assert 0 < expected[-1] <= 1


def test_a_figure_without_a_range_covers_as_if_it_were_not_there():
    rows = drawn(2, size=12)
    assert hypervolumes([(*row, 7.0) for row in rows]) == pytest.approx(hypervolumes(rows))
    assert hypervolumes([(1.0, 1.0)] * 3) == [0.0] * 3
    assert hypervolumes([(math.inf, 0.0)]) == [0.0]


class Table(SyntheticScorer):
    """Two figures of each pair of layers, as given."""

    ROWS = {  # noqa: RUF012
        (0, 1): (1.0, 5.0),
        (0, 2): (2.0, 2.0),
        (0, 3): (2.0, 2.0),
        (1, 2): (4.0, 1.0),
        (1, 3): (2.0, 2.5),
        (2, 3): (math.nan, 0.0),
    }

    def score(self, layout):
        self.scored.append(layout)
        kl, recall = self.ROWS[layout.attention_layers]
        return Score(per_block={"kl": (kl, kl), "recall": (recall, recall)}, tokens=1, seconds=0.0)


def kept(trials):
    return [trial.layout.attention_layers for trial in trials]


def test_the_set_holds_what_no_other_layout_beats():
    config, space, budget = make(4, 2, trials=6, pareto=["kl", "recall"])
    result = run_study(config, space, budget, Table(4), run_dir=None)
    assert result.exhaustive
    # Two are equal; (1, 3) is beaten by both; what is not finite is no result.
    assert kept(result.pareto_set) == [(0, 1), (0, 2), (0, 3), (1, 2)]
    assert result.best.layout.attention_layers == (0, 1), "the objective alone decides the best"
    curve = result.anytime_hypervolume
    assert curve == sorted(curve) and 0 < curve[-1] <= 1

    def placed(kl, recall):
        figures = Score(per_block={"kl": (kl,) * 2, "recall": (recall,) * 2}, tokens=1, seconds=0.0)
        return kept(result.place(space.parse("0,1,2"), figures).beaten_by)

    assert placed(2.5, 2.5) == [(0, 2), (0, 3)]
    assert placed(1.5, 4.0) == placed(2.0, 2.0) == []
    assert placed(math.nan, 3.0) == [(0, 2), (0, 3), (1, 2)]
    one, space, budget = make(4, 2, trials=6)
    assert run_study(one, space, budget, Table(4), run_dir=None).pareto_set == ()


def test_a_sum_over_layers_is_searched_when_its_pareto_set_is_asked_for():
    options = {"trials": 12, "objective": {"stage2_local": 1.0}, "replacements": REPLACEMENTS}
    config, space, budget = make(6, 2, pareto=["stage2_local", "cache"], **options)
    result = run_study(config, space, budget, Costly(6), run_dir=None)
    assert not result.solved and len(result.trials) == 12


def search(strategy, scorer, space, budget, names, *, num_trials, seed):
    """Figures of the layouts that a strategy proposes, in their order."""
    finished, rows = [], []
    for number in range(num_trials):
        context = SearchContext(
            space=space,
            budget=budget,
            weights={"kl": 1.0},
            finished=finished,
            figures=rows,
            pending=[],
            seed=trial_seed(seed, number),
            probe=scorer.score,
            stage2_losses=scorer.stage2_losses,
        )
        layout = build_strategy(strategy).propose(context).layout
        figures = scorer.figures(layout)
        finished.append((layout, figures["kl"]))
        rows.append(tuple(figures[name] for name in names))
    return rows


@pytest.mark.parametrize(
    ("strategy", "names"),
    [
        ("nsga2", ("kl", "cache")),
        ("nsga2", ("kl", "recall", "cache")),
        ("tpe", ("kl", "cache")),
    ],
)
def test_samplers_find_a_pareto_set_sooner_than_chance(strategy, names):
    _, space, budget = make(12, 3, replacements=REPLACEMENTS)
    assert budget.count(space) == 112640
    scorer = Costly(12)

    def rows(name, seed):
        return search(name, scorer, space, budget, names, num_trials=96, seed=seed)

    chance = [rows("random", seed) for seed in range(4)]
    found = [rows(strategy, seed) for seed in range(2)]
    columns = list(zip(*itertools.chain(*chance, *found), strict=True))
    # They fix the range, and come last so that they cover nothing themselves.
    corners = [tuple(map(max, columns)), tuple(map(min, columns))]

    def covered(rows):
        return hypervolumes([*rows, *corners])[len(rows) - 1]

    assert min(map(covered, found)) > max(map(covered, chance))


def test_generations_are_those_that_optuna_counts():
    size, distributions = 4, {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}
    own = optuna.create_study(
        directions=["minimize"] * 2,
        sampler=optuna.samplers.NSGAIISampler(population_size=size, seed=0),
    )
    for _ in range(19):
        trial = own.ask(distributions)
        x = trial.params["x"]
        own.tell(trial, [x * x, (x - 0.5) ** 2])
    # Without what Optuna has noted in its study and trials.
    anew = optuna.create_study(directions=["minimize"] * 2)
    for trial in own.trials:
        anew.add_trial(
            optuna.trial.create_trial(
                values=trial.values, params=trial.params, distributions=distributions
            )
        )
    counted = build_strategy({"name": "nsga2", "population": size}).sampler(0)
    asked = anew.ask()
    assert counted.get_trial_generation(anew, anew.trials[asked.number]) == 4
    for generation in range(5):
        for of in ("get_population", "get_parent_population"):
            theirs = getattr(own.sampler, of)(own, generation)
            ours = getattr(counted, of)(anew, generation)
            assert {t.number for t in ours} == {t.number for t in theirs}, (generation, of)
            assert generation == 0 or of == "get_population" or len(ours) == size


def test_bits_are_filled_by_what_the_pareto_set_keeps():
    _, space, budget = make(6, 1)
    layouts = [space.parse(str(layer)) for layer in range(6)]
    # By the first figure alone layer 0 is best, but 1 and 2 beat it or are even with it.
    rows = [(1.0, 9.0), (1.0, 1.0), (5.0, 0.0), (6.0, 3.0), (7.0, 3.0), (8.0, 3.0)]
    context = SearchContext(
        space=space,
        budget=budget,
        weights={"kl": 1.0},
        finished=[(layout, row[0]) for layout, row in zip(layouts, rows, strict=True)],
        figures=rows,
        pending=[],
        seed=0,
        probe=SyntheticScorer(6).score,
        stage2_losses=dict,
    )

    def first(context):
        bits = {f"layer_{layer:03d}.attention": 0 for layer in range(6)}
        worth = _ENCODINGS["bits"](context).worth(bits)
        return max(worth, key=lambda layer: worth[layer])

    assert first(replace(context, figures=())) == 0
    assert first(context) == 1


@pytest.mark.parametrize("strategy", ["nsga2", "tpe", "gp"])
def test_samplers_take_figures_that_are_not_finite(strategy):
    _, space, budget = make(6, 2)
    layouts = list(budget.enumerate(space))[:9]
    rows = [(float(i), 9.0 - i) for i in range(9)]
    rows[2] = (math.inf, 3.0)
    context = SearchContext(
        space=space,
        budget=budget,
        weights={"kl": 1.0},
        finished=[(layout, row[0]) for layout, row in zip(layouts, rows, strict=True)],
        figures=rows,
        pending=[],
        seed=0,
        probe=SyntheticScorer(6).score,
        stage2_losses=dict,
    )
    for figures in (rows, [(math.inf, math.inf)] * 9, [(1.0, 1.0)] * 9):
        proposal = build_strategy(strategy).propose(replace(context, figures=figures))
        assert proposal.layout not in layouts and proposal.proposed_by == strategy


def study(scorer, *, run_dir=None, pareto=("kl", "cache"), **options):
    options = {"trials": 40, "baselines": ["uniform", "swap_one"], "strategy": "nsga2", **options}
    config, space, budget = make(8, 2, replacements=REPLACEMENTS, pareto=list(pareto), **options)
    return config, run_study(config, space, budget, scorer, run_dir=run_dir)


class Stopped(Costly):
    def score(self, layout):
        if len(self.scored) == 7:
            raise KeyboardInterrupt
        return super().score(layout)


@pytest.mark.parametrize("strategy", [{"name": "nsga2", "population": 6}, "tpe"], ids=str)
def test_a_stopped_study_goes_on_as_if_unbroken(tmp_path, strategy):
    _, whole = study(Costly(8), strategy=strategy)
    label = build_strategy(strategy).label
    assert sum(trial.proposed_by == label for trial in whole.trials) > 20
    stops = 0
    while True:
        try:
            _, result = study(Stopped(8), run_dir=tmp_path, strategy=strategy)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 5
    assert [t.layout for t in result.trials] == [t.layout for t in whole.trials]
    assert result.pareto_set == whole.pareto_set and len(whole.pareto_set) > 2
    # Sought by figures, another way is gone than by the objective alone.
    _, single = study(Costly(8), strategy=strategy, pareto=())
    assert [t.layout for t in single.trials] != [t.layout for t in whole.trials]


def test_two_workers_find_one_set(tmp_path):
    scorers = [Costly(8, pause=0.02), Costly(8, pause=0.02)]
    options = {"storage": f"journal:{tmp_path / 'study.journal'}", "baselines": ["uniform"]}
    options |= {"trials": 30, "strategy": "nsga2", "pareto": ["kl", "cache"]}

    def work(number):
        config, space, budget = make(8, 2, replacements=REPLACEMENTS, **options)
        worker = Worker(number=number)
        scorer = scorers[number]
        return run_study(config, space, budget, scorer, run_dir=None, worker=worker, pace=QUICK)

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(work, range(2))
    assert one.pareto_set == two.pareto_set and len(one.pareto_set) > 2
    scored = [layout for scorer in scorers for layout in scorer.scored]
    assert len(scored) == len(set(scored)) == len(one.trials) == 30
    assert all(scorer.scored for scorer in scorers)


@pytest.mark.parametrize("pareto", [(), ("kl", "recall"), ("cache", "kl")])
def test_a_study_does_not_go_on_for_another_set(tmp_path, pareto):
    study(Costly(8), run_dir=tmp_path, trials=8)
    with pytest.raises(RunError, match=r"search\.pareto was \['kl', 'cache'\] and is now"):
        study(Costly(8), run_dir=tmp_path, trials=9, pareto=pareto)


def test_a_study_from_before_there_were_pareto_sets_goes_on(tmp_path):
    study(Costly(8), run_dir=tmp_path, trials=8, pareto=())
    with sqlite3.connect(tmp_path / "study.db") as database:
        where = "FROM study_user_attributes WHERE key = 'settings'"
        (text,) = database.execute(f"SELECT value_json {where}").fetchone()
        settings = json.loads(text)
        assert settings.pop("search.pareto") is None
        database.execute(
            "UPDATE study_user_attributes SET value_json = ? WHERE key = 'settings'",
            [json.dumps(settings)],
        )
    database.close()
    assert len(study(Costly(8), run_dir=tmp_path, trials=9, pareto=())[1].trials) >= 9


def test_reports_show_the_set():
    config, result = study(Costly(8), pareto=("kl", "recall", "cache"))
    console = Console(file=io.StringIO(), width=120)
    print_result(result, console=console)
    shown, page = " ".join(console.file.getvalue().split()), render_report(result, config)
    assert "Pareto set of kl, recall, cache" in shown and "Pareto set of kl, recall, cache" in page
    assert 3 < len(result.pareto_set) < len(result.trials)
    said = f"{len(result.pareto_set)} of {len(result.trials)} scored layouts"
    assert said in shown and said in page
    for trial in result.pareto_set[:20]:
        kl, recall, cache = result.figures(trial.score)
        row = f"{text.layers(trial.layout)} {kl:.4f} {recall:.4f} {cache / 1024:.2f} KiB"
        assert row in shown
        assert f'<td class="n">{recall:.4f}</td><td class="n">{cache / 1024:.2f} KiB</td>' in page
    assert f"covers {result.anytime_hypervolume[-1]:.0%} of the range" in shown
    start = page.index('aria-label="Range covered after each layout"')
    assert page[start : page.index("</svg>", start)].count("H") == len(result.trials)
    # One plot for recall and one for the cache.
    for name in ("recall", "cache"):
        start = page.index(f'aria-label="kl and {name} of each layout"')
        plot = page[start : page.index("</svg>", start)]
        assert plot.count('<circle class="best"') == len(result.pareto_set)
        assert plot.count("<circle") == len(result.trials)


def test_a_layout_is_placed_against_the_set():
    scorer = Costly(8)
    _, result = study(scorer)
    worst = max(result.trials, key=lambda trial: result.figures(trial.score))
    said = []
    for trial in (worst, result.pareto_set[0]):
        console = Console(file=io.StringIO(), width=120)
        placement = result.place(trial.layout, trial.score)
        print_placement(placement, trial.layout, trial.value, result, console=console)
        said.append(console.file.getvalue())
        assert all(
            dominates(result.figures(t.score), result.figures(trial.score))
            for t in placement.beaten_by
        )
    assert "Pareto set of kl, cache: beaten by " in said[0]
    assert "Pareto set of kl, cache: no layout of it is better" in said[1]


SPACE = {
    "candidates": {
        "small": {"mixer": "mamba2", "chunk_size": 8},
        "large": {"mixer": "mamba2", "chunk_size": 8, "d_conv": 8},
    }
}
OVERRIDES = ["search.pareto=[kl,attention_layers,cache]", "search.strategy=nsga2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pareto")


@pytest.fixture(scope="module")
def searched(folder):
    # Of 24 layouts.
    return pipeline.search(make_study(folder, *OVERRIDES, "search.trials=14", space=SPACE))


def test_costs_are_those_of_a_real_cache(folder, searched):
    bench = Workbench(make_study(folder, *OVERRIDES, space=SPACE))
    for trial in searched[0].trials[:4]:
        student = assemble(bench.teacher, trial.layout, bench.bank)
        with torch.no_grad():
            output = student(torch.arange(16)[None], use_cache=True)
            cache = getattr(output, cache_name(student))
        held = 0
        for layer in cache.layers:
            tensors = getattr(layer, "tensors", None) or {"k": layer.keys, "v": layer.values}
            held += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert trial.score.mean("cache") == held
        assert trial.score.mean("attention_layers") == 2
        assert trial.value == trial.score.mean("kl")
    assert len({trial.score.mean("cache") for trial in searched[0].trials}) > 1


def test_each_member_is_written_and_can_be_distilled(searched):
    result, path = searched
    folders = sorted((path.parent / "pareto").iterdir())
    assert len(folders) == len(result.pareto_set) >= 2
    by_layout = {trial.layout: trial for trial in result.pareto_set}
    for member in folders:
        raw = yaml.safe_load((member / "best.yaml").read_text(encoding="utf-8"))
        trial = by_layout.pop(pipeline.load_best(member).layout)
        assert member.name == raw["strip"].replace(" ", "")
        assert raw["scores"]["objectives"] == dict(
            zip(result.pareto, result.figures(trial.score), strict=True)
        )
        assert ("tied_with" in raw["scores"]) == (trial.layout == result.best.layout)
    distilled, folder = pipeline.distill(pipeline.load_best(folders[-1]))
    assert folder == folders[-1] / "distill" and (folder / "model" / "config.json").is_file()
    assert distilled.after.mean_kl <= distilled.before.mean_kl


def test_a_former_member_goes_unless_it_was_distilled(tmp_path):
    study = make_study(tmp_path, *OVERRIDES, "search.trials=3", "search.baselines=[]", space=SPACE)
    _, path = pipeline.search(study)
    folder = path.parent / "pareto"
    members = {member.name for member in folder.iterdir()}
    for name in ("former", "distilled"):
        (folder / name).mkdir()
        (folder / name / "best.yaml").write_bytes(path.read_bytes())
    (folder / "distilled" / "distill").mkdir()
    pipeline.search(study)
    assert {member.name for member in folder.iterdir()} == members | {"distilled"}


def test_a_layout_of_ones_own_is_placed_against_the_set(folder, searched):
    study = make_study(folder, *OVERRIDES, "search.trials=14", space=SPACE)
    unseen = next(
        layout
        for layout in searched[0].budget.enumerate(searched[0].space)
        if layout not in searched[0].by_layout
    )
    strip = unseen.strip(searched[0].space.symbols)
    layout, score, placement, result = pipeline.score(study, strip)
    assert layout == unseen and set(score.per_block) == {"kl", "attention_layers", "cache"}
    assert placement.trial is None and result.pareto_set == searched[0].pareto_set
    expected = [
        t for t in result.pareto_set if dominates(result.figures(t.score), result.figures(score))
    ]
    assert list(placement.beaten_by) == expected
