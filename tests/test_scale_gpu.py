"""Stage 3 on two GPUs: DDP and FSDP2 through NCCL do what one GPU does."""

import json
import os
import shutil
import subprocess
import sys

import processes
import pytest
import torch
from tiny_study import make_study

from mohawk_nas import pipeline
from mohawk_nas.files import load_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    study = make_study(tmp_path_factory.mktemp("scale"), "teacher.device=auto")
    return pipeline.search(study)[1].parent


def distil(count, run, mode, *, deaths=""):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    command += [f"--nproc-per-node={count}", processes.__file__, "distill", str(run)]
    more = ["distill.logits.accumulate=2", "distill.logits.batch_size=2"]
    done = subprocess.run(
        [*command, f"distill.logits.parallel={mode}", *more],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"DEATHS": deaths},
    )
    assert done.returncode == 0, done.stderr
    folder = run / "distill"
    curve = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return curve, load_tensors(folder / "model/model.safetensors"), done.stderr


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_gpus_do_what_one_does_and_go_on_after_a_kill(searched, tmp_path, mode):
    def run(name, count, **options):
        return distil(count, shutil.copytree(searched, tmp_path / name), mode, **options)

    alone, weights, _ = run("alone", 1)
    curve, found, _ = run("two", 2)
    assert [e["loss"] for e in curve] == pytest.approx([e["loss"] for e in alone], rel=0.02)
    assert found.keys() == weights.keys()
    for name, tensor in found.items():
        assert (tensor - weights[name]).abs().mean() < 1e-3, name
    broken, again, said = run("killed", 2, deaths="5")
    assert "continuing after step 4" in said
    assert [e["loss"] for e in broken] == pytest.approx([e["loss"] for e in curve], rel=1e-3)
    for name, tensor in again.items():
        assert (tensor - found[name]).abs().mean() < 1e-4, name
