"""Names for things that users can add to: mixers and search strategies.

A built-in is one file in a package, and the file's stem is its name, so listing the names imports
nothing. A third party registers by an entry point or in a file that the study names under
``plugins``.
"""

from __future__ import annotations

import ast
import filecmp
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from mohawk_nas.errors import ConfigError, MohawkError, RegistryError, did_you_mean

T = TypeVar("T")

_PLUGIN = "mohawk_nas_plugin_"


class Registry(Generic[T]):
    """Maps names to classes of one kind.

    Args:
        kind: What is registered, in the singular, for messages ("mixer").
        package: Package whose modules are the built-ins. A module registers its own stem when it
            is imported, which happens when the name is first asked for. Modules whose name begins
            with an underscore are helpers and carry no name.
        entry_points: Entry-point group through which installed packages add names.
        reserved: Names that mean something else where these names are used.
    """

    def __init__(
        self, kind: str, *, package: str, entry_points: str, reserved: Collection[str] = ()
    ) -> None:
        self.kind = kind
        self._package = package
        self._group = entry_points
        self._reserved = frozenset(reserved)
        self._items: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that enters the class under ``name``.

        Raises:
            RegistryError: The name is taken by a class from another place, or reserved.
        """

        def enter(item: type[T]) -> type[T]:
            if name in self._reserved:
                raise RegistryError(
                    f"{self.kind} {name!r} is a short name that comes with the package; "
                    f"{_origin(item)} must choose another name"
                )
            if item.__module__ != f"{self._package}.{name}" and name not in self._items:
                # A built-in has its name from the start, imported or not.
                self._load_builtin(name)
            present = self._items.get(name)
            if present is not None and _origin(present) != _origin(item):
                raise RegistryError(
                    f"{self.kind} {name!r} is already registered by {_origin(present)}; "
                    f"{_origin(item)} must choose another name"
                )
            self._items[name] = item
            return item

        return enter

    def get(self, name: str) -> type[T]:
        """The class registered under ``name``; imports its module if need be.

        Raises:
            RegistryError: Nothing has this name; the message lists what there is.
        """
        if name not in self._items:
            self._load(name)
        if name not in self._items:
            known = self.names()
            raise RegistryError(
                f"unknown {self.kind} {name!r}; available: {', '.join(known)}."
                f"{did_you_mean(name, known)} (One of your own must be named under `plugins`.)"
            )
        return self._items[name]

    def names(self) -> list[str]:
        """Every name, sorted, without importing anything that is not loaded yet."""
        return sorted({*self._items, *self._builtin_names(), *self._entry_points()})

    def name_of(self, item: type[T]) -> str:
        """The name that a class is registered under.

        Raises:
            RegistryError: It is not registered.
        """
        for name, known in self._items.items():
            if known is item:
                return name
        raise RegistryError(f"{item.__qualname__} is not a registered {self.kind}")

    def origin(self, name: str) -> str:
        """File and line where the class behind ``name`` is defined."""
        return _origin(self.get(name))

    def _builtin_names(self) -> list[str]:
        try:
            package = importlib.import_module(self._package)
        except ModuleNotFoundError as e:
            if e.name != self._package:
                raise
            raise RegistryError(
                f"package {self._package} is not found: this looks like a clone that is not "
                "installed; run `pip install -e .` in it"
            ) from e
        modules = pkgutil.iter_modules(package.__path__)
        return [module.name for module in modules if not module.name.startswith("_")]

    def _entry_points(self) -> dict[str, importlib.metadata.EntryPoint]:
        return {point.name: point for point in importlib.metadata.entry_points(group=self._group)}

    def _load_builtin(self, name: str) -> bool:
        if name not in self._builtin_names():
            return False
        importlib.import_module(f"{self._package}.{name}")
        return True

    def _load(self, name: str) -> None:
        if self._load_builtin(name):
            return
        if (point := self._entry_points().get(name)) is not None:
            try:
                item = point.load()
            except Exception as e:
                raise RegistryError(
                    f"{self.kind} {name!r}: its entry point {point.value}"
                    f"{f' of {point.dist.name}' if point.dist else ''} cannot be imported: "
                    f"{in_one_line(e)}"
                ) from e
            self.register(name)(item)


def load_plugin(path: Path) -> None:
    """Import a user's Python file, so that what it registers takes part like a built-in.

    The file is imported once per process, under a name made from its resolved path. A copy of one
    that is imported already, such as an export holds, is the same plugin.

    Raises:
        ConfigError: The file does not exist or cannot be imported.
    """
    path = path.resolve()
    if not path.is_file():
        raise ConfigError(f"plugins: {path} must be a Python file, but there is none")
    name = f"{_PLUGIN}{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    present = [str(m.__file__) for n, m in sys.modules.items() if n.startswith(_PLUGIN)]
    if name in sys.modules or any(
        Path(file).is_file() and filecmp.cmp(file, path, shallow=False) for file in present
    ):
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"plugins: {path} must be a Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    # A script that ends itself is no plugin either.
    except (Exception, SystemExit) as e:
        del sys.modules[name]
        raise ConfigError(f"plugins: importing {path} failed: {in_one_line(e)}") from e


def line_of(item: type[Any], error: BaseException) -> int | None:
    """The last line of the file of a user's class that led to an error."""
    file = getattr(inspect.getmodule(item), "__file__", None)
    frames = traceback.extract_tb(error.__traceback__)
    return next((f.lineno for f in reversed(frames) if f.filename == file), None)


def in_one_line(error: BaseException) -> str:
    """What an error says, and of which kind it is unless it is one of the package's own."""
    reason = " ".join(str(error).split())
    return reason if isinstance(error, MohawkError) else f"{type(error).__name__}: {reason}"


def is_users(item: type[Any]) -> bool:
    """Whether a class is a user's own, neither of this package nor in its ``mixers/``."""
    return item.__module__.partition(".")[0] != "mohawk_nas"


def is_plugin(item: type[Any]) -> bool:
    """Whether a class comes from a file that a study names under ``plugins``."""
    return item.__module__.startswith(_PLUGIN)


@cache
def text_digest(item: type[Any]) -> str:
    """Digest of the text that a user's class comes from: its file's and that of its helpers.

    It is asked for at every trial, layer by layer, and a class stays what it was imported as.
    """
    source = inspect.getsource(inspect.getmodule(item) or item)
    digest = hashlib.sha256(source.encode())
    for path in helpers(item):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def helpers(item: type[Any]) -> list[Path]:
    """Files of a user's own that the file of a user's class imports, however indirectly, sorted.

    They are of the class's own package, or lie beside a file that is named under ``plugins``. What
    is imported is read in the files, so that the answer does not depend on what has run.
    """
    home = inspect.getmodule(item)
    if home is None or not getattr(home, "__file__", None):
        return []
    first = Path(str(home.__file__)).resolve()
    # From the folder that holds its package.
    up = home.__name__.count(".") + (first.stem == "__init__")
    package = "" if is_plugin(item) else home.__name__.partition(".")[0]
    if package and not up:
        # A module by itself, in a folder that it shares with all that is installed.
        return []
    root = [first.parent, *first.parent.parents][up]
    found, left = {first}, [first]
    while left:
        for path in _imported(left.pop(), root=root, package=package):
            if path not in found:
                found.add(path)
                left.append(path)
    return sorted(found - {first})


def _imported(path: Path, *, root: Path, package: str) -> Iterator[Path]:
    """Files below ``root`` that a file imports; of one package only, if that is named."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    here = path.relative_to(root).parts[:-1]
    names: list[tuple[str, ...]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                if node.level > len(here):
                    continue
                base = here[: len(here) - node.level + 1] + base
            # What is imported of a package may be one of its modules.
            names += [base, *((*base, alias.name) for alias in node.names)]
    for name in names:
        if not name or name[0] == "mohawk_nas" or (package and name[0] != package):
            continue
        for there in (root.joinpath(*name).with_suffix(".py"), root.joinpath(*name, "__init__.py")):
            if there.is_file():
                yield there


def _origin(item: type[Any]) -> str:
    try:
        return f"{inspect.getsourcefile(item)}:{inspect.getsourcelines(item)[1]}"
    except (OSError, TypeError):
        return f"{item.__module__}.{item.__qualname__}"
