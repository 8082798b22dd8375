"""What predicts a distilled layout: one table over ground-truth tables.

    python studies/ground_truth/report.py studies/ground_truth/*.jsonl

For each table and each budget of stage 3: the rank correlation of every objective, and of every
smaller budget, with the distilled KL and recall of the largest budget, over the layouts that have
all of them, with bootstrap intervals; overall and within the best quarter by the distilled figure.
A smaller budget's KL is taken on every other block of the text, and foretells that on the others:
on the same blocks the two would share their noise. The largest budget's figure on the validation
split, of one seed, is what a study's rungs choose by. Then what the seeds of stage 3 allow: the
share of the variance that the layouts make, and the correlation that a perfect score would reach.
Then what a rung's choice among the best is up against: how far two splits, and two seeds, differ
about the 16 layouts that are best by KL - 0.2 recall. Written beside the tables as `report.json`.

    python studies/ground_truth/report.py phi-recall.jsonl --banks banks/phi-recall-*.jsonl

With `--banks`, tables of the same layouts scored with other banks: how their order of layouts
agrees with that of the first table's bank, over those that all these tables hold, and with the
distilled figure. The first table's own rows of other seeds of the bank stand beside them, with the
layouts that they have.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import stats

from mohawk_nas.config import OBJECTIVES
from mohawk_nas.files import write_json
from mohawk_nas.search import statistics

TRUTHS = ("kl", "recall")
FEWEST = 12
"""Layouts below which nothing is said."""
AMONG = 16
"""About as many as climb to a rung."""
RECALL_WEIGHT = 0.2
"""That of a study which names no other, near enough."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """How well one figure orders layouts by another."""

    table: str
    truth: str
    score: str
    layouts: int
    overall: statistics.Interval
    best_quarter: statistics.Interval | None
    """None where a quarter is fewer than 12 layouts."""


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """What the seeds of stage 3 allow."""

    table: str
    truth: str
    layouts: int
    seeds: int
    reliability: float
    best_quarter: float | None
    ceiling: float


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What makes two measurements of the best layouts differ: standard deviations over layouts of a
    figure, the mean over layouts taken out."""

    table: str
    truth: str
    layouts: int
    splits: float
    """Of validation - test, of one seed."""
    drawing: float | None
    """What that would be if the items of both, blocks of text or parts of the probe, were drawn
    from one set; None where a table keeps none."""
    seeds: float | None
    """Of one seed on the test split, by those of the layouts that have two; None for fewer than
    ``FEWEST`` of them."""


@dataclass(frozen=True, kw_only=True)
class Bank:
    """How scores with another bank order layouts."""

    table: int
    """0 is the first, then those of `--banks`."""
    tokens: int
    """Of stage 2."""
    seed: int
    score: str
    layouts: int
    agreement: float
    """Spearman's correlation with the scores of the table's bank."""
    shared: int
    """Distilled layouts that all banks' scores are known of."""
    distilled: float | None
    """Spearman's correlation with their distilled KL, None for fewer than 12."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--banks", nargs="+", default=[], type=Path, help="scored with other banks")
    parser.add_argument("--out", type=Path, help="report.json beside the first table")
    args = parser.parse_args()
    predictions: list[Prediction] = []
    seeds: list[Seeds] = []
    noise: list[Noise] = []
    for path in args.tables:
        rows = read(path)
        for truth in TRUTHS:
            predictions += predict(path.stem, rows, truth)
            if (found := seeds_of(path.stem, rows, truth)) is not None:
                seeds.append(found)
            if (noisy := noise_of(path.stem, rows, truth)) is not None:
                noise.append(noisy)
    show(predictions, seeds, noise)
    banks = compare_banks(*(read(path) for path in (args.tables[0], *args.banks)))
    show_banks(args.tables[0].stem, banks)
    out = args.out or args.tables[0].parent / "report.json"
    named = [path.name for path in args.tables]
    named += ["--banks", *(path.name for path in args.banks)] if args.banks else []
    write_json(
        out,
        {
            "command": " ".join([Path(sys.argv[0]).name, *named]),
            "predictions": [asdict(row) for row in predictions],
            "seeds": [asdict(row) for row in seeds],
            "noise": [asdict(row) for row in noise],
            "banks": [asdict(row) for row in banks],
        },
    )


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def compare_banks(
    rows: Sequence[Mapping[str, Any]], *others: Sequence[Mapping[str, Any]]
) -> list[Bank]:
    """Banks of other tables and of other seeds against the first table's.

    Those of too few layouts are left out; if none is left, there is nothing to compare.
    """
    # Two tables may hold banks of as many tokens that were trained otherwise.
    scored: dict[tuple[int, int, int], dict[str, Mapping[str, float]]] = {}
    for number, table in enumerate((rows, *others)):
        tokens = table[0]["study"]["bank"]["hidden"]["tokens"]
        for row in table:
            if row["kind"] == "zero_shot":
                scored.setdefault((tokens, number, row["bank_seed"]), {})[row["layout"]] = row
    own = (rows[0]["study"]["bank"]["hidden"]["tokens"], 0, 0)
    first = scored.get(own, {})
    scored = {
        key: found
        for key, found in sorted(scored.items())
        if len(found.keys() & first.keys()) >= FEWEST
    }
    if len(scored) < 2:
        return []
    budget = max((row["tokens"] for row in rows if row["kind"] == "distilled"), default=0)
    distilled = by_layout([row for row in rows if row["kind"] == "distilled"], "kl", budget)
    whole = set.intersection(*(set(found) for key, found in scored.items() if key[2] == 0))
    # Of one's own seeds there may be few, so they do not cut what the others are compared on.
    layouts = sorted(whole & distilled.keys())
    worth = np.array([np.mean(distilled[layout]) for layout in layouts])
    banks = []
    for (tokens, number, seed), found in scored.items():
        same = sorted((whole if seed == 0 else first.keys()) & found.keys())
        if len(same) < FEWEST:
            continue
        for score in (name for name in OBJECTIVES if name in found[same[0]]):
            compared = seed == 0 and len(layouts) >= FEWEST
            banks.append(
                Bank(
                    table=number,
                    tokens=tokens,
                    seed=seed,
                    score=score,
                    layouts=len(same),
                    agreement=rank_correlation(
                        [found[x][score] for x in same], [first[x][score] for x in same]
                    ),
                    shared=len(layouts),
                    distilled=rank_correlation([found[x][score] for x in layouts], worth)
                    if compared
                    else None,
                )
            )
    return banks


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    return float(stats.spearmanr(one, other).statistic)


def predict(name: str, rows: Sequence[Mapping[str, Any]], truth: str) -> list[Prediction]:
    """Every objective and smaller budget against the largest budget, averaged over its seeds."""
    distilled = [row for row in rows if row["kind"] == "distilled" and row[truth] is not None]
    budgets = sorted({row["tokens"] for row in distilled})
    if not budgets or budgets[-1] == 0:
        return []
    known: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["kind"] == "zero_shot" and row["bank_seed"] == 0:
            known.setdefault(row["layout"], {}).update(
                {objective: row[objective] for objective in OBJECTIVES if objective in row}
            )
    for tokens in budgets:
        for layout, values in by_layout(distilled, truth, tokens).items():
            # Of a smaller budget one seed, which is what a rung would have.
            value = float(np.mean(values)) if tokens == budgets[-1] else values[0]
            known.setdefault(layout, {})[f"{tokens:,} tokens"] = value
    last, apart = f"{budgets[-1]:,} tokens", {}
    if truth == "kl":
        for tokens in budgets[:-1]:
            for layout, value in halves(distilled, tokens, first=True).items():
                known[layout][f"{tokens:,} tokens"] = value
        apart = halves(distilled, budgets[-1], first=False)
    validated = f"{budgets[-1]:,} tokens, validation text"
    for layout, value in on_validation(distilled, truth, budgets[-1]).items():
        known[layout][validated] = value
    names = [n for n in OBJECTIVES if any(n in figures for figures in known.values())]
    names += [f"{tokens:,} tokens" for tokens in budgets[:-1]]
    # Tables from before it was kept have none.
    names += [validated] if any(validated in figures for figures in known.values()) else []
    layouts = [x for x, figures in known.items() if {*names, last} <= set(figures)]
    whole = [known[layout] for layout in layouts]
    if len(whole) < FEWEST:
        return []
    sign = 1 if truth == "kl" else -1
    found = []
    for score in names:
        others = apart and score.endswith("tokens")
        worth = sign * np.array([apart[x] if others else known[x][last] for x in layouts])
        best = worth <= np.quantile(worth, 0.25)
        # A budget's recall is a share that is right, the objective of that name one that is lost.
        turned = sign if "tokens" in score else 1
        scores = turned * np.array([figures[score] for figures in whole])
        found.append(
            Prediction(
                table=name,
                truth=truth,
                score=score,
                layouts=len(whole),
                overall=statistics.spearman(scores, worth),
                best_quarter=statistics.spearman(scores[best], worth[best])
                if best.sum() >= FEWEST
                else None,
            )
        )
    return found


def seeds_of(name: str, rows: Sequence[Mapping[str, Any]], truth: str) -> Seeds | None:
    """Of the largest budget that several seeds have, and the most seeds that enough layouts have.

    A table whose making was cut short holds fewer seeds of some.
    """
    distilled = [row for row in rows if row["kind"] == "distilled" and row[truth] is not None]
    for tokens in sorted({row["tokens"] for row in distilled if row["tokens"]}, reverse=True):
        found = by_layout(distilled, truth, tokens)
        counts = sorted(map(len, found.values()), reverse=True)
        most = counts[FEWEST - 1] if len(counts) >= FEWEST else 0
        if most < 2:
            continue
        values = np.array([v[:most] for v in found.values() if len(v) >= most])
        means = values.mean(axis=1)
        best = values[means <= np.quantile(means, 0.25)]
        return Seeds(
            table=name,
            truth=truth,
            layouts=len(values),
            seeds=most,
            reliability=statistics.reliability(values),
            best_quarter=statistics.reliability(best) if len(best) >= FEWEST // 2 else None,
            ceiling=statistics.ceiling(values),
        )
    return None


def noise_of(name: str, rows: Sequence[Mapping[str, Any]], truth: str) -> Noise | None:
    """Of the largest budget; None for tables without the validation split, or without recall."""
    distilled = [row for row in rows if row["kind"] == "distilled" and row["bank_seed"] == 0]
    budget = max((row["tokens"] for row in distilled), default=0)
    by_seed: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in distilled:
        if row["tokens"] == budget:
            by_seed.setdefault(row["seed"], {})[row["layout"]] = row
    first, second = (by_seed.get(seed, {}) for seed in (0, 1))
    kept = all("validation" in row and row["recall"] is not None for row in first.values())
    if not budget or not kept or len(first) < AMONG:
        return None
    best = sorted(first, key=lambda x: first[x]["kl"] - RECALL_WEIGHT * first[x]["recall"])[:AMONG]
    gaps = [first[x]["validation"][truth] - first[x][truth] for x in best]
    parts = ("kl_blocks",) if truth == "kl" else ("recall_parts", "recall_sequences")
    drawing = None
    if key := next((key for key in parts if all(key in first[x] for x in best)), None):
        items = np.array([first[x][key] for x in best])
        rest = items - items.mean(axis=0)
        rest -= rest.mean(axis=1, keepdims=True)
        # Of each of the two splits, as if both had as many items as this one.
        drawing = float(np.sqrt(2 * rest.var(axis=1).mean() / items.shape[1]))
    both = [first[x][truth] - second[x][truth] for x in first if x in second]
    return Noise(
        table=name,
        truth=truth,
        layouts=len(best),
        splits=float(np.std(gaps)),
        drawing=drawing,
        seeds=float(np.std(both) / np.sqrt(2)) if len(both) >= FEWEST else None,
    )


def by_layout(
    distilled: Sequence[Mapping[str, Any]], truth: str, tokens: int
) -> dict[str, list[float]]:
    """Layout -> its figure by seed, of the first bank."""
    found: dict[str, list[float]] = {}
    for row in sorted(distilled, key=lambda row: int(row["seed"])):
        if row["tokens"] == tokens and row["bank_seed"] == 0:
            found.setdefault(row["layout"], []).append(row[truth])
    return found


def on_validation(
    distilled: Sequence[Mapping[str, Any]], truth: str, tokens: int
) -> dict[str, float]:
    """Layout -> what a rung would see of it: the first seed, on the validation split."""
    found: dict[str, float] = {}
    for row in sorted(distilled, key=lambda row: int(row["seed"])):
        if row["tokens"] == tokens and row["bank_seed"] == 0 and "validation" in row:
            found.setdefault(row["layout"], row["validation"][truth])
    return found


def halves(distilled: Sequence[Mapping[str, Any]], tokens: int, *, first: bool) -> dict[str, float]:
    """Layout -> KL on every other block, of the first bank.

    The first half, which foretells, of the first seed; the other averaged over seeds.
    """
    found: dict[str, list[float]] = {}
    for row in sorted(distilled, key=lambda row: int(row["seed"])):
        if row["tokens"] == tokens and row["bank_seed"] == 0:
            blocks = row["kl_blocks"][0 if first else 1 :: 2]
            found.setdefault(row["layout"], []).append(float(np.mean(blocks)))
    return {
        layout: values[0] if first else float(np.mean(values)) for layout, values in found.items()
    }


def show(predictions: Sequence[Prediction], seeds: Sequence[Seeds], noise: Sequence[Noise]) -> None:
    console = Console()
    table = Table(title="Spearman's correlation with the distilled figure", box=box.SIMPLE_HEAD)
    for column in ("teacher", "distilled", "score", "layouts", "overall", "best quarter"):
        table.add_column(column)
    for row in predictions:
        quarter = "-" if row.best_quarter is None else str(row.best_quarter)
        figures = (str(row.layouts), str(row.overall), quarter)
        table.add_row(row.table, row.truth, row.score, *figures)
    console.print(table)
    table = Table(title="What the seeds of stage 3 allow", box=box.SIMPLE_HEAD)
    for column in ("teacher", "distilled", "layouts x seeds", "ICC", "best quarter", "ceiling"):
        table.add_column(column)
    for seed in seeds:
        quarter = "-" if seed.best_quarter is None else f"{seed.best_quarter:.2f}"
        size = f"{seed.layouts} x {seed.seeds}"
        figures = (size, f"{seed.reliability:.2f}", quarter, f"{seed.ceiling:.2f}")
        table.add_row(seed.table, seed.truth, *figures)
    console.print(table)
    if not noise:
        return
    title = f"How two measurements of the {AMONG} best differ (standard deviations)"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("teacher", "distilled", "two splits", "by drawing alone", "one seed"):
        table.add_column(column)
    for row in noise:
        figures = ("-" if x is None else f"{x:.4f}" for x in (row.splits, row.drawing, row.seeds))
        table.add_row(row.table, row.truth, *figures)
    console.print(table)


def show_banks(name: str, banks: Sequence[Bank]) -> None:
    if not banks:
        return
    title = f"{name}: scores with other banks, their correlation with the table's and with what "
    title += f"{banks[0].shared} layouts distil to"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in ("table", "tokens", "seed", "score", "layouts", "agreement", "distilled KL"):
        table.add_column(column, justify="left" if column == "score" else "right")
    for bank in banks:
        truth = "-" if bank.distilled is None else f"{bank.distilled:.3f}"
        figures = (str(bank.layouts), f"{bank.agreement:.4f}", truth)
        named = (str(bank.table), f"{bank.tokens:,}", str(bank.seed))
        table.add_row(*named, bank.score, *figures)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
