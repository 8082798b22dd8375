"""What a search chose, beside its baselines, on text that neither bank nor search has seen.

python studies/benchmarks/held_out.py runs/phi-24m
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from mohawk_nas.bank import Bank
from mohawk_nas.files import write_json
from mohawk_nas.layout import Layout
from mohawk_nas.metrics import BlockFigures, evaluate_blocks
from mohawk_nas.pipeline import load_best
from mohawk_nas.recall import recall
from mohawk_nas.runs import provenance
from mohawk_nas.search.study import load_result
from mohawk_nas.student import assemble
from mohawk_nas.workbench import Workbench

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    arguments = parser.parse_args()
    config = load_best(arguments.run).study
    bench = Workbench(config)
    result = load_result(bench.study, bench.space, bench.budget, run_dir=arguments.run)
    layouts = {"best": result.best.layout, **result.baselines}
    figures = {name: measure(bench, layout) for name, layout in layouts.items()}
    rows = []
    for name, (found, share) in sorted(figures.items(), key=lambda item: item[1][0].mean_kl):
        rows.append(
            {
                "name": name,
                "attention_layers": list(layouts[name].attention_layers),
                "search_value": result.by_layout[layouts[name]].value,
                "test_kl": found.mean_kl,
                "more_than_best": paired(found, figures["best"][0]),
                "test_cross_entropy": found.mean_cross_entropy,
                "recall": share,
            }
        )
    teacher = measure(bench, None)
    content = {
        "name": config.name,
        "test_tokens": bench.blocks["test"].tokens.numel(),
        "teacher": {"test_cross_entropy": teacher[0].mean_cross_entropy, "recall": teacher[1]},
        "recall_probe": str(bench.probe("test") or "none that the teacher solves"),
        "layouts": rows,
        "layouts_scored": len(result.trials),
        "bank_tokens": {"matrix": config.bank.matrix.tokens, "hidden": config.bank.hidden.tokens},
        "bank_losses": {
            f"{layer}, {name}": losses(bench.bank, layer, name)
            for layer, name in bench.space.replaceable
        },
        "made_with": {k: v for k, v in provenance().items() if k != "command"},
    }
    path = arguments.out / f"held_out_{config.name}.json"
    write_json(path, content)
    print(f"{'layout':<22}{'KL':>8}{'± to best':>16}{'cross-entropy':>15}{'recall':>9}")
    for row in rows:
        more = "{mean:+.4f} ± {standard_error:.4f}".format(**row["more_than_best"])
        print(
            f"{row['name']:<22}{row['test_kl']:>8.4f}{more:>18}{row['test_cross_entropy']:>13.4f}"
            f"{percent(row['recall']):>9}"
        )
    print(
        f"{'teacher':<22}{0:>8.4f}{'':>18}{teacher[0].mean_cross_entropy:>13.4f}"
        f"{percent(teacher[1]):>9}"
    )


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


@torch.no_grad()
def measure(bench: Workbench, layout: Layout | None) -> tuple[BlockFigures, float | None]:
    """KL divergence and cross-entropy on the test split, and recall; no layout is the teacher."""
    teacher = bench.teacher
    model = teacher.model if layout is None else assemble(teacher, layout, bench.bank)
    blocks, size = bench.blocks["test"], bench.config.search.batch_size
    probe = bench.probe("test")
    figures = evaluate_blocks(teacher, model, blocks, batch_size=size)
    return figures, None if probe is None else recall(model, probe)


def paired(one: BlockFigures, best: BlockFigures) -> dict[str, float]:
    """Mean difference in KL over the same blocks, with its standard error."""
    gaps = [a - b for a, b in zip(one.kl, best.kl, strict=True)]
    return {
        "mean": statistics.fmean(gaps),
        "standard_error": statistics.stdev(gaps) / math.sqrt(len(gaps)),
    }


def losses(bank: Bank, layer: int, name: str) -> dict[str, Any]:
    """Each stage's first and last entry of the loss curve."""
    found: dict[str, list[float]] = {}
    for entry in bank.record(layer, name)["losses"]:
        found.setdefault(entry["stage"], []).append(entry["loss"])
    return {stage: [curve[0], curve[-1]] for stage, curve in found.items()}


if __name__ == "__main__":
    main()
