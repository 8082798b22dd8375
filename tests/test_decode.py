"""Measured decode times: what is measured, that it adds up, and that a study keeps to it."""

import json
import time
from dataclasses import dataclass, replace

import pytest
import torch
import yaml
from tiny_study import make_study

from mohawk_nas import pipeline
from mohawk_nas.bench.timing import Effort
from mohawk_nas.errors import ConfigError, RunError
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.mixer import mixer_config
from mohawk_nas.mixers.mamba2 import Mamba2Config, Mamba2Mixer
from mohawk_nas.plan import find_problems, make_plan
from mohawk_nas.search import decode
from mohawk_nas.search.budget import DecodeTimes
from mohawk_nas.search.decode import (
    Step,
    UntrainedMixers,
    agreed_times,
    fill_cache,
    measure_layers,
    measure_step,
    read_times,
    write_times,
)
from mohawk_nas.search.space import SearchSpace
from mohawk_nas.student import assemble
from mohawk_nas.teacher import Teacher, cache_name
from mohawk_nas.testing import tiny_model

PAUSE = 0.05
"""Seconds, much more than everything else takes."""
STEP = Step(context=11, batch=3)


@pytest.fixture(autouse=True)
def little_effort(monkeypatch):
    monkeypatch.setattr(decode, "EFFORT", Effort(groups=3, group_seconds=0.0))


@dataclass(frozen=True, kw_only=True)
class SlowConfig(Mamba2Config):
    pause: float = PAUSE

    def build(self, view):
        mixer = SlowMixer(self, view)
        mixer.pause = self.pause
        return mixer


class SlowMixer(Mamba2Mixer):
    def forward(self, hidden, **kwargs):
        time.sleep(self.pause)
        return super().forward(hidden, **kwargs)


def slow_space(num_layers, pinned=None):
    candidates = {
        ATTENTION: mixer_config({"mixer": "attention"}),
        "slow": SlowConfig(init="random", chunk_size=8),
        "slower": SlowConfig(init="random", chunk_size=8, pause=2 * PAUSE),
    }
    return SearchSpace(num_layers=num_layers, candidates=candidates, pinned=pinned or {})


def test_each_kind_of_layer_costs_what_it_takes_and_students_what_their_layers_do():
    teacher = Teacher(
        tiny_model(
            "gemma3_text",
            num_hidden_layers=4,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"] * 2,
        )
    )
    space = slow_space(4, pinned={0: "slower"})
    modules = [slot.get(teacher.model) for slot in teacher.slots]
    times = measure_layers(teacher, space, STEP)
    assert [slot.get(teacher.model) for slot in teacher.slots] == modules
    assert set(times.layers) == {(0, "slower")} | {
        (i, name) for i in (1, 2, 3) for name in space.candidates
    }
    for (layer, name), cost in times.layers.items():
        expected = {ATTENTION: 0, "slow": PAUSE, "slower": 2 * PAUSE}[name]
        assert expected <= cost / 1e9 < expected + PAUSE, (layer, name)
    assert times.layers[1, "slow"] == times.layers[3, "slow"], "of one kind"
    assert 0 < times.rest / 1e9 < PAUSE
    layout = Layout(("slower", "slow", ATTENTION, "slow"))
    measured = measure_step(teacher, layout, UntrainedMixers(teacher, space), STEP)
    assert measured >= 4 * PAUSE
    assert times.of(layout) / 1e9 == pytest.approx(measured, rel=0.5)


@torch.no_grad()
def test_every_step_that_is_timed_is_the_same_step():
    teacher = Teacher(tiny_model("mistral", num_hidden_layers=3, sliding_window=5))
    space = slow_space(3)
    student = assemble(
        teacher, Layout((ATTENTION, "slow", ATTENTION)), UntrainedMixers(teacher, space)
    )
    caches = []
    student.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: caches.append(
            [
                (layer.get_seq_length(), getattr(layer, "tensors", None) or layer.keys)
                for layer in kwargs[cache_name(student)].layers
            ]
        ),
        with_kwargs=True,
    )
    decode._time_step(student, teacher.slots, STEP, shared=False)
    assert len(caches) >= 6
    for cache in caches:
        assert [length for length, _ in cache] == [11, 11, 11]
        keys, state, others = (held for _, held in cache)
        assert keys.shape == others.shape == (3, 2, 4, 4)
        assert {len(tensor) for tensor in state.values()} == {3}


@torch.no_grad()
@pytest.mark.parametrize("shared", [False, True])
def test_a_filled_cache_is_of_the_size_of_a_real_one(shared):
    teacher = Teacher(tiny_model("phi", num_hidden_layers=3))
    layout = Layout((ATTENTION, "slow", ATTENTION))
    student = assemble(teacher, layout, UntrainedMixers(teacher, slow_space(3)))
    filled = fill_cache(student, teacher.slots, STEP, shared=shared)
    tokens = torch.zeros(STEP.batch, STEP.context, dtype=torch.long)
    real = getattr(student(input_ids=tokens, use_cache=True), cache_name(student))
    for one, other in zip(filled.layers, real.layers, strict=True):
        assert type(one) is type(other)
        assert one.get_seq_length() == other.get_seq_length() == STEP.context
        if tensors := getattr(other, "tensors", None):
            assert {n: t.shape for n, t in one.tensors.items()} == {
                n: t.shape for n, t in tensors.items()
            }
        else:
            assert one.keys.shape == other.keys.shape
    same = filled.layers[0].keys.data_ptr() == filled.layers[2].keys.data_ptr()
    assert same == shared


def test_times_are_kept_for_what_they_were_measured_for(tmp_path):
    path, asked = tmp_path / "decode.json", {"context": 8, "batch": 2}
    times = DecodeTimes(layers={(0, ATTENTION): 7, (1, ATTENTION): 9, (0, "m"): 3}, rest=11)
    write_times(path, asked, times)
    assert read_times(path, asked) == times
    assert read_times(path, asked).digest == times.digest != replace(times, rest=12).digest
    assert read_times(path, asked | {"batch": 3}) is None
    path.write_text(path.read_text()[:-20])
    with pytest.raises(RunError, match=r"decode.json: must hold the decode times that"):
        read_times(path, asked)


def test_hosts_agree_on_the_times_that_were_stored_first(tmp_path):
    url = f"journal:{tmp_path}/study.journal"
    asked = {"context": 8, "batch": 2}
    mine, other = (DecodeTimes(layers={(0, ATTENTION): n}, rest=n) for n in (3, 4))

    def slow_host():
        # While it measures, another is faster.
        assert agreed_times(url, "x", asked, lambda: other) == other
        return mine

    assert agreed_times(url, "x", asked, slow_host) == other
    assert agreed_times(url, "x", asked, lambda: mine) == other
    assert agreed_times(url, "x", asked | {"batch": 3}, lambda: mine) == mine
    assert agreed_times(url, "another", asked, lambda: mine) == mine


BUDGET = {
    "attention_layers": {"at_most": 3},
    "cache": {"mib": 1.0, "context": 40, "batch": 2},
    "decode": {"milliseconds": 500, "context": 40, "batch": 2},
}


def test_a_study_measures_once_and_says_how_well_the_times_add_up(tmp_path, capsys):
    config = make_study(tmp_path, "search.trials=4", "search.baselines=[uniform]", budget=BUDGET)
    assert find_problems(config) == []
    plan = make_plan(config)
    assert plan.search.possible == 2**4 - 1
    assert not config.run_dir.exists(), "planning measures nothing"

    first, best = pipeline.search(config)
    record = config.run_dir / "decode.json"
    before, found = record.read_bytes(), yaml.safe_load(best.read_text())["scores"]["decode"]
    layout, times = first.best.layout, json.loads(before)
    costs = {(e["layer"], e["candidate"]): e["nanoseconds"] for e in times["layers"]}
    summed = (times["rest"] + sum(costs[pair] for pair in enumerate(layout.candidates))) / 1e6
    assert found["summed_ms"] == pytest.approx(summed)
    assert found["error"] == pytest.approx(summed / found["measured_ms"] - 1)

    # It goes on with the same times, and ends as an unbroken one does.
    whole = make_study(tmp_path, "search.trials=8", "search.baselines=[uniform]", budget=BUDGET)
    resumed, _ = pipeline.search(whole)
    assert record.read_bytes() == before
    (tmp_path / "other").mkdir()
    other = replace(whole, output=str(tmp_path / "other"))
    unbroken, _ = pipeline.search(other)
    assert [t.layout for t in resumed.trials] == [t.layout for t in unbroken.trials]

    # Other times are not mixed in.
    times["rest"] += 1
    record.write_text(json.dumps(times))
    with pytest.raises(RunError, match=r"has changed \(measurement of decode times\)"):
        pipeline.search(whole)


def test_what_was_measured_may_make_a_budget_impossible_before_anything_is_trained(tmp_path):
    config = make_study(tmp_path, "budget.decode.milliseconds=0.001", budget=BUDGET)
    assert find_problems(config) == []
    with pytest.raises(ConfigError, match=r"budget.decode.milliseconds: must be at least \d"):
        pipeline.search(config)
    assert not any((tmp_path / "bank").rglob("*.safetensors"))
    # Nothing was run, so the setting may change; what was measured still holds.
    before = (config.run_dir / "decode.json").read_bytes()
    possible = make_study(tmp_path, "search.trials=1", "search.baselines=[]", budget=BUDGET)
    pipeline.search(possible)
    assert (config.run_dir / "decode.json").read_bytes() == before


def test_two_hosts_and_two_workers_share_a_study(tmp_path):
    options = ["search.trials=3", "search.baselines=[first]", "bank.hidden.tokens=64"]
    options.append(f"search.storage=journal:{tmp_path}/shared.journal")
    here = make_study(tmp_path, *options, budget=BUDGET)
    there = make_study(
        tmp_path, *options, f"output={tmp_path}/there", "search.trials=5", budget=BUDGET
    )
    pipeline.search(here)
    result, _ = pipeline.search(there, workers=2)
    assert len(result.trials) == 5
    records = [config.run_dir / "decode.json" for config in (here, there)]
    assert records[0].read_bytes() == records[1].read_bytes()
