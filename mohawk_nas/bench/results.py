"""What is measured, and the file that holds it while it is measured."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mohawk_nas.bench.timing import Timing
from mohawk_nas.files import write_json
from mohawk_nas.ranks import num_ranks, rank

__all__ = ["Record", "Results", "environment"]

PACKAGES = (
    "mohawk-nas",
    "torch",
    "triton",
    "transformers",
    "mamba-ssm",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One measurement, or why there is none."""

    suite: str
    case: str
    shapes: Mapping[str, int | str]
    dtype: str
    unit: str = ""
    median: float | None = None
    """Over repeats, in ``unit``."""
    spread: tuple[float, float] | None = None
    """Lower and upper quartile over repeats, in ``unit``."""
    repeats: int = 0
    """Groups of calls that were timed."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What else is known; the unit ends the name."""
    left_out: str | None = None
    """Why this machine cannot do it; nothing has failed."""
    error: str | None = None
    """First line of what went wrong."""

    def measured(
        self,
        timing: Timing,
        *,
        unit: str = "ms",
        figure: Callable[[float], float] = lambda seconds: seconds * 1e3,
        **figures: float | None,
    ) -> Record:
        """This record with a timing in it.

        Args:
            timing: Seconds of a call.
            unit: Of the median.
            figure: Seconds of a call -> the number in that unit.
            **figures: What else is known; None is left out.
        """
        low, high = sorted(figure(seconds) for seconds in timing.quartiles)
        known = {name: value for name, value in figures.items() if value is not None}
        return dataclasses.replace(
            self,
            unit=unit,
            median=figure(timing.median),
            spread=(low, high),
            repeats=len(timing.seconds),
            figures=known
            | {"calls_a_repeat": timing.calls, "warmup_seconds": timing.warmup_seconds},
        )


class Results:
    """A results file, written anew with every record: a run that is killed keeps what it has.

    Of several processes the first one writes.

    Args:
        path: Where.
        header: What holds for all records.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.records: list[Record] = []
        self._header = header
        self._write(finished=False)

    @property
    def failed(self) -> list[Record]:
        """Records of what went wrong."""
        return [record for record in self.records if record.error is not None]

    def add(self, records: Sequence[Record]) -> None:
        """Keep some more."""
        self.records += records
        self._write(finished=False)

    def finish(self) -> None:
        """Say that nothing more will come."""
        self._write(finished=True)

    def _write(self, *, finished: bool) -> None:
        content = {
            **self._header,
            "finished": finished,
            "results": [dataclasses.asdict(record) for record in self.records],
        }
        if rank() == 0:
            write_json(self.path, content)


def environment(device: torch.device, *, command: str) -> dict[str, Any]:
    """Where, when and with what."""
    on_gpu = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if on_gpu else None
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": properties.name if properties else _processor(),
        "gpu_memory_bytes": properties.total_memory if properties else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cpu": _processor(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "processes": num_ranks(),
        "versions": {"python": sys.version.split()[0]} | _versions(),
        "spread": "lower and upper quartile over repeats",
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # Found on the path but not installed: known once something has imported it.
            module = sys.modules.get(name.replace("-", "_"))
            if module is not None:
                found[name] = str(getattr(module, "__version__", "not installed, but on the path"))
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
