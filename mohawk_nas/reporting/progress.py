"""Progress of long work: bars on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column

from mohawk_nas.reporting import Task

__all__ = ["ConsoleReporter"]

LINE_EVERY = 15.0
"""Seconds between two plain lines of one stage."""


class ConsoleReporter:
    """Shows stages as bars on a terminal, and as plain lines where nobody watches.

    Args:
        console: Where to write. None takes stderr, so that stdout holds results only.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._progress: Progress | None = None

    @contextmanager
    def stage(
        self, name: str, total: float | None, unit: str, *, done: float = 0
    ) -> Iterator[Task]:
        figures = _Figures(total, unit, done)
        if not self.console.is_terminal:
            lines = _Lines(self.console, name, figures)
            yield lines
            lines.finish()
            return
        outermost = self._progress is None
        progress = self._progress = self._progress or _bars(self.console)
        if outermost:
            progress.start()
        try:
            # Inner stages of a long one may be many and alike: each takes its forerunner's place.
            for earlier in progress.tasks:
                if earlier.finished and earlier.description == name:
                    progress.remove_task(earlier.id)
            bar = progress.add_task(name, total=total, figures=figures.text())
            progress.update(bar, completed=done)
            yield _Bar(progress, bar, figures)
            if figures.idle:
                progress.remove_task(bar)
            elif total is None:
                progress.update(bar, total=figures.done)
        finally:
            if outermost:
                progress.stop()
                self._progress = None

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class _Figures:
    """What a stage has done, and how fast."""

    def __init__(self, total: float | None, unit: str, done: float) -> None:
        self.total, self._unit = total, unit
        self.done, self._done_before = done, done
        self._tokens = 0
        self._shown: dict[str, float | str] = {}
        self._began = time.monotonic()

    def add(self, amount: float, tokens: int, figures: Mapping[str, float | str]) -> None:
        self.done += amount
        self._tokens += tokens
        self._shown.update(figures)

    @property
    def idle(self) -> bool:
        """Whether nothing has been done in this run."""
        return self.done == self._done_before

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def text(self) -> str:
        """How much, how fast, how much longer, then the figures."""
        of_total = "" if self.total is None else f"/{self.total:,.0f}"
        plural = "" if (self.total or self.done) == 1 else "s"
        parts = [f"{self.done:,.0f}{of_total} {self._unit}{plural}"]
        if self._tokens:
            parts.append(f"{self._tokens / max(self.seconds, 1e-9):,.0f} tokens/s")
        if self.total is not None and not self.idle and self.done < self.total:
            rate = (self.done - self._done_before) / max(self.seconds, 1e-9)
            parts.append(f"{_duration((self.total - self.done) / rate)} left")
        for name, value in self._shown.items():
            shown = value if isinstance(value, str) else f"{value:.4g}"
            parts.append(f"{name.replace('_', ' ')} {shown}")
        return " · ".join(parts)


class _Bar:
    def __init__(self, progress: Progress, bar: TaskID, figures: _Figures) -> None:
        self._progress, self._bar, self._figures = progress, bar, figures

    def advance(self, amount: float = 1, *, tokens: int = 0, **figures: float | str) -> None:
        self._figures.add(amount, tokens, figures)
        self._progress.update(self._bar, advance=amount, figures=self._figures.text())

    def expect(self, total: float) -> None:
        self._figures.total = total
        self._progress.update(self._bar, total=total, figures=self._figures.text())


class _Lines:
    def __init__(self, console: Console, name: str, figures: _Figures) -> None:
        self._console, self._name, self._figures = console, name, figures
        self._last = time.monotonic()

    def advance(self, amount: float = 1, *, tokens: int = 0, **figures: float | str) -> None:
        self._figures.add(amount, tokens, figures)
        if time.monotonic() - self._last >= LINE_EVERY:
            self._last = time.monotonic()
            self._print("")

    def expect(self, total: float) -> None:
        self._figures.total = total

    def finish(self) -> None:
        if not self._figures.idle:
            self._print(f" · took {_duration(self._figures.seconds)}")

    def _print(self, rest: str) -> None:
        line = f"{self._name}: {self._figures.text()}{rest}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _bars(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        # Of all columns this one is cut where a line is too long.
        TextColumn(
            "{task.fields[figures]}",
            style="dim",
            markup=False,
            table_column=Column(ratio=1, no_wrap=True),
        ),
        console=console,
        expand=True,
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"
