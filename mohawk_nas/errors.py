"""Errors a user can cause. Each message says where, what must hold, what came and what to do.

The command line turns every :class:`MohawkError` into one line on stderr. Bad input
(:class:`InputError` and its children) exits with 2, a run that failed midway with 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class MohawkError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class InputError(MohawkError):
    """Something the user gave is wrong; nothing has been run."""

    exit_code = 2


class ConfigError(InputError):
    """One or more problems in a study's configuration, all of them at once."""

    def __init__(self, problems: str | Sequence[str], *, source: str | None = None) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        self.source = source
        where = f"{source}: " if source else ""
        if len(self.problems) == 1:
            text = f"{where}{self.problems[0]}"
        else:
            listed = "".join(f"\n  - {problem}" for problem in self.problems)
            text = f"{where}{len(self.problems)} problems:{listed}"
        super().__init__(text)


class RegistryError(InputError):
    """A name that nothing is registered under, or that is registered twice."""


class LayoutError(InputError):
    """A layout that does not fit the model or the search space."""


class MixerError(InputError):
    """A mixer's configuration does not fit the layer it is built for."""


class TeacherError(InputError):
    """The teacher cannot be loaded, or it does something the method cannot follow."""


class DataError(InputError):
    """The text cannot be read, or there is too little of it."""


class BankError(InputError):
    """A bank entry is missing, damaged, or made for something else."""


class RunError(InputError):
    """A run folder holds something that the command must not touch."""


class ExportError(MohawkError):
    """The exported checkpoint does not do what the student does."""


class TrainingError(MohawkError):
    """A run failed midway: non-finite losses, no memory, no disk."""


class Stopped(MohawkError):
    """A signal asked for an end; what was done is saved, and the same command goes on."""

    # EX_TEMPFAIL of sysexits.h: to be tried again.
    exit_code = 75


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the nearest known name, else an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {match[0]!r}?" if match else ""
