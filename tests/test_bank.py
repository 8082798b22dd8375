import json
import logging
import math

import pytest
import torch
from tiny_study import make_study

from mohawk_nas.bank import Bank
from mohawk_nas.distill.trainer import Stage
from mohawk_nas.errors import BankError, TrainingError
from mohawk_nas.mixer import mixer_config
from mohawk_nas.reporting import SILENT
from mohawk_nas.teacher import Teacher
from mohawk_nas.testing import tiny_model
from mohawk_nas.workbench import Workbench

BOTH = ("bank.matrix.tokens=192", "bank.matrix.batch_size=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bank")


@pytest.fixture
def bench(folder, tmp_path):
    def make(*overrides, bank="bank"):
        return Workbench(make_study(folder, f"bank.path={tmp_path / bank}", *BOTH, *overrides))

    return make


def weights(bank, layer, candidate="mamba2"):
    return bank.mixer(layer, candidate).state_dict()


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


class Killed(Exception):
    pass


def kill_after(bank, monkeypatch, saves):
    """Make the bank fail as if killed after so many partial files."""
    save, count = bank._save_partial, 0

    def counted(job):
        nonlocal count
        if count == saves:
            raise Killed
        count += 1
        save(job)

    monkeypatch.setattr(bank, "_save_partial", counted)


def test_losses_fall_in_both_stages(bench):
    work = bench("bank.hidden.tokens=4096", "bank.matrix.tokens=2048")
    work.bank.train(work.space.replaceable, reporter=SILENT)
    for layer, name in work.space.replaceable:
        losses = work.bank.record(layer, name)["losses"]
        for stage in ("matrix", "hidden"):
            curve = [entry["loss"] for entry in losses if entry["stage"] == stage]
            assert curve[-1] < curve[0], (layer, stage, curve)


def test_an_entry_does_not_depend_on_its_company(bench):
    wide = {
        "mamba2": {"mixer": "mamba2", "chunk_size": 8},
        "wide": {"mixer": "mamba2", "d_conv": 2},
    }
    together = bench(f"space.candidates={json.dumps(wide)}", bank="together")
    together.bank.train(together.space.replaceable, reporter=SILENT)
    alone = bench(bank="alone")
    alone.bank.train([(2, "mamba2")], reporter=SILENT)
    assert together.bank.key(2, "mamba2") == alone.bank.key(2, "mamba2")
    assert_equal(weights(together.bank, 2), weights(alone.bank, 2))


# Three steps of stage 1 and eight of stage 2, saved every second step for four layers: the kills
# fall into stage 1, between entries of one save, and into stage 2.
@pytest.mark.parametrize("saves", [0, 2, 4, 9, 17])
def test_a_killed_run_ends_as_an_unbroken_one(bench, monkeypatch, saves):
    whole = bench(bank="whole")
    whole.bank.train(whole.space.replaceable, reporter=SILENT)
    broken = bench(bank="broken")
    kill_after(broken.bank, monkeypatch, saves)
    with pytest.raises(Killed):
        broken.bank.train(broken.space.replaceable, reporter=SILENT)
    again = bench(bank="broken")
    again.bank.train(again.space.replaceable, reporter=SILENT)
    for layer, name in whole.space.replaceable:
        assert_equal(weights(whole.bank, layer), weights(again.bank, layer))
        assert whole.bank.record(layer, name)["losses"] == again.bank.record(layer, name)["losses"]
    assert not list(again.bank.path.glob("*.partial.*"))


def test_what_is_there_is_not_trained_again(bench, monkeypatch):
    work = bench()
    work.bank.train(work.space.replaceable, reporter=SILENT)
    again = bench()

    def never(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr("mohawk_nas.bank.train_layers", never)
    again.bank.train(again.space.replaceable, reporter=SILENT)
    assert_equal(weights(work.bank, 1), weights(again.bank, 1))


@pytest.mark.parametrize(
    "change",
    [
        "bank.hidden.lr=1e-3",
        "bank.hidden.tokens=1024",
        "bank.matrix.tokens=0",
        "bank.matrix.squared=true",
        "seed=1",
        "data.separator=the",
        "space.candidates.mamba2.d_conv=3",
    ],
)
def test_an_entry_of_another_recipe_is_never_used(bench, change):
    work = bench()
    work.bank.train([(0, "mamba2")], reporter=SILENT)
    other = bench(change)
    assert not other.bank.has(0, "mamba2")
    with pytest.raises(BankError, match="no bank entry for layer 0, mamba2"):
        other.bank.mixer(0, "mamba2")


def test_checkpoint_frequency_is_not_part_of_the_key(bench):
    assert bench().bank.key(0, "mamba2") == bench("bank.checkpoint_steps=9").bank.key(0, "mamba2")


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "record"])
def test_a_damaged_entry_is_named_and_trained_again(bench, caplog, damage):
    work = bench()
    work.bank.train([(1, "mamba2")], reporter=SILENT)
    before = weights(work.bank, 1)
    file = work.bank.path / f"{work.bank.key(1, 'mamba2')}.safetensors"
    content = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif damage == "remove":
        file.unlink()
    else:
        file.with_suffix(".json").write_text("{", encoding="utf-8")
    again = bench()
    with caplog.at_level(logging.WARNING):
        again.bank.train([(1, "mamba2")], reporter=SILENT)
    assert "layer 1, mamba2 is damaged" in caplog.text
    assert_equal(before, weights(again.bank, 1))


def test_a_damaged_partial_file_starts_anew(bench, monkeypatch, caplog):
    work = bench()
    kill_after(work.bank, monkeypatch, 4)
    with pytest.raises(Killed):
        work.bank.train(work.space.replaceable, reporter=SILENT)
    partial = next(work.bank.path.glob("*.partial.safetensors"))
    partial.write_bytes(partial.read_bytes()[:100])
    again = bench()
    with caplog.at_level(logging.WARNING):
        again.bank.train(again.space.replaceable, reporter=SILENT)
    assert "it starts anew" in caplog.text
    assert not again.bank.missing(again.space.replaceable)


def test_parts_copied_from_a_bfloat16_teacher_keep_their_trained_values(tmp_path, bench):
    work = bench()
    teacher = Teacher(
        tiny_model("qwen3", vocab_size=4096).to(torch.bfloat16), work.teacher.tokenizer
    )

    def make():
        return Bank(
            tmp_path / "norms",
            teacher=teacher,
            candidates={"mamba2": mixer_config({"mixer": "mamba2"})},
            recipe=work.config.bank,
            blocks=work.blocks["bank"],
            seed=0,
        )

    trained, loaded = make(), make()
    trained.train([(0, "mamba2")], reporter=SILENT)
    assert trained.mixer(0, "mamba2").c_norm is not None
    assert_equal(weights(trained, 0), weights(loaded, 0))


def test_a_bank_can_continue_another(bench, tmp_path):
    work = bench()
    work.bank.train([(0, "mamba2")], reporter=SILENT)
    longer = Bank(
        tmp_path / "longer",
        teacher=work.teacher,
        candidates=work.space.candidates,
        recipe=work.config.bank,
        blocks=work.blocks["bank"],
        seed=1,
        start=work.bank,
    )
    before = {name: t.clone() for name, t in weights(work.bank, 0).items()}
    longer.train([(0, "mamba2")], reporter=SILENT)
    assert_equal(before, weights(work.bank, 0))
    first = longer.record(0, "mamba2")["losses"][0]["loss"]
    assert first < work.bank.record(0, "mamba2")["losses"][0]["loss"]
    assert longer.key(0, "mamba2") != work.bank.key(0, "mamba2")


def test_a_refused_step_leaves_no_trace_in_the_losses(bench, monkeypatch):
    work = bench("bank.matrix.tokens=0")
    whole, calls = Stage.loss, 0

    def spoiled(stage, mixer, capture):
        nonlocal calls
        calls += 1
        loss = whole(stage, mixer, capture)
        return loss * float("nan") if calls in (3, 8) else loss

    monkeypatch.setattr(Stage, "loss", spoiled)
    work.bank.train([(0, "mamba2")], reporter=SILENT)
    record = work.bank.record(0, "mamba2")
    assert record["bad_steps"] == 2
    assert all(math.isfinite(entry["loss"]) for entry in record["losses"])
    assert all(t.isfinite().all() for t in weights(work.bank, 0).values())


def test_gradients_that_are_not_finite_stop_the_run_and_name_the_candidate(bench, monkeypatch):
    work = bench("bank.hidden.tokens=2048", "bank.matrix.tokens=0")

    def broken(stage, mixer, capture):
        return mixer(capture.hidden).sum() * float("nan")

    monkeypatch.setattr(Stage, "loss", broken)
    message = r"layer 0, mamba2: its loss or gradient was not finite in 1[1-6] steps so far"
    with pytest.raises(TrainingError, match=message):
        work.bank.train([(0, "mamba2")], reporter=SILENT)
