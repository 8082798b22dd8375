"""What stands in, in a folder that needs no installation, for the registry and the options' reader.

Such a folder brings its mixers along and its options have been checked, so it takes a dictionary
and a constructor. :mod:`mohawk_nas.export.standalone` puts these in place of the names below in
:mod:`mohawk_nas.registry` and :mod:`mohawk_nas.config`.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of the classes that are imported.

    Args:
        kind: What is registered, in the singular, for messages.
        **where: Where an installed package would look for more.
    """

    def __init__(self, kind: str, **where: Any) -> None:
        self.kind = kind
        self._items: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that enters the class under ``name``."""

        def enter(item: type[T]) -> type[T]:
            self._items[name] = item
            return item

        return enter

    def get(self, name: str) -> type[T]:
        """The class registered under ``name``.

        Raises:
            ValueError: This folder does not hold it.
        """
        if name not in self._items:
            raise ValueError(f"unknown {self.kind} {name!r}; this folder holds {[*self._items]}")
        return self._items[name]


def read_options(cls: type[T], options: Mapping[str, Any], *, where: str, owner: str) -> T:
    """An object of a configuration dataclass, from its fields as JSON holds them.

    Raises:
        ValueError: An option is unknown or cannot be.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{where}: {owner} has no option {unknown[0]!r}")
    values = {}
    for name, value in options.items():
        kind = hints[name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            value = read_options(kind, value, where=f"{where}.{name}", owner=owner)
        values[name] = value
    return cls(**values)
