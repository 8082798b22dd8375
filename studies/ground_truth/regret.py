"""What strategies cost: replayed on ground-truth tables, judged by what their picks distil to.

    python studies/ground_truth/regret.py studies/ground_truth/phi-*.jsonl --by kl recall

A table must hold every layout on the budget undistilled; the strategies then run through the same
code as `mohawk-nas search`, ten seeds each, and no model is needed. After so many layouts the one
that is best by the study's objective is the pick, and its regret is what it distils to: (pick -
best distilled) / (mean of all layouts - best distilled), for KL, for recall, and for a sum of both
if the study's objective is one, at the table's largest budget of stage 3. Where only some layouts
are distilled, those drawn from the tenths of the score's range stand for all of them. `optimum` is
the pick of a perfect search by that objective, the floor that no strategy gets below but by luck;
`best distilled by it` is the layout whose distilled figures are best by the objective, and what it
loses by each single figure is what the objective's weights ask for.

With `--undistilled` regret is that of the score itself, for which nothing need be distilled: how
soon a strategy finds what is best by the objective.

With `--finalists 8` the default study is judged once more with `search.rungs`: it distils the 8
best of the layouts that it scored, 16 at least, and what its baselines name, and picks what is best
on the validation split by KL, and by recall where the objective holds it. So does `optimum` with
its 8 best. Those that this leaves tied are distilled again as in a study, with `--run-off` seeds at
most; where the table lacks a layout's next seed, the mean of those that it has stands for it, and
these layouts are counted and written to `--missing`. Of tables that keep the means of the
validation split alone, the test split's blocks tell the spread (of recall only where they keep the
probe's sequences).

Intervals are bootstrapped over the text's blocks, or the recall probe's notations, and the
strategies' seeds. Tables of before keep the probe's sequences, whose intervals know nothing of
other notations, or neither: then recall has the seeds alone, and where all picks are one layout no
interval. `p` is that of the difference to the reference strategy, after Holm for the number of
comparisons. Picks that are not distilled are counted, left out, and written with the finalists that
are not to `--missing`, for `table.py --layouts`, also where too few are yet to judge by.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from heapq import nsmallest
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from mohawk_nas.config import (
    OBJECTIVES,
    BudgetConfig,
    RungsConfig,
    SearchConfig,
    SpaceConfig,
    StudyConfig,
)
from mohawk_nas.errors import ConfigError, DataError, MohawkError, RunError
from mohawk_nas.files import write_json
from mohawk_nas.layout import Layout
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.record import is_solved
from mohawk_nas.search.result import StudyResult
from mohawk_nas.search.rungs import Halving, Rung, build_pruner, climb
from mohawk_nas.search.scoring import Learnt, Score
from mohawk_nas.search.space import SearchSpace, load_space
from mohawk_nas.search.strategies.gates import Gates
from mohawk_nas.search.strategy import Selector, build_strategy
from mohawk_nas.search.study import run_study, trial_seed

Array = npt.NDArray[np.float64]
Mapped = Callable[..., Iterable[Any]]

STRATEGIES = (
    "random",
    "swaps",
    "tpe",
    "gp",
    "{name: surrogate, model: additive}",
    "surrogate",
    "uniform",
    "stage2_rank",
    "swap_one",
    "add_one_in",
    "greedy",
    "{name: greedy, swaps: 2}",
    "beam",
    "gates",
)
AFTER = (16, 64, 256)
"""Layouts after which a strategy's pick is taken; selectors end by themselves."""
UNKNOWN = -1e9
"""Of a finalist that is not distilled: it is picked, so that the pick is counted as missing."""
GATES = ("tokens", "batch_size", "lr", "recall_weight")
"""Options of gates that decide what they learn."""
TENTHS = 10
"""Of the score's range, from each of which `table.py` draws."""
REPEATS = 10_000
"""Of the bootstrap."""


@dataclass(frozen=True)
class Truth:
    """What layouts distil to."""

    name: str
    values: Mapping[str, float]
    """Layout -> mean over the seeds of stage 3; lower is better."""
    blocks: Mapping[str, Array] | None
    """Layout -> the same by blocks of text, or parts of the recall probe."""
    drawn: Sequence[Sequence[str]]
    """Layouts that stand for all on the budget: groups that stand for equal parts of it."""
    terms: Sequence[tuple[float, Truth]] = ()
    """Weights and figures, if it is a sum of several."""

    @classmethod
    def sum_of(cls, terms: Sequence[tuple[float, Truth]]) -> Truth:
        """Several figures of the same layouts, weighed."""
        values = {name: sum(w * t.values[name] for w, t in terms) for name in terms[0][1].values}
        name = " + ".join(t.name if w == 1 else f"{w:.3g} {t.name}" for w, t in terms)
        return cls(name, values, None, terms[0][1].drawn, terms)

    @property
    def varies(self) -> bool:
        """Whether it is known how the values vary with the text."""
        if self.terms:
            # With one term taken as exact, the interval would be too narrow.
            return all(truth.varies for _, truth in self.terms)
        return self.blocks is not None

    @cached_property
    def samples(self) -> dict[str, Array]:
        """Layout -> its value over resampled text, ``(REPEATS,)``."""
        if self.terms:
            return {name: sum(w * t.samples[name] for w, t in self.terms) for name in self.values}
        if self.blocks is None:
            return {name: np.full(REPEATS, value) for name, value in self.values.items()}
        size = len(next(iter(self.blocks.values())))
        # Each figure's own: text and questions of a probe have nothing to do with each other.
        rng = np.random.default_rng(list(self.name.encode()))
        places = rng.integers(size, size=(REPEATS, size))
        return {name: blocks[places].mean(axis=1) for name, blocks in self.blocks.items()}

    def regret(self, layout: str) -> float:
        best = min(self.values.values())
        means = [statistics.fmean(self.values[name] for name in part) for part in self.drawn]
        mean = statistics.fmean(means)
        return (self.values[layout] - best) / (mean - best)

    @cached_property
    def _scale(self) -> tuple[Array, Array]:
        best = np.min(list(self.samples.values()), axis=0)
        means = [np.mean([self.samples[name] for name in part], axis=0) for part in self.drawn]
        return best, np.mean(means, axis=0) - best

    def regrets(self, layout: str) -> Array:
        """The same over resampled text, ``(REPEATS,)``."""
        best, scale = self._scale
        return (self.samples[layout] - best) / scale


@dataclass(frozen=True)
class GroundTruth:
    """One table; stands in for the scorer of a study."""

    name: str
    num_layers: int
    num_attention: int
    scores: Mapping[str, Mapping[str, float]]
    """Layout -> objective -> undistilled value; probes too."""
    losses: Mapping[int, float]
    """Layer -> stage-2 loss of its replacement."""
    distilled: Sequence[Mapping[str, Any]]
    """Rows of the largest budget of stage 3."""
    tokens: int
    teacher_recall: Mapping[str, float]
    """Split -> share of its probe that the teacher solves."""
    gates: Sequence[str]
    """What each restart of `gates` named when the table was made."""

    @classmethod
    def read(cls, path: Path) -> GroundTruth:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if row.get("bank_seed", 0) == 0]
        scores = {
            row["layout"]: {name: row[name] for name in OBJECTIVES if name in row}
            for row in rows
            if row["kind"] in ("zero_shot", "probe")
        }
        losses = next(row["losses"] for row in rows if row["kind"] == "stage2")
        num_layers = len(losses)
        kept = rows[0]["study"]["budget"]["attention_layers"]
        if not isinstance(kept, int):
            raise DataError(f"{path}: must be of an exact number of attention layers, not {kept}")
        zero_shot = sum(row["kind"] == "zero_shot" for row in rows)
        if zero_shot != (possible := math.comb(num_layers, kept)):
            raise DataError(
                f"{path}: must hold all {possible:,} layouts on the budget, but has {zero_shot:,}; "
                "run table.py without --zero-shot"
            )
        distilled = [row for row in rows if row["kind"] == "distilled"]
        tokens = max((row["tokens"] for row in distilled), default=0)
        distilled = [row for row in distilled if row["tokens"] == tokens]
        picks = next((row["named"] for row in rows if row["kind"] == "picks"), [])
        return cls(
            name=path.stem,
            num_layers=num_layers,
            num_attention=kept,
            scores=scores,
            losses={int(layer): loss for layer, loss in losses.items()},
            distilled=distilled,
            tokens=tokens,
            teacher_recall=rows[0].get("teacher_recall", {}),
            gates=[layout for label, layout in picks if label.split(":")[0] == "gates"],
        )

    @cached_property
    def truths(self) -> Sequence[Truth]:
        """What layouts distil to: KL, and recall where the teacher solves the probe."""
        layouts = {row["layout"] for row in self.distilled}
        complete = len(layouts) == self.budget.count(self.space)
        return _truths(self.distilled, complete=complete)

    def truths_by(self, objective: Mapping[str, float]) -> Sequence[Truth]:
        """The same, and what a sum of both comes to, recall as a share of the teacher's."""
        by_name = {truth.name: truth for truth in self.truths}
        if not {"kl", "recall"} == set(objective) == set(by_name):
            return self.truths
        share = objective["recall"] / self.teacher_recall.get("test", 1.0)
        terms = [(objective["kl"], by_name["kl"]), (share, by_name["recall"])]
        return [*self.truths, Truth.sum_of(terms)]

    def undistilled(self, objective: Mapping[str, float]) -> Truth:
        """The score itself, of every layout on the budget."""
        layouts = self.budget.enumerate(self.space)
        values = {_name(x): self.score(x).value(objective) for x in layouts}
        return Truth("score", values, None, [list(values)])

    @cached_property
    def budget(self) -> Budget:
        return Budget(attention_layers=self.num_attention)

    @cached_property
    def space(self) -> SearchSpace:
        return load_space(SpaceConfig(name="hybrid_phi_mamba"), num_layers=self.num_layers)

    def score(self, layout: Layout) -> Score:
        found = self.scores.get(_name(layout))
        if found is None:
            raise DataError(f"{self.name}: has no score for {_name(layout)}")
        per_block = {name: (value,) for name, value in found.items()}
        return Score(per_block=per_block, tokens=0, seconds=0.0)

    def stage2_losses(self) -> dict[tuple[int, str], float]:
        (mixer,) = self.space.replacements
        return {(layer, mixer): loss for layer, loss in self.losses.items()}

    def study(self, objective: Mapping[str, float], *, seed: int, **search: Any) -> StudyResult:
        config = StudyConfig(
            name=f"{self.name}-{seed}",
            seed=seed,
            budget=BudgetConfig(attention_layers=self.num_attention),
            search=SearchConfig(objective=dict(objective), **search),
        )
        return run_study(
            config,
            self.space,
            self.budget,
            self,
            run_dir=None,
            distiller=_Distilled(self),
            learn_gates=partial(self._learnt, seed),
        )

    def _learnt(self, study_seed: int, *, seed: int, **choices: Any) -> Learnt:
        """Gates are not learnt again: each restart names what it named when the table was made."""
        usual = {name: getattr(Gates(), name) for name in GATES}
        other = {name: choices[name] for name in usual if choices[name] != usual[name]}
        seeds = [trial_seed(study_seed, n, "gates") for n in range(1, len(self.gates) + 1)]
        if other or seed not in seeds:
            asked = f"with {other}" if other else "so often"
            raise DataError(f"{self.name}: must hold gates learnt {asked}; name `gates` as it is")
        kept = self.space.parse(self.gates[seeds.index(seed)]).attention_layers
        worth = {layer: float(layer in kept) for layer in range(self.num_layers)}
        return Learnt(worth=worth, tokens=usual["tokens"], seconds=0.0)

    def best(self, objective: Mapping[str, float], count: int) -> list[str]:
        """The layouts on the budget that are best by the objective."""
        layouts = self.budget.enumerate(self.space)
        found = nsmallest(count, layouts, key=lambda layout: self.score(layout).value(objective))
        return [_name(layout) for layout in found]

    @cached_property
    def validated(self) -> Mapping[str, Sequence[Score]]:
        """Layout -> what a rung sees of it with each seed, on the validation split."""
        if any("validation" not in row for row in self.distilled):
            raise DataError(
                f"{self.name}: must have distilled layouts' figures on the validation split for "
                "--finalists, but was made without them"
            )
        whole = all("kl_blocks" in row["validation"] for row in self.distilled)
        blocks_of = _validation_blocks if whole else _guessed_validation_blocks
        found: dict[str, list[Score]] = {}
        for row in sorted(self.distilled, key=lambda row: int(row["seed"])):
            per_block = blocks_of(row, self.teacher_recall.get("validation", 1.0))
            score = Score(per_block=per_block, tokens=row["tokens"], seconds=0.0)
            found.setdefault(row["layout"], []).append(score)
        return found

    def rung_of(
        self, finalists: Sequence[str], objective: Mapping[str, float], *, seeds: int
    ) -> Rung:
        """A rung of these layouts alone, run off; one that is not distilled is its best."""
        layouts = [self.space.parse(name) for name in finalists]
        distil, found = _Distilled(self), dict[tuple[Layout, int, int], Score]()
        for seed in range(seeds):
            scores = distil(layouts, self.tokens, seed)
            found |= {(x, self.tokens, seed): s for x, s in zip(layouts, scores, strict=True)}
        (rung,) = climb(
            [(layout, self.score(layout)) for layout in layouts],
            weights=objective,
            tokens=[self.tokens],
            pruner=Halving(),
            found=found,
            named=layouts,
            seeds=seeds,
        )
        return rung

    def lacking(self, rung: Rung) -> list[str]:
        """Layouts that are distilled and had a part in a run-off without a seed of their own."""
        counts = {name: len(scores) for name, scores in self.validated.items()}
        pairs = [(_name(x), n) for n, standing in enumerate(rung.run_off, 1) for x in standing]
        return sorted({name for name, seed in pairs if name in counts and counts[name] <= seed})


def _validation_blocks(row: Mapping[str, Any], _: float) -> dict[str, tuple[float, ...]]:
    """KL, and the lost share of the teacher's recall, in each block of the validation split."""
    seen = row["validation"]
    names = [name for name in ("kl", "recall") if seen[name] is not None]
    return {name: tuple(seen[f"{name}_blocks"]) for name in names}


def _guessed_validation_blocks(
    row: Mapping[str, Any], teacher_recall: float
) -> dict[str, tuple[float, ...]]:
    """The same of a table that keeps the split's means: the test split's blocks around them."""
    seen, tested = row["validation"], np.array(row["kl_blocks"])
    found = {"kl": tuple((tested - tested.mean() + seen["kl"]).tolist())}
    if seen["recall"] is not None:
        shares = np.full(len(tested), seen["recall"])
        sequences = np.array(row.get("recall_sequences", []))
        if len(sequences) and len(sequences) % len(tested) == 0:
            dealt = sequences.reshape(len(tested), -1).mean(1)
            shares += dealt - dealt.mean()
        found["recall"] = tuple((1 - shares / teacher_recall).tolist())
    return found


@dataclass(frozen=True)
class _Distilled:
    """Stands in for the distillations of a study's rung."""

    table: GroundTruth
    at_once: int = 1000

    def __call__(self, layouts: Sequence[Layout], tokens: int, seed: int) -> list[Score]:
        return [self._score(_name(layout), seed) for layout in layouts]

    def _score(self, name: str, seed: int) -> Score:
        known = self.table.validated
        if name in known:
            several = known[name]
            return several[seed] if seed < len(several) else Score.mean_of(several)
        others = next(iter(known.values()))[0].per_block if known else {"kl": (0.0,)}
        per_block = {figure: (UNKNOWN,) * len(row) for figure, row in others.items()}
        return Score(per_block=per_block, tokens=0, seconds=0.0)


@dataclass(frozen=True)
class Picks:
    """What a strategy picked after so many layouts, one pick a seed."""

    strategy: str
    layouts: int
    """Scored until then, probes included."""
    picks: Sequence[str]
    finalists: Sequence[str] = ()
    """Distilled before the picks, of all seeds."""
    lacking: Sequence[str] = ()
    """Of these, those with fewer seeds in the table than a run-off asked for."""


@dataclass(frozen=True)
class _Run:
    """What one study scored, in order."""

    trials: Sequence[tuple[float, str]]
    """Value and layout."""
    probes: int
    pick: str
    finalists: Sequence[str]
    """Distilled before the pick."""
    lacking: Sequence[str]
    """As of :class:`Picks`."""

    def best(self, step: int) -> str:
        """The best of the first so many."""
        return min(self.trials[:step], key=lambda trial: trial[0])[1]


@contextmanager
def _mapped(workers: int) -> Iterator[Mapped]:
    """``map``, over processes if there are several."""
    if workers == 1:
        yield map
        return
    # A BLAS that took every core in each of them would have them wait for one another.
    share = str(max(1, (os.cpu_count() or 1) // workers))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, share)
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield pool.map


def _run(
    table: GroundTruth, objective: Mapping[str, float], search: Mapping[str, Any], seed: int
) -> _Run:
    result = table.study(objective, seed=seed, **search)
    trials = sorted(result.trials, key=lambda trial: trial.number)
    return _Run(
        trials=[(t.value, _name(t.layout)) for t in trials],
        probes=len(result.probes),
        pick=_name(result.best.layout),
        finalists=[_name(layout) for rung in result.rungs for layout in rung.climbers],
        lacking=[name for rung in result.rungs for name in table.lacking(rung)],
    )


def _truths(distilled: Sequence[Mapping[str, Any]], *, complete: bool) -> list[Truth]:
    if not distilled:
        raise DataError(
            "the table must hold distilled layouts, but has none; --missing FILE writes which ones "
            "strategies name, for table.py --layouts"
        )
    by_layout: dict[str, list[Mapping[str, Any]]] = {}
    for row in distilled:
        by_layout.setdefault(row["layout"], []).append(row)
    drawn = _drawn_by_chance(by_layout, complete=complete)
    blocks = {
        name: np.mean([row["kl_blocks"] for row in rows], axis=0)
        for name, rows in by_layout.items()
    }
    kl = {name: float(values.mean()) for name, values in blocks.items()}
    truths = [Truth("kl", kl, blocks, drawn)]
    if distilled[0]["recall"] is not None:
        lost = {name: -statistics.fmean(r["recall"] for r in x) for name, x in by_layout.items()}
        parts = None
        # Rows of earlier versions have sequences, or neither.
        for key in ("recall_sequences", "recall_parts"):
            if all(key in row for row in distilled):
                parts = {
                    name: -np.mean([row[key] for row in rows], axis=0)
                    for name, rows in by_layout.items()
                }
        truths.append(Truth("recall", lost, parts, drawn))
    return truths


def _drawn_by_chance(
    by_layout: Mapping[str, Sequence[Mapping[str, Any]]], *, complete: bool
) -> list[list[str]]:
    """Tenths of the score's range, with what was drawn from each; one group if all is there."""
    if complete:
        return [list(by_layout)]
    tenths: dict[str, list[str]] = {}
    for name, rows in by_layout.items():
        for why in rows[0]["chosen_as"]:
            if why.startswith("tenth "):
                tenths.setdefault(why, []).append(name)
    if len(tenths) < TENTHS:
        raise DataError(
            f"the table must hold distilled layouts drawn from all {TENTHS} tenths of the score's "
            f"range, but has them from {len(tenths)}; distil more with table.py"
        )
    return list(tenths.values())


def replay(
    table: GroundTruth,
    objective: Mapping[str, float],
    choice: Any,
    *,
    seeds: int,
    most: int,
    run_all: Mapped,
) -> list[Picks]:
    """A strategy's picks after each of AFTER, a selector's at its end.

    Raises:
        DataError: The objective leaves a strategy nothing to search.
    """
    strategy = build_strategy(choice)
    possible = table.budget.count(table.space)
    if isinstance(strategy, Selector):
        result = table.study(objective, seed=0, strategy="random", trials=1, baselines=[choice])
        # An optimum that is computed is a trial too, but not the selector's.
        named = set(result.baselines.values())
        best = next(trial.layout for trial in result.ranking if trial.layout in named)
        looked = {probe.layout for probe in result.probes} | named
        return [Picks(strategy.label, len(looked), [_name(best)])]
    if is_solved(SearchConfig(objective=dict(objective))):
        raise DataError("stage2_local alone is solved exactly, so no strategy has a part in it")
    # One short of the whole space, which a study would enumerate instead.
    steps = sorted({min(step, most, possible - 1) for step in AFTER})
    search = {"strategy": choice, "trials": steps[-1], "baselines": []}
    runs = list(run_all(partial(_run, table, objective, search), range(seeds)))
    return [Picks(strategy.label, step, [run.best(step) for run in runs]) for step in steps]


def default_study(
    table: GroundTruth,
    objective: Mapping[str, float],
    *,
    seeds: int,
    most: int,
    run_all: Mapped,
    finalists: Sequence[int],
    run_off: int,
    baselines: Sequence[Any] | None,
    then: Any,
) -> list[Picks]:
    """A study's own baselines and then its strategy, as they come; probes are counted first."""
    named = {} if baselines is None else {"baselines": list(baselines)}
    if then is not None:
        named |= {"strategy": then}
    # One short of the whole space, which a study would enumerate instead.
    most = min(most, table.budget.count(table.space) - 1)
    runs = list(run_all(partial(_run, table, objective, named | {"trials": most}), range(seeds)))
    found: list[Picks] = []
    distilled: list[Picks] = []
    for step in sorted({min(step, most) for step in AFTER}):
        counts = [run.probes + len(run.trials[:step]) for run in runs]
        # A study that has scored everything ends before.
        if not found or round(statistics.fmean(counts)) > found[-1].layouts:
            count = round(statistics.fmean(counts))
            found.append(Picks("default study", count, [run.best(step) for run in runs]))
            for several in finalists:
                pruner = {"name": "halving", "factor": 2, "most": several}
                if build_pruner(pruner).limit(step) < several:
                    continue
                # Where nothing is distilled yet any budget will do.
                rungs = RungsConfig(tokens=[table.tokens or 1], pruner=pruner, seeds=run_off)
                search = named | {"trials": step, "rungs": rungs}
                again = list(run_all(partial(_run, table, objective, search), range(seeds)))
                distilled.append(
                    Picks(
                        f"default study, rung of {several}",
                        count,
                        [run.pick for run in again],
                        sorted({name for run in again for name in run.finalists}),
                        sorted({name for run in again for name in run.lacking}),
                    )
                )
    return [*found, *distilled]


def best_distilled(truths: Sequence[Truth], objective: Mapping[str, float]) -> list[Picks]:
    """The pick of whoever knew what layouts distil to; its other figures are the objective's price.

    Nobody's where the objective is of nothing that is known of distilled layouts.
    """
    judged = [t for t in truths if t.terms] or [t for t in truths if [t.name] == list(objective)]
    best = [min(truth.values, key=truth.values.__getitem__) for truth in judged]
    return [
        Picks("best distilled by it", len(truth.values), [layout])
        for truth, layout in zip(judged, best, strict=True)
    ]


def judge(picks: Picks, truth: Truth) -> dict[str, Any]:
    """Regret of the picks that are distilled, with its interval."""
    known = [pick for pick in picks.picks if pick in truth.values]
    found: dict[str, Any] = {
        "strategy": picks.strategy,
        "layouts": picks.layouts,
        "missing": len(picks.picks) - len(known),
        "lacking": len(picks.lacking),
    }
    if known:
        regrets = [truth.regret(pick) for pick in known]
        found |= {"regret": statistics.fmean(regrets), "worst": max(regrets)}
        if truth.varies or len(set(known)) > 1:
            drawn = _drawn(known, truth, np.random.default_rng(1))
            found |= dict(zip(("low", "high"), np.quantile(drawn, [0.025, 0.975]), strict=True))
    return found


def _drawn(known: Sequence[str], truth: Truth, rng: np.random.Generator) -> Array:
    """Mean regret over resampled seeds of the strategy and resampled text, ``(REPEATS,)``."""
    each = np.stack([truth.regrets(pick) for pick in known])
    places = rng.integers(len(known), size=(REPEATS, len(known)))
    return np.array(each[places, np.arange(REPEATS)[:, None]].mean(axis=1))


def compare(
    reference: Picks, others: Sequence[Picks], truth: Truth
) -> dict[tuple[str, int], float]:
    """p of each other strategy's paired difference to the reference, Holm's correction made."""
    base = [pick for pick in reference.picks if pick in truth.values]
    if not base:
        return {}
    found = {}
    for other in others:
        known = [pick for pick in other.picks if pick in truth.values]
        # Without blocks only seeds vary, and of one pick nothing does.
        varies = truth.varies or (len(set(base)) > 1 and len(set(known)) > 1)
        if known and varies:
            # The same text for both; their seeds have nothing to do with each other.
            one, two = np.random.default_rng(1), np.random.default_rng(2)
            differences = _drawn(base, truth, one) - _drawn(known, truth, two)
            fewer = min(int((differences <= 0).sum()), int((differences >= 0).sum()))
            found[other.strategy, other.layouts] = min(1.0, 2 * (fewer + 1) / (REPEATS + 1))
    corrected, most = {}, 0.0
    for rank, (key, p) in enumerate(sorted(found.items(), key=lambda item: item[1])):
        most = max(most, min(1.0, (len(found) - rank) * p))
        corrected[key] = most
    return corrected


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        run(arguments)
    except MohawkError as error:
        print(f"regret: error: {error}", file=sys.stderr)
        return 2
    return 0


def run(arguments: Sequence[str] | None) -> None:
    """Replay, judge, show, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("tables", nargs="+", type=Path)
    add("--by", nargs="+", default=["kl"], help="objectives, as a study names them")
    add("--strategies", nargs="*", default=STRATEGIES)
    add("--baselines", nargs="*", help="of the default study; those of a study that names none")
    add("--then", type=yaml.safe_load, help="strategy of the default study, after its baselines")
    add("--reference", default="default study", help="strategy to compare with, by its label")
    add("--seeds", type=int, default=10)
    add("--workers", type=int, default=os.cpu_count(), help="processes; one a core")
    add("--undistilled", action="store_true", help="judge by the score itself")
    add("--finalists", type=int, nargs="*", default=[], help="distilled before a pick, e.g. 4 8")
    add("--run-off", type=int, default=RungsConfig.seeds, help="most seeds of tied finalists")
    add("--most", type=int, default=max(AFTER), help="most layouts a strategy scores")
    add("--missing", type=Path, help="file for what is to be distilled yet; of one table")
    add("--out", type=Path, help="regret.json beside the first table")
    options = parser.parse_args(arguments)
    if options.undistilled and options.finalists:
        parser.error("--finalists: are distilled, which --undistilled leaves out")
    console, outcomes = Console(width=140), []
    missing: dict[str, None] = {}
    # One pool for all: a process takes seconds to start.
    with _mapped(options.workers) as run_all:
        for path in options.tables:
            table = GroundTruth.read(path)
            for text in options.by:
                objective = _objective(text)
                known = next(iter(table.scores.values()))
                if unknown := [name for name in objective if name not in known]:
                    raise DataError(
                        f"--by: {unknown[0]!r} must be a score of {path}, which has "
                        f"{', '.join(known)}"
                    )
                runs = replay_all(table, objective, options, run_all, console)
                named = dict.fromkeys(x for run in runs for x in (*run.picks, *run.finalists))
                missing |= {x: None for run in runs for x in run.lacking}
                try:
                    truths = (
                        [table.undistilled(objective)]
                        if options.undistilled
                        else table.truths_by(objective)
                    )
                except DataError as e:
                    if not options.missing:
                        raise
                    # What is to be distilled is all that can be told yet.
                    console.print(f"{table.name}, by {text}: not judged, {e}")
                    done = {row["layout"] for row in table.distilled}
                    missing |= {x: None for x in named if x not in done}
                    continue
                missing |= {x: None for x in named if x not in truths[0].values}
                for outcome in judge_all(runs, truths, objective, options.reference):
                    by = (
                        "the score"
                        if options.undistilled
                        else f"distilled {outcome['judged_by']}, {table.tokens:,} tokens"
                    )
                    head = {"table": table.name, "objective": text}
                    outcomes.append(head | outcome | {"judged_by": by})
                    show(outcomes[-1], console)
    if options.missing:
        options.missing.write_text("".join(f"{x}\n" for x in missing), encoding="utf-8")
        console.print(f"{len(missing)} picks are not distilled, or too seldom: {options.missing}")
    if not outcomes:
        return
    out = options.out or options.tables[0].parent / "regret.json"
    write_json(out, {"seeds": options.seeds, "outcomes": outcomes})
    console.print(f"Wrote {out}")


def replay_all(
    table: GroundTruth,
    objective: Mapping[str, float],
    options: argparse.Namespace,
    run_all: Mapped,
    console: Console,
) -> list[Picks]:
    """What the optimum, the default study and every strategy pick."""
    size = table.budget.count(table.space)
    runs = [Picks("optimum", size, table.best(objective, 1))]
    for count in options.finalists:
        best = table.best(objective, count)
        rung = table.rung_of(best, objective, seeds=options.run_off)
        pick, lacking = _name(rung.ranking[0]), table.lacking(rung)
        runs.append(Picks(f"optimum, rung of {count}", size, [pick], best, lacking))
    how = {"seeds": options.seeds, "most": options.most, "run_all": run_all}
    named = options.baselines and list(map(yaml.safe_load, options.baselines))
    runs += default_study(
        table,
        objective,
        finalists=options.finalists,
        run_off=options.run_off,
        baselines=named,
        then=options.then,
        **how,
    )
    for choice in map(yaml.safe_load, options.strategies):
        try:
            runs += replay(table, objective, choice, **how)
        except (DataError, RunError, ConfigError) as e:
            console.print(f"{choice}: left out, {e}")
    return runs


def judge_all(
    runs: Sequence[Picks],
    truths: Sequence[Truth],
    objective: Mapping[str, float],
    reference: str,
) -> Iterator[dict[str, Any]]:
    """The picks' regrets by each figure, and p of their difference to the reference's."""
    base = [run for run in runs if run.strategy == reference]
    if not base:
        raise DataError(
            f"--reference: must be one of {', '.join({r.strategy: 0 for r in runs})}, but is "
            f"{reference!r}"
        )
    # Found by what it is judged by, so it is no strategy to compare with.
    known_best = best_distilled(truths, objective)
    for truth in truths:
        p = compare(base[-1], [run for run in runs if run not in base], truth)
        rows = [
            judge(run, truth) | {"p": p.get((run.strategy, run.layouts))}
            for run in (*known_best, *runs)
        ]
        yield {"judged_by": truth.name, "layouts": len(truth.values), "rows": rows}


def _objective(text: str) -> dict[str, float]:
    value = yaml.safe_load(text)
    return {value: 1.0} if isinstance(value, str) else {k: float(v) for k, v in value.items()}


def _name(layout: Layout) -> str:
    return ",".join(map(str, layout.attention_layers))


def show(outcome: Mapping[str, Any], console: Console) -> None:
    title = (
        f"{outcome['table']}: searched by {outcome['objective']}, regret of "
        f"{outcome['judged_by']} ({outcome['layouts']:,} layouts)"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    columns = ("strategy", "after", "regret", "95 %", "worst seed", "p", "not distilled")
    for column in (*columns, "too few seeds"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for row in outcome["rows"]:
        figures = ["", "", ""]
        if "regret" in row:
            interval = f"{row['low']:.1%} to {row['high']:.1%}" if "low" in row else ""
            figures = [f"{row['regret']:.1%}", interval, f"{row['worst']:.1%}"]
        p = "" if row["p"] is None else f"{row['p']:.3f}"
        table.add_row(
            row["strategy"],
            f"{row['layouts']:,}",
            *figures,
            p,
            str(row["missing"] or ""),
            str(row["lacking"] or ""),
        )
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
