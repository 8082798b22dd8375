"""Progress of long work: bars on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Task as RichTask
from rich.text import Text

from mohawk_nas.reporting import Task

__all__ = ["ConsoleReporter"]

LINE_EVERY = 15.0
"""Seconds between two plain lines of one stage."""


class ConsoleReporter:
    """Shows stages as bars on a terminal, and as a line now and then anywhere else.

    Args:
        console: Where to write; progress belongs on stderr, so that stdout holds results only.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._progress: Progress | None = None

    @contextmanager
    def stage(
        self, name: str, total: float | None, unit: str, *, done: float = 0
    ) -> Iterator[Task]:
        if not self.console.is_terminal:
            task = _PlainTask(self.console, name, total, unit, done)
            yield task
            task.finish()
            return
        outermost = self._progress is None
        progress = self._progress or _bars(self.console)
        self._progress = progress
        try:
            if outermost:
                progress.start()
            bar = progress.add_task(name, total=total, completed=done, figures="")
            yield _BarTask(progress, bar, _Figures(name, total, unit, done))
        finally:
            if outermost:
                progress.stop()
                self._progress = None

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


class _Figures:
    """What a stage has done, and how fast."""

    def __init__(self, name: str, total: float | None, unit: str, done: float) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done, self._done_before = done, done
        self.tokens = 0
        self.shown: dict[str, float | str] = {}
        self._began = time.monotonic()

    def add(self, amount: float, tokens: int, figures: Mapping[str, float | str]) -> None:
        self.done += amount
        self.tokens += tokens
        self.shown |= figures

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def text(self) -> str:
        """Count, rate, time left, then the figures."""
        count = f"{self.done:,.0f}"
        plural = "s"
        if self.total is not None:
            count += f"/{self.total:,.0f}"
            plural = "" if self.total == 1 else "s"
        parts = [f"{count} {self.unit}{plural}"]
        if self.tokens and self.seconds > 0:
            parts.append(f"{self.tokens / self.seconds:,.0f} tokens/s")
        new = self.done - self._done_before
        if self.total is not None and new > 0 and self.done < self.total:
            parts.append(f"{_duration(self.seconds / new * (self.total - self.done))} left")
        for name, value in self.shown.items():
            shown = value if isinstance(value, str) else f"{value:.4g}"
            parts.append(f"{name.replace('_', ' ')} {shown}")
        return " · ".join(parts)


class _BarTask:
    def __init__(self, progress: Progress, bar: TaskID, figures: _Figures) -> None:
        self._progress, self._bar, self._figures = progress, bar, figures

    def advance(self, amount: float = 1, *, tokens: int = 0, **figures: float | str) -> None:
        self._figures.add(amount, tokens, figures)
        self._progress.update(self._bar, advance=amount, figures=self._figures.text())


class _PlainTask:
    def __init__(
        self, console: Console, name: str, total: float | None, unit: str, done: float
    ) -> None:
        self._console = console
        self._figures = _Figures(name, total, unit, done)
        self._last = time.monotonic()

    def advance(self, amount: float = 1, *, tokens: int = 0, **figures: float | str) -> None:
        self._figures.add(amount, tokens, figures)
        if time.monotonic() - self._last >= LINE_EVERY:
            self._last = time.monotonic()
            self._print("")

    def finish(self) -> None:
        self._print(f" · took {_duration(self._figures.seconds)}")

    def _print(self, rest: str) -> None:
        line = f"{self._figures.name}: {self._figures.text()}{rest}"
        self._console.print(line, highlight=False, soft_wrap=True)


class _Clock(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        return Text(_duration(task.elapsed or 0.0), style="cyan")


def _bars(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        _Clock(),
        TextColumn("{task.fields[figures]}", style="dim"),
        console=console,
    )


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
        if minutes >= 60
        else f"{minutes}:{rest:02d} min"
    )
