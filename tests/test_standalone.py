"""Exports that hold their own code: they load where there is torch and transformers, no more."""

import dataclasses
import importlib.metadata
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports

from mohawk_nas import config
from mohawk_nas.errors import ExportError
from mohawk_nas.export import (
    HybridConfig,
    HybridForCausalLM,
    check,
    load_hybrid,
    plain,
    save_hybrid,
)
from mohawk_nas.export.hf import describe_candidates
from mohawk_nas.export.standalone import standalone_files, write_standalone
from mohawk_nas.export.verify import verify_export
from mohawk_nas.files import save_tensors
from mohawk_nas.layout import Layout
from mohawk_nas.mixer import MIXERS, build_mixer, mixer_config
from mohawk_nas.mixers import _step
from mohawk_nas.registry import load_plugin
from mohawk_nas.student import install_mixers
from mohawk_nas.teacher import find_attention
from mohawk_nas.testing import tiny_model

PLUGIN = Path(__file__).with_name("moving_average.py")
INSTALLED = {"torch", "transformers"}
TOKENS = torch.randint(0, 61, (2, 21), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def plugin():
    load_plugin(PLUGIN)
    yield
    MIXERS._items.pop("moving_average", None)
    for name in [name for name in sys.modules if name.startswith("mohawk_nas_plugin_")]:
        del sys.modules[name]


def make(folder, arch="llama", **candidates):
    """A student with attention in its last layer, saved with its code, and its logits."""
    model = tiny_model(arch, num_hidden_layers=3, tie_word_embeddings=True)
    slots = find_attention(model)
    configs = {name: mixer_config(choices) for name, choices in candidates.items()}
    layout = Layout((*list(configs)[:1], *list(configs)[-1:], "attention"))
    mixers = {
        i: build_mixer(configs[layout[i]], slots[i].view, seed=i) for i in layout.replaced_layers
    }
    install_mixers(model, mixers, slots)
    save_hybrid(model, folder, layout=layout, candidates=describe_candidates(configs))
    write_standalone(folder)
    with torch.no_grad():
        return model, model(TOKENS, use_cache=False).logits


MAMBA2 = {"mamba2": {"mixer": "mamba2", "chunk_size": 8}}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standalone") / "my-export.1"
    # Query and key norms, grouped heads.
    return folder, *make(folder, "qwen3", **MAMBA2)


def required(*roots):
    """The distributions that some need, themselves included."""
    found, waiting = {}, list(roots)
    while waiting:
        name = re.match(r"[\w.-]+", waiting.pop())[0].lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            # For another system.
            continue
        waiting += [r for r in found[name].requires or () if "extra ==" not in r]
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A folder of packages with torch, transformers and what these two require."""
    packages = tmp_path_factory.mktemp("packages")
    for distribution in required("torch", "transformers").values():
        tops = {Path(file).parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
        for top in tops:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    return packages


FRESH = """
import importlib.util, runpy, sys
sys.path.insert(0, sys.argv[1])
for name in ("mohawk_nas", "omegaconf", "optuna", "datasets"):
    assert importlib.util.find_spec(name) is None, name
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_it_runs_where_nothing_but_torch_and_transformers_is(export, bare, tmp_path):
    folder, _, logits = export
    reference = tmp_path / "reference.safetensors"
    save_tensors(reference, {"tokens": TOKENS, "logits": logits})
    # Neither site-packages nor environment variables nor this folder.
    command = [sys.executable, "-I", "-S", "-c", FRESH, bare, check.__file__, folder, reference]
    done = subprocess.run(
        [*map(str, command), "--alone"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_MODULES_CACHE": str(tmp_path / "modules"), "HOME": os.environ["HOME"]},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"reloaded logits", "prefill and decode", "saved and loaded again"}
    assert found["reloaded logits"] == 0
    # What ran is the folder's.
    assert list((tmp_path / "modules").rglob("mohawk_mixers_mamba2.py"))


def test_the_check_runs_the_folders_code(export, tmp_path):
    folder, student, _ = export
    copy = shutil.copytree(folder, tmp_path / "copy")
    mixer = copy / "mohawk_mixers_mamba2.py"
    text = mixer.read_text(encoding="utf-8")
    changed = text.replace("F.silu(gate)", "F.relu(gate)")
    assert changed != text
    mixer.write_text(changed, encoding="utf-8")
    with pytest.raises(ExportError, match=r"fails its check: .*reloaded logits: logits differ by"):
        verify_export(copy, student, alone=True)


def test_a_mixer_of_the_users_own_goes_along(plugin, tmp_path):
    mine = {"mine": {"mixer": "moving_average", "num_heads": 6}}
    student, _ = make(tmp_path / "export", "phi", **MAMBA2, **mine)
    assert (tmp_path / "export/plugin_moving_average.py").is_file()
    found = verify_export(tmp_path / "export", student, plugins=[str(PLUGIN)], alone=True)
    assert found["reloaded logits"] <= 1e-5


def test_what_it_says_is_what_the_package_says(export):
    folder, _, _ = export
    mixer = MIXERS.get("mamba2").build.__globals__["Mamba2Mixer"]
    texts = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.py")}
    for item in (mixer, mixer.__mro__[1], HybridConfig, find_attention, install_mixers):
        assert any(inspect.getsource(item) in text for text in texts.values()), item
    for name, text in texts.items():
        # What transformers looks for, here and when it saves the model again.
        assert set(get_imports(folder / name)) <= {
            *sys.stdlib_module_names,
            "torch",
            "transformers",
        }
        siblings = re.findall(r"^from \.(\w+) import", text, re.MULTILINE)
        assert {f"{sibling}.py" for sibling in siblings} <= set(texts)
        assert not re.search(r"^\s*(from|import) mohawk_nas", text, re.MULTILINE)
        assert text.index("# SPDX-License-Identifier: Apache-2.0") < 120
    # Nothing of the search is needed to run a model.
    assert "class Teacher:" not in "".join(texts.values())


def test_an_installed_package_loads_it_with_its_own_code(export, tmp_path):
    folder, _, logits = export
    for options in ({}, {"trust_remote_code": True}):
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        assert type(model) is HybridForCausalLM and type(model.config) is HybridConfig
    with torch.no_grad():
        assert torch.equal(model(TOKENS, use_cache=False).logits, logits)
    # It saves no code, and so must not point to any.
    model.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    load_hybrid(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).layout == ["mamba2", "mamba2", "attention"]


def test_kernels_go_along(export):
    """Ours need a Triton, which is imported where it is and asked for nowhere."""
    folder, _, _ = export
    code = (
        "import importlib, sys\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "sys.modules['mohawk_nas'] = None\n"
        "found = importlib.import_module('kernels.mohawk_mixers__backends')._triton()\n"
        "print(found.fused_step.__module__)\n"
    )
    packages = folder.with_name("packages")
    shutil.copytree(folder, packages / "kernels", ignore=shutil.ignore_patterns("*.safetensors"))
    (packages / "kernels/__init__.py").touch()
    # As much of Triton as defining kernels takes.
    (packages / "triton").mkdir()
    (packages / "triton/__init__.py").write_text("def jit(kernel):\n    return kernel\n")
    (packages / "triton/language.py").write_text("constexpr = int\n")
    done = subprocess.run(
        [sys.executable, "-c", code, packages], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "kernels.mohawk_mixers__step_triton"
    whole = Path(inspect.getfile(_step)).with_name("_step_triton.py").read_text(encoding="utf-8")
    kernels = (folder / "mohawk_mixers__step_triton.py").read_text(encoding="utf-8")
    for kernel in re.findall(r"@triton.jit\ndef .*?(?=\n\n\n)", whole, re.DOTALL):
        assert kernel in kernels
    assert kernels.count("@triton.jit") == whole.count("@triton.jit") > 0


IMPORTS = """
from __future__ import annotations
from typing import TYPE_CHECKING
{}
from mohawk_nas.mixer import MIXERS, MixerConfig

@MIXERS.register("mine")
class Mine(MixerConfig):
    pass
"""


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (
            "import omegaconf",
            r"mixer.py:3 must import from torch, .* but imports omegaconf; put wha",
        ),
        (
            "def f():\n    from omegaconf.errors import X",
            r"mixer.py:4 .* imports omegaconf.errors;",
        ),
        ("from mohawk_nas import ranks", r"mixer.py:3 .* imports ranks from mohawk_nas;"),
        ("from mohawk_nas import Mixer", r"Mixer from mohawk_nas; import it from the file that"),
        ("import mohawk_nas.ranks", r"mixer.py:3 .* but imports mohawk_nas.ranks;"),
        (
            "from mohawk_nas.config import load_study",
            r"mixer.py:3 .* imports load_study from mohawk_nas.config;",
        ),
        (
            "import importlib\ndef f():\n    return importlib.import_module('mohawk_nas.ranks')",
            r"mixer.py:5 .* imports mohawk_nas.ranks by a call;",
        ),
        ("from importlib import import_module\nimport_module('math')", None),
        ("try:\n    import omegaconf\nexcept ImportError:\n    omegaconf = None", None),
        ("if TYPE_CHECKING:\n    from mohawk_nas.workbench import Workbench", None),
        ("import torch.nn, math\nfrom transformers import AutoConfig", None),
        ("def f():\n    from mohawk_nas.errors import MixerError as E, InputError", None),
        ("def f():\n    import triton\n    return triton", None),
    ],
)
def test_what_a_mixer_may_import(line, problem, tmp_path):
    path = tmp_path / "my mixer.py"
    path.write_text(IMPORTS.format(line).lstrip(), encoding="utf-8")
    load_plugin(path)
    try:
        if problem:
            with pytest.raises(ExportError, match=problem):
                standalone_files(["mine"])
            return
        files = standalone_files(["mine"])
    finally:
        MIXERS._items.pop("mine")
    text = files["plugin_my_mixer.py"]
    (tmp_path / "out.py").write_text(text, encoding="utf-8")
    assert set(get_imports(tmp_path / "out.py")) <= {*sys.stdlib_module_names, *INSTALLED}
    assert "workbench" not in text and "class Mine(MixerConfig):" in text
    if "as E" in line:
        assert "    from .mohawk_errors import MixerError as E, InputError\n" in text
        assert "class InputError" in files["mohawk_errors.py"]
    assert "from .plugin_my_mixer import Mine" in files["modeling_mohawk_hybrid.py"]


def test_two_files_of_one_name(tmp_path):
    names = ["one", "two"]
    for name in names:
        path = tmp_path / name / "mixer.py"
        path.parent.mkdir()
        text = IMPORTS.format(f"NUMBER = {name!r}").replace('"mine"', f'"{name}"')
        path.write_text(text, encoding="utf-8")
        load_plugin(path)
    try:
        files = standalone_files(names)
    finally:
        for name in names:
            MIXERS._items.pop(name)
    assert "NUMBER = 'one'" in files["plugin_mixer.py"]
    assert "NUMBER = 'two'" in files["plugin_mixer_2.py"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    size: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    name: str | None = "x"

    def __post_init__(self):
        if self.inner.size < 0:
            raise ValueError("`size >= 0` must hold")


def test_options_are_read_as_the_package_reads_them():
    choices = [Outer(), Outer(inner=Inner(size=3), name=None)]
    for outer in choices:
        options = json.loads(json.dumps(dataclasses.asdict(outer)))
        for read in (plain.read_options, config.read_options):
            assert read(Outer, options, where="candidates.a", owner="outer") == outer
    with pytest.raises(ValueError, match=r"candidates.a: outer has no option 'nam'"):
        plain.read_options(Outer, {"nam": 1}, where="candidates.a", owner="outer")
    with pytest.raises(ValueError, match=r"`size >= 0` must hold"):
        plain.read_options(Outer, {"inner": {"size": -1}}, where="candidates.a", owner="outer")
    registry = plain.Registry("mixer", package="a.b", entry_points="a.b")
    assert registry.register("outer")(Outer) is Outer and registry.get("outer") is Outer
    with pytest.raises(ValueError, match=r"unknown mixer 'other'; this folder holds \['outer'\]"):
        registry.get("other")
