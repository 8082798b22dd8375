"""Benchmarks: what they write, what they count, and what happens when something goes wrong."""

import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path

import processes
import pytest
import torch

from mohawk_nas.bench import distill, inference, matrix, search, trials
from mohawk_nas.bench.bank import mixer_flops, teacher_flops
from mohawk_nas.bench.options import DEFAULT_SUITES, MODELS, SUITES, Options
from mohawk_nas.bench.setup import FreshBank, Setup
from mohawk_nas.bench.timing import Effort, Timing, time_calls
from mohawk_nas.cli import main
from mohawk_nas.errors import InputError
from mohawk_nas.kernels.matrix_orientation import matrix_distance
from mohawk_nas.layout import Layout
from mohawk_nas.reporting import SILENT

ROOT = Path(__file__).parents[1]

PHASES = ("prefill", "decode")
CASES = {
    "scan": {"plain, forward", "plain, forward and backward", "mamba_ssm"},
    "matrix": {"kernel", "twin", "plain"},
    "bank": {
        "matrix product",
        "teacher forward",
        "stage 1",
        "stage 1, counted floor",
        "stage 2",
        "stage 2, counted floor",
    },
    "trials": {
        f"{stream}, {kept}"
        for stream in ("random layouts", "neighbours of one layout", "every layout in order")
        for kept in ("prefixes kept", "nothing kept")
    },
    "distill": {
        "one student",
        "4 students",
        "one student, layers run again",
        "stock forward and training step",
    },
    "inference": {f"{who}, {what}" for who in ("teacher", "student") for what in PHASES},
    "search": {"load", "stage 1", "stage 2", "probes", "trials", "rest", "total"},
}


def bench(folder, *arguments):
    """Run the command; its exit code, and what it wrote."""
    path = folder / "results.json"
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments, "--quick", "--device", "cpu", "--out", str(path)])
    written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return stopped.value.code, written


@pytest.fixture
def setup():
    return Setup(options=Options(model="llama-3.2-1b", quick=True, device="cpu"))


@pytest.mark.parametrize("suite", SUITES)
def test_each_suite_writes_its_results(tmp_path, suite, capsys):
    model = "smollm2-135m" if suite == "matrix" else "phi-24m"
    work = ["--work", str(tmp_path / "work")] if suite == "search" else []
    code, written = bench(tmp_path, suite, "--model", model, *work)
    assert code == 0
    assert written["finished"] and written["device"]
    assert {"torch", "transformers", "python"} <= set(written["versions"])
    assert written["command"].startswith(f"mohawk-nas bench {suite} --model {model} --quick")
    results = written["results"]
    assert {record["case"] for record in results} == CASES[suite]
    for record in results:
        assert record["suite"] == suite and record["dtype"] == "float32" and record["shapes"]
        assert record["error"] is None
        if record["left_out"]:
            assert record["case"] in ("mamba_ssm", "kernel") and record["median"] is None
            continue
        low, high = record["spread"]
        assert 0 < low <= record["median"] <= high < math.inf
        assert record["unit"] and record["repeats"] >= 1
        assert all(math.isfinite(figure) for figure in record["figures"].values())
        if suite == "trials":
            share = record["figures"]["share_of_layers_run"]
            assert share == 1 if record["case"].endswith("nothing kept") else share < 1
    shown = capsys.readouterr().out
    assert f"{suite}: {SUITES[suite]}" in shown and "results.json" in shown


def test_a_case_that_fails_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(distill, "LogitsTrainer", broken)
    code, written = bench(tmp_path, "distill", "scan")
    assert code == 1 and written["finished"]
    errors = {r["case"]: r["error"] for r in written["results"] if r["suite"] == "distill"}
    # Stock training does without our trainer.
    assert errors.pop("stock forward and training step") is None
    assert set(errors.values()) == {"RuntimeError: first line"} and len(errors) == 3
    measured = {r["case"] for r in written["results"] if r["suite"] == "scan" and r["median"]}
    assert measured == CASES["scan"] - {"mamba_ssm"}
    assert "failed: distill, one student: RuntimeError: first line" in capsys.readouterr().out


def test_models_are_measured_side_by_side_and_hold_what_a_budget_counts(tmp_path, capsys):
    asked = ("--contexts", "24,40", "--batches", "2", "--keep", "1", "--model", "llama-3.2-1b")
    code, written = bench(tmp_path, "inference", *asked)
    assert code == 0 and "--contexts 24,40 --batches 2" in written["command"]
    decoded = {}
    for record in written["results"]:
        if record["case"].endswith("decode"):
            figures, where = record["figures"], record["shapes"]
            assert figures["cache_bytes"] == figures["budget_bytes"]
            assert figures["ms_a_step"] == pytest.approx(2e3 / record["median"])
            decoded[record["case"].split(",")[0], where["context"]] = figures["cache_bytes"]
    # Keys and values of 2 heads of 8 numbers for 5 layers, and for one of them.
    every = 2 * 2 * 2 * 8 * 4
    assert decoded["teacher", 24] == 5 * 24 * every
    assert decoded["teacher", 40] == 5 * 40 * every
    assert decoded["student", 40] - decoded["student", 24] == 16 * every
    shown = capsys.readouterr().out
    assert shown.count("student / teacher") == 2 and "decode/s" in shown


def test_attention_stands_in_the_middles_of_equal_parts():
    assert inference.evenly(24, 4, "m").attention_layers == (3, 9, 15, 21)
    assert inference.evenly(5, 2, "m").attention_layers == (1, 3)
    assert inference.evenly(3, 1, "m").attention_layers == (1,)


def test_what_would_take_too_long_or_too_much_memory_is_left_out(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB")

    monkeypatch.setattr(inference.Decoder, "pretend", full)
    code, written = bench(tmp_path, "inference", "--cell-seconds", "0")
    assert code == 0
    reasons = [record["left_out"] for record in written["results"]]
    assert reasons.count("out of memory") == 8
    too_long = [reason for reason in reasons if reason and reason.startswith("would take")]
    assert len(too_long) == 6 and all("more than --cell-seconds 0" in r for r in too_long)


@pytest.mark.parametrize("text", ["CUDA out of memory.", "Triton Error [CUDA]: out of memory"])
def test_the_largest_batch_is_what_fits(setup, monkeypatch, text):
    models = inference._Models(setup, 48)
    models.get("student")
    each = models.cache_bytes("student", 48, 1)
    pretend, tried = inference.Decoder.pretend, []

    def limited(self, length):
        tried.append(self.batch)
        if self.batch > 6:
            raise (torch.OutOfMemoryError if "Triton" not in text else RuntimeError)(text)
        pretend(self, length)

    monkeypatch.setattr(inference.Decoder, "pretend", limited)
    free = inference.RESERVE + 9 * each + 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    blank = inference._blank(setup, "student, largest batch", 48, "largest")
    (record,) = inference._largest(setup, models, "student", 48, blank)
    assert tried[:4] == [9, 8, 7, 6] and set(tried[4:]) <= {6}
    assert record.shapes["batch"] == 6 and record.median > 0
    assert record.figures["cache_bytes"] == 6 * each


def test_a_cache_of_another_size_than_a_budget_counts_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(inference._Models, "cache_bytes", lambda *args: 1)
    code, written = bench(tmp_path, "inference", "--contexts", "16", "--batches", "1")
    assert code == 1
    errors = [r["error"] for r in written["results"] if r["case"].endswith("decode")]
    assert all(
        re.search(r"the cache holds [\d,]+ bytes, but a budget counts 1$", e) for e in errors
    )


@pytest.mark.parametrize(("suite", "code"), [("matrix", 0), ("scan", 1)])
def test_too_little_memory_is_an_answer_only_where_it_is_expected(
    tmp_path, monkeypatch, suite, code
):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB")

    def full_while_recorded(*args, **kwargs):
        try:
            full()
        finally:
            raise RuntimeError("CUDA error: capturing stream has unjoined work")

    monkeypatch.setattr(matrix, "plain_distance", full_while_recorded)
    monkeypatch.setattr("mohawk_nas.bench.scan._operands", full)
    found, written = bench(tmp_path, suite)
    assert found == code
    of_plain = [r for r in written["results"] if r["case"].startswith("plain")]
    for record in of_plain:
        if suite == "matrix":
            assert record["left_out"] == "out of memory" and record["error"] is None
        else:
            assert record["error"].startswith("OutOfMemoryError: CUDA out of memory")
    assert of_plain


def test_a_suite_that_cannot_be_set_up_is_recorded(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("no such thing")

    monkeypatch.setattr(Setup, "layouts", broken)
    code, written = bench(tmp_path, "trials")
    assert code == 1
    (record,) = written["results"]
    assert (record["case"], record["error"]) == ("setup", "ValueError: no such thing")


def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(distill, "LogitsTrainer", stopped)
    code, written = bench(tmp_path, "scan", "distill")
    assert code == 130 and not written["finished"]
    assert {record["case"] for record in written["results"]} == CASES["scan"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["scna"], "SUITE: must be one of scan, matrix, .* got 'scna'. Did you mean 'scan'"),
        (["--model", "phi1.5"], "--model: must be one of .* Did you mean 'phi-1.5'"),
        (["--keep", "5"], "--keep: must lie within 1 and 4, .* but got 5"),
        (["--block-size", "4096"], "--block-size: must lie within 8 and 2048, .* but got 4096"),
        (["--contexts", "512,x"], "--contexts: must be numbers with commas .* got '512,x'"),
        (["--contexts", "4"], "--contexts: must be numbers from 8 on .* got '4'"),
        (["--batches", "1,0"], "--batches: must be numbers from 1 on .* got '1,0'"),
        (["--device", "gpu"], "--device: must be auto, cpu or cuda"),
        (["search", "--stage1-tokens", "3"], "bank.matrix.tokens: must be 0 or at least one step"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, arguments, wanted):
    path = tmp_path / "results.json"
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments, "--quick", "--out", str(path)])
    assert stopped.value.code == 2 and not path.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(wanted, line)


def test_results_are_not_overwritten_unasked(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text('{"results": [1]}', encoding="utf-8")
    code, written = bench(tmp_path, "scan")
    assert code == 2 and written == {"results": [1]}
    assert "results.json is there already; use --force" in capsys.readouterr().err
    assert bench(tmp_path, "scan", "--force")[0] == 0


def test_out_may_be_a_folder(tmp_path):
    with pytest.raises(SystemExit):
        main(["bench", "scan", "--quick", "--device", "cpu", "--out", str(tmp_path / "here")])
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["phi-24m_scan_quick.json"]


def test_a_search_that_was_stopped_goes_on_and_adds_its_times(tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"
    arguments = ["search", "--work", str(work), "--checkpoint-steps", "1"]
    advance, advanced = search._Watched.advance, []

    def stopping(self, *args, **kwargs):
        advance(self, *args, **kwargs)
        advanced.append(self)
        # Two steps are stage 1, two more are half of stage 2.
        if len(advanced) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(search._Watched, "advance", stopping)
        code, written = bench(tmp_path, *arguments)
    assert code == 130 and written["results"] == []
    first = json.loads((work / "phases.json").read_text(encoding="utf-8"))
    assert first["result"] is None
    assert {"load", "stage 1", "stage 2", "rest"} == set(first["commands"][0])

    code, written = bench(tmp_path, *arguments)
    assert code == 0
    both = json.loads((work / "phases.json").read_text(encoding="utf-8"))
    assert both["commands"][0] == first["commands"][0]
    # The bank went on where it stood.
    assert set(both["commands"][1]) == {"load", "stage 2", "probes", "trials", "rest"}
    seconds = {r["case"]: r["median"] for r in written["results"]}
    for name in ("load", "stage 1", "stage 2", "trials"):
        assert seconds[name] == sum(call.get(name, 0) for call in both["commands"])
    assert seconds["total"] == pytest.approx(
        sum(value for call in both["commands"] for value in call.values())
    )
    figures = {r["case"]: r["figures"] for r in written["results"]}
    assert figures["total"]["commands"] == 2
    assert figures["trials"]["layouts"] >= 1 and figures["probes"]["layouts"] >= 1

    # What has ended is not run again.
    assert bench(tmp_path, *arguments, "--force")[0] == 0
    assert json.loads((work / "phases.json").read_text(encoding="utf-8")) == both
    # And what is another search is not added to it.
    capsys.readouterr()
    assert bench(tmp_path, *arguments, "--trials", "8", "--force")[0] == 2
    assert "holds a search with another study" in capsys.readouterr().err


def test_phases_count_what_passes_in_them(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(search.time, "perf_counter", lambda: now[0])
    clock = search.PhaseClock(tmp_path / "phases.json", SILENT)
    now[0] = 1.0
    with clock.stage("stage 1 (matrix)", total=2, unit="step") as task:
        now[0] = 3.0
        task.advance(1)
        # A killed command has told what it did until then.
        written = json.loads((tmp_path / "phases.json").read_text(encoding="utf-8"))
        assert written["commands"] == [{"rest": 1.0, "stage 1": 2.0}]
        now[0] = 3.5
    now[0] = 4.0
    clock.finish({})
    again = search.PhaseClock(tmp_path / "phases.json", SILENT)
    assert again.seconds() == {"stage 1": 2.5, "rest": 1.5}


def test_the_median_is_over_groups_of_calls():
    numbers, takes = [], iter([90.0, 1.0, 2.0, 9.0, 4.0, 3.0, 5.0])

    def watch(work):
        work()
        return next(takes)

    timing = time_calls(
        numbers.append,
        stopwatch=watch,
        effort=Effort(groups=5, group_seconds=2.0, max_seconds=100.0),
        warmup=4,
    )
    # 4 to warm up, 1 to see how long one takes, then 5 groups of 2.
    assert numbers == list(range(15))
    assert timing.seconds == (1.0, 4.5, 2.0, 1.5, 2.5) and timing.calls == 2
    assert timing.median == 2.0 and timing.quartiles == (1.5, 2.5)
    assert timing.warmup_seconds == 90.0


def test_slow_calls_are_timed_three_times():
    timing = time_calls(
        lambda number: None,
        stopwatch=lambda work: 50.0,
        effort=Effort(groups=10, max_seconds=30.0),
    )
    assert timing.seconds == (50.0,) * 3


@pytest.mark.parametrize("length", [1, 33])
def test_whole_matrices_give_the_same_distance_and_gradients(setup, length):
    query, key, factors, heads = matrix.operands(setup, length, 0)
    leaves = [factors.c, factors.b, factors.log_decay, factors.diagonal]
    options = {"scaling": setup.view.scaling, "heads": heads}
    found = []
    for distance in (matrix.plain_distance, matrix_distance):
        squared = distance(query, key, factors, **options)
        found.append([squared, *torch.autograd.grad(squared.sum(), leaves)])
    torch.testing.assert_close(*found)


def test_operations_of_the_matrix_are_counted_over_the_causal_half():
    # Of T = 3 six pairs: forward q k^T and C B^T, backward both twice, and C's and B's gradients.
    products = 6 * (5 + 7) + 2 * 6 * (5 + 7) + 2 * 6 * 7
    count = matrix.count_flops(batch=2, heads=3, tokens=3, head=5, state=7)
    assert count == 2 * 2 * 3 * products


def test_operations_of_a_step_follow_from_shapes(setup):
    teacher, config = setup.teacher, setup.mixer_config
    width, heads, kv_heads, head, inner, layers = 32, 4, 2, 8, 64, 5
    attention = width * head * (2 * heads + 2 * kv_heads)
    mlp = 3 * width * inner
    length = 16
    forward = 2 * (layers * attention + (layers - 1) * mlp)
    forward += layers * 2 * (length + 1) * heads * head
    assert teacher_flops(teacher, length) == forward

    into = width * (4 * heads * head + heads)
    out = heads * head * width
    conv, scan, gate = 3 * heads * head * 4, 3 * heads * head * head, 2 * heads * head
    hidden = 4 * into + 6 * out + 3 * 2 * (conv + scan + gate)
    assert mixer_flops(config, teacher, length, "hidden") == hidden
    products = (length + 1) * heads * (2 * head + 4 * head)
    assert mixer_flops(config, teacher, length, "matrix") == 4 * into + products


def test_operations_of_stage_3_are_those_of_products(setup):
    teacher, length = setup.teacher, setup.shape.block_size
    width, heads, kv_heads, head, inner, layers, vocab = 32, 4, 2, 8, 64, 5, 128
    projections = width * head * (2 * heads + 2 * kv_heads)
    others = 2 * (layers * 3 * width * inner + vocab * width)
    attention = 2 * projections + 2 * (length + 1) * heads * head
    assert distill.forward_flops(setup, teacher) == others + layers * attention
    mixer = setup.mixer_config.flops_per_token(setup.view, length)
    layout = Layout.keeping((1, 2), num_layers=5, replacement=setup.candidate)
    found = distill.forward_flops(setup, teacher, layout)
    assert found == others + 2 * attention + 3 * mixer


def test_a_rate_is_a_share_of_the_assumed_peak(setup, monkeypatch):
    timing = Timing(seconds=(0.5,), calls=1, warmup_seconds=0.0)
    figures = []
    for name in ("cpu", "NVIDIA H100 80GB HBM3"):
        monkeypatch.setattr(Setup, "device_name", name)
        blank = setup.blank("distill", "one student")
        record = distill._rated(setup, blank, timing, None, flops=989 * 10**9, count=1)
        figures.append(record.figures)
    # 2 blocks of 32 tokens in half a second, at 989 GFLOP a token.
    assert "mfu" not in figures[0]
    assert figures[1]["mfu"] == pytest.approx(0.128)
    assert figures[1]["assumed_peak_tflops"] == 989
    assert figures[1]["tokens_per_second"] == 128


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process cannot use CUDA")
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_measure_one_step_together(tmp_path, mode):
    path = tmp_path / "results.json"
    arguments = ["bench", "distill", "--quick", "--device", "cpu", "--parallel", mode]
    log = tmp_path / "log.txt"
    codes = processes.run(2, [*arguments, "--out", str(path)], log=log)
    assert codes == [0, 0], log.read_text()
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["finished"] and written["processes"] == 2
    assert written["command"].startswith("torchrun --nproc-per-node 2 -m mohawk_nas bench distill")
    assert [r["case"] for r in written["results"]] == [mode, f"{mode}, layers run again"]
    for record in written["results"]:
        assert record["error"] is None and record["shapes"]["ranks"] == 2
        # Both processes' tokens count.
        tokens = 2 * record["shapes"]["batch"] * record["shapes"]["tokens"]
        assert record["figures"]["tokens_per_second"] == pytest.approx(tokens * record["median"])
    assert processes.run(2, ["bench", "scan", "--quick", "--out", str(path)], log=log)[0] == 2
    assert "SUITE: must be distill with several processes" in log.read_text()


def test_scaling_is_told_from_results_of_several_numbers_of_processes(tmp_path):
    sys.path.insert(0, str(ROOT / "studies/benchmarks"))
    try:
        import scaling
    finally:
        sys.path.pop(0)
    shapes = {"model": "m", "layers": 2, "batch": 4, "tokens": 8}

    def write(processes, rates, **changed):
        path = tmp_path / f"{processes}.json"
        results = [
            {
                "suite": "distill",
                "case": case,
                "shapes": shapes | changed,
                "median": 1.0,
                "figures": {"tokens_per_second": rate},
            }
            for case, rate in rates.items()
        ]
        content = {"device": "d", "processes": processes, "results": results}
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    one = write(1, {"one student": 100.0, "one student, layers run again": 80.0, "stock": 1e9})
    four = write(4, {"fsdp": 360.0, "fsdp, layers run again": 240.0})
    found = {(r["processes"], r["again"]): r["efficiency"] for r in scaling.rows([four, one])}
    assert found == {(1, False): 1.0, (4, False): 0.9, (1, True): 1.0, (4, True): 0.75}
    with pytest.raises(InputError, match="must be of one process"):
        scaling.rows([four])
    with pytest.raises(InputError, match=r"must be of .*'batch': 4.* but is of .*'batch': 2"):
        scaling.rows([one, write(2, {"fsdp": 1.0}, batch=2)])


def test_the_named_shapes_are_the_models():
    asset = json.loads((ROOT / "studies/assets/phi-1_5.json").read_text(encoding="utf-8"))
    assert MODELS["phi-1.5"].config.items() <= asset.items()
    tiny = Setup(options=Options(model="smollm2-135m", quick=True, device="cpu"))
    assert (tiny.view.num_heads, tiny.view.num_kv_heads, tiny.view.head_dim) == (4, 2, 8)
    for name in MODELS:
        layers = Options(model=name, layers=2, block_size=64).shape
        assert layers.config["num_hidden_layers"] == 2 and layers.keep == 1
        assert layers.config["hidden_size"] == MODELS[name].config["hidden_size"]


def test_an_untrained_bank_hands_out_the_same_mixer_every_time(setup):
    bank = FreshBank(setup, setup.teacher)
    first, again = (bank.mixer(1, setup.candidate) for _ in range(2))
    assert first is again and first is not bank.mixer(2, setup.candidate)
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_neighbours_move_one_attention_layer():
    layout = Layout.keeping([1, 3], num_layers=6, replacement="other")
    first, *rest = trials.neighbours(layout, 100, seed=0)
    assert first == layout and len(set(rest)) == 2 * 4
    for other in rest:
        assert len(set(other.attention_layers) & {1, 3}) == 1
        assert len(other.attention_layers) == 2


def test_splits_of_random_tokens_differ(setup):
    bank, scored = (setup.blocks(split, 4 * 32) for split in ("bank", "search"))
    assert bank.tokens.shape == scored.tokens.shape == (4, 32)
    assert bank.fingerprint != scored.fingerprint
    assert not torch.equal(bank.tokens, scored.tokens)


def test_the_command_line_is_written_as_it_is_typed():
    options = Options(suites=("scan",), model="phi-1.5", quick=True, batch_size=4)
    assert options.command() == "mohawk-nas bench scan --model phi-1.5 --quick --batch-size 4"
    assert "search" not in DEFAULT_SUITES
    with pytest.raises(InputError, match="Did you mean 'bank'"):
        dataclasses.replace(options, suites=("banks",))
