"""Tries recipes of stage 3 on a few layouts, to find the one that a table of ground truth uses.

    python studies/ground_truth/recipe.py STUDY.yaml --try lr=3e-4 lr=1e-3,batch_size=4 \\
        --tokens 1M,4M

The study is the table's, and `--try` names what differs from its `distill.logits`. Some layouts of
the budget are scored undistilled; those distilled stand at equal distances in a part of their order
by `--by`, the middle eight tenths of KL unless told. Most layouts recall nothing, so a recipe that
keeps recall is found among the best by it: `--by recall --between 0,0.03`. They are measured on the
validation split, since a recipe chosen by the test split would flatter what is tested. Of each
recipe and budget: mean KL and recall, the change of KL in each layout, and the rank correlation
with the recipe's largest budget. The rows are written to `--out`, and the same command goes on
where it was stopped; rows of another bank, text or `distill.logits` stay there and are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from table import all_or_some, name_of, numbers, to_the_end

from mohawk_nas.audit import measure_on
from mohawk_nas.config import LogitsConfig, StudyConfig, load_study, recipe_of
from mohawk_nas.distill.several import distil_layouts
from mohawk_nas.errors import InputError, MohawkError
from mohawk_nas.files import RowFile
from mohawk_nas.plan import find_problems
from mohawk_nas.reporting import screen
from mohawk_nas.search.objectives import BankScorer
from mohawk_nas.search.statistics import spearman
from mohawk_nas.workbench import Workbench

Rows = Sequence[Mapping[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("study", type=Path)
    add("overrides", nargs="*", help="changes to the study, e.g. seed=1")
    add("--try", dest="recipes", nargs="+", default=[""], help="e.g. lr=1e-3,batch_size=4")
    add("--tokens", type=numbers, default=[1_048_576], help="budgets of stage 3, e.g. 1M,4M")
    add("--layouts", type=int, default=8, help="to distil")
    add("--scored", type=int, default=200, help="layouts from whose order these are taken")
    add("--by", choices=["kl", "recall"], default="kl", help="what orders them, best first")
    add("--between", type=shares, default=(0.1, 0.9), help="part of the order, 0 is the best")
    add("--seeds", type=numbers, default=[0], help="of stage 3, e.g. 0,1")
    add("--out", type=Path, help="studies/ground_truth/recipe_NAME.jsonl")
    args = parser.parse_intermixed_args(argv)
    try:
        if args.layouts < 3:
            raise InputError(f"--layouts: must be at least 3 to be ranked, but is {args.layouts}")
        config = load_study(args.study, args.overrides)
        if problems := find_problems(config):
            raise InputError("\n".join(problems))
        out = args.out or Path(__file__).parent / f"recipe_{config.name}.jsonl"
        rows = RowFile(out)
        show(measure_all(config, rows, args))
    except MohawkError as error:
        print(f"recipe: error: {error}", file=sys.stderr)
        return 2
    return 0


def shares(text: str) -> tuple[float, float]:
    first, last = map(float, text.split(","))
    if not 0 <= first < last <= 1:
        raise ValueError(text)
    return first, last


def measure_all(config: StudyConfig, rows: RowFile, args: argparse.Namespace) -> Rows:
    """Every recipe, budget and seed that the rows lack; then all rows of this study."""
    reporter = screen.reporter()
    bench = Workbench(config, reporter)
    bench.bank.train(bench.space.replaceable, reporter=reporter)
    probe = bench.probe("search") if args.by == "recall" else None
    if args.by == "recall" and probe is None:
        raise InputError("--by recall: the teacher must solve a recall probe, but solves none")
    scorer = BankScorer(
        bench.teacher,
        bench.bank,
        bench.blocks["search"],
        pairs=bench.space.replaceable,
        weights={args.by: 1.0},
        probe=probe,
        batch_size=config.search.batch_size,
    )
    some = all_or_some(bench, args.scored)
    scored = {layout: scorer.score(layout).mean(args.by) for layout in some}
    ranked = sorted(scored, key=scored.__getitem__)
    # Its memory is the students'.
    del scorer
    places = np.linspace(*args.between, args.layouts) * (len(ranked) - 1)
    layouts = [ranked[round(place)] for place in places]
    measure = measure_on(bench, "validation")
    for recipe in ["undistilled", *args.recipes]:
        for tokens in [0] if recipe == "undistilled" else sorted(args.tokens):
            logits = changed(config.distill.logits, recipe, tokens)
            # A budget's text does not depend on which other budgets there are.
            train = bench.training_text(tokens)
            for seed in args.seeds if tokens else [0]:
                row = keys(bench, recipe, tokens) | {"seed": seed}
                done = {found["layout"] for found in rows.find(**row)}
                left = [layout for layout in layouts if name_of(layout) not in done]
                at_once = bench.students_at_once(logits)
                for start in range(0, len(left), at_once):
                    group, began = left[start : start + at_once], time.perf_counter()
                    found = distil_layouts(
                        bench.teacher,
                        group,
                        bench.bank,
                        train=train,
                        config=logits,
                        seed=seed,
                        measure=measure,
                        reporter=reporter,
                    )
                    seconds = round((time.perf_counter() - began) / len(group), 2)
                    for layout, figures in zip(group, found, strict=True):
                        kl = round(statistics.fmean(figures["kl_blocks"]), 6)
                        named = {"layout": name_of(layout), "kl": kl, "recall": figures["recall"]}
                        rows.add(row | named | {"seconds": seconds})
    found = [row for row in rows.rows if "identity" in row]
    return [x for x in found if keys(bench, x["recipe"], x["tokens"]).items() <= x.items()]


def keys(bench: Workbench, recipe: str, tokens: int) -> dict[str, Any]:
    """What a row depends on besides layout and seed."""
    logits = changed(to_the_end(bench.config.distill.logits), recipe, tokens)
    return {
        "recipe": recipe,
        "tokens": tokens,
        "logits": recipe_of(logits) if tokens else None,
        "identity": hashlib.sha256(json.dumps(bench.identity).encode()).hexdigest()[:16],
    }


def changed(logits: LogitsConfig, recipe: str, tokens: int) -> LogitsConfig:
    """Stage 3 with what a recipe names."""
    values: dict[str, Any] = {"tokens": tokens}
    if recipe != "undistilled":
        for part in filter(None, recipe.split(",")):
            name, _, text = part.partition("=")
            kind = type(getattr(logits, name, None))
            if kind not in (int, float, str):
                raise InputError(f"--try: {name} must be a number or word of distill.logits")
            values[name] = kind(text)
    return dataclasses.replace(logits, **values)


def show(rows: Rows) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("recipe", "tokens", "KL", "KL change", "recall", "rank corr.", "s a layout"):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    before = means(rows, "undistilled", 0, "kl")
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        budgets = sorted({row["tokens"] for row in rows if row["recipe"] == recipe})
        last = means(rows, recipe, budgets[-1], "kl")
        for tokens in budgets:
            kl = means(rows, recipe, tokens, "kl")
            shared = [layout for layout in kl if layout in last and layout in before]
            if not shared:
                continue
            changes = [kl[layout] / before[layout] - 1 for layout in shared]
            order = spearman(
                np.array([kl[layout] for layout in shared]),
                np.array([last[layout] for layout in shared]),
            )
            found = rows_of(rows, recipe, tokens)
            shares = [row["recall"] for row in found if row["recall"] is not None]
            table.add_row(
                recipe or "the study's",
                f"{tokens:,}",
                f"{statistics.fmean(kl.values()):.4f}",
                f"{min(changes):+.0%} to {max(changes):+.0%}",
                f"{statistics.fmean(shares):.1%}" if shares else "",
                f"{order.value:.2f}",
                f"{statistics.fmean(row['seconds'] for row in found):.1f}",
            )
    Console().print(table)


def rows_of(rows: Rows, recipe: str, tokens: int) -> Rows:
    return [row for row in rows if (row["recipe"], row["tokens"]) == (recipe, tokens)]


def means(rows: Rows, recipe: str, tokens: int, figure: str) -> dict[str, float]:
    """Layout -> mean over seeds."""
    found: dict[str, list[float]] = {}
    for row in rows_of(rows, recipe, tokens):
        found.setdefault(row["layout"], []).append(row[figure])
    return {layout: statistics.fmean(values) for layout, values in found.items()}


if __name__ == "__main__":
    sys.exit(main())
