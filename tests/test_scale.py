"""Stage 3 on several processes: what comes out, what is left after a kill, who stops when."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import processes
import pytest
import torch
from tiny_study import make_study

from mohawk_nas import pipeline
from mohawk_nas.distill.parallel import ShardedTrainer
from mohawk_nas.files import load_tensors

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process cannot use CUDA"),
]

STEPS = 10


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A searched run whose stage 2 goes on; three heads do not divide over two processes."""
    folder = tmp_path_factory.mktemp("scale")
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
    for step in (3, 4):
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
