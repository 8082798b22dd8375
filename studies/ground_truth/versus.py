"""The layout that a search chose against simpler choices, at equal distillation and with interest.

    python studies/ground_truth/versus.py STUDY.yaml --tokens 4M --seeds 0,1,2 \\
        --rivals uniform swap_one random 4,10,16,22

The study is searched first if it has not been. Its best layout is distilled from the bank with
`--tokens` of stage 3. So is each rival, once with as many and once with the search's own tokens
besides: those that every layout and every probe was scored on, those of gates, and those that rungs
distilled on. The bank is everyone's. What a search costs is thus given to those who do without.

A rival is one of the study's baselines by its label, of which the one that scored best is taken if
there are several; a layout of one's own; or `random`: the best by the study's objective of as many
layouts as the search has scored, drawn at random. Which it was stands in the rows.

All are measured on the test split, which nothing has seen: KL, cross-entropy, recall. Differences
to the searched layout are paired over blocks of text, or parts of the recall probe, and
bootstrapped over these and the seeds; intervals are widened for the number of rows and figures
(Bonferroni), so that all of them hold together with 95 %.

The rows are written to `versus.jsonl` in the run's folder, and the same command goes on where it
was stopped; `--part 1/2` and `2/2` share the distillations of two processes. The table is printed
as Markdown and kept in `--out`.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from table import name_of, numbers, part, to_the_end

from mohawk_nas import pipeline
from mohawk_nas.config import LogitsConfig, StudyConfig, load_study, recipe_of, token_count
from mohawk_nas.distill.several import distil_layouts
from mohawk_nas.errors import InputError, LayoutError, MohawkError
from mohawk_nas.files import RowFile, write_json
from mohawk_nas.layout import Layout
from mohawk_nas.metrics import evaluate_blocks
from mohawk_nas.plan import find_problems
from mohawk_nas.recall import answers, notation_of
from mohawk_nas.reporting import screen
from mohawk_nas.runs import check_identity, check_run_dir, provenance
from mohawk_nas.search.result import StudyResult
from mohawk_nas.workbench import Workbench

Array = npt.NDArray[np.float64]

REPEATS = 10_000
"""Of the bootstrap."""


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        config = load_study(args.study, args.overrides)
        if problems := find_problems(config):
            raise InputError("\n".join(problems))
        make(config, args)
    except MohawkError as error:
        print(f"versus: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("study", type=Path)
    add("overrides", nargs="*", help="changes to the study, e.g. seed=1")
    add("--rivals", nargs="+", default=["uniform", "swap_one", "random"])
    add("--tokens", type=token_count, help="of stage 3, e.g. 4M; distill.logits.tokens")
    add("--seeds", type=numbers, default=[0], help="of stage 3, e.g. 0,1,2")
    add("--part", type=part, default=(0, 1), help="1/2 and 2/2 share the work of two processes")
    add("--out", type=Path, help="versus.json in the run's folder")
    return parser.parse_intermixed_args(argv)


def make(config: StudyConfig, args: argparse.Namespace) -> None:
    """Everything that the arguments ask for and the rows lack, then the table."""
    reporter = screen.reporter()
    if not (config.run_dir / "best.yaml").is_file():
        if args.part[1] > 1:
            raise InputError(f"--part: {config.run_dir} must hold a finished search; run it first")
        pipeline.search(config, reporter=reporter)
    check_run_dir(config)
    bench = Workbench(config, reporter)
    check_identity(config.run_dir, bench.identity)
    result, rows = bench.result(), RowFile(config.run_dir / "versus.jsonl")
    tokens, own = args.tokens or config.distill.logits.tokens, tokens_read(result)
    searched = result.best.layout
    rivals = {name: rival(name, bench, result, rows) for name in args.rivals}
    wanted = [(searched, tokens)]
    wanted += [(layout, budget) for layout in rivals.values() for budget in (tokens, tokens + own)]
    wanted = [pair for pair in dict.fromkeys(wanted) if pair != (searched, tokens + own)]
    logits = to_the_end(config.distill.logits)
    distil(bench, rows, wanted, logits, args)
    rows, recipe = RowFile(rows.path), recipe_of(logits)

    def found(layout: Layout, budget: int, seed: int) -> Mapping[str, Any] | None:
        keys = {"layout": name_of(layout), "tokens": budget, "seed": seed, "recipe": recipe}
        keys["asked by"] = notation_of("test")
        return next(iter(rows.find(kind="distilled", **keys)), None)

    if any(found(*pair, seed) is None for pair in wanted for seed in args.seeds):
        print("Not all of it is distilled yet; other parts do it.")
        return

    def figures(layout: Layout, budget: int) -> Figures:
        each = [found(layout, budget, seed) for seed in args.seeds]
        return Figures.of([row for row in each if row is not None])

    base = figures(searched, tokens)
    lines = [entry("searched", searched, tokens, base, None)]
    # Each of its figures is a comparison.
    several = len([pair for pair in wanted if pair[0] != searched]) * len(base.values)
    for name, layout in rivals.items():
        if layout == searched:
            lines.append(entry(f"{name} = searched", searched, tokens, base, None))
            continue
        for budget in (tokens, tokens + own):
            theirs = figures(layout, budget)
            lines.append(entry(name, layout, budget, theirs, theirs.minus(base, several)))
    content = {
        "study": config.name,
        "search_tokens": own,
        "seeds": args.seeds,
        "comparisons": several,
        "rows": lines,
        "made_with": {k: v for k, v in provenance().items() if k != "command"},
    }
    out = args.out or config.run_dir / "versus.json"
    write_json(out, content)
    print(markdown(lines))
    print(f"\nThe search read {own:,} tokens. Wrote {out}")


def tokens_read(result: StudyResult) -> int:
    """Tokens that a search has read besides its bank's, forward only or trained on."""
    scored = sum(trial.score.tokens for trial in result.trials)
    scored += sum(probe.score.tokens for probe in result.probes)
    distilled = sum(score.tokens for rung in result.rungs for score in rung.scores.values())
    return scored + distilled + sum(cost.tokens for cost in result.learnt.values())


def rival(name: str, bench: Workbench, result: StudyResult, rows: RowFile) -> Layout:
    """The layout that a rival names; a random one is drawn and scored once."""
    if name == "random":
        kept = {"kind": "random", "of": len(result.trials) + len(result.probes)}
        if not any(rows.find(**kept)):
            best = best_of_random(bench, kept["of"])
            rows.add(kept | {"layout": list(best.candidates)})
        row = next(iter(rows.find(**kept)))
        return Layout(tuple(row["layout"]))
    labels = [
        label
        for label in result.baselines
        if label == name or label.startswith((f"{name}/", f"{name}:"))
    ]
    if labels:
        named = [result.baselines[label] for label in labels]
        return min(named, key=lambda layout: result.by_layout[layout].value)
    try:
        layout = bench.space.parse(name)
        bench.budget.check(layout)
    except LayoutError as error:
        known = ", ".join(result.baselines)
        raise InputError(f"--rivals: {name}: {error}; or name random, {known}") from error
    return layout


def best_of_random(bench: Workbench, count: int) -> Layout:
    count = min(count, bench.budget.count(bench.space))
    rng = random.Random(f"{bench.config.seed} random rivals")
    drawn: dict[Layout, None] = {}
    while len(drawn) < count:
        drawn[bench.budget.random(bench.space, rng)] = None
    scorer, weights = bench.scorer(), bench.study.search.objective
    values = {}
    with bench.reporter.stage("random layouts", total=count, unit="layout") as task:
        for layout in drawn:
            values[layout] = scorer.score(layout).value(weights)
            task.advance(1)
    return min(values, key=values.__getitem__)


def distil(
    bench: Workbench,
    rows: RowFile,
    wanted: Sequence[tuple[Layout, int]],
    logits: LogitsConfig,
    args: argparse.Namespace,
) -> None:
    """What this part has of the distillations and the rows lack, students of a budget at once."""
    at_once, recipe = bench.students_at_once(logits), recipe_of(logits)
    measure = measure_on_test(bench)
    for seed in args.seeds:
        for budget in sorted({budget for _, budget in wanted}):
            layouts = [layout for layout, tokens in wanted if tokens == budget]
            keys = {"kind": "distilled", "tokens": budget, "seed": seed, "recipe": recipe}
            keys["asked by"] = notation_of("test")
            done = {row["layout"] for row in rows.find(**keys)}
            mine = layouts[args.part[0] :: args.part[1]]
            left = [layout for layout in mine if name_of(layout) not in done]
            # A budget's text does not depend on which other budgets there are.
            train = bench.training_text(budget)
            for start in range(0, len(left), at_once):
                group = left[start : start + at_once]
                bench.reporter.say(f"seed {seed}, {budget:,} tokens: {len(left) - start} to go")
                config = dataclasses.replace(logits, tokens=budget)
                found = distil_layouts(
                    bench.teacher,
                    group,
                    bench.bank,
                    train=train,
                    config=config,
                    seed=seed,
                    measure=measure,
                    reporter=bench.reporter,
                )
                for layout, figures in zip(group, found, strict=True):
                    rows.add(keys | {"layout": name_of(layout)} | figures)


def measure_on_test(bench: Workbench) -> Callable[[Any], dict[str, Any]]:
    """KL and cross-entropy of each block, recall of each part of the probe."""
    probe = bench.probe("test")

    def measure(model: Any) -> dict[str, Any]:
        figures = evaluate_blocks(bench.teacher, model, bench.blocks["test"])
        return {
            "kl": list(figures.kl),
            "cross_entropy": list(figures.cross_entropy),
            "recall": None if probe is None else probe.parts(answers(model, probe)).tolist(),
        }

    return measure


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a layout came to, by figure: ``(S, N)``, seeds by blocks or parts of the probe."""

    values: Mapping[str, Array]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]]) -> Figures:
        names = [n for n in ("kl", "cross_entropy", "recall") if rows[0][n] is not None]
        return cls({name: np.array([row[name] for row in rows]) for name in names})

    def minus(self, other: Figures, several: int) -> dict[str, list[float]]:
        """Difference and its interval, widened for so many comparisons."""
        return {name: list(self._minus(other, name, several)) for name in self.values}

    def _minus(self, other: Figures, name: str, several: int) -> Iterator[float]:
        rng, pair = np.random.default_rng(0), (self.values[name], other.values[name])
        seeds, items = pair[0].shape
        # The same text for both; their seeds have nothing to do with each other.
        places = rng.integers(items, size=(REPEATS, items))
        drawn = []
        for values in pair:
            chosen = rng.integers(seeds, size=(REPEATS, seeds))
            by_seed = values[:, places].mean(axis=2)
            drawn.append(by_seed[chosen, np.arange(REPEATS)[:, None]].mean(axis=1))
        yield float(pair[0].mean() - pair[1].mean())
        outside = 0.05 / max(1, several) / 2
        yield from np.quantile(drawn[0] - drawn[1], [outside, 1 - outside]).tolist()


def entry(
    name: str,
    layout: Layout,
    tokens: int,
    figures: Figures,
    more: Mapping[str, list[float]] | None,
) -> dict[str, Any]:
    means = {key: float(values.mean()) for key, values in figures.values.items()}
    return {
        "chosen_as": name,
        "attention_layers": list(layout.attention_layers),
        "tokens": tokens,
        **means,
        "more_than_searched": more,
    }


def markdown(lines: Sequence[Mapping[str, Any]]) -> str:
    with_recall = "recall" in lines[0]
    head = ["", "attention layers", "tokens", "KL", "above searched"]
    head += ["recall", "above searched"] if with_recall else []
    found = [head, ["---", *("---:" for _ in head[1:])]]
    for line in lines:
        more = line["more_than_searched"]
        kept = ", ".join(map(str, line["attention_layers"]))
        cells = [line["chosen_as"], kept, f"{line['tokens']:,}", f"{line['kl']:.4f}"]
        cells.append("" if more is None else "{:+.4f} [{:+.4f}, {:+.4f}]".format(*more["kl"]))
        if with_recall:
            cells.append(f"{line['recall']:.1%}")
            cells.append(
                "" if more is None else "{:+.1%} [{:+.1%}, {:+.1%}]".format(*more["recall"])
            )
        found.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in found)


if __name__ == "__main__":
    sys.exit(main())
