"""Replays search strategies on layouts that are scored already, or scored by a formula.

Needs no model and no GPU. Each strategy runs ten times, without baselines, through the same code as
`mohawk-nas search`; selectors, which name their layouts up front, run once a table. Regret is what
the best layout found is above the best there is, as a share of (mean of all layouts - best):

    python studies/benchmarks/replay.py TABLES --made-up pairs,24,4 roles,24,4

`--strategies` and `--selectors` take others, as a study names them, options included:

    python studies/benchmarks/replay.py TABLE --strategies random '{name: tpe, encoding: slots}'

With `--baselines` the strategies go on from what these scored, as they do in a study; what they
look at off the budget is not counted:

    python studies/benchmarks/replay.py --made-up pairs,24,4 --baselines greedy --strategies swaps

Made-up spaces are drawn anew for each seed. In `pairs` each layer that keeps attention has an
effect and so has each two of them, both with the same spread over the layouts on the budget: just
what a pairwise surrogate assumes. In `roles` each of six roles is played by the best of the layers
that keep attention, so layers stand in for each other. Their mixers have no stage-2 losses, so all
are 0 there.

A table is a JSON object: `name`, `num_layers`, `attention_layers` (how many a layout keeps),
`objective`, `possible` (layouts on the budget), `layouts` (a list of `{"layout": [1, 5],
"value": 0.23}`, one for each layout on the budget) and `probes` (values of layouts off the budget,
by their attention layers: `{"1": 0.9}`).
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from mohawk_nas.config import BudgetConfig, SearchConfig, SpaceConfig, StudyConfig
from mohawk_nas.errors import DataError, RunError
from mohawk_nas.files import write_json
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.result import StudyResult
from mohawk_nas.search.scoring import Score
from mohawk_nas.search.space import SearchSpace, load_space
from mohawk_nas.search.strategy import build_strategy
from mohawk_nas.search.study import run_study

Array = npt.NDArray[np.float64]

STRATEGIES = (
    "random",
    "tpe",
    "{name: tpe, encoding: slots}",
    "{name: tpe, encoding: bits}",
    "gp",
    "{name: gp, encoding: slots}",
    "{name: gp, encoding: bits}",
    "{name: surrogate, model: additive}",
    "surrogate",
    "{name: surrogate, explore: none}",
)
SELECTORS = (
    "swap_one",
    "add_one_in",
    "greedy",
    "{name: greedy, swaps: 2}",
    "{name: greedy, direction: remove}",
    "beam",
    "{name: beam, swaps: 2}",
)
STEPS = (4, 8, 16, 32, 64, 128, 256, 512)
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One teacher's layouts and their values; stands in for the scorer of a study."""

    name: str
    objective: str
    num_layers: int
    num_attention: int
    values: Mapping[tuple[int, ...], float]
    """Attention layers -> value, of layouts on the budget and of probes."""

    @classmethod
    def read(cls, path: Path) -> Scores:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if len(raw["layouts"]) != raw["possible"]:
            raise DataError(
                f"{path}: must hold all {raw['possible']:,} layouts on the budget, but has "
                f"{len(raw['layouts']):,}"
            )
        values = {tuple(row["layout"]): float(row["value"]) for row in raw["layouts"]}
        for layers, value in raw["probes"].items():
            values[tuple(int(layer) for layer in layers.split(",") if layer)] = float(value)
        return cls(
            name=raw["name"],
            objective=raw["objective"],
            num_layers=raw["num_layers"],
            num_attention=raw["attention_layers"],
            values=values,
        )

    @cached_property
    def budget(self) -> Budget:
        return Budget(attention_layers=self.num_attention)

    @cached_property
    def space(self) -> SearchSpace:
        return load_space(SpaceConfig(name="hybrid_phi_mamba"), num_layers=self.num_layers)

    @cached_property
    def feasible(self) -> list[float]:
        """Values of all layouts on the budget."""
        return [self.score(x).mean(self.objective) for x in self.budget.enumerate(self.space)]

    def score(self, layout: Layout) -> Score:
        value = self.values.get(layout.attention_layers)
        if value is None:
            raise DataError(f"{self.name}: has no value for {list(layout.attention_layers)}")
        return Score(per_block={self.objective: (value,)}, tokens=0, seconds=0.0)

    def stage2_losses(self) -> dict[tuple[int, str], float]:
        raise DataError(f"{self.name}: knows no stage-2 losses, but values of whole layouts alone")

    @cached_property
    def scale(self) -> tuple[float, float]:
        """Lowest value, and what the mean is above it."""
        best = min(self.feasible)
        return best, statistics.fmean(self.feasible) - best

    def regret(self, value: float) -> float:
        best, spread = self.scale
        return (value - best) / spread

    @cached_property
    def additive_r_squared(self) -> float:
        """How much of the values a sum over layers explains, adjusted for its parameters."""
        layouts, values = self.budget.enumerate(self.space), np.array(self.feasible)
        kept = np.array([[c == ATTENTION for c in x.candidates] for x in layouts], dtype=float)
        kept, values = kept - kept.mean(axis=0), values - values.mean()
        spare = len(values) - self.num_layers
        if spare < 1:
            # As many parameters as layouts explain them all.
            return 1.0
        residual = values - kept @ np.linalg.lstsq(kept, values, rcond=None)[0]
        return 1 - float(residual @ residual) / spare / (float(values @ values) / (len(values) - 1))

    def expected_random(self, num_layouts: int) -> float:
        """Mean regret of the best of ``num_layouts`` random layouts, over every choice of them."""
        values = sorted(self.feasible)
        best, expected, left = values[0], 0.0, 1.0
        # The next best is the best drawn if it is drawn and none before it was.
        for i, value in enumerate(values[: len(values) - num_layouts + 1]):
            drawn = left * num_layouts / (len(values) - i)
            expected += drawn * (value - best)
            left -= drawn
        return expected / (statistics.fmean(values) - best)

    def study(self, *, seed: int, **search: Any) -> StudyResult:
        config = StudyConfig(
            name=f"{self.name}-{seed}",
            seed=seed,
            budget=BudgetConfig(attention_layers=self.num_attention),
            search=SearchConfig(objective={self.objective: 1.0}, **search),
        )
        return run_study(config, self.space, self.budget, self, run_dir=None)


@dataclass(frozen=True, kw_only=True)
class MadeUp(Scores):
    """Values by a formula, for every layout there is."""

    formula: Callable[[Array], Array]
    """Whether each layer keeps attention ``(layouts, num_layers)`` -> values ``(layouts,)``"""

    @classmethod
    def of(cls, text: str, *, seed: int) -> MadeUp:
        """Reads ``pairs,24,4``: kind, layers, layers that keep attention."""
        kind, *numbers = text.split(",")
        num_layers, num_attention = map(int, numbers)
        make = {"pairs": pairs, "roles": roles}[kind]
        return cls(
            name=f"made-up {kind}",
            objective="kl",
            num_layers=num_layers,
            num_attention=num_attention,
            values={},
            formula=make(np.random.default_rng(seed), num_layers, num_attention),
        )

    def kept(self, layouts: Sequence[Layout]) -> Array:
        found = np.zeros((len(layouts), self.num_layers))
        for row, layout in zip(found, layouts, strict=True):
            row[list(layout.attention_layers)] = 1.0
        return found

    def score(self, layout: Layout) -> Score:
        value = float(self.formula(self.kept([layout]))[0])
        return Score(per_block={self.objective: (value,)}, tokens=0, seconds=0.0)

    def stage2_losses(self) -> dict[tuple[int, str], float]:
        (mixer,) = self.space.replacements
        return {(layer, mixer): 0.0 for layer in range(self.num_layers)}


def pairs(
    rng: np.random.Generator, num_layers: int, num_attention: int
) -> Callable[[Array], Array]:
    """An effect of each layer that keeps attention and of each two of them, both normal."""
    single = rng.normal(size=num_layers)
    double = np.triu(rng.normal(size=(num_layers, num_layers)), 1)
    # A pair counts against how often its layers are kept, so single layers explain little of it.
    share = num_attention / num_layers

    def parts(kept: Array) -> tuple[Array, Array]:
        centred = kept - share
        return kept @ single, np.einsum("nj,nj->n", centred @ double, centred)

    sample = np.zeros((10_000, num_layers))
    for row in sample:
        row[rng.choice(num_layers, num_attention, replace=False)] = 1.0
    alone, together = parts(sample)
    double *= alone.std() / together.std()
    return lambda kept: np.sum(parts(kept), axis=0)


def roles(
    rng: np.random.Generator, num_layers: int, num_attention: int
) -> Callable[[Array], Array]:
    """Each of six roles is played by whichever kept layer is best at it; few are good at any."""
    talents = rng.uniform(size=(6, num_layers)) ** 3
    return lambda kept: -np.sum([(kept * talent).max(axis=1) for talent in talents], axis=0)


def replay(
    tables: Sequence[Scores],
    *,
    strategies: Sequence[str] = STRATEGIES,
    selectors: Sequence[str] = SELECTORS,
    baselines: Sequence[str] = (),
    most: int = 64,
) -> dict[str, Any]:
    """Regrets of every strategy and selector.

    Args:
        tables: One a seed; the same one for all seeds, or spaces made up by the same rule.
        strategies: As a study names them.
        selectors: As a study names them.
        baselines: Scored before each strategy begins.
        most: Most layouts that a run scores.
    """
    first = tables[0]
    possible = first.budget.count(first.space)
    # One layout short of the whole space, which the study would enumerate instead.
    steps = [step for step in STEPS if step <= min(most, possible - 1)]
    named = [yaml.safe_load(choice) for choice in baselines]
    curves: dict[str, list[list[float]]] = {}
    seconds: dict[str, float] = {}
    for choice in map(yaml.safe_load, strategies):
        label, began = build_strategy(choice).label, time.perf_counter()
        regrets = []
        for seed, table in enumerate(tables):
            try:
                result = table.study(seed=seed, strategy=choice, trials=steps[-1], baselines=named)
            except (DataError, RunError) as e:
                print(f"{label}: left out, {e}")
                break
            best = result.anytime()
            regrets.append([table.regret(best[step - 1]) for step in steps])
        else:
            curves[label] = regrets
            seconds[label] = (time.perf_counter() - began) / (len(tables) * steps[-1])
    picks = {}
    for choice in map(yaml.safe_load, selectors):
        label, found = build_strategy(choice).label, []
        for table in tables if isinstance(first, MadeUp) else tables[:1]:
            try:
                result = table.study(seed=0, strategy="random", trials=1, baselines=[choice])
            except (DataError, RunError) as e:
                # A table holds the probes of the selectors that its search had.
                print(f"{label}: left out, {e}")
                break
            trial = result.by_layout[result.baselines[label]]
            looked = {probe.layout for probe in result.probes} | {trial.layout}
            found.append((len(looked), table.regret(trial.value), trial.layout.attention_layers))
        if found:
            picks[label] = {
                "layout": list(found[0][2]),
                "evaluations": round(statistics.fmean(evaluations for evaluations, _, _ in found)),
                "regret": statistics.fmean(regret for _, regret, _ in found),
                "regrets": [regret for _, regret, _ in found],
            }
    return {
        "name": first.name,
        "objective": first.objective,
        "num_layers": first.num_layers,
        "attention_layers": first.num_attention,
        "layouts": possible,
        "baselines": named,
        "additive_r_squared": statistics.fmean(table.additive_r_squared for table in tables),
        "steps": steps,
        "random_expected": [
            statistics.fmean(table.expected_random(step) for table in tables) for step in steps
        ],
        "regret": curves,
        "seconds_per_layout": seconds,
        "picks": picks,
    }


def show(outcome: Mapping[str, Any], console: Console) -> None:
    """Mean regret after n layouts, with the worst seed beside it."""
    title = (
        f"{outcome['name']}: {outcome['attention_layers']} of {outcome['num_layers']} layers, "
        f"{outcome['layouts']:,} layouts, {outcome['objective']}; adjusted R² of a sum over layers "
        f"{outcome['additive_r_squared']:.2f}"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("after so many layouts", no_wrap=True)
    for step in outcome["steps"]:
        table.add_column(str(step), justify="right")
    table.add_column("s a layout", justify="right")
    table.add_row("chance", *(f"{regret:.1%}" for regret in outcome["random_expected"]))
    for label, seeds in outcome["regret"].items():
        columns = list(zip(*seeds, strict=True))
        row = [f"{statistics.fmean(found):.1%} ({max(found):.1%})" for found in columns]
        table.add_row(label, *row, f"{outcome['seconds_per_layout'][label]:.3f}")
    console.print(table)
    for name, pick in outcome["picks"].items():
        after = f"after {pick['evaluations']} evaluations"
        if len(pick["regrets"]) == 1:
            after += f" (keeps {','.join(map(str, pick['layout']))})"
        else:
            after += f" (worst of {len(pick['regrets'])} spaces {max(pick['regrets']):.1%})"
        console.print(f" {name}: {pick['regret']:.1%} {after}", highlight=False)
    console.print()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Replay search strategies on tables of scored layouts."
    )
    parser.add_argument("tables", nargs="*", type=Path, help="JSON tables of scored layouts")
    parser.add_argument("--made-up", nargs="*", default=[], metavar="KIND,LAYERS,KEPT")
    parser.add_argument("--strategies", nargs="*", default=STRATEGIES, metavar="STRATEGY")
    parser.add_argument("--selectors", nargs="*", default=SELECTORS, metavar="SELECTOR")
    parser.add_argument("--baselines", nargs="*", default=[], metavar="SELECTOR")
    parser.add_argument("--seeds", type=int, default=10, help="runs of each strategy")
    parser.add_argument("--most", type=int, default=64, help="most layouts scored in a run")
    parser.add_argument("--out", type=Path, default=RESULTS / "replay.json")
    options = parser.parse_args(arguments)
    console = Console(width=140)
    began = time.perf_counter()
    outcomes = []
    spaces: list[Sequence[Scores]] = [
        [Scores.read(path)] * options.seeds for path in options.tables
    ]
    for text in options.made_up:
        spaces.append([MadeUp.of(text, seed=seed) for seed in range(options.seeds)])
    for tables in spaces:
        outcome = replay(
            tables,
            strategies=options.strategies,
            selectors=options.selectors,
            baselines=options.baselines,
            most=options.most,
        )
        outcomes.append(outcome)
        show(outcome, console)
    console.print(
        "Regret after so many layouts: (best found - best there is) / (mean of all - best there "
        "is); lower is better. Mean (worst) of the seeds, "
        f"{'baselines' if options.baselines else 'no baseline'} scored beforehand. Chance: the "
        "mean of random search over all seeds, computed. Seconds include Optuna's storage.",
        style="dim",
    )
    typed = sys.argv[1:] if arguments is None else arguments
    content = {
        "command": shlex.join(["python", "studies/benchmarks/replay.py", *map(str, typed)]),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("mohawk-nas", "optuna", "numpy", "scipy")},
        },
        "hardware": {"machine": platform.machine(), "processor": "CPU, one process"},
        "seconds": round(time.perf_counter() - began, 1),
        "tables": outcomes,
    }
    write_json(options.out, content)
    console.print(f"Wrote {options.out}")


if __name__ == "__main__":
    main()
