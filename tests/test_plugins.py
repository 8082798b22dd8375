"""A user's mixer, from a file that the study names, takes part like a built-in one."""

import importlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_study import make_study

from mohawk_nas.cli import main
from mohawk_nas.config import dump, load_study
from mohawk_nas.errors import RegistryError
from mohawk_nas.mixer import MIXERS
from mohawk_nas.registry import load_plugin
from mohawk_nas.search.study import load_result
from mohawk_nas.testing import MixerContract
from mohawk_nas.workbench import Workbench

SOURCE = Path(__file__).with_name("moving_average.py")


def forget():
    """As in a process that has not read the plugin."""
    MIXERS._items.pop("moving_average", None)
    for name in [name for name in sys.modules if name.startswith("mohawk_nas_plugin_")]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def unregistered(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    forget()
    yield
    forget()


class TestContract(MixerContract):
    @pytest.fixture(autouse=True)
    def loaded(self, unregistered):
        load_plugin(SOURCE)
        # Six heads of four channels, as those of the layer under test.
        type(self).config = MIXERS.get("moving_average")(num_heads=6)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("plugins")


@pytest.fixture
def write(shared, tmp_path):
    """Write a study with the plugin beside it."""

    def write_study(**candidates):
        config = make_study(
            shared,
            f"output={tmp_path / 'runs'}",
            f"bank.path={tmp_path / 'bank'}",
            "bank.matrix={tokens: 128, batch_size: 4}",
            "search.baselines=[first]",
            space={"candidates": candidates},
        )
        raw = yaml.safe_load(dump(config)) | {"plugins": ["./moving_average.py"]}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(raw))
        shutil.copy(SOURCE, tmp_path / "moving_average.py")
        return tmp_path / "study.yaml"

    return write_study


def call(capsys, *args):
    # Each command is a process of its own.
    forget()
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


MINE = {"mixer": "moving_average"}


def test_it_is_searched_beside_a_built_in(write, tmp_path, capsys):
    study = write(mamba2={"mixer": "mamba2", "chunk_size": 8}, mine=MINE)
    code, out, err = call(capsys, "search", study, "search.trials=8")
    assert code == 0, err
    assert "M = mamba2, E = mine" in out

    config = load_study(study)
    assert config.plugins == [str(tmp_path / "moving_average.py")]
    bench = Workbench(config)
    result = load_result(config, bench.space, bench.budget, run_dir=config.run_dir)
    assert len(result.trials) == 8
    assert result.num_possible == 24
    used = {name for trial in result.trials for name in trial.layout.candidates}
    assert used == {"attention", "mamba2", "mine"}
    for layer in range(4):
        record = bench.bank.record(layer, "mine")
        assert {entry["stage"] for entry in record["losses"]} == {"matrix", "hidden"}
        assert re.fullmatch(r"MovingAverageConfig:\w{16}", record["identity"]["mixer"])


def test_every_command_knows_it(write, tmp_path, capsys, monkeypatch):
    checked = []

    def check(folder, student, *, plugins, alone):
        checked.append(plugins)
        return {}

    # The check takes a process of its own, and is handed the plugins.
    monkeypatch.setattr("mohawk_nas.export.folder.verify_export", check)
    study, run = write(mine=MINE), tmp_path / "runs/tiny"
    for command in (
        ["validate", study],
        ["search", study, "search.trials=2", "--dry-run"],
        ["search", study, "search.trials=2"],
        ["score", study, "search.trials=2", "--layout", "E A E A"],
        ["distill", run],
        ["export", run],
        ["evaluate", run],
        ["evaluate", run / "export"],
        ["generate", run / "export", "--prompt", "hello", "--max-new-tokens", "3"],
    ):
        code, _, err = call(capsys, *command)
        assert code == 0, err
    ((copy,),) = checked
    assert copy.endswith("/plugins/moving_average.py")
    best = yaml.safe_load((run / "best.yaml").read_text())
    assert best["candidates"]["mine"]["mixer"] == "moving_average"


@pytest.fixture
def exported(write, tmp_path, capsys, monkeypatch):
    """A run that is distilled and exported."""
    monkeypatch.setattr("mohawk_nas.export.folder.verify_export", lambda *a, **k: {})
    study, run = write(mine=MINE), tmp_path / "runs/tiny"
    for command in (["search", study, "search.trials=2"], ["distill", run], ["export", run]):
        code, _, err = call(capsys, *command)
        assert code == 0, err
    return run


def test_a_file_that_changed_since_the_distillation_is_refused(exported, tmp_path, capsys):
    with (tmp_path / "moving_average.py").open("a") as file:
        file.write("# changed\n")
    for command in (
        ["evaluate", exported],
        ["export", exported, "--out", tmp_path / "again"],
        ["generate", exported, "--prompt", "hello"],
    ):
        code, out, err = call(capsys, *command)
        assert (code, out) == (2, "")
        assert f"{exported}/distill: what it was begun with has changed (file of mixer mov" in err
        assert "Restore it, or distil again with `distill --force`" in err
    # The export has a file of its own.
    code, _, err = call(capsys, "generate", exported / "export", "--prompt", "hello")
    assert code == 0, err


def test_an_export_works_where_its_plugin_has_moved(exported, tmp_path, capsys):
    (tmp_path / "moving_average.py").unlink()
    folder = (exported / "export").rename(tmp_path / "elsewhere")
    for command in (["evaluate", folder], ["generate", folder, "--prompt", "hello"]):
        code, _, err = call(capsys, *command)
        assert code == 0, err
    card = json.loads((folder / "mohawk_nas.json").read_text())
    study = card["study"]
    assert study["plugins"] == ["plugins/moving_average.py"]
    # What an export is evaluated by is found where it was.
    read = str([study["teacher"]["source"], study["data"]["source"], study["data"]["cache"]])
    assert str(tmp_path) not in str(card).replace(read, "").replace(study["data"]["cache"], "")
    assert card["distillation"]["provenance"]["command"].partition(" ")[0] in sys.argv[0]


@torch.no_grad()
def test_an_export_needs_the_plugin_and_says_so(write, tmp_path):
    from mohawk_nas.export import load_hybrid, save_hybrid
    from mohawk_nas.export.hf import describe_candidates
    from mohawk_nas.layout import Layout
    from mohawk_nas.reporting import SILENT
    from mohawk_nas.student import assemble

    bench = Workbench(load_study(write(mine=MINE)))
    layout = Layout.keeping([1], num_layers=4, replacement="mine")
    bench.bank.train([(i, "mine") for i in layout.replaced_layers], reporter=SILENT)
    student = assemble(bench.teacher, layout, bench.bank)
    candidates = describe_candidates(bench.space.candidates)
    save_hybrid(student, tmp_path / "export", layout=layout, candidates=candidates)
    forget()
    with pytest.raises(RegistryError, match="unknown mixer 'moving_average'; available: "):
        load_hybrid(tmp_path / "export")
    again = load_hybrid(tmp_path / "export", plugins=[str(SOURCE)])
    tokens = torch.arange(20)[None]
    assert torch.equal(
        again(tokens, use_cache=False).logits, student(tokens, use_cache=False).logits
    )


def test_entries_follow_the_plugins_text(write, tmp_path):
    def key():
        forget()
        bench = Workbench(load_study(tmp_path / "study.yaml"))
        return bench.bank.key(2, "mine")

    write(mine=MINE)
    plugin = tmp_path / "moving_average.py"
    before = key()
    (tmp_path / "other").mkdir()
    moved = tmp_path / "other/mixer.py"
    shutil.copy(plugin, moved)
    text = (tmp_path / "study.yaml").read_text()
    (tmp_path / "study.yaml").write_text(text.replace("./moving_average.py", "./other/mixer.py"))
    assert key() == before
    # A change to the text may change what is trained.
    changed = tmp_path / "changed.py"
    changed.write_text(plugin.read_text().replace("0.0, 3.0", "0.0, 4.0"))
    (tmp_path / "study.yaml").write_text(text.replace("./moving_average.py", "./changed.py"))
    assert key() != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, r"layer 0: `d_model % num_heads == 0` must hold, but got .*d_model=32"),
        ({"num_heads": 0}, r"space.candidates.mine: `num_heads >= 1` must hold, but got "),
        ({"num_head": 4}, r"space.candidates.mine.num_head: unknown option. Did you mean 'num_he"),
        ({"num_heads": "x"}, r"space.candidates.mine.num_heads: Value 'x' of type 'str' could no"),
        ({"init": "attention"}, r"MovingAverage cannot start from attention; use init: random"),
    ],
)
def test_its_options_are_checked_like_a_built_ins(options, message, write, capsys):
    code, out, err = call(capsys, "validate", write(mine=MINE | options))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert re.search(message, err)


@pytest.mark.parametrize(
    ("there", "instead", "message"),
    [
        ('symbol = "E"', "pass", "symbol of MovingAverageConfig must be one upper-case .*None$"),
        ('"E"', '"e"', "symbol of MovingAverageConfig must be one upper-case .* is 'e'$"),
        ("return MovingAverage(", "MovingAverage(", "build must make a Mixer, but makes nothing"),
        ("num_heads: int)", "heads: int)", r"build failed in line \d+: NameError: name 'num_heads"),
        ("2 * view.d_model**2 +", "view.d_model**2 +", "num_params must be 2,052, as many as are"),
        ("d_model**2 + 2", "d_model**2 + 2.0", "flops_per_token must be a whole number"),
        ("view.d_model * 4", "-4", "state_bytes must be a whole number, at least 0, but is -8"),
        ("view.d_model * 4", "view.model", r"state_bytes failed in line \d+: Attribute"),
        ("view.d_model * 4", "view.d_model", "state_bytes must be 256, as many as .* is 64"),
        ("self.num_heads =", "self.heads =", "its mixer's num_heads must be a number of heads"),
        (".flatten(2))", ".flatten(2))[:1]", r"forward must give a tensor \(2, 9, 32\) in "),
        (".flatten(2))", ".flatten(2)) / 0", "forward must be finite on finite input"),
        ("mixed.to(", "nothing.to(", r"forward failed in line \d+: NameError: name"),
        ("hidden * mask[", "hidden * msk[", r"forward with a mask failed in line \d+: Name"),
        (".exp().tril()", ".exp()", "forward must be causal: the output of a token "),
        ("carried = (self", "carried = (2 * self", "forward with a cache must continue where "),
        ("hidden.shape[1]\n        return", "1\n        return", "must have counted 9 tokens .* 4"),
        ("c=ones[..., None]", "c=ones", r"factors\(\).c must give a tensor \(2, 4, 9, any"),
        ("init: Literal", "more: object = None\n    init: Literal", "must be of types that YAML"),
        ("if self.num_heads < 1", "assert 0\n        if 0", "refused by an assertion"),
    ],
)  # fmt: skip
def test_its_mistakes_are_told_before_anything_is_trained(
    there, instead, message, write, tmp_path, capsys
):
    study, plugin = write(mine=MINE), tmp_path / "moving_average.py"
    text = plugin.read_text()
    assert there in text
    plugin.write_text(text.replace(there, instead, 1))
    code, out, err = call(capsys, "validate", study)
    assert (code, out) == (2, "")
    assert re.search(message, err.splitlines()[-1]), err
    assert "space.candidates.mine: " in err


@pytest.mark.parametrize(
    ("there", "instead", "options"),
    [
        # Its kernels take the teacher's type alone.
        (
            "values = self.values(hidden, mask=mask)\n",
            "values = self.values(hidden, mask=mask)\n"
            "        assert values.dtype == torch.bfloat16\n",
            ["teacher.dtype=bfloat16"],
        ),
        # It has no matrix, and stage 1 asks for none.
        (
            "        shape = (hidden.shape[0], self.num_heads, hidden.shape[1])",
            "        raise NotImplementedError",
            ["bank.matrix.tokens=0", "distill.matrix.tokens=0"],
        ),
        # It holds parts of the teacher, which is not loaded yet.
        (
            "self.num_heads = num_heads\n",
            "self.num_heads = num_heads\n"
            "        part = torch.ones(1, device='meta')\n"
            "        self.register_buffer('part', part, persistent=False)\n",
            [],
        ),
        # It needs a GPU, and this is where the study is planned.
        (
            "values = self.values(hidden, mask=mask)\n",
            "raise RuntimeError('needs CUDA')\n",
            [],
        ),
    ],
)
def test_what_is_no_mistake_is_none(there, instead, options, write, tmp_path, capsys):
    study, plugin = write(mine=MINE), tmp_path / "moving_average.py"
    text = plugin.read_text()
    assert there in text
    plugin.write_text(text.replace(there, instead, 1))
    code, _, err = call(capsys, "validate", study, *options)
    assert code == 0, err


def test_it_may_be_of_several_files_but_then_is_not_exported(write, tmp_path, monkeypatch, capsys):
    study, plugin = write(mine=MINE), tmp_path / "moving_average.py"
    text = plugin.read_text().replace("F.logsigmoid", "beside_it.logsigmoid")
    plugin.write_text(text.replace("import torch\n", "import beside_it\nimport torch\n", 1))
    beside = tmp_path / "beside_it.py"
    beside.write_text("from torch.nn.functional import logsigmoid\n")
    monkeypatch.syspath_prepend(tmp_path)

    def call_afresh(*args):
        sys.modules.pop("beside_it", None)
        importlib.invalidate_caches()
        return call(capsys, *args)

    code, _, err = call_afresh("search", study, "search.trials=2")
    assert code == 0, err
    run = next((tmp_path / "runs").iterdir())
    assert call_afresh("distill", run)[0] == 0
    code, _, err = call_afresh("export", run)
    assert code == 1 and "beside_it.py; put them into it, or install them" in err, err
    # What lies beside it decides what is trained as well.
    beside.write_text("def logsigmoid(x):\n    return x.sigmoid().log() - 1\n")
    code, _, err = call_afresh("search", study, "search.trials=2")
    assert code == 2 and "what it was begun with has changed" in err, err


def test_what_is_registered_as_a_mixer_is_one(write, capsys):
    study = write(mine={"mixer": "mine"})
    MIXERS.register("mine")(type("Mine", (), {}))
    try:
        code, _, err = call(capsys, "validate", study)
        assert code == 2 and re.search(
            r"candidates.mine.mixer: what .* registers as 'mine' must be a MixerConfig", err
        )
    finally:
        del MIXERS._items["mine"]


def test_a_plugin_that_fails_is_one_line(write, tmp_path, capsys):
    study = write(mine=MINE)
    (tmp_path / "moving_average.py").write_text("import nothing_of_that_name\n")
    code, _, err = call(capsys, "validate", study)
    assert code == 2
    assert re.search(r"plugins: importing .*moving_average.py failed: ModuleNotFoundError: ", err)
    assert "space.candidates.mine.mixer: unknown mixer 'moving_average'; available: " in err
