"""What the commands say to bad input: one line, the right exit code, and nothing on disk lost."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from tiny_study import make_study, make_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

from mohawk_nas import pipeline
from mohawk_nas.cli import main
from mohawk_nas.config import dump

# What long work says on stderr before something fails.
PROGRESS = re.compile(
    r"(loading the teacher|continuing|stage \d|baselines|search|\d+ layouts|eval)"
)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Teacher, text, cache, bank, and a run that was searched, distilled and exported."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "study.yaml").write_text(dump(make_study(folder)))
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", lambda handle: None)
    # The check takes a process of its own; tests/test_export.py has it.
    patch.setattr("mohawk_nas.export.folder.verify_export", lambda *args, **kwargs: {})
    for command in (
        ["search", folder / "study.yaml"],
        ["distill", folder / "runs/tiny/best.yaml"],
        ["export", folder / "runs/tiny"],
    ):
        with pytest.raises(SystemExit) as ended:
            main([str(part) for part in command])
        assert ended.value.code == 0
    patch.undo()
    return folder


@pytest.fixture
def study(shared, tmp_path):
    """The study's file; it has not been run, but its bank is there."""
    config = make_study(shared, f"output={tmp_path / 'runs'}")
    (tmp_path / "study.yaml").write_text(dump(config))
    return tmp_path / "study.yaml"


@pytest.fixture
def run(shared, study, tmp_path):
    """Folder of the finished run, which ``study`` describes."""
    shutil.copytree(shared / "runs", tmp_path / "runs")
    record = tmp_path / "runs/tiny/config.yaml"
    record.write_text(study.read_text())
    return tmp_path / "runs/tiny"


@pytest.fixture
def call(capsys, tmp_path):
    """Run a command; gives exit code, stdout and stderr."""

    def run_it(*args):
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run_it


def contents(*folders):
    """Path -> hash of every file."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def refuse(call, shared, tmp_path):
    """Run a command that must fail; nothing that was there may change.

    Gives the message. ``made`` names files that it may leave behind; None allows any.
    """

    def run_it(*args, code=2, made=()):
        before = contents(shared, tmp_path)
        found, _, err = call(*args)
        assert found == code, err
        *earlier, last = err.splitlines()
        assert all(PROGRESS.match(line) for line in earlier), err
        assert last.startswith("mohawk-nas: ")
        after = contents(shared, tmp_path)
        assert {path: after.get(path) for path in before} == before
        new = {path.name for path in set(after) - set(before) if path.suffix != ".lock"}
        assert made is None or new <= set(made)
        return last.removeprefix("mohawk-nas: ")

    return run_it


RECORDS = ("config.yaml", "provenance.json", "identity.json")
QUICK = ("search.baselines=[first]", "search.strategy=random", "search.trials=2")


# The study itself: nothing is loaded, nothing is written.


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.trails=3", r"study.yaml: search.trails: unknown key. Did you mean 'trials'\?"),
        ("serach.trials=3", r"study.yaml: serach: unknown key. Did you mean 'search'\?"),
        (
            "space.pinned={9: attention}",
            r"space.pinned.9: layers are counted from 0, so this must be within 0 and 3, but got 9",
        ),
        (
            "space.pinned={1: mamba}",
            r"space.pinned.1: unknown candidate 'mamba'; available: attention, mamba2. Did you",
        ),
        (
            "budget.attention_layers=5",
            r"budget.attention_layers: must be at most 4, the teacher's layers, but got 5",
        ),
        (
            "space.candidates={m: {mixer: mamba3}}",
            r"space.candidates.m.mixer: unknown mixer 'mamba3'; available: attention, mamba2. Did "
            r"you mean 'mamba2'\?",
        ),
        (
            "space.candidates={m: {mixer: mamba2, d_stat: 4}}",
            r"space.candidates.m.d_stat: unknown option. Did you mean 'd_state'\?",
        ),
        ("space=hybrid_phi_mambo", r"space.name: unknown search space 'hybrid_phi_mambo'; .*Did"),
        ("search.strategy=tpee", r"search.strategy: unknown strategy 'tpee'; available: add_one_"),
        (
            "search.baselines=[firts]",
            r"search.baselines\[0\]: 'firts' must be a selector .*Did you mean 'first'\?",
        ),
        (
            "search.baselines=['0,9']",
            r"search.baselines\[0\]: '0,9': layer 9 is out of range: layers are counted from 0",
        ),
        (
            "search.baselines=['0,1,2']",
            r"search.baselines\[0\]: '0,1,2': the budget is exactly 2 attention layers, but",
        ),
        (
            "data.block_size=128 & data.validation_tokens=128",
            r"data.block_size: must be at most 64, the teacher's context, but got 128",
        ),
        (
            "data.source=./none.jsonl",
            r"data.source: no such file: .*/none.jsonl; name a file, a gl",
        ),
        ("teacher.device=gpu", r"teacher.device: must be auto, cpu or cuda\[:N\], got 'gpu'"),
        ("plugins=[none.py]", r"plugins: .*/none.py must be a Python file, but there is none"),
        ("search.storage=study.db", r"search.storage: must be a database's URL such as sqlite:"),
        ("search.trials", r"override 'search.trials' must look like key.name=value"),
        ("teacher.source=./nowhere", r"teacher.source: no such folder: .*/nowhere$"),
        (
            "teacher.source=./none.gguf",
            r"teacher.source: no such file: .*/none.gguf$",
        ),
        (
            "teacher.source=package:no_such_thing/model.gguf",
            r"teacher.source: the Python package 'no_such_thing' is not installed; try `pip "
            r"install --no-deps no-such-thing`",
        ),
        (
            "teacher.source=package:numpy/none.gguf",
            r"teacher.source: no such file: .*/numpy/none.gguf",
        ),
    ],
)
def test_a_study_that_cannot_be_run(override, message, study, refuse):
    found = refuse("search", study, *override.split(" & "))
    assert re.search(message, found)


def test_layers_that_a_layout_does_not_have(run, study, refuse):
    assert refuse("score", study, "--layout", "0,7") == (
        "layout '0,7': layer 7 is out of range: layers are counted from 0 and must be below 4"
    )
    assert refuse("score", study, "--layout", "M A M X") == (
        "layout 'M A M X': unknown symbols in layout: X; known: A (attention), M (mamba2)"
    )
    assert refuse("score", study, "--layout", "MAM").endswith("all 4 layers, but 'MAM' names 3")


def test_validate_lists_every_problem_at_once(study, call):
    code, out, err = call(
        "validate",
        study,
        "plugins=[/none.py]",
        "space.candidates={m: {mixer: mamba3}, n: {mixer: mamba2, d_stat: 3}}",
        "space.pinned={0: p}",
        "teacher.device=gpu",
        "teacher.source=/nowhere",
        "data.source=[/none.jsonl, /none.txt]",
        "search.strategy=tpee",
        "search.baselines=[firts]",
        f"bank.path={study}/bank",
    )
    assert (code, out) == (2, "")
    first, *problems = err.splitlines()
    assert first == f"mohawk-nas: {study}: 11 problems:"
    starts = [
        "plugins: /none.py must be a Python file",
        "space.candidates.m.mixer: unknown mixer 'mamba3'",
        "space.candidates.n.d_stat: unknown option",
        "space.pinned.0: unknown candidate 'p'",
        "teacher.device: must be auto",
        "data.source: no such file: /none.jsonl",
        "data.source: no such file: /none.txt",
        f"bank.path: must be a folder, there or to be made, but {study} is a file",
        "teacher.source: no such folder: /nowhere",
        "search.strategy: unknown strategy 'tpee'",
        "search.baselines[0]: 'firts' must be a selector",
    ]
    for problem, start in zip(problems, starts, strict=True):
        assert problem.startswith(f"  - {start}")
    # Wrong keys keep the rest from being looked at, are all told too, and it is said.
    code, _, err = call("validate", study, "search.trails=1", "seed=x", "bank.hidden.lr=0")
    assert code == 2
    assert len(err.splitlines()) == 5
    assert err.endswith("\nThe model and the text were not looked at: there may be more problems\n")


def test_validate_says_when_there_is_nothing_to_say(study, call):
    assert call("validate", study) == (0, f"{study}: no problem found\n", "")


@pytest.mark.parametrize("command", ["search", "validate", "score"])
def test_a_study_that_is_not_there(command, tmp_path, refuse):
    more = ["--layout", "0,1"] if command == "score" else []
    message = refuse(command, tmp_path / "none.yaml", *more)
    assert message == f"{tmp_path / 'none.yaml'}: no such file; there must be a study in YAML"


def test_usage_errors_name_what_is_near(call):
    code, _, err = call("serach", "study.yaml")
    assert code == 2
    assert "No such command 'serach'. Did you mean 'search'?" in err
    code, _, err = call("search", "study.yaml", "--forse")
    assert code == 2
    assert "No such option: --forse" in err


# The teacher


@pytest.fixture
def teacher(tmp_path):
    return make_teacher(tmp_path / "teacher")


def test_a_teacher_without_weights(teacher, study, refuse):
    (teacher / "model.safetensors").unlink()
    for command in ("validate", "search"):
        assert refuse(command, study, f"teacher.source={teacher}").endswith(
            f"teacher.source: {teacher} must hold its weights as *.safetensors, but has none"
        )
    (teacher / "pytorch_model.bin").write_bytes(b"pickled")
    assert refuse("search", study, f"teacher.source={teacher}").endswith(
        "but has only pytorch_model.bin; convert them first"
    )


@pytest.mark.parametrize("damage", ["empty", "half", "tail", "header", "rubbish"])
def test_damaged_weights(damage, teacher, study, refuse):
    weights = teacher / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(
        {
            "empty": b"",
            "half": whole[: len(whole) // 2],
            "tail": whole[:-1],
            "header": whole[:50] + b"\xff" * 20 + whole[70:],
            "rubbish": b"rubbish" * 1000,
        }[damage]
    )
    message = refuse("search", study, f"teacher.source={teacher}", made=RECORDS)
    assert message.startswith(
        f"teacher.source: {teacher} cannot be read; it may be damaged: SafetensorError: "
    )


def test_weights_that_lack_some(teacher, study, refuse):
    config = json.loads((teacher / "config.json").read_text())
    config["num_hidden_layers"] = 5
    (teacher / "config.json").write_text(json.dumps(config))
    message = refuse("search", study, f"teacher.source={teacher}", made=RECORDS)
    assert re.search(
        r"must hold every weight of PhiForCausalLM, but \d+ are missing or of", message
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read; it may be damaged: "),
        ('{"model_type": "nonsense"}', "cannot be read; it may be damaged: .*`nonsense`"),
        (
            '{"model_type": "resnet"}',
            "must be a causal language model with attention, but .*ResNet",
        ),
        (
            '{"model_type": "mamba2"}',
            "must be a causal language model with attention, but .*Mamba2",
        ),
    ],
)
def test_folders_that_are_no_teacher(text, message, teacher, study, refuse):
    (teacher / "config.json").write_text(text)
    found = refuse("search", study, f"teacher.source={teacher}")
    assert re.match(f"teacher.source: {teacher} {message}", found)
    assert len(found) < 500
    (teacher / "config.json").unlink()
    found = refuse("validate", study, f"teacher.source={teacher}")
    assert found.endswith(f"teacher.source: {teacher} must hold a config.json, but has none")


def test_a_teacher_without_a_tokenizer(teacher, study, refuse):
    (teacher / "tokenizer.json").unlink()
    (teacher / "tokenizer_config.json").unlink()
    for command, start in {"validate": f"{study}: ", "search": ""}.items():
        assert refuse(command, study, f"teacher.source={teacher}") == (
            f"{start}teacher.tokenizer: {teacher} has no tokenizer; name a folder or a hub name "
            "that has one"
        )


def test_a_tokenizer_of_more_tokens_than_the_teacher_knows(teacher, study, refuse):
    model = AutoModelForCausalLM.from_pretrained(teacher)
    most = max(AutoTokenizer.from_pretrained(teacher).get_vocab().values())
    model.resize_token_embeddings(most)
    model.save_pretrained(teacher)
    assert refuse("validate", study, f"teacher.source={teacher}") == (
        f"{study}: teacher.tokenizer: numbers tokens up to {most:,}, but {teacher} knows only "
        f"{most:,}; name the tokenizer that it was trained with"
    )


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_an_attention_that_is_not_installed(study, refuse, shared):
    option = "teacher.attention=flash_attention_2"
    assert refuse("search", study, option, made=RECORDS).startswith(
        f"teacher.source: {shared}/teacher needs a package that is not installed: ImportError: "
    )


@pytest.mark.parametrize("keep", [0, 3, 30, 200])
def test_truncated_gguf_files(keep, tmp_path, study, refuse):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_token_list([f"token {i}" for i in range(100)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert path.stat().st_size > 500
    path.write_bytes(path.read_bytes()[:keep])
    assert refuse("search", study, f"teacher.source={path}").startswith(
        f"teacher.source: {path} cannot be read; it may be damaged: "
    )


def test_a_hub_that_cannot_be_reached(study, refuse, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refuse("search", study, "teacher.source=org/no-such-model")
    assert message.startswith(
        f"teacher.source: there is no folder {Path('org/no-such-model').resolve()}, and "
        "org/no-such-model cannot be had from the hub: "
    )


# The text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold text, but is empty; leave it out"),
        (b"\n\n", "must hold text, but no line has any in field 'text'; leave it out, or name"),
        (b'{"text": ""}\n', "must hold text, but no line has any in field 'text'"),
        (b'{"text": "a b c"}\n', "too little text for bank .has 0 tokens in blocks of 16, from "),
        (b'{"body": "a b c"}\n', r"line 1 must have a field 'text', but has body; name one of th"),
        (b"a b c\n", "line 1 must be one JSON object, but is not JSON: "),
    ],
)
def test_text_that_is_not_there(content, message, study, tmp_path, refuse):
    path = tmp_path / "text.jsonl"
    path.write_bytes(content)
    found = refuse("search", study, f"data.source={path}", made=RECORDS)
    assert re.match(rf"data.source: .*{message}", found)


def test_settings_may_change_as_long_as_nothing_was_run(study, tmp_path, refuse, call):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    refuse("search", study, f"data.source={tmp_path}/empty.jsonl", made=RECORDS)
    assert call("search", study, *QUICK)[0] == 0


# The bank


def bank_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_bank_made_for_another_teacher_is_never_used(study, tmp_path, call):
    bank = tmp_path / "bank"
    other = make_teacher(tmp_path / "teacher", seed=1)
    options = [f"bank.path={bank}", f"teacher.source={other}", *QUICK]
    assert call("search", study, *options)[0] == 0
    alone, best = bank_files(bank), read_best(tmp_path / "runs/tiny")
    shutil.rmtree(bank)
    shutil.rmtree(tmp_path / "runs")

    assert call("search", study, options[0], *QUICK)[0] == 0
    first = bank_files(bank)
    assert read_best(tmp_path / "runs/tiny")["scores"] != best["scores"]
    shutil.rmtree(tmp_path / "runs")
    assert call("search", study, *options)[0] == 0
    both = bank_files(bank)
    assert {name: both[name] for name in first} == first
    weights = {name for name in alone if name.endswith(".safetensors")}
    assert len(weights) == 4
    assert {name: both.get(name) for name in weights} == {name: alone[name] for name in weights}
    assert read_best(tmp_path / "runs/tiny")["scores"]["value"] == best["scores"]["value"]


def read_best(run):
    return yaml.safe_load((run / "best.yaml").read_text())


def test_distil_with_another_teacher(run, tmp_path, refuse):
    other = make_teacher(tmp_path / "other", seed=1)
    shutil.rmtree(run / "distill")
    message = refuse("distill", run / "best.yaml", f"teacher.source={other}")
    assert re.match(
        rf"{run}/best.yaml: was made for another teacher \(fingerprint \w+, but {other} has \w+\); "
        "run `search` again",
        message,
    )


@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "record", "strange record"])
def test_a_damaged_entry_is_named_and_trained_again(
    damage, shared, run, study, tmp_path, call, caplog
):
    bank = tmp_path / "bank"
    shutil.copytree(shared / "bank", bank)
    before = bank_files(bank)
    key = read_best(run)["bank"]["2"]
    weights, record = bank / f"{key}.safetensors", bank / f"{key}.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif damage == "changed":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    elif damage == "gone":
        weights.unlink()
    elif damage == "record":
        record.write_text('{"sha256": ')
    else:
        record.write_text("[]")
    shutil.rmtree(run)
    with caplog.at_level(logging.WARNING, "mohawk_nas"):
        assert call("search", study, f"bank.path={bank}", *QUICK)[0] == 0
    (message,) = caplog.messages
    assert re.match(
        r"bank entry of layer 2, mamba2 is damaged \(.*\); it is trained again", message
    )
    after = bank_files(bank)
    assert after.keys() == before.keys()
    for name in before:
        if name != record.name:
            assert after[name] == before[name]


# Folders that hold something else


def test_an_output_folder_that_holds_something_else(study, tmp_path, refuse, call):
    folder = tmp_path / "runs/tiny"
    folder.mkdir(parents=True)
    for i in range(5):
        (folder / f"chapter {i}.txt").write_text("years of work")
    assert refuse("search", study) == (
        f"{folder}: must be empty or hold an earlier run of this study, but holds chapter 0.txt, "
        "chapter 1.txt, chapter 2.txt and 2 more; choose another `name` or `output`"
    )
    assert call("search", study, *QUICK, "--force")[0] == 0
    aside = tmp_path / "runs/tiny.old-1"
    assert len([p for p in aside.iterdir() if p.read_text() == "years of work"]) == 5
    assert (folder / "best.yaml").is_file()


def test_an_output_that_is_a_file(study, tmp_path, refuse):
    (tmp_path / "notes").write_text("")
    for name in ("output", "bank.path", "data.cache"):
        assert refuse("search", study, f"{name}={tmp_path}/notes/deeper") == (
            f"{name}: must be a folder, there or to be made, but {tmp_path}/notes is a file; name "
            "another"
        )


def test_a_distill_folder_that_holds_something_else(run, refuse):
    shutil.rmtree(run / "distill")
    (run / "distill").mkdir()
    (run / "distill/notes.txt").write_text("years of work")
    assert refuse("distill", run) == (
        f"{run}/distill: must be empty or hold an earlier distillation, but holds notes.txt; use "
        "--force to set it aside"
    )


def test_an_export_onto_a_folder_that_is_there(run, tmp_path, refuse, call, monkeypatch):
    assert refuse("export", run) == (
        f"{run}/export: is there already; use --force to set it aside, or --out"
    )
    (tmp_path / "file").write_text("x")
    assert refuse("export", run, "--out", tmp_path / "file").startswith(f"{tmp_path}/file: is ther")
    monkeypatch.setattr("mohawk_nas.export.folder.verify_export", lambda *args, **kwargs: {})
    before = contents(run / "export")
    assert call("export", run, "--force")[0] == 0
    assert sorted(contents(run / "export.old-1").values()) == sorted(before.values())
    (tmp_path / "empty").mkdir()
    assert call("export", run / "distill", "--out", tmp_path / "empty")[0] == 0
    assert (tmp_path / "empty/config.json").is_file()


def test_an_export_that_fails_its_check_leaves_nothing(run, tmp_path, refuse, monkeypatch):
    from mohawk_nas.errors import ExportError

    def fail(*args, **kwargs):
        raise ExportError("the exported checkpoint fails its check: logits differ")

    monkeypatch.setattr("mohawk_nas.export.folder.verify_export", fail)
    for options in (["--out", tmp_path / "new"], ["--force"]):
        message = refuse("export", run, *options, code=1)
        assert re.match(r".*: is not written, since the exported checkpoint fails its ch", message)
    assert not (tmp_path / "new").exists()


# Runs that are taken up again


def test_a_resumed_run_names_what_may_not_change(run, study, refuse):
    assert refuse("search", study, "seed=3", "bank.hidden.lr=1e-4", "search.trials=9") == (
        f"{run}: was begun with other settings (bank.hidden.lr: 0.003 -> 0.0001; seed: 0 -> 3). "
        "Only search.trials, search.batch_size, search.storage, teacher.device, data.cache, "
        "data.streaming, data.shuffle_blocks, data.workers, "
        "bank.path, bank.checkpoint_steps, output, search.rungs and distill may change; give the "
        "study another name, or use --force to set the old run aside"
    )
    message = refuse("score", study, "search.tokens=64", "--layout", "0,1")
    assert "(search.tokens: 128 -> 64)" in message


def test_a_run_that_was_renamed(run, study, refuse, tmp_path):
    shutil.copytree(run, tmp_path / "moved" / "other")
    message = refuse("search", study, "name=other", f"output={tmp_path / 'moved'}")
    assert re.search(
        r"moved/other: was begun with other settings \(name: 'tiny' -> 'other'\); a run's folder "
        r"is called as its study, so rename both back, or use --force",
        message,
    )


def test_a_resumed_run_takes_what_may_change(study, call, tmp_path):
    assert call("search", study, *QUICK)[0] == 0
    code, out, err = call(
        "search",
        study,
        *QUICK,
        "search.trials=4",
        "search.batch_size=3",
        "bank.checkpoint_steps=7",
        "distill.logits.lr=1e-5",
    )
    assert code == 0
    assert "continuing: 2 layouts are scored already" in err
    assert "4 distinct layouts of the 6" in out
    best = read_best(tmp_path / "runs/tiny")
    assert best["study"]["distill"]["logits"]["lr"] == 1e-5
    assert yaml.safe_load((tmp_path / "runs/tiny/config.yaml").read_text()) == best["study"]


def test_scoring_leaves_the_run_as_it_was(run, study, call):
    before = contents(run)
    code, out, _ = call("score", study, "distill.logits.lr=1e-5", "--layout", "M A M A")
    assert code == 0
    assert "of 6 (the study has scored it too)" in out
    after = contents(run)
    assert {path: after[path] for path in before if path.suffix != ".db"} == {
        path: before[path] for path in before if path.suffix != ".db"
    }


def test_a_distillation_with_other_settings(run, refuse, call):
    message = refuse("distill", run, "distill.logits.lr=1e-5", "distill.logits.tokens=128")
    assert message == (
        f"{run}/distill: holds a distillation with other settings (distill.logits.lr: 0.0003 -> "
        "1e-05; distill.logits.tokens: 640 -> 128). Without the change it goes on; for another one "
        "beside it give the study another name, or use --force to set this one aside"
    )
    before = contents(run / "distill")
    assert call("distill", run, "distill.logits.tokens=128", "--force")[0] == 0
    assert sorted(contents(run / "distill.old-1").values()) == sorted(before.values())


@pytest.mark.parametrize("content", [b"a: [", b"[1]", b"a: 3", b"\xff"])
def test_a_record_that_cannot_be_read_back(content, run, study, refuse):
    (run / "config.yaml").write_bytes(content)
    message = refuse("search", study)
    assert message.startswith(f"{run}/config.yaml: cannot be read back (")
    assert message.endswith("); use --force to set the run aside and start anew")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("settings.json", b"{", "must hold JSON, but does not: "),
        ("checkpoint.safetensors", b"rubbish", "must hold safetensors, but is damaged: "),
        ("best.safetensors", b"rubbish", "must hold safetensors, but is damaged: "),
        ("best.safetensors", None, "must hold the best weights so far, but is not there; use"),
    ],
)
def test_a_distillation_that_cannot_be_taken_up(name, content, message, run, refuse):
    path = run / "distill" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    found = refuse("distill", run)
    assert found.startswith(f"{path}: {message}")
    assert found.endswith(f"; use --force to set {run}/distill aside and start anew")


# Steps that miss the one before


def test_score_before_search(study, tmp_path, refuse):
    assert refuse("score", study, "--layout", "0,1") == (
        f"{tmp_path}/runs/tiny: must hold a finished search, but holds none; run `search`"
    )


def test_a_relative_output_is_told_whole(study, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (["score", study, "--layout", "0,1"], ["audit", study]):
        _, _, err = call(*command, "output=elsewhere")
        assert err == (
            f"mohawk-nas: {tmp_path}/elsewhere/tiny: must hold a finished search, but holds none; "
            "run `search` (`output` starts at the working folder)\n"
        )


def test_the_version_is_told(call):
    assert call("--version") == (0, f"mohawk-nas {version('mohawk-nas')}\n", "")


def test_distil_before_search(tmp_path, refuse):
    for given in (tmp_path / "best.yaml", tmp_path):
        assert refuse("distill", given) == (
            f"{tmp_path}/best.yaml: no such file; `mohawk-nas search` writes it"
        )


@pytest.mark.parametrize("content", [b"a: 1", b"- a", b"a: [1", b"\xff\xfe", b"", b"study: {}"])
def test_distil_something_else(content, tmp_path, refuse):
    (tmp_path / "best.yaml").write_bytes(content)
    assert refuse("distill", tmp_path).startswith(
        f"{tmp_path}/best.yaml: must be what `search` wrote, but is not ("
    )


def test_distil_a_layout_that_was_changed_by_hand(run, refuse):
    best = read_best(run)
    best["layout"][0] = "mamba3"
    (run / "best.yaml").write_text(yaml.safe_dump(best))
    assert refuse("distill", run) == (
        f"{run}/best.yaml: layer 0: unknown candidate 'mamba3'; available: attention, mamba2. Did "
        "you mean 'mamba2'?"
    )
    best["layout"] = best["layout"][1:]
    (run / "best.yaml").write_text(yaml.safe_dump(best))
    shutil.rmtree(run / "distill")
    assert refuse("distill", run) == (
        f"{run}/best.yaml: the layout has 3 layers, but the teacher has 4"
    )


def test_distil_a_layout_without_replaced_layers(run, refuse):
    best = read_best(run)
    best["layout"] = ["attention"] * 4
    (run / "best.yaml").write_text(yaml.safe_dump(best))
    assert refuse("distill", run) == (
        f"{run}/best.yaml: its layout keeps attention in every layer, so there is nothing to "
        "distil; lower the study's budget and search again"
    )


def test_distil_with_a_misspelt_override(run, refuse):
    assert refuse("distill", run, "distill.logits.token=5") == (
        f"{run}/best.yaml: distill.logits.token: unknown key. Did you mean 'tokens'?"
    )


def test_export_before_distil(run, tmp_path, refuse):
    for name in ("distill", "export"):
        shutil.rmtree(run / name)
    assert refuse("export", run) == f"{run}: must hold a finished distillation; run `distill` first"
    assert refuse("export", tmp_path) == (
        f"{tmp_path}: must be an exported folder or a run's folder with a best.yaml, but is neither"
    )
    assert refuse("export", run, "--shard-size", "5 gigabytes") == (
        "--shard-size: must be like 500MB or 5GB, but got '5 gigabytes'"
    )
    assert refuse("export", run, "--format", "layout", "--standalone") == (
        "--format layout: writes no model; leave --standalone and such out"
    )
    assert refuse("export", run, "--dtype", "int8") == (
        "--dtype: must be float32, bfloat16 or float16, but got 'int8'"
    )


@pytest.mark.parametrize("command", [["evaluate"], ["generate", "--prompt", "hello"]])
def test_evaluate_something_else(command, shared, tmp_path, refuse):
    for folder in (tmp_path, shared / "teacher", tmp_path / "none"):
        assert refuse(command[0], folder, *command[1:]) == (
            f"{folder}: must be an exported folder or a run's folder with a best.yaml, but is "
            "neither"
        )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mohawk_nas.json", b"{", r"mohawk_nas.json: must hold JSON, .*; export it again$"),
        ("mohawk_nas.json", b"{}", r"mohawk_nas.json: must be what `export` wrote, but is not"),
        ("model.safetensors", b"rubbish", r"export: must hold a whole hybrid, but cannot be read "),
        ("model.safetensors", None, r"export: must hold a whole hybrid, but cannot be read .OSErr"),
        ("config.json", b"{", r"export: must hold a whole hybrid, but cannot be read .OSError"),
    ],
)
def test_evaluate_a_damaged_export(name, content, message, run, refuse):
    path = run / "export" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert re.search(message, refuse("evaluate", run / "export"))


# Runs that fail midway


def full_after(monkeypatch, count):
    """The disk is full from the given write on."""
    replace, writes = os.replace, []

    def failing(*args):
        writes.append(args)
        if len(writes) > count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[1]))
        replace(*args)

    monkeypatch.setattr(os, "replace", failing)


@pytest.mark.parametrize("writes", [0, 1, 2, 5])
def test_a_full_disk(writes, study, tmp_path, call, monkeypatch):
    options = [f"bank.path={tmp_path / 'bank'}", *QUICK]
    with monkeypatch.context() as patch:
        full_after(patch, writes)
        code, _, err = call("search", study, *options)
    assert code == 1
    message = (
        r"mohawk-nas: .*/(runs|bank)/\S+: no space left to write it \([\d,]+ MiB free\); make "
        r"room, or name a folder on another disk$"
    )
    assert re.match(message, err.splitlines()[-1])
    assert not list(tmp_path.rglob("*.tmp"))
    before = contents(tmp_path / "bank") if (tmp_path / "bank").exists() else {}
    assert call("search", study, *options)[0] == 0
    after = contents(tmp_path / "bank")
    finished = {path for path in before if "partial" not in path.name and path.suffix != ".json"}
    assert {path: after[path] for path in finished} == {path: before[path] for path in finished}


def test_a_full_disk_while_distilling_and_exporting(run, tmp_path, refuse, monkeypatch):
    shutil.rmtree(run / "distill/model")
    shutil.rmtree(run / "export")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save_hybrid", full)
        assert refuse("distill", run, code=1).startswith(
            f"{run}/distill/model: no space left to write it ("
        )
    assert not (run / "distill/model").exists()
    assert refuse("export", run) == f"{run}: must hold a finished distillation; run `distill` first"


def test_a_learning_rate_that_is_much_too_high(study, tmp_path, refuse):
    options = [f"bank.path={tmp_path / 'bank'}", "bank.hidden.lr=1e30", *QUICK]
    # Unfinished candidates stay in the bank.
    message = refuse("search", study, *options, code=1, made=None)
    assert re.fullmatch(
        r"layer 0, mamba2: its loss must be a number when stage hidden ends, but is nan; lower the "
        r"stage's lr \(now 1e\+30\)",
        message,
    )


def test_an_error_that_nobody_foresaw_is_one_line(study, refuse, monkeypatch):
    def broken(*args, **kwargs):
        raise LookupError("first line\n  second line")

    monkeypatch.setattr(pipeline, "run_study", broken)
    assert refuse("search", study, code=1, made=RECORDS) == (
        "LookupError: first line second line; --traceback shows where"
    )


def test_stopping_is_no_error(study, refuse, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_study", stopped)
    assert refuse("search", study, code=130, made=RECORDS) == (
        "stopped; the same command goes on from here"
    )


def test_traceback_shows_where_an_error_came_from(study, monkeypatch):
    from mohawk_nas.errors import ConfigError

    for arguments in (["--traceback", "validate", str(study)], ["validate", str(study)]):
        with pytest.raises(ConfigError if "--traceback" in arguments else SystemExit):
            main([*arguments, "search.trails=3"])
    with pytest.raises(ConfigError, match="unknown key"):
        main(["validate", str(study), "search.trails=3", "--traceback"])


def test_files_of_others_are_not_read(study, refuse, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    path = tmp_path / "secret.yaml"
    path.write_text("name: x")
    path.chmod(0)
    assert "cannot be read" in refuse("validate", path)
