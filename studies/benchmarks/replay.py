"""Replays search strategies on layouts that are scored already, or scored by a formula.

Needs no model and no GPU. Each strategy runs ten times, without baselines, through the same code as
`mohawk-nas search`; selectors, which name their layouts up front, run once. Regret is what the best
layout found is above the best there is, as a share of (mean of all layouts - best). All tables and
one made-up space of 24 layers take about MINUTES minutes on one core:

    python studies/benchmarks/replay.py studies/benchmarks/results/scores_{quickstart,phi-24m}.json \
        --made-up 24,4

`--strategies` takes other strategies as a study names them, options included:

    ... --strategies random tpe '{name: tpe, encoding: slots}'

A made-up space has an effect of each layer that keeps attention and one of each two of them, drawn
at random, anew for each seed, both with the same spread over the layouts on the budget.

A table is a JSON object: `name`, `num_layers`, `attention_layers` (how many a layout keeps),
`objective`, `possible` (layouts on the budget), `layouts` (a list of `{"layout": [1, 5],
"value": 0.23}`, one for each layout on the budget) and `probes` (values of layouts off the budget,
by their attention layers: `{"1": 0.9}`).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mohawk_nas.config import BudgetConfig, SearchConfig, SpaceConfig, StudyConfig
from mohawk_nas.errors import DataError
from mohawk_nas.files import write_json
from mohawk_nas.layout import Layout
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.result import StudyResult
from mohawk_nas.search.scoring import Score
from mohawk_nas.search.space import SearchSpace, load_space
from mohawk_nas.search.study import run_study

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
    "{name: surrogate, explore: thompson}",
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

    @classmethod
    def made_up(cls, num_layers: int, num_attention: int, *, seed: int) -> MadeUp:
        """A space in which single layers and pairs of them spread the values equally."""
        rng = np.random.default_rng(seed)
        share = num_attention / num_layers
        layers, pairs = rng.normal(size=num_layers), rng.normal(size=(num_layers, num_layers))
        # Centred at how often a layer is kept, so that a pair has no part that its layers explain.
        space = MadeUp(
            name=f"made-up {num_attention} of {num_layers}",
            objective="kl",
            num_layers=num_layers,
            num_attention=num_attention,
            values={},
            share=share,
            layers=layers,
            pairs=np.triu(pairs, 1),
        )
        kept = space.kept(list(space.budget.enumerate(space.space)))
        single, double = space.parts(kept)
        return replace(
            space, layers=layers / single.std(), pairs=np.triu(pairs, 1) / double.std()
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
        raise NotImplementedError("a table of scores knows no stage-2 losses")

    def regret(self, value: float) -> float:
        best = min(self.feasible)
        return (value - best) / (statistics.fmean(self.feasible) - best)

    def expected_random(self, num_layouts: int) -> float:
        """Mean regret of the best of ``num_layouts`` random layouts, over every choice of them."""
        values = sorted(self.feasible)
        total = math.comb(len(values), num_layouts)
        # The i-th best is the best drawn if all others come from those behind it.
        weights = (math.comb(len(values) - i, num_layouts - 1) for i in range(1, len(values) + 1))
        return sum(self.regret(v) * (w / total) for v, w in zip(values, weights, strict=True))

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

    share: float
    layers: Array
    """``(num_layers,)``"""
    pairs: Array
    """``(num_layers, num_layers)``, upper triangle."""

    def kept(self, layouts: Sequence[Layout]) -> Array:
        rows = [[i in layout.attention_layers for i in range(self.num_layers)] for layout in layouts]
        return np.array(rows, dtype=float)

    def parts(self, kept: Array) -> tuple[Array, Array]:
        centred = kept - self.share
        return centred @ self.layers, np.einsum("nj,nj->n", centred @ self.pairs, centred)

    @cached_property
    def feasible(self) -> list[float]:
        kept = self.kept(list(self.budget.enumerate(self.space)))
        return [float(value) for value in sum(self.parts(kept))]

    def score(self, layout: Layout) -> Score:
        value = float(sum(self.parts(self.kept([layout])))[0])
        return Score(per_block={self.objective: (value,)}, tokens=0, seconds=0.0)


def replay(tables: Sequence[Scores], *, strategies, selectors, most: int) -> dict[str, Any]:
    """Regrets of every strategy and selector.

    Args:
        tables: One a seed; the same again and again where there is one table only.
        strategies: As a study names them.
        selectors: As a study names them.
        most: Most layouts that a run scores.
    """
    possible = scores.budget.count(scores.space)
    steps = [step for step in STEPS if step <= min(most, possible - 1)]
    # One layout short of the whole space, which the study would enumerate instead.
    curves: dict[str, list[list[float]]] = {}
    for strategy in STRATEGIES:
        curves[strategy] = []
        for seed in range(num_seeds):
            result = scores.study(seed=seed, strategy=strategy, trials=steps[-1], baselines=[])
            best = result.anytime()
            curves[strategy].append([scores.regret(best[step - 1]) for step in steps])
    picks = {}
    for name in SELECTORS:
        result = scores.study(seed=0, strategy="random", trials=1, baselines=[name])
        trial = result.by_layout[result.baselines[name]]
        looked = {probe.layout for probe in result.probes} | {trial.layout}
        picks[name] = {
            "layout": list(trial.layout.attention_layers),
            "evaluations": len(looked),
            "regret": scores.regret(trial.value),
        }
    return {
        "name": scores.name,
        "objective": scores.objective,
        "num_layers": scores.num_layers,
        "attention_layers": scores.num_attention,
        "layouts": possible,
        "steps": steps,
        "random_expected": [scores.expected_random(step) for step in steps],
        "regret": curves,
        "picks": picks,
    }


def show(outcome: Mapping[str, Any], console: Console) -> None:
    """Mean regret after n layouts, with the worst seed beside it."""
    title = (
        f"{outcome['name']}: {outcome['attention_layers']} of {outcome['num_layers']} layers, "
        f"{outcome['layouts']:,} layouts, {outcome['objective']}"
    )
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("layouts", justify="right")
    table.add_column("chance", justify="right")
    for strategy, seeds in outcome["regret"].items():
        table.add_column(f"{strategy} x{len(seeds)}", justify="right")
        table.add_column("worst", justify="right")
    for i, step in enumerate(outcome["steps"]):
        row = [str(step), f"{outcome['random_expected'][i]:.1%}"]
        for seeds in outcome["regret"].values():
            found = [curve[i] for curve in seeds]
            row += [f"{statistics.fmean(found):.1%}", f"{max(found):.1%}"]
        table.add_row(*row)
    console.print(table)
    for name, pick in outcome["picks"].items():
        layers = ",".join(map(str, pick["layout"]))
        after = f"after {pick['evaluations']} evaluations (keeps {layers})"
        console.print(f" {name}: {pick['regret']:.1%} {after}", highlight=False)
    console.print()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Replay search strategies on tables of scored layouts."
    )
    parser.add_argument("tables", nargs="+", type=Path, help="JSON tables of scored layouts")
    parser.add_argument("--seeds", type=int, default=10, help="runs of each strategy")
    parser.add_argument("--most", type=int, default=64, help="most layouts scored in a run")
    parser.add_argument("--out", type=Path, default=RESULTS / "replay.json")
    options = parser.parse_args(arguments)
    console = Console()
    began = time.perf_counter()
    outcomes = []
    for path in options.tables:
        outcome = replay(Scores.read(path), num_seeds=options.seeds, most=options.most)
        outcomes.append(outcome)
        show(outcome, console)
    console.print(
        "Regret after so many layouts: (best found - best there is) / (mean of all - best there "
        "is); lower is better. Mean and worst over the seeds, no baseline scored beforehand. "
        "Chance: the mean of random search over all seeds, computed.",
        style="dim",
    )
    typed = sys.argv[1:] if arguments is None else arguments
    content = {
        "command": shlex.join(["python", "studies/benchmarks/replay.py", *map(str, typed)]),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("mohawk-nas", "optuna", "numpy")},
        },
        "hardware": {"machine": platform.machine(), "processor": "CPU, one process"},
        "seconds": round(time.perf_counter() - began, 1),
        "tables": outcomes,
    }
    write_json(options.out, content)
    console.print(f"Wrote {options.out}")


if __name__ == "__main__":
    main()
