"""``audit``: distils layouts of a finished search, and says how well its score foretold them.

Layouts are taken from the whole range of the score, besides those that matter: the best, what the
baselines name, what climbed to a rung, and some drawn at random from all on the budget. Each is
distilled from the bank with one short recipe, with more than one seed, so that what cannot be
foretold is known too. They are measured on the test split, since rungs choose by the validation
split, and none of the seeds is the rungs': what a study was led by cannot say how right it was. The
rows stand in ``audit/distilled.jsonl`` of the run; the same command goes on with them.
"""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mohawk_nas.config import StudyConfig, recipe_of, short_recipe
from mohawk_nas.distill.several import distil_layouts
from mohawk_nas.errors import ConfigError, RunError, TrainingError
from mohawk_nas.files import RowFile, read_json, write_json
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.metrics import evaluate_blocks
from mohawk_nas.plan import find_problems
from mohawk_nas.recall import answers, notation_of
from mohawk_nas.reporting import SILENT, Reporter
from mohawk_nas.runs import check_identity, check_run_dir, no_search, only_one
from mohawk_nas.search import statistics
from mohawk_nas.search.result import StudyResult
from mohawk_nas.search.statistics import Fit, Interval, Regret
from mohawk_nas.search.workers import Crew, environments
from mohawk_nas.workbench import Workbench

__all__ = [
    "AuditReport",
    "Distilled",
    "Rival",
    "Trust",
    "audit",
    "choose_layouts",
    "expected_interval",
    "measure_on",
]

TENTHS = 10
DRAWN = 10
"""Layouts drawn at random: where a search was led, its own layouts say nothing of all others."""
FEWEST = 12
"""Layouts below which no correlation is told."""
GUESS = 0.8
"""Correlation for which the interval is foretold."""
SPLIT: Literal["test"] = "test"
"""What distilled layouts are measured on."""
LOOK_EVERY = 1.0
"""Seconds between looks at what workers have done."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trust:
    """How well the study's score foretells one distilled figure."""

    figure: str
    """``kl`` or ``recall``."""
    spearman: Interval | None
    """None, as Kendall's, where the score or the figure is the same for every layout; all else is
    None in the latter case."""
    kendall: Interval | None
    best_quarter: Interval | None
    """Spearman's, within the quarter that distils best; None where that is too few layouts, or they
    do not differ."""
    reliability: float | None
    """Share of a distillation's variance that the layout makes and not the seed, by the layouts
    that were distilled with several; None where these are too few."""
    ceiling: float | None
    """Spearman's correlation that a perfect score would reach among these."""
    fit: Fit | None
    """What sums over layers and pairs explain of it."""
    regret: Regret | None
    """Of the study's best layout among those distilled; None where no layout beats the mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Distilled:
    """A layout's score in the study, and what it came to when distilled."""

    layout: Layout
    score: float
    """Value of the study's objective; lower is better."""
    figures: Mapping[str, tuple[float, ...]]
    """``kl`` and, if the teacher solves a probe, ``recall`` -> one value a seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rival:
    """What baselines name, when distilled, against the study's best."""

    labels: tuple[str, ...]
    layout: Layout
    loses: Mapping[str, Interval]
    """Figure -> what it loses beyond the study's best: ``kl`` in nats a token; ``recall`` as a
    share of right answers; where a study goes by both, their sum as its weights have it, named
    like ``kl + 0.2 recall``. Paired over text and probe, with what seeds alone change if layouts
    have several; the intervals of all rivals and figures hold together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditReport:
    """What an audit found."""

    layouts: int
    seeds: int
    tokens: int
    trusts: tuple[Trust, ...]
    best: Layout
    """Of the distilled ones, that with the lowest KL."""
    tied: tuple[Layout, ...]
    """Those that cannot be told from it over the same text and seeds, itself left out."""
    searched: Layout
    """The study's best."""
    objective: str = "value"
    """What the score is, such as ``kl + 0.5 recall``."""
    drawn: int = 0
    """Layouts drawn at random whose mean regrets are a share of; 0 if it is that of all."""
    repeated: int = 0
    """Layouts with several seeds, which say what seeds alone change; 0 if they are too few."""
    rivals: tuple[Rival, ...] = ()
    """Baselines that name other layouts than the study's best, as far as they, and it, were
    distilled with as many seeds as the report rests on."""
    not_held: tuple[str, ...] = ()
    """Baselines whose layouts were not."""
    distilled: tuple[Distilled, ...] = field(default=(), repr=False)
    """What all this rests on."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        named = {"best": self.best, "searched": self.searched}
        return {
            **{
                name: getattr(self, name)
                for name in ("layouts", "seeds", "tokens", "drawn", "repeated")
            },
            "not_held": list(self.not_held),
            **{name: list(layout.candidates) for name, layout in named.items()},
            "tied": [list(layout.candidates) for layout in self.tied],
            "trusts": [asdict(trust) for trust in self.trusts],
            "rivals": [
                asdict(rival) | {"layout": list(rival.layout.candidates)} for rival in self.rivals
            ],
            "distilled": [
                {
                    "layout": list(one.layout.candidates),
                    "score": one.score,
                    **{name: list(values) for name, values in one.figures.items()},
                }
                for one in self.distilled
            ],
        }


def audit(
    config: StudyConfig,
    *,
    hours: float,
    tokens: int,
    seeds: int = 2,
    layouts: int | None = None,
    workers: int = 1,
    reporter: Reporter = SILENT,
) -> tuple[AuditReport, Path]:
    """Distil layouts of a finished search for some time, and report.

    Args:
        config: The study; the recipe is its rungs', :func:`short_recipe`.
        hours: No distillation is begun after so long. What earlier commands distilled is kept.
        tokens: Of stage 3 for each layout and seed.
        seeds: Distillations of each layout.
        layouts: To distil, or more if what is named and drawn is more; None as many as there is
            time for.
        workers: Processes that distil, besides this one if they are more than one.
        reporter: Told what happens.

    Returns:
        The report and the path of its JSON file.

    Raises:
        RunError: There is no finished search, or another audit of it, or too little would be
            distilled, or was in that time, to say anything.
        TrainingError: All workers have stopped.
    """
    if problems := find_problems(config):
        raise ConfigError(problems)
    if not (config.run_dir / "best.yaml").is_file():
        raise no_search(config)
    check_run_dir(config)
    with only_one(config.run_dir):
        bench = Workbench(config, reporter)
        check_identity(config.run_dir, bench.identity)
        result = bench.result()
        folder = config.run_dir / "audit"
        recipe = short_recipe(config, tokens)
        # Bank and text before anyone asks for them at once.
        texts = bench.training_text(tokens), bench.blocks[SPLIT]
        read = [text.fingerprint for text in texts]
        asked = notation_of(SPLIT) if bench.probe(SPLIT) else None
        settings = {"logits": recipe_of(recipe), "split": SPLIT, "texts": read, "recall": asked}
        _claim(folder, settings)
        bench.bank.train(bench.space.replaceable, reporter=reporter)
        drawn = _draw(bench, result, folder / "drawn.json")
        work = _Work(
            tokens=tokens,
            seeds=_seeds(config, seeds),
            layouts=layouts,
            hours=hours,
            until=time.time() + 3600 * hours,
            drawn=tuple(drawn),
        )
        rows = folder / "distilled.jsonl"
        work.check(result, RowFile(rows).rows)
        if took := [
            score.seconds / rung.num_seeds(layout)
            for rung in result.rungs
            if rung.tokens == tokens
            for layout, score in rung.scores.items()
        ]:
            # Known before anything is distilled here.
            each = float(np.mean(took)) / workers
            reporter.say(work.outlook(each, len(work.chosen(result))))
        if workers == 1:
            _distil(bench, result, rows, work)
        else:
            _distil_by_workers(bench, result, rows, work, workers)
        # Earlier versions distilled with the rungs' seed as well.
        own = [row for row in RowFile(rows).rows if row["seed"] != config.seed]
        probe = bench.probe(SPLIT)
        solved = 0.0 if probe is None else probe.teacher_recall
        report = _report(result, own, tokens=tokens, drawn=drawn, teacher_recall=solved)
        path = folder / "audit.json"
        write_json(path, report.to_dict())
        return report, path


def choose_layouts(
    scored: Mapping[Layout, float],
    named: Iterable[tuple[str, Layout]],
    count: int,
    *,
    neighbours: Sequence[Layout] = (),
    seed: int = 1,
) -> dict[Layout, list[str]]:
    """Layouts that are worth distilling, the same for the same scores.

    Args:
        scored: Layout -> score, lower is better.
        named: Reason and layout of those that are taken in any case.
        count: How many, or more if more are named.
        neighbours: A sixth is drawn from these.
        seed: Of what is drawn.

    Returns:
        Layout -> why; the tenths of the score's range take turns.
    """
    chosen: dict[Layout, list[str]] = {}
    for why, layout in named:
        chosen.setdefault(layout, []).append(why)
    rng = random.Random(seed)
    for layout in rng.sample(list(neighbours), min(len(neighbours), count // 6)):
        chosen.setdefault(layout, []).append("neighbour")
    ranked = sorted(scored, key=lambda layout: (scored[layout], layout.candidates))
    strata = [
        ranked[i * len(ranked) // TENTHS : (i + 1) * len(ranked) // TENTHS] for i in range(TENTHS)
    ]
    for stratum in strata:
        rng.shuffle(stratum)
    while any(strata) and len(chosen) < count:
        for number, stratum in enumerate(strata):
            if stratum and len(chosen) < count:
                layout = stratum.pop()
                if layout not in chosen:
                    chosen[layout] = [f"tenth {number + 1}"]
    return chosen


def measure_on(
    bench: Workbench, split: Literal["validation", "test"]
) -> Callable[[Any], dict[str, Any]]:
    """What a distilled student is measured by: KL of each block, cross-entropy, recall.

    Recall is the share of right answers, the mean of the probe's parts beside it.
    """
    probe = bench.probe(split)

    def measure(model: Any) -> dict[str, Any]:
        figures = evaluate_blocks(bench.teacher, model, bench.blocks[split])
        parts = None if probe is None else probe.parts(answers(model, probe))
        return {
            "kl_blocks": list(figures.kl),
            "cross_entropy": figures.mean_cross_entropy,
            "recall": None if parts is None else parts.mean().item(),
            "recall_parts": None if parts is None else parts.tolist(),
        }

    return measure


def expected_interval(layouts: int, correlation: float = GUESS) -> tuple[float, float]:
    """Where 95 % of Spearman's correlations would lie (Bonett and Wright 2000)."""
    error = math.sqrt((1 + correlation**2 / 2) / (layouts - 3))
    middle = math.atanh(correlation)
    return math.tanh(middle - 1.96 * error), math.tanh(middle + 1.96 * error)


def _seeds(config: StudyConfig, count: int) -> tuple[int, ...]:
    return tuple(seed for seed in range(count + 1) if seed != config.seed)[:count]


def _claim(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / "settings.json"
    if path.is_file():
        kept = read_json(path)
        old, new = kept["logits"], settings["logits"]
        # What stands at its default may be left out.
        changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        # Earlier versions measured on the validation split, and said nothing of it, nor of recall.
        changed += [key for key in ("split", "texts", "recall") if kept.get(key) != settings[key]]
        if changed:
            raise RunError(
                f"{folder}: holds an audit with another {', '.join(changed)}; remove the folder to "
                "begin anew"
            )
    write_json(path, dict(settings))


def _draw(bench: Workbench, result: StudyResult, path: Path) -> dict[Layout, float]:
    """Layouts drawn at random from all on the budget, and their scores; the same at each call.

    None where every layout was scored.
    """
    if result.exhaustive:
        return {}
    if path.is_file():
        return {Layout(tuple(names)): value for names, value in read_json(path)}
    rng, drawn = random.Random(f"{bench.config.seed} drawn for the audit"), dict[Layout, float]()
    count = min(DRAWN, result.num_possible)
    scorer, weights = bench.scorer(), bench.study.search.objective
    with bench.reporter.stage("random layouts", total=count, unit="layout") as task:
        while len(drawn) < count:
            layout = bench.budget.random(bench.space, rng)
            if layout in drawn:
                continue
            known = result.by_layout.get(layout)
            drawn[layout] = known.value if known else scorer.score(layout).value(weights)
            task.advance(1)
    # Its memory is the students'.
    scorer.release()
    write_json(path, [[list(layout.candidates), value] for layout, value in drawn.items()])
    return drawn


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """What is to be distilled; the same for all workers."""

    tokens: int
    seeds: tuple[int, ...]
    layouts: int | None
    hours: float
    until: float
    """By the clock; nothing is begun after it."""
    drawn: Sequence[Layout]
    """At random, and distilled in any case."""

    def check(self, result: StudyResult, rows: Iterable[Mapping[str, Any]]) -> None:
        """Raise RunError if all that is to be distilled, and is, would be too little."""
        chosen = {*self.chosen(result), *(Layout(tuple(row["layout"])) for row in rows)}
        if len(chosen) >= FEWEST:
            return
        needed = f"at least {FEWEST} are needed"
        most = len(self._scored(result).keys() | set(self.drawn))
        if most < FEWEST:
            raise RunError(
                f"audit of {result.name!r}: only {most} of {result.num_possible:,} layouts are "
                f"scored or drawn at random; {needed}"
            )
        named = {layout for label, layout in self._named(result) if label != "drawn"}
        raise RunError(
            f"--layouts: {self.layouts} asked for in all, {len(named)} named by the search and "
            f"{len(self.drawn)} drawn at random make {len(chosen)} layouts; {needed}, so "
            "ask for more or leave it out"
        )

    @staticmethod
    def _scored(result: StudyResult) -> dict[Layout, float]:
        # With attention everywhere there is nothing to distil.
        return {t.layout: t.value for t in result.trials if t.layout.replaced_layers}

    def _named(self, result: StudyResult) -> list[tuple[str, Layout]]:
        scored = self._scored(result)
        named = [("best", result.best.layout), *result.baselines.items()]
        # What short distillations chose among may hold the truly best.
        named += [("climbed", layout) for rung in result.rungs for layout in rung.climbers]
        named = [(label, layout) for label, layout in named if layout in scored]
        return named + [("drawn", layout) for layout in self.drawn if layout.replaced_layers]

    def chosen(self, result: StudyResult) -> list[Layout]:
        scored, named = self._scored(result), self._named(result)
        # There are no others.
        most = len(scored.keys() | set(self.drawn))
        return list(choose_layouts(scored, named, min(most, self.layouts or most)))

    def share(self, result: StudyResult, number: int, count: int) -> list[Layout]:
        """A worker's part of them, from everywhere in the score's range."""
        chosen = self.chosen(result)
        if count > 1:
            # The tenths of the range take turns there, so every n-th would be of few of them.
            random.Random(0).shuffle(chosen)
        return chosen[number::count]

    def outlook(self, each: float, possible: int) -> str:
        """What interval the time allows, by the seconds of a distillation."""
        seeds = len(self.seeds)
        count = min(int(3600 * self.hours / each / seeds), possible)
        return _outlook(each, count, seeds)


def _distil(
    bench: Workbench,
    result: StudyResult,
    path: Path,
    work: _Work,
    *,
    share: tuple[int, int] = (0, 1),
) -> None:
    """Distil what there is time for: all seeds of a few layouts, then of the next.

    Args:
        bench: The study's.
        result: What was searched.
        path: Of the rows.
        work: What to do.
        share: Which part of how many; each takes other layouts.
    """
    config, reporter, rows = bench.config, bench.reporter, RowFile(path)
    mine = work.share(result, *share)
    train = bench.training_text(work.tokens)
    recipe = short_recipe(config, work.tokens)
    measure, at_once = measure_on(bench, SPLIT), bench.students_at_once(recipe)
    told, total = False, len(mine) * len(work.seeds)
    done = sum(len(_done(rows.rows, mine, seed)) for seed in work.seeds)
    with reporter.stage("audit", total=total, unit="distillation", done=done) as task:
        for start in range(0, len(mine), at_once):
            for seed in work.seeds:
                group = mine[start : start + at_once]
                known = _done(rows.rows, group, seed)
                group = [layout for layout in group if layout not in known]
                if not group:
                    continue
                began = time.time()
                if began > work.until:
                    return
                figures = distil_layouts(
                    bench.teacher,
                    group,
                    bench.bank,
                    train=train,
                    config=recipe,
                    seed=seed,
                    measure=measure,
                    reporter=reporter,
                )
                for layout, found in zip(group, figures, strict=True):
                    rows.add({"layout": list(layout.candidates), "seed": seed, **found})
                ended = time.time()
                task.advance(len(group), time_up_in=_minutes(work.until - ended))
                if not told:
                    reporter.say(work.outlook((ended - began) / len(group), len(mine)))
                    told = True


def _done(rows: Iterable[Mapping[str, Any]], layouts: Iterable[Layout], seed: int) -> set[Layout]:
    """Those of the layouts that are distilled with this seed."""
    return {Layout(tuple(row["layout"])) for row in rows if row["seed"] == seed} & set(layouts)


def _distil_by_workers(
    bench: Workbench, result: StudyResult, path: Path, work: _Work, workers: int
) -> None:
    """The same by several processes, which this one watches."""
    config, reporter = bench.config, bench.reporter
    chosen = work.chosen(result)
    before = RowFile(path).rows
    done = sum(len(_done(before, chosen, seed)) for seed in work.seeds)
    total, known, told = len(chosen) * len(work.seeds), len(before), False
    round_of_all = workers * bench.students_at_once(short_recipe(config, work.tokens))
    # This process distils nothing, so what it holds of a GPU is its workers'.
    bench.release()
    places = environments(workers, config.teacher.device)
    first: tuple[float, int] | None = None
    with (
        reporter.stage("audit", total=total, unit="distillation", done=done) as task,
        Crew(_distil_share, (config, work, workers), environments=places) as crew,
    ):
        working = True
        while working:
            # Asked first: one that ends while this looks is told of in the next round.
            working = crew.working
            for text in crew.wait(LOOK_EVERY):
                reporter.say(f"{text}{'; the others go on' if crew.working else ''}")
            now = time.time()
            count = path.read_bytes().count(b"\n") if path.is_file() else 0
            if count > known:
                task.advance(count - known, time_up_in=_minutes(work.until - now))
                known = count
                if first is None:
                    # Until now they have been starting. Rows come by groups, so it takes a whole
                    # round to see how fast they are.
                    first = now, count
                elif not told and count >= first[1] + round_of_all:
                    reporter.say(work.outlook((now - first[0]) / (count - first[1]), len(chosen)))
                    told = True
    if not crew.finished:
        raise TrainingError(
            f"audit of {config.name!r}: no worker came to its end. What was distilled is kept; run "
            "again to continue"
        )


def _distil_share(number: int, config: StudyConfig, work: _Work, workers: int) -> None:
    """What a worker does."""
    bench = Workbench(config, SILENT)
    path = config.run_dir / "audit" / "distilled.jsonl"
    _distil(bench, bench.result(), path, work, share=(number, workers))


def _minutes(seconds: float) -> str:
    return f"{max(0.0, seconds) / 60:.0f} min"


def _outlook(each: float, count: int, seeds: int) -> str:
    text = (
        f"a distillation takes {each:.1f} s, so there is time for {count} layouts x {seeds} seeds"
    )
    if count < FEWEST:
        return f"{text}, too few to tell a correlation; give more --hours or fewer --tokens"
    low, high = expected_interval(count)
    return f"{text}; a correlation of {GUESS} would be known to lie within {low:.2f} and {high:.2f}"


def _report(
    result: StudyResult,
    rows: Sequence[Mapping[str, Any]],
    *,
    tokens: int,
    drawn: Mapping[Layout, float],
    teacher_recall: float = 0.0,
) -> AuditReport:
    by_layout: dict[Layout, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        by_layout.setdefault(Layout(tuple(row["layout"])), []).append(row)
    counts = sorted(map(len, by_layout.values()), reverse=True)
    if len(counts) < FEWEST:
        raise RunError(
            f"only {len(counts)} layouts are distilled, and {FEWEST} are needed to say anything; "
            "run again with more --hours"
        )
    # As many seeds as half of the layouts have been through: fewer seeds would be noisier, but time
    # may have ended when a second one had just begun.
    seeds = counts[max(FEWEST, (len(counts) + 1) // 2) - 1]
    whole = {layout: found[:seeds] for layout, found in by_layout.items() if len(found) >= seeds}
    # What seeds alone change can be told from a part of them.
    repeats = max(2, seeds)
    repeated = [x for x in by_layout if len(by_layout[x]) >= repeats]
    repeated = repeated if len(repeated) >= FEWEST else []
    # Whoever distilled them in what order, the intervals are the same.
    layouts = sorted(whole, key=lambda layout: layout.candidates)
    # (N, S, B)
    blocks = np.array([[row["kl_blocks"] for row in whole[layout]] for layout in layouts])
    known = {layout: trial.value for layout, trial in result.by_layout.items()}
    scores = np.array([known[x] if x in known else drawn[x] for x in layouts])
    by_chance = [i for i, layout in enumerate(layouts) if layout in drawn]
    # Too few would tell less of all layouts than these do.
    by_chance = by_chance if len(by_chance) >= DRAWN // 2 else []
    free = result.space.free_layers
    kept = np.array([[x[layer] == ATTENTION for layer in free] for x in layouts], dtype=float)
    searched = layouts.index(result.best.layout) if result.best.layout in whole else None
    figures = {"kl": blocks.mean(axis=2)}
    by_seed = {"kl": [[np.mean(r["kl_blocks"]) for r in by_layout[x][:repeats]] for x in repeated]}
    if rows[0]["recall"] is not None:
        figures["recall"] = np.array([[row["recall"] for row in whole[x]] for x in layouts])
        by_seed["recall"] = [[row["recall"] for row in by_layout[x][:repeats]] for x in repeated]
    # Figure -> (N, S, B), by blocks of text or parts of the probe, lower is better.
    parts = {"kl": blocks}
    if rows[0]["recall"] is not None:
        parts["recall"] = -np.array([[row["recall_parts"] for row in whole[x]] for x in layouts])
    # A block's gap is much the same in every seed, so seeds add no blocks.
    over_seeds = blocks.mean(axis=1)
    order = np.argsort(over_seeds.mean(axis=1), kind="stable")
    terms = [_term(name, weight) for name, weight in result.weights.items()]
    best = int(order[0])
    tied = set(statistics.tied_with_best(over_seeds)) - {best}
    return AuditReport(
        layouts=len(layouts),
        seeds=seeds,
        tokens=tokens,
        trusts=tuple(
            _trust(
                name,
                scores,
                values if name == "kl" else -values,
                kept,
                searched,
                parts=parts.get(name),
                drawn=by_chance or None,
                by_seed=np.array(by_seed[name]) if repeated else None,
            )
            for name, values in figures.items()
        ),
        best=layouts[best],
        tied=tuple(layouts[int(i)] for i in order if int(i) in tied),
        searched=result.best.layout,
        objective=" + ".join(terms),
        drawn=len(by_chance),
        repeated=len(repeated),
        not_held=tuple(x for x, layout in result.baselines.items() if layout not in whole),
        rivals=()
        if searched is None
        else _rivals(
            result,
            layouts,
            parts,
            teacher_recall,
            {name: float(np.var(x, axis=1, ddof=1).mean()) for name, x in by_seed.items() if x},
        ),
        distilled=tuple(
            Distilled(
                layout=layout,
                score=float(scores[i]),
                figures={name: tuple(values[i].tolist()) for name, values in figures.items()},
            )
            for i, layout in enumerate(layouts)
        ),
    )


def _rivals(
    result: StudyResult,
    layouts: Sequence[Layout],
    parts: Mapping[str, statistics.Values],
    teacher_recall: float,
    seed_variance: Mapping[str, float],
) -> tuple[Rival, ...]:
    """Baselines against the study's best by its figures' parts ``(N, S, B)``."""
    best = layouts.index(result.best.layout)
    named: dict[Layout, list[str]] = {}
    for label, layout in result.baselines.items():
        if layout in layouts and layout != result.best.layout:
            named.setdefault(layout, []).append(label)
    # Figure -> weight of each part's gap in it.
    figures = {name: {name: 1.0} for name in parts}
    weights = {name: result.weights.get(name, 0.0) for name in ("kl", "recall")}
    if "recall" in parts and all(weights.values()):
        # As rungs weigh them: of recall the lost share of the teacher's.
        both = " + ".join(_term(name, weight) for name, weight in weights.items())
        figures[both] = weights | {"recall": weights["recall"] / teacher_recall}
    found = []
    for layout, labels in named.items():
        place = layouts.index(layout)
        gaps = {name: (part[place] - part[best]).mean(axis=0) for name, part in parts.items()}
        loses = {}
        for figure, terms in figures.items():
            # Of two layouts, each the mean of so many seeds.
            spread = sum(w**2 * 2 * seed_variance.get(n, 0.0) for n, w in terms.items())
            loses[figure] = statistics.paired(
                [(weight, gaps[name]) for name, weight in terms.items()],
                spread=spread / parts["kl"].shape[1],
                several=len(named) * len(figures),
            )
        found.append(Rival(labels=tuple(labels), layout=layout, loses=loses))
    return tuple(found)


def _term(name: str, weight: float) -> str:
    return name if weight == 1 else f"{weight:g} {name}"


def _trust(
    name: str,
    scores: statistics.Values,
    values: statistics.Values,
    kept: statistics.Values,
    searched: int | None,
    *,
    parts: statistics.Values | None,
    drawn: Sequence[int] | None,
    by_seed: statistics.Values | None,
) -> Trust:
    """Of one figure ``(N, S)``, lower is better, and its parts ``(N, S, B)``.

    ``drawn`` are the places of the layouts whose mean stands for all; None for all places.
    ``by_seed`` is the figure of those layouts that have several seeds.
    """
    truth = values.mean(axis=1)
    top = truth <= np.quantile(truth, 0.25)
    differ = bool(np.ptp(truth))
    # Layouts that all score alike have no order to compare.
    ordered = differ and len(set(scores)) > 1
    best_ordered = bool(np.ptp(truth[top])) and len(set(scores[top])) > 1
    if by_seed is not None and not np.ptp(by_seed):
        by_seed = None
    regret = None
    if searched is not None:
        # Where the best is no better than the mean there is nothing to tell.
        with suppress(ValueError):
            regret = statistics.regret(scores, values, searched, drawn=drawn)
            if parts is not None:
                within = statistics.regret_within(parts, searched, drawn=drawn)
                regret = dataclasses.replace(regret, within=within)
    return Trust(
        figure=name,
        spearman=statistics.spearman(scores, truth) if ordered else None,
        kendall=statistics.kendall(scores, truth) if ordered else None,
        best_quarter=statistics.spearman(scores[top], truth[top])
        if best_ordered and top.sum() >= FEWEST // 2
        else None,
        reliability=None if by_seed is None else statistics.reliability(by_seed),
        ceiling=None if by_seed is None else statistics.ceiling(by_seed),
        fit=statistics.fit_layers(kept, truth) if differ else None,
        regret=regret,
    )
