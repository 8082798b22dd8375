"""Stage 3's curves for TensorBoard."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Board", "missing_package"]


def missing_package() -> str | None:
    """What is wrong with ``distill.tensorboard: true`` here, or None."""
    if importlib.util.find_spec("tensorboard") is not None:
        return None
    return (
        "distill.tensorboard: needs the tensorboard package, which is not installed; "
        "`pip install 'mohawk-nas[tensorboard]'`"
    )


class Board:
    """A folder of event files.

    Args:
        folder: Made if need be.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    @contextmanager
    def after(self, step: int) -> Iterator[None]:
        """For the length of the block, take entries; what was there after ``step`` is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)
        try:
            yield
        finally:
            self._writer.close()

    def add(self, entries: Sequence[Mapping[str, float]]) -> None:
        """Curves of ``loss``, ``lr`` and whatever else the entries hold beside ``step``."""
        for entry in entries:
            for name, value in entry.items():
                if name != "step":
                    self._writer.add_scalar(name, value, int(entry["step"]))
        self._writer.flush()
