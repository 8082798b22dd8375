import hashlib
import importlib
import importlib.metadata
import sys
import textwrap
import types

import pytest

from mohawk_nas.errors import ConfigError, RegistryError
from mohawk_nas.registry import Registry, helpers, load_plugin, text_digest

MODULE = """
from {package} import THINGS

@THINGS.register("{name}")
class Thing:
    name = "{name}"
"""


@pytest.fixture
def things(tmp_path, monkeypatch):
    """A registry whose built-ins are files in a package made for this test."""
    package = f"things_{tmp_path.name}"
    folder = tmp_path / package
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from mohawk_nas.registry import Registry\n"
        f"THINGS = Registry('thing', package='{package}', entry_points='{package}')\n"
    )
    for name in ("hammer", "saw"):
        (folder / f"{name}.py").write_text(MODULE.format(package=package, name=name))
    (folder / "_helper.py").write_text("raise ImportError('helpers are not asked for')\n")
    (folder / "broken.py").write_text("import no_such_package_at_all\n")
    (folder / "forgetful.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__(package).THINGS
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]


def loaded(things):
    prefix = f"{things._package}."
    return {name.removeprefix(prefix) for name in sys.modules if name.startswith(prefix)}


def write(path, text):
    path.write_text(textwrap.dedent(text))
    return path


def test_names_import_nothing(things):
    assert things.names() == ["broken", "forgetful", "hammer", "saw"]
    assert loaded(things) == set()


def test_a_module_is_imported_when_its_name_is_asked_for(things):
    assert things.get("hammer").name == "hammer"
    assert loaded(things) == {"hammer"}
    assert things.get("hammer") is things.get("hammer")


def test_unknown_names(things):
    with pytest.raises(RegistryError) as caught:
        things.get("hamer")
    assert str(caught.value) == (
        "unknown thing 'hamer'; available: broken, forgetful, hammer, saw. Did you mean "
        "'hammer'? (One of your own must be named under `plugins`.)"
    )
    with pytest.raises(RegistryError, match=r"unknown thing '_helper'; available: .*saw\. \(One"):
        things.get("_helper")
    with pytest.raises(RegistryError, match="unknown thing 'forgetful'"):
        things.get("forgetful")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        things.get("broken")


def test_registering(things):
    @things.register("drill")
    class Drill:
        pass

    assert things.get("drill") is Drill
    assert "drill" in things.names()
    assert things.name_of(Drill) == "drill"
    assert things.name_of(things.get("saw")) == "saw"
    # The same class again, as when a file is loaded twice, is no conflict.
    assert things.register("drill")(Drill) is Drill
    with pytest.raises(RegistryError, match="Drill2 is not a registered thing"):
        things.name_of(type("Drill2", (), {}))


def test_a_name_is_taken_once(things):
    @things.register("drill")
    class Drill:
        pass

    with pytest.raises(
        RegistryError,
        match=r"thing 'drill' is already registered by .*test_registry.py:\d+; .*test_registry.py"
        r":\d+ must choose another name",
    ):

        @things.register("drill")
        class Other:
            pass

    assert things.get("drill") is Drill


@pytest.mark.parametrize("imported", [True, False])
def test_a_built_in_name_is_taken_whether_it_is_imported_or_not(things, imported):
    if imported:
        things.get("hammer")
    with pytest.raises(
        RegistryError, match=r"'hammer' is already registered by .*hammer.py:\d+; .*test_registry"
    ):

        @things.register("hammer")
        class Mine:
            pass

    assert things.get("hammer").name == "hammer"


def test_origin(things):
    assert things.origin("saw").endswith("/saw.py:4")
    things.register("made")(type("Made", (), {"__module__": "nowhere"}))
    assert things.origin("made") == "nowhere.Made"


class Point:
    """Stands in for an installed package's entry point."""

    name = "lathe"
    loads = 0

    def load(self):
        Point.loads += 1
        return Point


def test_entry_points(things, monkeypatch):
    def entry_points(*, group):
        assert group == things._package
        return [Point()]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    assert "lathe" in things.names()
    assert Point.loads == 0
    assert things.get("lathe") is Point is things.get("lathe")
    assert Point.loads == 1


def test_an_entry_point_that_leads_nowhere_is_told_with_its_name(things, monkeypatch):
    point = importlib.metadata.EntryPoint("lathe", "no_such_package_at_all:Lathe", things._package)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda *, group: [point])
    message = r"thing 'lathe': its entry point no_such_package_at_all:Lathe cannot be imported: Mod"
    with pytest.raises(RegistryError, match=message):
        things.get("lathe")


def test_a_clone_that_is_not_installed():
    lost = Registry("thing", package="mohawk_nas.no_such_things", entry_points="x")
    with pytest.raises(RegistryError, match=r"mohawk_nas.no_such_things is not found: .*`pip inst"):
        lost.names()


def test_a_plugin_takes_part(things, tmp_path):
    plugin = write(
        tmp_path / "mine.py",
        f"""
        from {things._package} import THINGS

        @THINGS.register("mine")
        class Mine:
            loads = []
        """,
    )
    load_plugin(plugin)
    assert "mine" in things.names()
    assert things.origin("mine") == f"{plugin}:4"
    first = things.get("mine")
    # Named again, by another path: it is imported once.
    load_plugin(tmp_path / ".." / tmp_path.name / "mine.py")
    assert things.get("mine") is first


def digest_of(path):
    """Of a class in a plugin, as in a process that has not read it."""
    load_plugin(path)
    (module,) = [m for m in sys.modules.values() if getattr(m, "__file__", None) == str(path)]
    del sys.modules[module.__name__]
    item = types.new_class("Item", exec_body=lambda body: body.update(__module__=module.__name__))
    sys.modules[module.__name__] = module
    try:
        return text_digest(item), [file.name for file in helpers(item)]
    finally:
        del sys.modules[module.__name__]


def test_a_class_is_told_by_its_files(tmp_path):
    plugin = tmp_path / "mine.py"
    plugin.write_text("import json\nfrom mohawk_nas.errors import ConfigError\n")
    # What lies beside it and is not imported, or is the package itself, is not its own.
    (tmp_path / "other.py").touch()
    (tmp_path / "mohawk_nas").mkdir()
    (tmp_path / "mohawk_nas" / "errors.py").touch()
    alone = digest_of(plugin)
    assert alone == (hashlib.sha256(plugin.read_bytes()).hexdigest()[:16], [])

    plugin.write_text("def later():\n    from parts import one\n    from .x import y\n")
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "__init__.py").touch()
    (parts / "one.py").write_text("from . import two\nimport parts.one\n")
    (parts / "two.py").write_text("from ..over import the_top\nimport torch\n")
    (parts / "three.py").write_text("not even Python")
    before = digest_of(plugin)
    assert before[1] == ["__init__.py", "one.py", "two.py"]
    (parts / "three.py").touch()
    assert digest_of(plugin) == before
    (parts / "two.py").write_text("import torch\n")
    assert digest_of(plugin) != before


def test_a_class_of_a_package_is_told_by_what_it_imports_of_that(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "a_package_of_mine"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "inner" / "__init__.py").write_text("from ..above import x\nimport beside_it\n")
    (package / "above.py").write_text("x = 1\n")
    (package / "mixer.py").write_text("from .inner import x\n\n\nclass Item: pass\n")
    (tmp_path / "beside_it.py").touch()
    try:
        item = importlib.import_module("a_package_of_mine.mixer").Item
        names = [str(file.relative_to(package)) for file in helpers(item)]
        assert names == ["above.py", "inner/__init__.py"]
        (package / "__init__.py").write_text("from .mixer import Item\n")
        monkeypatch.setattr(item, "__module__", "a_package_of_mine")
        sys.modules["a_package_of_mine"].__file__ = str(package / "__init__.py")
        assert "mixer.py" in [file.name for file in helpers(item)]
        # A module by itself lies among all that is installed.
        alone = importlib.import_module("beside_it")
        (tmp_path / "beside_it.py").write_text("import a_package_of_mine\n")
        monkeypatch.setattr(item, "__module__", alone.__name__)
        assert helpers(item) == []
    finally:
        for name in [n for n in sys.modules if n.startswith(("a_package_of_mine", "beside_it"))]:
            del sys.modules[name]


def test_plugins_of_one_name_in_two_folders(things, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        text = MODULE.format(package=things._package, name=folder)
        load_plugin(write(tmp_path / folder / "plugin.py", text))
    assert {"one", "two"} <= set(things.names())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", r"importing .*bad.py failed: SyntaxError: invalid syntax"),
        ("import nothing_of_that_name\n", "failed: ModuleNotFoundError: No module named 'nothing_"),
        ("raise RuntimeError('two\\nlines')\n", r"failed: RuntimeError: two lines$"),
        ("raise SystemExit(3)\n", r"failed: SystemExit: 3$"),
    ],
)
def test_broken_plugins(text, message, tmp_path):
    plugin = write(tmp_path / "bad.py", text)
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"^plugins: .*{message}") as caught:
            load_plugin(plugin)
        assert "\n" not in str(caught.value)
    # Repaired, it can be loaded by the same process.
    write(plugin, "x = 1\n")
    load_plugin(plugin)


def test_a_plugin_that_takes_a_built_in_name(things, tmp_path):
    plugin = write(tmp_path / "bad.py", MODULE.format(package=things._package, name="saw"))
    with pytest.raises(
        ConfigError, match=r"importing .*bad.py failed: .*'saw' is already registered by .*saw.py"
    ):
        load_plugin(plugin)
    assert things.get("saw").__module__ == f"{things._package}.saw"


def test_plugins_that_are_no_python_files(tmp_path):
    with pytest.raises(ConfigError, match=r"none.py must be a Python file, but there is none"):
        load_plugin(tmp_path / "none.py")
    with pytest.raises(ConfigError, match="must be a Python file, but there is none"):
        load_plugin(tmp_path)
    with pytest.raises(ConfigError, match=r"mixer.txt must be a Python file \(\.py\)"):
        load_plugin(write(tmp_path / "mixer.txt", "x = 1"))
