"""Stage 3 on several processes: what comes out, what is left after a kill, who stops when."""

import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings

import processes
import pytest
import torch
from tiny_study import make_streamed_study, make_study, make_teacher, make_text

from mohawk_nas import pipeline, ranks
from mohawk_nas.config import LogitsConfig, dump
from mohawk_nas.distill import checkpoints, parallel
from mohawk_nas.distill.logits_trainer import LogitsTrainer, student_to_train
from mohawk_nas.distill.parallel import (
    DataParallelTrainer,
    ShardedTrainer,
    make_trainer,
    parallel_mode,
)
from mohawk_nas.errors import ConfigError, RunError, TeacherError
from mohawk_nas.files import load_tensors, save_tensors
from mohawk_nas.layout import Layout
from mohawk_nas.mixer import build_mixer, mixer_config
from mohawk_nas.plan import find_problems
from mohawk_nas.student import assemble
from mohawk_nas.teacher import Teacher
from mohawk_nas.testing import tiny_model

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process cannot use CUDA"),
]

STEPS = 10


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A searched run whose stage 2 goes on; three heads do not divide over two processes."""
    folder = tmp_path_factory.mktemp("scale")
    make_teacher(folder / "teacher", num_heads=3, hidden_size=36)
    make_text(folder / "text.jsonl")
    study = make_study(folder, "distill.hidden.tokens=128", "distill.hidden.batch_size=4")
    return pipeline.search(study)[1].parent


@pytest.fixture
def fresh(searched, tmp_path):
    def copy(name):
        return shutil.copytree(searched, tmp_path / name)

    return copy


@pytest.fixture(scope="module")
def whole(searched, tmp_path_factory):
    """Unbroken distillations, by their number of processes and mode."""
    folder = tmp_path_factory.mktemp("whole")
    done = {}

    def distilled(count, mode="ddp"):
        if (count, mode) not in done:
            run = shutil.copytree(searched, folder / f"{count}{mode}")
            assert distil(count, run, mode) == [0] * count
            done[count, mode] = run / "distill"
        return done[count, mode]

    return distilled


def distil(count, run, mode="ddp", *more, **options):
    arguments = ["distill", str(run), f"distill.logits.parallel={mode}", *more]
    return processes.run(count, arguments, **options)


def curve(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same(one, other):
    """Curves, best weights and exported weights are equal to the last bit."""
    assert curve(one) == curve(other)
    assert [entry["step"] for entry in curve(one)] == list(range(1, STEPS + 1))
    for name in ("best.safetensors", "model/model.safetensors"):
        left, right = load_tensors(one / name), load_tensors(other / name)
        assert left.keys() == right.keys()
        for key, tensor in left.items():
            assert torch.equal(tensor, right[key]), key


def assert_close(one, other):
    for left, right in zip(curve(one), curve(other), strict=True):
        assert left == pytest.approx(right, rel=1e-3)
    left, right = (load_tensors(f / "model/model.safetensors") for f in (one, other))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        # Adam makes whole steps of gradients that are rounding alone.
        assert (tensor - right[name]).abs().mean() < 2e-5, name


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_do_what_one_does(whole, mode):
    folder = whole(2, mode)
    assert_close(folder, whole(1))
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert result["provenance"]["processes"] == 2
    # Stage 2 was shared, too.
    records = [json.loads(p.read_text(encoding="utf-8")) for p in (folder / "bank").glob("*.json")]
    assert {record["rank"] for record in records} == {0, 1}
    assert not list(folder.glob("checkpoint.safetensors"))
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]


def no_room():
    """What does not fit is divided, and gathered whenever it runs."""
    parallel._room = lambda device: 0.0


def test_what_is_gathered_when_changes_no_bit(fresh, whole, tmp_path):
    run = fresh("divided")

    def killed():
        no_room()
        processes.die_in(6, rank=1)

    assert distil(2, run, "fsdp", before=killed)[1] == -signal.SIGKILL
    log = tmp_path / "log.txt"
    assert distil(2, run, "fsdp", before=no_room, log=log) == [0, 0]
    assert "continuing after step 4 of 10" in log.read_text()
    assert_same(run / "distill", whole(2, "fsdp"))


def test_torchrun_restarts_what_was_killed_and_ends_as_unbroken(fresh, whole):
    run = fresh("restarted")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--max-restarts=1", processes.__file__, "distill", str(run)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"DEATHS": "5"}
    )
    assert done.returncode == 0, done.stderr
    assert "continuing after step 4 of 10" in done.stderr
    assert_same(run / "distill", whole(2))


@pytest.mark.parametrize(("count", "mode"), [(1, "auto"), (2, "ddp"), (2, "fsdp")])
def test_runs_that_are_killed_anywhere_end_as_unbroken(fresh, whole, count, mode):
    run, rng = fresh("killed"), random.Random(count)
    for step in (3, 4) if count == 1 else (5,):
        rank = rng.randrange(count)
        # Somewhere in a step, in the looks after it, or while a checkpoint is written.
        seconds = rng.uniform(0.001, 0.05)
        codes = distil(
            count,
            run,
            mode,
            before=lambda s=step, r=rank, t=seconds: processes.die_in(s, rank=r, seconds=t),
        )
        assert codes[rank] == -signal.SIGKILL
    assert distil(count, run, mode) == [0] * count
    assert_same(run / "distill", whole(count, mode if count > 1 else "ddp"))


def test_a_study_that_gives_its_layout_is_distilled_by_several(tmp_path):
    config = make_study(tmp_path, "layout='1,2'", "budget.attention_layers=null")
    study = tmp_path / "given.yaml"
    study.write_text(dump(config), encoding="utf-8")
    command = ["distill", str(study), "distill.logits.parallel=fsdp"]
    assert processes.run(2, command) == [0, 0]
    best = pipeline.load_best(config.run_dir)
    assert best.layout.attention_layers == (1, 2)
    assert len(curve(config.run_dir / "distill")) == STEPS
    # Another layout is another distillation, whoever asks.
    log = tmp_path / "log.txt"
    assert 2 in processes.run(2, [*command, "layout='0,2'"], log=log)
    assert "layout" in log.read_text()


def test_a_signal_to_one_process_saves_and_ends_all(fresh, whole, tmp_path):
    run, log = fresh("stopped"), tmp_path / "log.txt"
    folder = run / "distill"
    codes = distil(
        2,
        run,
        before=lambda: processes.die_in(3, rank=1, number=signal.SIGTERM),
        log=log,
    )
    assert codes == [75, 75]
    # The step in which the signal came is the last, and is saved though no checkpoint is due.
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    (told,) = [line for line in log.read_text().splitlines() if line.startswith("mohawk-nas: ")]
    assert "after step 3 of 10, which is saved; the same command goes on" in told
    # Another number of processes goes on from there, and back.
    codes = distil(
        1, run, before=lambda: processes.die_in(4, number=signal.SIGINT), log=tmp_path / "two.txt"
    )
    assert codes == [75]
    told = (tmp_path / "two.txt").read_text()
    assert "continuing after step 3 of 10" in told and "stopped by SIGINT after step 7" in told
    assert (folder / "checkpoint.safetensors").is_file()
    assert not list(folder.glob("checkpoint-*"))
    assert distil(2, run, "fsdp") == [0, 0]
    assert not (folder / "checkpoint.safetensors").exists()
    assert_close(folder, whole(1))


def test_what_torchrun_starts_again_goes_on_whatever_force_says(fresh, whole, tmp_path):
    run, log = fresh("forced"), tmp_path / "log.txt"
    stop = {"before": lambda: processes.die_in(4, number=signal.SIGTERM)}
    assert distil(1, run, "auto", "--force", **stop) == [75]
    again = {"before": lambda: os.environ.update(TORCHELASTIC_RESTART_COUNT="1")}
    assert distil(1, run, "auto", "--force", **again, log=log) == [0]
    assert "continuing after step 4 of 10" in log.read_text()
    assert_same(run / "distill", whole(1))


@pytest.fixture(scope="module")
def streamed(searched):
    """A study that gives its layout and streams two texts, with a worker in each process."""
    folder = searched.parents[1]
    (folder / "more.jsonl").write_text((folder / "text.jsonl").read_text(), encoding="utf-8")

    def written(output):
        study = make_streamed_study(
            folder, f"output={output}", "distill.hidden={tokens: 256, batch_size: 4}"
        )
        output.mkdir(exist_ok=True)
        path = output / "study.yaml"
        path.write_text(dump(study), encoding="utf-8")
        return path

    return written


def test_two_processes_that_stream_end_as_unbroken_and_go_on_as_one(streamed, tmp_path):
    log = tmp_path / "log.txt"
    studies = {name: streamed(tmp_path / name) for name in ("whole", "broken", "alone")}
    folders = {name: path.parent / "tiny/distill" for name, path in studies.items()}

    def distil(count, name, **options):
        return processes.run(count, ["distill", str(studies[name])], log=log, **options)

    assert distil(2, "whole") == [0, 0]
    codes = distil(2, "broken", before=lambda: processes.die_in(6, rank=1))
    assert codes[1] == -signal.SIGKILL
    assert [path.name for path in folders["broken"].glob("checkpoint-*")] == ["checkpoint-4"]
    shutil.copytree(folders["broken"].parent, folders["alone"].parent)
    assert distil(2, "broken") == [0, 0]
    assert "continuing after step 4 of 10" in log.read_text()
    assert_same(folders["broken"], folders["whole"])
    # The position is that of all ranks: one process takes it up.
    assert distil(1, "alone") == [0]
    assert_close(folders["alone"], folders["whole"])


def test_a_signal_to_the_whole_group_saves_though_workers_get_it_too(streamed, tmp_path):
    study, log = streamed(tmp_path / "stopped"), tmp_path / "log.txt"

    def in_a_group_that_is_told_to_end():
        # As torchrun starts and ends its processes.
        os.setsid()
        before, started = LogitsTrainer.step, []

        def told(self, *args):
            started.append(args)
            if len(started) == 3:
                # By another: a worker that is told by its parent takes it for an order.
                command = ["kill", "-TERM", "--", f"-{os.getpgrp()}"]
                subprocess.run(command, start_new_session=True, check=True)
                # For the workers to be gone, if they go.
                time.sleep(0.5)
            return before(self, *args)

        LogitsTrainer.step = told

    arguments = ["distill", str(study)]
    assert processes.run(1, arguments, before=in_a_group_that_is_told_to_end, log=log) == [75]
    assert "stopped by SIGTERM after step 3 of 10, which is saved" in log.read_text()
    assert (study.parent / "tiny/distill/checkpoint.safetensors").is_file()


def test_sharded_checkpoints_are_read_by_one_process(fresh, whole):
    run = fresh("stopped")
    stop = {"before": lambda: processes.die_in(4, rank=0, number=signal.SIGTERM)}
    assert distil(2, run, "fsdp", **stop) == [75, 75]
    assert distil(1, run) == [0]
    assert_close(run / "distill", whole(1))


def test_a_half_written_checkpoint_is_not_taken_for_a_whole_one(fresh, whole, tmp_path):
    run = fresh("half")
    folder = run / "distill"

    def die_before_it_has_its_name():
        real, calls = checkpoints.save, []

        def dying(*args, **options):
            real(*args, **options)
            calls.append(args)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoints.save = dying

    assert -signal.SIGKILL in distil(2, run, before=die_before_it_has_its_name)
    half = folder / ".checkpoint-4"
    for part in half.glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:100])
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert distil(2, run, log=tmp_path / "log.txt") == [0, 0]
    assert "continuing after step 2 of 10" in (tmp_path / "log.txt").read_text()
    assert_same(folder, whole(2))
    assert not half.exists()
    # One that lost something after it got its name is told by its name.
    (whole_one,) = folder.glob("checkpoint-*")
    (whole_one / ".metadata").write_bytes(b"")
    assert distil(1, run, log=tmp_path / "damaged.txt") == [2]
    told = (tmp_path / "damaged.txt").read_text()
    assert f"{whole_one}: must hold a whole checkpoint, but: " in told and "use --force" in told


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_what_is_not_finite_on_one_process_moves_nothing_on_any(fresh, tmp_path, mode):
    run, log = fresh("spoiled"), tmp_path / "log.txt"

    def spoil():
        for kind in (DataParallelTrainer, ShardedTrainer):
            before = kind._loss
            kind._loss = lambda self, tokens, before=before: (
                before(self, tokens) * (float("nan") if os.environ["RANK"] == "1" else 1.0)
            )

    codes = distil(2, run, mode, "distill.logits.max_bad_steps=4", before=spoil, log=log)
    assert codes == [1, 1]
    (told,) = [line for line in log.read_text().splitlines() if line.startswith("mohawk-nas: ")]
    assert "not finite in " in told and "distill.logits.max_bad_steps (4)" in told
    folder = run / "distill"
    # The last checkpoint holds what the first one began with.
    best = load_tensors(folder / "best.safetensors")
    (path,) = folder.glob("checkpoint-*")
    state = {f"weight/{name}": torch.zeros_like(tensor) for name, tensor in best.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")
        checkpoints.load(state, checkpoint_id=path, no_dist=True)
    for name, tensor in best.items():
        assert torch.equal(state[f"weight/{name}"], tensor), name


def test_a_batch_that_cannot_be_divided_is_refused_at_once(searched, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"multiple of their number \(3\), but got 4"):
        pipeline.distill(pipeline.load_best(searched))


def test_the_mode_follows_from_size_and_choice(monkeypatch):
    class Small:
        device = torch.device("cpu")

    assert parallel_mode(LogitsConfig(parallel="fsdp"), Small()) == "one"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parallel_mode(LogitsConfig(parallel="fsdp"), Small()) == "fsdp"
    assert parallel_mode(LogitsConfig(), Small()) == "ddp"


def test_what_decides_speed_alone_may_change_between_two_commands(fresh, whole):
    run = fresh("changed")
    stop = {"before": lambda: processes.die_in(5, number=signal.SIGTERM)}
    assert distil(1, run, **stop) == [75]
    more = ["distill.logits.activation_checkpointing=true", "distill.logits.max_bad_steps=3"]
    assert distil(1, run, "fsdp", *more) == [0]
    assert_same(run / "distill", whole(1))
    raw = json.loads((run / "distill/settings.json").read_text(encoding="utf-8"))
    assert "schedule" not in raw["distill"]["logits"] and "teacher" not in raw["distill"]


def test_what_every_process_holds_whole_follows_from_room(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    teacher = Teacher(tiny_model("llama").to(torch.bfloat16))
    student = copy.deepcopy(teacher.model).float().requires_grad_(True)
    count = sum(parameter.numel() for parameter in student.parameters())
    for accumulate, taken in ((1, 4 * count), (2, 8 * count)):
        # Of both are two bytes a parameter gathered.
        config = LogitsConfig(accumulate=accumulate)
        found = []
        for room in (taken + 4 * count, taken + 4 * count - 1, taken + 2 * count - 1):
            monkeypatch.setattr(parallel, "_room", lambda device, room=room: room)
            held = parallel._Held.by_memory(teacher, student, config)
            found.append((held.teacher, held.layers))
        assert found == [(True, True), (True, False), (False, False)]


@pytest.mark.parametrize(
    ("which", "recomputes", "fits"),
    [("all", True, True), ("mixers", False, True), ("all", True, False)],
)
def test_beside_a_bfloat16_teacher_sums_are_float32_and_the_same(tmp_path, which, recomputes, fits):
    config = LogitsConfig(
        batch_size=4,
        accumulate=2,
        # Adam forgives a wrong factor, and clipping would hide it in the moments.
        grad_clip=1e6,
        trainable=which,
        activation_checkpointing=recomputes,
    )
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(3, 61, (6, 4, 16), generator=generator)

    def train(mode):
        if mode == "fsdp" and not fits:
            no_room()
        # Of what stands once a head one of two processes has no part.
        heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
        model = tiny_model("llama", tie_word_embeddings=True, **heads)
        teacher = Teacher(model.to(torch.bfloat16))
        mixer = mixer_config({"mixer": "mamba2", "chunk_size": 8})

        class Bank:
            def mixer(self, layer, name):
                return build_mixer(mixer, teacher.views[layer], seed=layer).float()

        layout = Layout(("mamba2", "attention"))
        if mode == "fsdp":
            student = assemble(teacher, layout, Bank(), share=False).float()
        else:
            student = student_to_train(teacher, layout, Bank(), which, taught_in=torch.bfloat16)
        trainer = make_trainer(teacher, student, config, mode)
        for pair in batches.split(2):
            shares = pair.view(2, ranks.num_ranks(), -1, 16)[:, ranks.rank()]
            trainer.step(list(shares), 1e-3)
        losses = [row[0] for row, _ in trainer.read()]
        state = {k: getattr(t, "full_tensor", lambda t=t: t)() for k, t in trainer.state().items()}
        assert {t.item() for k, t in state.items() if k.startswith("step/")} == {3}
        trainer.release()
        if ranks.rank() == 0:
            save_tensors(tmp_path / f"{mode}.safetensors", state)
            (tmp_path / f"{mode}.json").write_text(json.dumps(losses))

    train("one")
    expected = load_tensors(tmp_path / "one.safetensors")
    losses = json.loads((tmp_path / "one.json").read_text())
    for mode in ("ddp", "fsdp"):
        assert processes.run(2, lambda mode=mode: train(mode)) == [0, 0]
        of_mode = json.loads((tmp_path / f"{mode}.json").read_text())
        assert of_mode == pytest.approx(losses, rel=5e-3)
        found = load_tensors(tmp_path / f"{mode}.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert tensor.dtype == torch.float32
            if name.startswith("weight/"):
                assert (tensor - expected[name]).abs().mean() < 3e-4, name
            elif name.startswith("exp_avg/"):
                assert (tensor - expected[name]).norm() < 0.03 * expected[name].norm(), name


def test_a_larger_teacher_of_the_same_tokens_teaches_in_stage_3(fresh, tmp_path):
    make_teacher(tmp_path / "large", num_layers=5, num_heads=4, hidden_size=48, seed=1)
    of_large = f"distill.teacher.source={tmp_path / 'large'}"
    taught = fresh("taught")
    result, folder = pipeline.distill(pipeline.load_best(taught, [of_large]))
    # It is the larger one that KL is measured to and falls to.
    plain, _ = pipeline.distill(pipeline.load_best(fresh("plain")))
    assert result.before.mean_kl > 2 * plain.before.mean_kl
    assert result.after.mean_kl < result.before.mean_kl
    raw = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    assert raw["distill"]["teacher"]["source"] == str(tmp_path / "large")
    with pytest.raises(RunError, match=r"other settings \(distill\.teacher: .*use --force"):
        pipeline.distill(pipeline.load_best(taught))
    # Sharded, and on two processes.
    shared = fresh("shared")
    assert distil(2, shared, "fsdp", of_large) == [0, 0]
    assert_close(shared / "distill", folder)


def test_a_teacher_of_other_tokens_is_refused(fresh, searched, tmp_path):
    make_teacher(tmp_path / "large", seed=1)
    text = (tmp_path / "large/tokenizer.json").read_text(encoding="utf-8")
    vocabulary = json.loads(text)
    names = list(vocabulary["model"]["vocab"])
    one, other = names[300], names[301]
    numbers = vocabulary["model"]["vocab"]
    numbers[one], numbers[other] = numbers[other], numbers[one]
    (tmp_path / "large/tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    run, of_large = fresh("run"), f"distill.teacher.source={tmp_path / 'large'}"
    with pytest.raises(TeacherError, match=r"distill.teacher: .*large \(4,096 .*teacher \(4,096"):
        pipeline.distill(pipeline.load_best(run, [of_large]))
    config = json.loads((tmp_path / "large/config.json").read_text(encoding="utf-8"))
    (tmp_path / "large/config.json").write_text(json.dumps(config | {"vocab_size": 4000}))
    study = pipeline.load_best(run, [of_large]).study
    (problem,) = find_problems(study)
    assert "large (4,000 logits) must have the vocabulary" in problem and "another size" in problem
    (missing,) = find_problems(pipeline.load_best(run, [of_large + "/no"]).study)
    assert missing.startswith("distill.teacher.source: ")


def test_tensorboard_that_is_missing_is_named_at_once(searched, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(ConfigError, match=r"needs the tensorboard package.*mohawk-nas\[tensorb"):
        pipeline.distill(pipeline.load_best(searched, ["distill.tensorboard=true"]))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("distill.teacher.dtype=float32", r"distill.teacher.source: must be given, since"),
        ("distill.teacher={source: x, overrides: {a: 1}}", r"needs distill.teacher.random_weights"),
        ("distill.logits.max_bad_steps=-1", r"max_bad_steps: must be at least 0, but got -1"),
        ("distill.logits.parallel=tensor", r"distill.logits.parallel: .*tensor"),
        ("distill.logits.schedule=linear", r"distill.logits.schedule: .*linear"),
    ],
)
def test_settings_that_cannot_be_are_refused(searched, change, problem):
    with pytest.raises(ConfigError, match=problem):
        pipeline.load_best(searched, [change])
