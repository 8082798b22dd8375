"""The whole path on a tiny teacher: search, score, distil, export, evaluate, generate."""

import gc
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import weakref
from importlib.metadata import version
from threading import Timer

import pytest
import torch
import yaml
from tiny_study import ASSETS, make_study, make_teacher, make_text

from mohawk_nas import pipeline, runs
from mohawk_nas.config import load_study, plain
from mohawk_nas.distill import logits
from mohawk_nas.errors import BankError, RunError
from mohawk_nas.evaluate import continue_text, evaluate, find_target
from mohawk_nas.export.folder import export_folder
from mohawk_nas.layout import Layout
from mohawk_nas.mixer import Mixer
from mohawk_nas.reporting import Silent
from mohawk_nas.search.study import load_result
from mohawk_nas.workbench import Workbench

STUDIES = ASSETS.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def searched(folder):
    return pipeline.search(make_study(folder))


@pytest.fixture(scope="module")
def distilled(searched):
    return pipeline.distill(pipeline.load_best(searched[1]))


def test_a_search_writes_all_that_distillation_needs(folder, searched):
    result, path = searched
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert raw["layout"] == list(result.best.layout.candidates)
    assert raw["attention_layers"] == list(result.best.layout.attention_layers)
    assert raw["strip"].split().count("A") == 2
    assert raw["scores"]["value"] == result.best.value
    assert set(raw["bank"]) == {str(i) for i in result.best.layout.replaced_layers}
    assert raw["provenance"]["versions"]["torch"] == version("torch")
    assert pipeline.load_best(path).study == make_study(folder)
    assert (path.parent / "config.yaml").is_file() and (path.parent / "provenance.json").is_file()
    for key in raw["bank"].values():
        assert (folder / "bank" / f"{key}.safetensors").is_file()


def test_the_space_is_scored_whole_and_the_best_wins(searched):
    result, _ = searched
    assert result.exhaustive and len(result.trials) == result.num_possible == 6
    assert result.best.value == min(trial.value for trial in result.trials)
    assert set(result.baselines) >= {"first", "last", "swap_one", "add_one_in", "greedy"}


def test_a_layout_of_ones_own_is_placed(folder, searched):
    result, _ = searched
    layout, scored, placement, _ = pipeline.score(make_study(folder), "0,1")
    assert layout.attention_layers == (0, 1)
    assert placement.trial is not None
    assert placement.rank == 1 + sum(t.value < placement.trial.value for t in result.trials)
    # Off the budget it is scored anew.
    layout, scored, placement, _ = pipeline.score(make_study(folder), "A A A M")
    assert placement.trial is None
    assert scored.mean("kl") < max(trial.value for trial in result.trials)


def test_distillation_starts_from_the_bank_and_keeps_the_best(searched, distilled):
    result, folder = distilled
    assert result.after.mean_kl <= result.before.mean_kl
    raw = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert raw["layout"] == list(searched[0].best.layout.candidates)
    assert raw["validation_kl"]["after"] == result.after.mean_kl


def test_stage_3_holds_one_copy_of_its_mixers(searched, tmp_path, monkeypatch):
    def mixers():
        gc.collect()
        return {x for x in gc.get_objects() if issubclass(type(x), Mixer)}

    def make_trainer(*args):
        held.append(len(mixers() - set(others)))
        return make(*args)

    held, others, make = [], weakref.WeakSet(mixers()), logits.make_trainer
    monkeypatch.setattr(logits, "make_trainer", make_trainer)
    copy = tmp_path / "best.yaml"
    copy.write_bytes(searched[1].read_bytes())
    best = pipeline.load_best(copy, ["distill.hidden.tokens=64", "distill.hidden.batch_size=4"])
    pipeline.distill(best)
    assert held == [len(best.layout.replaced_layers)]


def test_a_finished_distillation_is_not_run_again(searched, distilled, monkeypatch):
    def never(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr("mohawk_nas.distill.logits.LogitsTrainer.step", never)
    again, _ = pipeline.distill(pipeline.load_best(searched[1]))
    assert again.after == distilled[0].after


def test_other_settings_do_not_continue_a_distillation(searched, distilled):
    best = pipeline.load_best(searched[1], ["distill.logits.lr=1e-5"])
    with pytest.raises(RunError, match=r"other settings \(distill\.logits\.lr: .*use --force"):
        pipeline.distill(best)


@pytest.mark.parametrize(
    "overrides",
    [
        ["distill.hidden.tokens=256", "distill.hidden.batch_size=4"],
        [
            "distill.start=scratch",
            "distill.matrix.tokens=128",
            "distill.matrix.batch_size=4",
            "distill.hidden.tokens=256",
            "distill.hidden.batch_size=4",
        ],
    ],
    ids=["more of stage 2", "from scratch"],
)
def test_stages_one_and_two_can_be_part_of_the_distillation(searched, tmp_path, overrides):
    copy = tmp_path / "best.yaml"
    copy.write_bytes(searched[1].read_bytes())
    result, folder = pipeline.distill(pipeline.load_best(copy, overrides))
    assert result.after.mean_kl <= result.before.mean_kl
    records = [json.loads(p.read_text()) for p in (folder / "bank").glob("*.json")]
    assert len(records) == 2
    from_bank = "distill.start=scratch" not in overrides
    assert all((r["identity"]["start"] is not None) == from_bank for r in records)


def test_export_evaluate_generate(folder, distilled):
    out, found = export_folder(distilled[1])
    assert found["reloaded logits"] <= 1e-5 and found["prefill and decode"] <= 1e-5
    run, _ = evaluate(find_target(distilled[1].parent))
    assert [row.name for row in run] == ["teacher", "undistilled student", "distilled student"]
    exported, _ = evaluate(find_target(out))
    assert [row.name for row in exported] == ["teacher", "export"]
    assert exported[1].figures == run[2].figures
    assert run[0].figures.mean_kl == pytest.approx(0, abs=1e-6)
    assert run[2].figures.mean_kl < run[1].figures.mean_kl
    prompts = ["a text", "another text that is longer"]
    said = [continue_text(find_target(p), prompts, max_new_tokens=4) for p in (out, distilled[1])]
    assert said[0] == said[1] and all(map(str.startswith, said[0], prompts))
    alone = [continue_text(find_target(out), [prompt], max_new_tokens=4)[0] for prompt in prompts]
    assert said[0] == alone
    card = (out / "README.md").read_text(encoding="utf-8")
    assert str(folder) not in card and f"{distilled[0].after.mean_kl:.4f}" in card


def test_an_export_that_stands_alone(folder, distilled, tmp_path):
    from transformers import GenerationConfig

    run = tmp_path / "run"
    shutil.copytree(distilled[1].parent, run, ignore=shutil.ignore_patterns("export"))
    stop = GenerationConfig(max_length=77, eos_token_id=[0, 5])
    stop.save_pretrained(run / "distill/model")
    out, found = export_folder(run, standalone=True, shard_size="100KB")
    assert found["reloaded logits"] <= 1e-5 and found["saved and loaded again"] <= 1e-5
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    names = {name: where.partition(".")[0] for name, where in config["auto_map"].items()}
    assert names.keys() == {"AutoConfig", "AutoModelForCausalLM"}
    assert all((out / f"{module}.py").is_file() for module in names.values())
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 1
    said = GenerationConfig.from_pretrained(out)
    assert said.max_length == 77 and said.eos_token_id == [0, 5]
    assert "trust_remote_code=True" in (out / "README.md").read_text(encoding="utf-8")
    # Of text and weights no more than names.
    texts = [p.read_text("utf-8") for p in out.iterdir() if p.suffix in (".py", ".md")]
    assert not [text for text in texts if str(folder) in text]
    (row,) = [row for row in evaluate(find_target(out))[0] if row.name == "export"]
    assert row.figures.mean_kl == pytest.approx(evaluate(find_target(run))[0][-1].figures.mean_kl)


def test_more_trials_continue_a_study(tmp_path):
    options = ("search.baselines=[first]", "search.strategy=random")
    short, _ = pipeline.search(make_study(tmp_path, "search.trials=3", *options))
    long, _ = pipeline.search(make_study(tmp_path, "search.trials=5", *options))
    assert [t.layout for t in long.trials[:3]] == [t.layout for t in short.trials]
    assert len(long.trials) == 5


def test_force_sets_an_earlier_run_aside(tmp_path):
    first, _ = pipeline.search(make_study(tmp_path, "search.tokens=64"))
    pipeline.search(make_study(tmp_path), force=True)
    assert (tmp_path / "runs" / "tiny.old-1" / "best.yaml").is_file()
    assert first.best.layout in {Layout(t.layout.candidates) for t in first.trials}


def test_force_leaves_a_study_that_others_may_be_at_alone(tmp_path):
    url = f"search.storage=sqlite:///{tmp_path / 'studies.db'}"
    pipeline.search(make_study(tmp_path, url))
    with pytest.raises(RunError, match="holds a study 'tiny', which --force does not set aside"):
        pipeline.search(make_study(tmp_path, url, "seed=5"), force=True)
    assert (tmp_path / "runs" / "tiny" / "best.yaml").is_file()
    pipeline.search(make_study(tmp_path, url, "seed=5", "name=other"), force=True)


def test_other_text_of_a_rung_is_refused(tmp_path):
    config = make_study(tmp_path, "search.rungs.tokens=[1024]", "bank.hidden.tokens=64")
    pipeline.search(config)

    def read():
        bench = Workbench(config)
        return {x: blocks.fingerprint for x, blocks in bench.blocks.items()}, bench.training_text(
            1024
        ).fingerprint

    text = tmp_path / "text.jsonl"
    lines, (others, longer) = text.read_text(encoding="utf-8").splitlines(), read()
    for number in range(10, len(lines)):
        # A document that the rung reads, and nobody else.
        text.write_text("\n".join([*lines[:number], *lines[number + 1 :]]), encoding="utf-8")
        found = read()
        if found[0] == others and found[1] != longer:
            break
    else:
        raise AssertionError
    with pytest.raises(RunError, match="text of the rung of 1,024 tokens"):
        pipeline.search(config)


def test_a_bfloat16_teacher_goes_the_whole_way(tmp_path):
    config = make_study(tmp_path, "teacher.dtype=bfloat16", "bank.matrix.tokens=128")
    result, path = pipeline.search(config)
    assert result.best.value > 0
    distilled, folder = pipeline.distill(pipeline.load_best(path))
    assert distilled.after.mean_kl <= distilled.before.mean_kl
    _, found = export_folder(folder)
    assert found["prefill and decode"] <= 1e-5


def test_hybrid_phi_mamba_runs_on_a_shrunken_random_phi(tmp_path, monkeypatch):
    # The card would ask for the teacher's licence.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    make_text(tmp_path / "text.jsonl")
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    }
    path = STUDIES / "hybrid_phi_mamba.yaml"
    baselines = yaml.safe_load(path.read_text(encoding="utf-8"))["search"]["baselines"]
    gates = {"name": "gates", "tokens": 128, "restarts": 2, "batch_size": 4}
    baselines = [gates if name == "gates" else name for name in baselines]
    assert gates in baselines
    config = load_study(
        path,
        [
            f"output={tmp_path / 'runs'}",
            f"bank.path={tmp_path / 'bank'}",
            f"data.cache={tmp_path / 'cache'}",
            "teacher.random_weights=true",
            f"teacher.overrides={json.dumps(small)}",
            f"teacher.tokenizer={ASSETS / 'phi-tiny'}",
            "teacher.device=cpu",
            f"data.source={tmp_path / 'text.jsonl'}",
            "data.subset=null",
            "data.block_size=16",
            "data.validation_tokens=64",
            "data.test_tokens=64",
            "bank.matrix={tokens: 256, batch_size: 4}",
            "bank.hidden={tokens: 512, batch_size: 4}",
            "search.tokens=64",
            "search.trials=32",
            f"search.baselines={json.dumps(baselines)}",
            "search.rungs.tokens=[128]",
            "distill.hidden={tokens: 128, batch_size: 4}",
            "distill.logits={tokens: 256, batch_size: 4}",
        ],
    )
    result, path = pipeline.search(config)
    assert len(result.trials) == 32 and not result.exhaustive
    assert result.baselines["4,10,16,22"].attention_layers == (4, 10, 16, 22)
    assert all(len(trial.layout.attention_layers) == 4 for trial in result.trials)
    (rung,) = result.rungs
    assert rung.complete and result.baselines["4,10,16,22"] in rung.climbers
    _, folder = pipeline.distill(pipeline.load_best(path))
    export_folder(folder)


@pytest.mark.parametrize(
    ("pinned", "candidates"),
    [
        ({0: "attention"}, {"mamba2": {"mixer": "mamba2"}}),
        ({1: "wide"}, {"mamba2": {"mixer": "mamba2"}, "wide": {"mixer": "mamba2", "d_conv": 2}}),
    ],
)
def test_pinned_layers_are_trained_and_scored_as_pinned(tmp_path, pinned, candidates):
    space = {"pinned": pinned, "candidates": candidates}
    result, _ = pipeline.search(make_study(tmp_path, "search.trials=4", space=space))
    for trial in result.trials:
        for layer, name in pinned.items():
            assert trial.layout[layer] == name
    assert len(list((tmp_path / "bank").glob("*.json"))) == sum(
        1 if layer in pinned else len(candidates)
        for layer in range(4)
        if pinned.get(layer) != "attention"
    )


def test_a_teacher_replaced_in_place_is_noticed(tmp_path):
    pipeline.search(make_study(tmp_path, "search.trials=2", "search.baselines=[first]"))
    make_teacher(tmp_path / "teacher", seed=1)
    with pytest.raises(RunError, match=r"has changed \(teacher; mixers or their training\), and"):
        pipeline.search(make_study(tmp_path, "search.trials=4", "search.baselines=[first]"))
    with pytest.raises(RunError, match=r"has changed \(teacher"):
        pipeline.score(make_study(tmp_path, "search.baselines=[first]"), "0,1")


@pytest.mark.parametrize(
    "change", ["seed=3", "data.validation_tokens=64", "bank.hidden.lr=1e-4", "data.block_size=32"]
)
def test_a_distillation_does_not_continue_on_other_ground(searched, distilled, change):
    before = {p: p.read_bytes() for p in distilled[1].glob("*.safetensors")}
    best = pipeline.load_best(searched[1], [change])
    with pytest.raises(RunError, match="what it was begun with has changed"):
        pipeline.distill(best)
    assert before == {p: p.read_bytes() for p in distilled[1].glob("*.safetensors")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_exports_in_half_precision_pass_their_check(distilled, tmp_path, dtype):
    out, found = export_folder(distilled[1], tmp_path / "out", dtype=dtype)
    assert found["reloaded logits"] <= 1e-5
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype


def test_evaluation_follows_the_layout_that_was_distilled(searched, distilled, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(searched[1].parent, copy)
    raw = yaml.safe_load((copy / "best.yaml").read_text(encoding="utf-8"))
    other = next(t for t in searched[0].ranking if t.layout != searched[0].best.layout)
    raw["layout"] = list(other.layout.candidates)
    (copy / "best.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    rows = {row.name: row.figures for row in evaluate(find_target(copy))[0]}
    whole = {row.name: row.figures for row in evaluate(find_target(searched[1].parent))[0]}
    assert rows["undistilled student"] == whole["undistilled student"]


def test_best_yaml_means_the_same_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_study(tmp_path, "bank.path=here/bank", "data.cache=here/cache", "output=runs")
    _, path = pipeline.search(config)
    (tmp_path / "elsewhere").mkdir()
    best = tmp_path / path
    monkeypatch.chdir(tmp_path / "elsewhere")
    pipeline.distill(pipeline.load_best(best))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_two_searches_of_one_run_are_kept_apart(tmp_path):
    config = make_study(tmp_path)
    with (
        runs.only_one(config.run_dir),
        pytest.raises(RunError, match="by one process at a time, but another is at it"),
    ):
        pipeline.search(config)


def outcome(config):
    """What must be the same after kills: order, layouts, scores, bank keys, best."""
    bench = Workbench(config)
    result = load_result(config, bench.space, bench.budget, run_dir=config.run_dir)
    best = yaml.safe_load((config.run_dir / "best.yaml").read_text(encoding="utf-8"))
    trials = [(t.layout, t.score.per_block, dict(t.provenance)) for t in result.trials]
    return trials, dict(result.baselines), best["layout"], best["bank"], best["scores"]


class Killer(Silent):
    """Kills its own process some milliseconds after so many steps or layouts, as SIGKILL does."""

    def __init__(self, after, *, seconds):
        self.left, self.seconds = after, seconds

    def advance(self, amount=1, **figures):
        self.left -= amount
        if self.left == 0:
            Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


def test_two_ranks_make_the_bank_and_the_study_of_one(tmp_path):
    make_study(tmp_path)

    def study(name):
        return make_study(
            tmp_path,
            f"output={tmp_path / name}",
            f"bank.path={tmp_path / name / 'bank'}",
            "bank.matrix.tokens=128",
            "bank.matrix.batch_size=4",
        )

    pipeline.search(study("one"))
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(plain(study("two"))), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--standalone", "-m", "mohawk_nas", "search", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert outcome(study("two")) == outcome(study("one"))
    one, two = (Workbench(study(name)).bank for name in ("one", "two"))
    ranks = set()
    for layer in range(4):
        weights = [bank.mixer(layer, "mamba2").state_dict() for bank in (one, two)]
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        ranks.add(two.record(layer, "mamba2")["rank"])
    assert ranks == {0, 1}
    # What is wrong is told once, in one line.
    changed = plain(study("two")) | {"seed": 1}
    # Here the others have nothing to do, and must be told so all the same.
    changed["search"]["evaluation"] = "per_trial"
    path.write_text(yaml.safe_dump(changed), encoding="utf-8")
    refused = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = [line for line in refused.stderr.splitlines() if line.startswith("mohawk-nas: ")]
    assert refused.returncode and len(lines) == 1 and "begun with other settings" in lines[0], (
        refused.stderr
    )
    assert "gloo" not in refused.stderr


def test_stage1_rank_reads_the_banks_records(tmp_path):
    study = make_study(
        tmp_path,
        "bank.matrix.tokens=1024",
        "bank.matrix.batch_size=4",
        "search.baselines=[stage1_rank]",
    )
    result, _ = pipeline.search(study)
    bench = Workbench(study)
    last = {}
    for layer in range(4):
        losses = bench.bank.record(layer, "mamba2")["losses"]
        last[layer] = [entry["loss"] for entry in losses if entry["stage"] == "matrix"][-1]
    assert bench.stage1_losses() == {(layer, "mamba2"): loss for layer, loss in last.items()}
    kept = result.baselines["stage1_rank"].attention_layers
    assert set(kept) == set(sorted(last, key=last.get)[-2:])
    assert len(set(last.values())) == 4


def test_a_bank_without_stage_1_tells_so(searched, folder):
    bench = Workbench(make_study(folder))
    with pytest.raises(BankError, match=r"layer 0, mamba2 has no stage matrix; set bank.matrix.to"):
        bench.stage1_losses()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process cannot use CUDA")
def test_a_search_that_is_killed_ten_times_ends_as_an_unbroken_one(tmp_path):
    make_teacher(tmp_path / "teacher", num_layers=7)
    make_text(tmp_path / "text.jsonl")

    def study(name):
        return make_study(
            tmp_path,
            f"output={tmp_path / name}",
            f"bank.path={tmp_path / name / 'bank'}",
            f"data.cache={tmp_path / name / 'cache'}",
            "bank.matrix.tokens=512",
            "bank.matrix.batch_size=4",
            "bank.hidden.tokens=2048",
            "search.trials=16",
            "search.baselines=[first, swap_one]",
        )

    # A forked child skips the seconds that imports take.
    context = multiprocessing.get_context("fork")

    def run(name, **options):
        child = context.Process(target=pipeline.search, args=(study(name),), kwargs=options)
        child.start()
        child.join()
        return child.exitcode

    assert run("whole") == 0
    trials = outcome(study("whole"))[0]
    assert len(trials) == 16
    rng = random.Random(0)
    # The bank takes 40 steps, of which a kill loses at most one; then come 23 layouts.
    for after in (7, 9, 3, 9, 8, 9, 5, 4, 4, 4):
        killer = Killer(after, seconds=rng.uniform(0, 0.02))
        assert run("broken", reporter=killer) == -signal.SIGKILL
    assert run("broken") == 0
    assert outcome(study("broken")) == outcome(study("whole"))
    bench = Workbench(study("broken"))
    result = load_result(bench.config, bench.space, bench.budget, run_dir=bench.config.run_dir)
    assert "swaps" in {trial.proposed_by for trial in result.trials}
