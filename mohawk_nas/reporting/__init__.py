"""How long work and its results are shown; only the modules in here import rich."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

__all__ = ["SILENT", "Reporter", "Silent", "Task"]


class Task(Protocol):
    """One stage of long work."""

    def advance(self, amount: float = 1, *, tokens: int = 0, **figures: float | str) -> None:
        """Some more is done.

        Args:
            amount: In the stage's unit, since the last call.
            tokens: Tokens that went through since the last call, for a rate.
            **figures: What to show beside the progress, by name; a figure stays until it changes.
        """

    def expect(self, total: float) -> None:
        """There turns out to be another amount to do in all, counted as the stage's ``total``."""


class Reporter(Protocol):
    """Told what happens while it happens."""

    def stage(
        self, name: str, total: float | None, unit: str, *, done: float = 0
    ) -> AbstractContextManager[Task]:
        """A stage of the work, for the length of a ``with`` block.

        Args:
            name: What is done.
            total: All there is to do, None where nobody knows.
            unit: What is counted, in the singular ("step").
            done: How much an earlier run has done already.
        """

    def say(self, text: str) -> None:
        """One line that the user should read."""


class Silent:
    """A reporter that shows nothing."""

    @contextmanager
    def stage(
        self, name: str, total: float | None, unit: str, *, done: float = 0
    ) -> Iterator[Task]:
        yield self

    def advance(self, amount: float = 1, *, tokens: int = 0, **figures: float | str) -> None:
        """Part of the task this reporter hands out."""

    def expect(self, total: float) -> None:
        """Part of the task this reporter hands out."""

    def say(self, text: str) -> None:
        """Nothing is said."""


SILENT = Silent()
