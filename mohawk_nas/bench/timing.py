"""How long something takes: warm-up, then groups of calls, then the median over groups.

On a GPU the time of a group lies between two events on the stream the calls are made from, so it
holds the waiting of the GPU for Python too, as a user's run would.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Effort", "Stopwatch", "Timing", "peak_bytes", "release", "stopwatch", "time_calls"]

Stopwatch = Callable[[Callable[[], object]], float]
"""Seconds that some work takes until its results are there."""

MAX_CALLS = 1000
"""Calls a group."""
LEAST_GROUPS = 3
"""Groups that are timed however long they take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Effort:
    """How much is measured."""

    groups: int = 10
    group_seconds: float = 0.2
    """A group holds calls for about as long, one at least."""
    max_seconds: float = 30.0
    """No group is begun after so long, once there are three."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds of one call."""

    seconds: tuple[float, ...]
    """Mean of each group."""
    calls: int
    """A group."""
    warmup_seconds: float
    """Everything before: compilation, tuning, recording of CUDA graphs."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Lower and upper quartile over the groups."""
        if len(self.seconds) == 1:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def time_calls(
    call: Callable[[int], object],
    *,
    stopwatch: Stopwatch,
    effort: Effort,
    warmup: int = 3,
) -> Timing:
    """Time a call again and again.

    Args:
        call: Given its number, which counts from 0, so that its inputs can rotate.
        stopwatch: Times a group of calls.
        effort: How often.
        warmup: Calls before. A training step runs plainly three times and is recorded then.
    """
    number = 0

    def some(count: int) -> None:
        nonlocal number
        for _ in range(count):
            call(number)
            number += 1

    warmed = stopwatch(lambda: some(warmup))
    once = stopwatch(lambda: some(1))
    calls = min(MAX_CALLS, max(1, math.ceil(effort.group_seconds / max(once, 1e-9))))
    seconds: list[float] = []
    total = 0.0
    while len(seconds) < effort.groups:
        if len(seconds) >= LEAST_GROUPS and total >= effort.max_seconds:
            break
        took = stopwatch(lambda: some(calls))
        total += took
        seconds.append(took / calls)
    return Timing(seconds=tuple(seconds), calls=calls, warmup_seconds=warmed)


def stopwatch(device: torch.device) -> Stopwatch:
    """By events on a GPU, by the clock elsewhere."""
    if device.type != "cuda":

        def by_clock(work: Callable[[], object]) -> float:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began

        return by_clock

    def by_events(work: Callable[[], object]) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        began.record()
        work()
        ended.record()
        torch.cuda.synchronize(device)
        return float(began.elapsed_time(ended)) / 1e3

    return by_events


def peak_bytes(work: Callable[[], object], device: torch.device) -> tuple[int, int] | None:
    """Most memory of a GPU during some work.

    Returns:
        All of it, and what went beyond what was held before; None where torch does not count.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return peak, peak - before


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
