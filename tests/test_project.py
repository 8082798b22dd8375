"""What holds for the repository as a whole: packaging, imports, studies, words."""

import ast
import functools
import importlib.util
import json
import re
import resource
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import mohawk_nas
from mohawk_nas.config import SpaceConfig, load_study
from mohawk_nas.mixer import MIXERS, MixerConfig
from mohawk_nas.plan import find_problems
from mohawk_nas.search.space import load_space, space_names
from mohawk_nas.search.strategy import STRATEGIES, Strategy

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HOMES = PYPROJECT["tool"]["setuptools"]["package-dir"]
STUDIES = sorted((ROOT / "studies").rglob("*.yaml"))
SPACES = sorted((ROOT / "search_spaces").glob("*.yaml"))
COMMANDS = [
    "search",
    "score",
    "audit",
    "distill",
    "export",
    "evaluate",
    "generate",
    "validate",
    "bench",
    "ls",
]


def folders_of_python():
    """Package name -> folder, for every folder that holds code of the package."""
    for package, home in HOMES.items():
        for init in sorted((ROOT / home).rglob("__init__.py")):
            inside = init.parent.relative_to(ROOT / home).parts
            yield ".".join([package, *inside]), init.parent


@functools.cache
def imports():
    """Module -> every module it imports, at the top or inside a function."""
    found = {}
    for package, folder in folders_of_python():
        for path in sorted(folder.glob("*.py")):
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            found[name] = set(_imported(path, package))
    return found


def _imported(path, package):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = "." * node.level + (node.module or "")
            home = importlib.util.resolve_name(home, package) if node.level else home
            # `from package import module` imports the module.
            names = [f"{home}.{alias.name}" for alias in node.names]
            known = {f"{p}.{f.stem}" for p, folder in folders_of_python() for f in folder.glob("*")}
            yield from [name for name in names if name in known] or [home]


def within(module, *homes):
    return any(module == home or module.startswith(f"{home}.") for home in homes)


def importers(*targets):
    return {name for name, found in imports().items() for m in found if within(m, *targets)}


def test_every_package_is_listed():
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(name for name, _ in folders_of_python())
    assert HOMES == {
        "mohawk_nas": "mohawk_nas",
        "mohawk_nas.mixers": "mixers",
        "mohawk_nas.search_spaces": "search_spaces",
    }
    # A folder of code without an __init__.py would be left out silently.
    for home in HOMES.values():
        for path in (ROOT / home).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path


def test_the_wheel_holds_one_package_and_everything_in_it(tmp_path):
    if int(version("setuptools").split(".")[0]) < 77:
        pytest.skip("building needs the setuptools that pyproject.toml asks for")
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", *HOMES.values()):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"mohawk_nas"}
    expected = {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in folders_of_python()
        for path in [*folder.glob("*.py"), *folder.glob("*.yaml"), *folder.glob("py.typed")]
    }
    assert {"mohawk_nas/mixers/mamba2.py", "mohawk_nas/py.typed"} <= expected
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_what_is_imported_is_declared():
    project = PYPROJECT["project"]
    optional = [r for listed in project["optional-dependencies"].values() for r in listed]
    declared = {
        re.match(r"[\w-]+", requirement)[0].lower().replace("-", "_")
        for requirement in [*project["dependencies"], *optional]
    }
    distributions = {"yaml": "pyyaml"}
    outside = {module.split(".")[0] for found in imports().values() for module in found}
    outside -= {*sys.stdlib_module_names, "mohawk_nas"}
    assert {name for name in outside if distributions.get(name, name) not in declared} == set()


def test_the_core_imports_no_mixer():
    assert {
        n for n in importers("mohawk_nas.mixers") if not within(n, "mohawk_nas.mixers")
    } == set()
    names = set(MIXERS.names()) - {"attention"}
    for package, folder in folders_of_python():
        if within(package, "mohawk_nas.mixers"):
            continue
        for path in folder.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                is_name = isinstance(node, ast.Constant) and node.value in names
                assert not is_name, f"{path}:{node.lineno} names a mixer"


def test_mixers_import_only_their_contract():
    allowed = [f"mohawk_nas.{name}" for name in ("mixers", "mixer", "registry", "errors")]
    for name, found in imports().items():
        if within(name, "mohawk_nas.mixers"):
            ours = {module for module in found if within(module, "mohawk_nas")}
            assert {module for module in ours if not within(module, *allowed)} == set(), name


@pytest.mark.parametrize(
    ("library", "home"),
    [
        ("optuna", "mohawk_nas.search"),
        ("sqlalchemy", "mohawk_nas.search"),
        ("rich", "mohawk_nas.reporting"),
        ("typer", "mohawk_nas.cli"),
        ("datasets", "mohawk_nas.documents"),
        ("pytest", "mohawk_nas.testing"),
    ],
)
def test_a_library_has_one_home(library, home):
    users = importers(library)
    assert users
    assert {name for name in users if not within(name, home)} == set()


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        (["errors"], [""]),
        (["layout", "registry", "config"], ["mixer", "teacher", "student", "bank", "search"]),
        (["mixer"], ["teacher", "student", "bank", "distill", "search", "data"]),
        (["teacher"], ["student", "bank", "distill", "search", "data", "metrics"]),
        (["student"], ["bank", "distill", "search", "data", "metrics"]),
        (["data", "documents", "files", "metrics", "kernels"], ["bank", "distill", "search"]),
        (["distill"], ["bank", "search"]),
        (["bank"], ["search"]),
        (["search"], ["pipeline", "plan", "evaluate", "export"]),
        (["pipeline", "plan", "evaluate", "export", "search", "bank", "distill"], ["cli"]),
        (["reporting.__init__"], ["search", "distill", "evaluate"]),
    ],
)
def test_arrows_go_one_way(lower, upper):
    homes = [f"mohawk_nas.{name}".removesuffix(".__init__") for name in lower]
    above = [f"mohawk_nas.{name}".removesuffix(".") for name in upper]
    for name, found in imports().items():
        exact = lower == ["reporting.__init__"]
        if name in homes if exact else within(name, *homes):
            assert {module for module in found if within(module, *above)} == set(), name


def test_every_public_name_resolves():
    for name in mohawk_nas.__all__:
        assert getattr(mohawk_nas, name).__module__.startswith("mohawk_nas."), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mohawk_nas.nothing  # noqa: B018


def test_every_mixer_resolves():
    assert {"attention", "mamba2"} <= set(MIXERS.names())
    for name in MIXERS.names():
        assert issubclass(MIXERS.get(name), MixerConfig)
        assert MIXERS.name_of(MIXERS.get(name)) == name
        assert re.fullmatch("[A-Z]", MIXERS.get(name).symbol)
        MIXERS.get(name)()
    assert len({MIXERS.get(name).symbol for name in MIXERS.names()}) == len(MIXERS.names())


def test_every_strategy_resolves():
    assert {"tpe", "gp", "random", "exhaustive", "uniform", "beam"} <= set(STRATEGIES.names())
    for name in STRATEGIES.names():
        assert issubclass(STRATEGIES.get(name), Strategy)
        STRATEGIES.get(name)()


def header(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_parses_and_says_how_to_run_it(path):
    assert load_study(path).name == path.stem
    commands = {
        "ground_truth": "python studies/ground_truth/table.py",
        "recipes": "mohawk-nas distill",
    }
    command = commands.get(path.parent.name, "mohawk-nas search")
    assert f"{command} {path.relative_to(ROOT)}" in header(path)
    assert re.search(r"^# Needs: +\S", header(path), re.MULTILINE)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_space_parses_and_says_how_to_use_it(path):
    assert path.stem in space_names()
    assert load_space(SpaceConfig(name=path.stem), num_layers=24).replacements
    assert f"space: {path.stem}" in header(path)


def test_the_studies_of_the_package_are_there():
    assert {"quickstart", "smollm2-135m", "hybrid_phi_mamba"} <= {path.stem for path in STUDIES}
    assert {path.stem for path in SPACES} == set(space_names())


def text_files():
    left_out = {".git", ".venv", "build", "dist", "runs", "__pycache__"}
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.endswith(("_cache", ".egg-info")) for part in parts)
        if hidden or left_out & set(parts) or not path.is_file():
            continue
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


# Folders that people and build machines work in.
SOMEONES = re.compile(r"(?<![\w.])(/(?:home|Users|root|work|workspace|tmp/venv)/\w+|[A-Z]:\\Users)")


def test_no_file_names_a_place_on_someones_machine():
    assert SOMEONES.search("/".join(["see ", "home", "ann", "x"]))
    files = dict(text_files())
    assert {ROOT / "README.md", ROOT / "studies/quickstart.yaml", Path(__file__)} <= set(files)
    found = {path: match[0] for path, text in files.items() if (match := SOMEONES.search(text))}
    assert found == {}


def test_the_readme_has_the_two_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = "python3 -m venv .venv && . .venv/bin/activate && ./install.sh"
    assert [line for line in lines if line.startswith("python3 -m venv")] == [
        f"{start} && mohawk-nas search studies/quickstart.yaml",
        f"{start} dev && pytest",
    ]


def test_the_readmes_study_is_a_whole_one(tmp_path):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (study,) = re.findall(r"```yaml\n(name: .*?)```", readme, re.DOTALL)
    path = tmp_path / "my.yaml"
    path.write_text(study, encoding="utf-8")
    teacher, text = ROOT / "studies/assets/phi-tiny", "studies/assets/text/quickstart.jsonl.xz"
    config = load_study(path, [f"teacher.source={teacher}", f"data.source={ROOT / text}"])
    assert find_problems(config) == []
    assert config.search.rungs.tokens and config.search.objective["recall"] > 0


def test_links_between_pages_lead_somewhere():
    pages = [path for path, _ in text_files() if path.suffix == ".md"]
    assert {ROOT / "README.md", ROOT / "docs/searching.md"} <= set(pages)
    broken = [
        (page.name, link)
        for page in pages
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
        if not link.startswith(("http", "#")) and not (page.parent / link.split("#")[0]).exists()
    ]
    assert broken == []


def test_the_ci_script_finds_the_test_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    find = re.search(r"test_command=\$\((.*)\)$", script, re.MULTILINE)[1]
    found = subprocess.run(["bash", "-c", find], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.splitlines() == [
        "python3 -m venv .venv && . .venv/bin/activate && ./install.sh dev && pytest"
    ]


HELP = """
import contextlib, io, json, sys
from mohawk_nas.cli import main

shown = {}
for command in sys.argv[1:]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*command.split(), "--help"])
    heavy = {"torch", "transformers", "optuna", "datasets", "numpy", "rich"} & set(sys.modules)
    shown[command] = [out.getvalue(), sorted(heavy)]
print(json.dumps(shown))
"""


def test_help_is_quick_and_loads_nothing_heavy():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-c", HELP, "", *COMMANDS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = json.loads(done.stdout)
    for name, (text, heavy) in shown.items():
        assert text.startswith(f"Usage: mohawk-nas {name}".rstrip()), name
        assert heavy == [], name
    listed = re.findall(r"^  (\w+)  ", shown[""][0].partition("Commands:")[2], re.MULTILINE)
    assert listed == COMMANDS
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
