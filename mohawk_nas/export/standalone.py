"""A checkpoint's code, for machines with nothing but torch and transformers.

The files are cut out of the installed package's own, so there is no second copy to keep: a change
to a mixer is a change to the next export. Starting from the two classes that transformers loads,
every definition that these reach is kept as it is written, comments included, and imports inside
the package become imports of the file beside. The files of the mixers are taken whole, since a
user's may do at import what no one can foresee.

transformers copies such files by what it reads in them (``dynamic_module_utils``): siblings are
found by lines ``from .name import``, and every other package that is imported outside of a ``try``
must be installed. So what cannot be written like that is refused here, not on another machine.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mohawk_nas.errors import ExportError
from mohawk_nas.files import read_json, write_json
from mohawk_nas.mixer import MIXERS

__all__ = ["standalone_files", "write_standalone"]

_PACKAGE = "mohawk_nas"
_CONFIGURATION = f"{_PACKAGE}.export.configuration"
_MODELING = f"{_PACKAGE}.export.hf"

_NAMED = {
    _CONFIGURATION: "configuration_mohawk_hybrid",
    _MODELING: "modeling_mohawk_hybrid",
}

AUTO_MAP = {
    "AutoConfig": f"{_NAMED[_CONFIGURATION]}.HybridConfig",
    "AutoModelForCausalLM": f"{_NAMED[_MODELING]}.HybridForCausalLM",
}
"""What the folder's ``config.json`` says of the files: class by the name that transformers asks."""

# In a folder of its own there is nothing to search for names, and no YAML to check.
_STAND_INS = {
    f"{_PACKAGE}.registry": f"{_PACKAGE}.export.plain",
    f"{_PACKAGE}.config": f"{_PACKAGE}.export.plain",
}

# numpy and safetensors come with transformers.
_INSTALLED = {"torch", "transformers", "safetensors", "numpy", *sys.stdlib_module_names}

# On a GPU it comes with torch. Files of kernels import it as a matter of course, and are imported
# only where it is; a `try` that changes nothing lets transformers see that, too.
_WITH_A_GPU = {"triton"}


def write_standalone(folder: Path) -> list[str]:
    """Put a saved hybrid's code into its folder, and into its ``config.json`` where it is.

    Args:
        folder: As :func:`mohawk_nas.export.hf.save_hybrid` leaves it.

    Returns:
        Names of the files written.

    Raises:
        ExportError: As :func:`standalone_files`.
    """
    config = read_json(folder / "config.json")
    files = standalone_files({choices["mixer"] for choices in config["candidates"].values()})
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    write_json(folder / "config.json", {**config, "auto_map": AUTO_MAP})
    return list(files)


def standalone_files(mixers: Iterable[str]) -> dict[str, str]:
    """Everything a hybrid with these mixers needs besides torch and transformers.

    Args:
        mixers: Registered names.

    Returns:
        File name -> text, all for one folder.

    Raises:
        ExportError: Something that is needed cannot be carried along, such as a mixer's import of
            another package.
    """
    homes: dict[str, list[str]] = {}
    for name in mixers:
        found = MIXERS.get(name)
        homes.setdefault(found.__module__, []).append(found.__name__)
    cut = _Cut({_PACKAGE, *(home.partition(".")[0] for home in homes)})
    for home in homes:
        cut.take_whole(home)
    cut.reach(_CONFIGURATION, "HybridConfig")
    cut.reach(_MODELING, "HybridForCausalLM")
    texts = {cut.file_of(name): module.text(cut) for name, module in cut.modules.items()}
    registering = "".join(
        f"from .{cut.file_of(home)} import {name}  # noqa: E402, F401\n"
        for home, names in sorted(homes.items())
        for name in sorted(names)
    )
    if registering:
        texts[_NAMED[_MODELING]] += (
            f"\n\n# The mixers of this model; importing them registers their names.\n{registering}"
        )
    return {f"{name}.py": text for name, text in sorted(texts.items())}


@dataclass
class _Statement:
    """One top-level statement of a module, with the comments above it."""

    node: ast.stmt
    text: str
    first_line: int
    """Where ``text`` begins in the file."""
    binds: set[str]
    uses: set[str]
    kept: bool = False


@dataclass
class _Module:
    name: str
    package: str
    path: Path
    docstring: str
    statements: list[_Statement]
    wanted: set[str] = field(default_factory=set)
    """Imported names that are used."""

    @property
    def own(self) -> bool:
        return self.name.partition(".")[0] == _PACKAGE

    def home_of(self, node: ast.ImportFrom) -> str:
        """The module that an import names."""
        dotted = "." * node.level + (node.module or "")
        return importlib.util.resolve_name(dotted, self.package) if node.level else dotted

    def text(self, cut: _Cut) -> str:
        """The file as it is written out."""
        licence = "# SPDX-License-Identifier: Apache-2.0\n" if self.own else ""
        origin = self.name if self.own else self.path.name
        header = f"# Written by `mohawk-nas export --standalone`, out of {origin}.\n{licence}"
        parts, gap = [], ""
        for statement in self.statements:
            # What is left out leaves its blank lines.
            gap = max(gap, _blank_lines(statement.text))
            if statement.kept:
                parts.append(gap + _rewritten(statement, self, cut).lstrip("\n"))
                gap = ""
        return f"{header}{self.docstring}\n\n{''.join(parts).strip(chr(10))}\n"


class _Cut:
    """What has been reached so far.

    Args:
        roots: Top-level names of the packages that code may be taken from.
    """

    def __init__(self, roots: set[str]) -> None:
        self._roots = roots
        self.modules: dict[str, _Module] = {}

    def module(self, name: str) -> _Module:
        """A module's statements; read once."""
        if name not in self.modules:
            self.modules[name] = _read(name)
        return self.modules[name]

    def is_carried(self, module: str) -> bool:
        """Whether a module's code goes along rather than being installed."""
        return module.partition(".")[0] in self._roots

    def file_of(self, module: str) -> str:
        """A module's name in the folder."""
        if module in _NAMED:
            return _NAMED[module]
        home = self.modules[module]
        if not home.own:
            stem = re.sub(r"\W", "_", home.path.stem)
            others = [m.name for m in self.modules.values() if not m.own]
            same = [m for m in others if re.sub(r"\W", "_", self.modules[m].path.stem) == stem]
            number = same.index(module)
            return f"plugin_{stem}" + (f"_{number + 1}" if number else "")
        return "mohawk_" + module.removeprefix(f"{_PACKAGE}.").replace(".", "_")

    def take_whole(self, name: str) -> None:
        """Keep all of a module."""
        module = self.module(name)
        for statement in module.statements:
            if isinstance(statement.node, ast.Import | ast.ImportFrom):
                module.wanted |= statement.binds
            self._keep(statement, module)

    def reach(self, name: str, wanted: str) -> None:
        """Keep what defines a name in a module, and what that needs.

        Raises:
            ExportError: Something cannot be carried along.
        """
        module = self.module(name)
        if wanted in module.wanted:
            return
        module.wanted.add(wanted)
        for statement in module.statements:
            if wanted in statement.binds:
                self._keep(statement, module)

    def _keep(self, statement: _Statement, module: _Module) -> None:
        whole = not isinstance(statement.node, ast.Import | ast.ImportFrom)
        if whole:
            if statement.kept:
                return
            statement.kept = True
            local = {name for s in module.statements for name in s.binds}
            for name in sorted(statement.uses & local):
                self.reach(module.name, name)
        else:
            statement.kept = True
        for call, imported in _imports_by_call(statement.node):
            if imported.startswith(".") or self.is_carried(imported):
                raise _refusal(module, call, f"{imported} by a call")
        for node, guarded in _imports(statement.node):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if not whole and (alias.asname or alias.name.partition(".")[0]) not in (
                        module.wanted
                    ):
                        continue
                    self._check(alias.name, module, node, guarded)
                continue
            home = module.home_of(node)
            if not self.is_carried(home):
                self._check(home, module, node, guarded)
                continue
            there = _STAND_INS.get(home, home)
            for alias in node.names:
                if whole or (alias.asname or alias.name) in module.wanted:
                    if not any(alias.name in s.binds for s in self.module(there).statements):
                        raise _refusal(module, node, f"{alias.name} from {home}")
                    self.reach(there, alias.name)

    def _check(self, imported: str, module: _Module, node: ast.stmt, guarded: bool) -> None:
        top = imported.partition(".")[0]
        needed = top not in _INSTALLED | _WITH_A_GPU and not guarded
        if self.is_carried(imported) or needed:
            raise _refusal(module, node, imported)


def _refusal(module: _Module, node: ast.stmt | ast.expr, imported: str) -> ExportError:
    advice = "put what can be done without into a `try`, or export without --standalone"
    if imported.endswith(f" from {_PACKAGE}"):
        # Its names stand in other files, and are looked up there when they are first used.
        advice = f"import it from the file that defines it, such as {_PACKAGE}.mixer"
    return ExportError(
        f"standalone: {module.path}:{node.lineno} must import from torch, transformers, the "
        "standard library, and what a mixer needs of its own package by name, but imports "
        f"{imported}; {advice}"
    )


def _read(name: str) -> _Module:
    loaded = sys.modules.get(name)
    spec = getattr(loaded, "__spec__", None) or importlib.util.find_spec(name)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise ExportError(f"standalone: {name} must be a Python file, but is not")
    path = Path(spec.origin)
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    body = ast.parse(text).body
    docstring = ast.get_docstring(ast.Module(body=body, type_ignores=[]), clean=False)
    start = 0
    head = ""
    if docstring is not None:
        start = body[0].end_lineno or 0
        head = "".join(lines[body[0].lineno - 1 : start]).rstrip("\n")
    statements: list[_Statement] = []
    for node in body[docstring is not None :]:
        end = node.end_lineno or node.lineno
        text = "".join(lines[start:end])
        if not _for_types_only(node):
            statement = _Statement(
                node=node,
                text=text,
                first_line=start + 1,
                binds=set(_bound(node)),
                uses={n.id for n in ast.walk(node) if isinstance(n, ast.Name)},
            )
            statements.append(statement)
        start = end
    module = _Module(
        name=name, package=spec.parent or "", path=path, docstring=head, statements=statements
    )
    # Every file begins with it, so that annotations stay unread.
    for statement in statements:
        if isinstance(statement.node, ast.ImportFrom) and statement.node.module == "__future__":
            statement.kept = True
            module.wanted |= statement.binds
    return module


def _blank_lines(text: str) -> str:
    return text[: len(text) - len(text.lstrip("\n"))]


def _for_types_only(node: ast.stmt) -> bool:
    """``if TYPE_CHECKING:``, which transformers would take for an import, and ``__all__``."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return "__all__" in _bound(node)


def _bound(node: ast.AST) -> Iterator[str]:
    """Names that a top-level statement makes or changes."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        for alias in node.names:
            yield alias.asname or alias.name.partition(".")[0]
    elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))
    elif isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While):
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, ast.ExceptHandler):
                for one in inner.body:
                    yield from _bound(one)
            else:
                yield from _bound(inner)


def _imports(
    node: ast.AST, guarded: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements in a statement, and whether a ``try`` is around them."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, guarded
    for inner in ast.iter_child_nodes(node):
        yield from _imports(inner, guarded or isinstance(node, ast.Try))


def _imports_by_call(node: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Calls of ``importlib.import_module`` with a name that is written there, and the name."""
    for call in ast.walk(node):
        if not isinstance(call, ast.Call) or not call.args:
            continue
        if ast.unparse(call.func).rpartition(".")[2] != "import_module":
            continue
        name = call.args[0]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            yield call, name.value


def _rewritten(statement: _Statement, module: _Module, cut: _Cut) -> str:
    """A statement's text with its imports turned to the files beside."""
    at_top = isinstance(statement.node, ast.Import | ast.ImportFrom)
    lines = statement.text.splitlines(keepends=True)
    # From the last to the first, so that line numbers stay right.
    for node, guarded in sorted(_imports(statement.node), key=lambda found: -found[0].lineno):
        names = [
            alias
            for alias in node.names
            if not at_top or (alias.asname or alias.name.partition(".")[0]) in module.wanted
        ]
        if isinstance(node, ast.Import):
            homes, carried = [alias.name for alias in names], False
        else:
            homes = [module.home_of(node)]
            carried = cut.is_carried(homes[0])
        wrapped = not guarded and any(home.partition(".")[0] in _WITH_A_GPU for home in homes)
        if not carried and not wrapped and len(names) == len(node.names):
            continue
        text = _import_line(node, names, module, cut)
        if wrapped:
            text = f"try:\n{textwrap.indent(text, '    ')}\nexcept ImportError:\n    raise"
        first = node.lineno - statement.first_line
        last = (node.end_lineno or node.lineno) - statement.first_line
        lines[first : last + 1] = [textwrap.indent(f"{text}\n", " " * node.col_offset)]
    return "".join(lines)


def _import_line(
    node: ast.Import | ast.ImportFrom, names: Sequence[ast.alias], module: _Module, cut: _Cut
) -> str:
    listed = [ast.unparse(alias) for alias in names]
    if isinstance(node, ast.Import):
        return f"import {', '.join(listed)}"
    home = module.home_of(node)
    if cut.is_carried(home):
        home = f".{cut.file_of(_STAND_INS.get(home, home))}"
    line = f"from {home} import {', '.join(listed)}"
    if node.col_offset + len(line) <= 100:
        return line
    inner = "".join(f"    {name},\n" for name in listed)
    return f"from {home} import (\n{inner})"
