"""Prints how stage 3 scales over processes, from results of `mohawk-nas bench distill`.

Each process trains on a batch of its own, so the work grows with their number. Efficiency is the
rate of N processes over N times the rate of one:

    mohawk-nas bench distill --model phi-1.5 --batch-size 4 --out one.json
    torchrun --nproc-per-node 2 -m mohawk_nas bench distill --model phi-1.5 --batch-size 4 \\
        --parallel fsdp --out two.json
    python studies/benchmarks/scaling.py one.json two.json
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mohawk_nas.errors import InputError
from mohawk_nas.files import read_json

SAME = ("model", "layers", "batch", "tokens")
"""Shapes that must agree for rates to be compared."""


def rows(paths: list[Path]) -> list[dict[str, Any]]:
    """A row for each way of training one student that is measured, by number of processes.

    Raises:
        InputError: The files are of different models or devices, or none is of one process.
    """
    found, measured_as = [], None
    for path in paths:
        content = read_json(path)
        for record in content["results"]:
            students = record["shapes"].get("students", 1)
            is_ours = record["suite"] == "distill" and not record["case"].startswith("stock")
            if not is_ours or students != 1 or record["median"] is None:
                continue
            one = {"device": content["device"]} | {k: record["shapes"][k] for k in SAME}
            if measured_as not in (None, one):
                raise InputError(f"{path}: must be of {measured_as}, but is of {one}")
            measured_as = one
            # Layers that are run again are compared with such.
            again = record["case"].endswith("run again")
            figures = record["figures"]
            found.append({"processes": content["processes"], "case": record["case"]} | figures)
            found[-1]["again"] = again
    alone = {row["again"]: row["tokens_per_second"] for row in found if row["processes"] == 1}
    if not alone:
        raise InputError(f"one of {', '.join(map(str, paths))} must be of one process")
    for row in found:
        one_rate = alone.get(row["again"])
        row["efficiency"] = one_rate and row["tokens_per_second"] / row["processes"] / one_rate
    return sorted(found, key=lambda row: (row["again"], row["processes"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="files of `bench distill`")
    parsed = parser.parse_args()
    print(
        f"{'processes':>9}  {'case':<32} {'tokens/s':>10} {'MFU':>6} {'GiB':>6} {'efficiency':>10}"
    )
    for row in rows(parsed.results):
        mfu = f"{row['mfu']:.1%}" if "mfu" in row else "-"
        memory = f"{row['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in row else "-"
        efficiency = f"{row['efficiency']:.1%}" if row["efficiency"] else "-"
        print(
            f"{row['processes']:>9}  {row['case']:<32} {row['tokens_per_second']:>10,.0f} "
            f"{mfu:>6} {memory:>6} {efficiency:>10}"
        )


if __name__ == "__main__":
    main()
