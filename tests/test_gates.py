"""Gates that are learnt, and what a study makes of them."""

import copy
import functools
import multiprocessing
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from synthetic_search import SyntheticScorer, make
from tiny_study import make_study

from mohawk_nas import recall, workbench
from mohawk_nas.data import BlockOrder
from mohawk_nas.errors import ConfigError, RunError, TrainingError
from mohawk_nas.layout import ATTENTION
from mohawk_nas.pipeline import search
from mohawk_nas.plan import find_problems, make_plan
from mohawk_nas.reporting import SILENT
from mohawk_nas.reporting.text import counts
from mohawk_nas.search.gates import learn_gates, soft_top_k
from mohawk_nas.search.leases import Pace, Worker
from mohawk_nas.search.scoring import Learnt
from mohawk_nas.search.study import plan_search, run_study, trial_seed
from mohawk_nas.workbench import Workbench


@pytest.mark.parametrize("temperature", [5.0, 1.0, 0.1, 0.01])
@pytest.mark.parametrize("kept", [1, 3, 6])
def test_the_gates_sum_to_what_is_kept(kept, temperature):
    worth = torch.tensor([0.3, -2.0, 4.0, 0.0, 1.0, 0.9, -0.5])
    gates = soft_top_k(worth, kept, temperature)
    assert gates.sum() == pytest.approx(kept, abs=1e-4)
    assert (gates[worth.argsort()].diff() >= 0).all()
    if temperature == 0.01:
        assert set(worth.topk(kept).indices.tolist()) == set((gates > 0.5).nonzero()[:, 0].tolist())


def test_gradients_of_the_gates_go_through_the_threshold():
    worth = torch.tensor([0.3, -0.4, 0.2, 0.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: soft_top_k(w, 2, 0.5), worth)
    (gradient,) = torch.autograd.grad(soft_top_k(worth, 2, 0.5) @ torch.rand(4).double(), worth)
    assert gradient.sum().abs() < 1e-9


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Workbench(make_study(tmp_path_factory.mktemp("gates")))
    bench.bank.train(bench.space.replaceable, reporter=SILENT)
    return bench


class Damaged:
    """A bank whose mixers put out far too much in some layers."""

    def __init__(self, bank, layers):
        self._mixers = {i: copy.deepcopy(bank.mixer(i, "mamba2")) for i in range(4)}
        for i in layers:
            with torch.no_grad():
                self._mixers[i].out_proj.weight.mul_(20)

    def mixer(self, layer, name):
        return self._mixers[layer]


def steps(bench, count):
    return [bench.blocks["bank"].batch(range(4 * i, 4 * i + 4)) for i in range(count)]


FREE = dict.fromkeys(range(4), "mamba2")


@pytest.mark.parametrize("bad", [(1, 3), (0, 2), (0, 1)])
def test_attention_stays_where_its_replacement_does_harm(bench, bad):
    before = {n: t.clone() for n, t in bench.teacher.model.state_dict().items()}
    batches = steps(bench, 8) * 3
    for seed in (0, 1):
        worth = learn_gates(
            bench.teacher, Damaged(bench.bank, bad), FREE, batches, kept=2, seed=seed
        )
        assert sorted(sorted(worth, key=worth.get)[-2:]) == sorted(bad)
    after = bench.teacher.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_same_seed_learns_the_same_and_another_does_not(bench):
    batches = steps(bench, 4)
    found = [
        learn_gates(bench.teacher, bench.bank, FREE, batches, kept=2, seed=s) for s in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]


def test_pinned_layers_have_no_gate(bench):
    free = {1: "mamba2", 2: "mamba2"}
    worth = learn_gates(
        bench.teacher, bench.bank, free, steps(bench, 3), kept=1, pinned={3: "mamba2"}
    )
    assert sorted(worth) == [1, 2]


def test_the_probe_has_a_say(bench):
    generator = torch.Generator().manual_seed(0)
    probe = recall.RecallProbe(
        split="search",
        asked=((recall.Template(), 2),),
        asked_by=torch.zeros(16, dtype=torch.long),
        tokens=torch.randint(300, 400, (16, 12), generator=generator),
        positions=torch.tensor([[9, 10]] * 16),
        teacher_recall=1.0,
    )
    batches = steps(bench, 4)
    found = [
        learn_gates(bench.teacher, bench.bank, FREE, batches, kept=2, probe=p, recall_weight=weight)
        for p, weight in ((None, 1.0), (probe, 1.0), (probe, 10.0))
    ]
    assert len({tuple(worth.values()) for worth in found}) == 3


def test_a_loss_that_is_not_finite_is_no_result(bench):
    broken = Damaged(bench.bank, ())
    with torch.no_grad():
        broken._mixers[2].out_proj.weight.fill_(torch.nan)
    with pytest.raises(TrainingError, match="not finite"):
        learn_gates(bench.teacher, broken, FREE, steps(bench, 2), kept=2)


# As a study's strategy and baseline

# 4 steps of 64 tokens a restart.
GATES = "{name: gates, tokens: 250, restarts: 2, batch_size: 4}"


def essence(result):
    """All that must not depend on when and how often a study was stopped."""
    trials = [(t.layout, t.score.per_block, t.value, t.proposed_by) for t in result.trials]
    learnt = {name: cost.tokens for name, cost in result.learnt.items()}
    return trials, result.baselines, result.asked, learnt


def only(result, label):
    return {name: layout for name, layout in result.baselines.items() if name.startswith(label)}


def test_a_study_takes_what_the_gates_choose(tmp_path, monkeypatch):
    study = make_study(tmp_path, f"search.baselines=[first, {GATES}]", f"name={tmp_path.name}")
    result, _ = search(study)
    label = "gates(tokens=250, restarts=2, batch_size=4)"
    bench = Workbench(study)
    blocks, expected = bench.blocks["bank"], []
    for seed in (trial_seed(study.seed, number, "gates") for number in (1, 2)):
        order = BlockOrder(len(blocks), batch_size=4, seed=seed)
        batches = [blocks.batch(order.indices(step)) for step in range(4)]
        worth = learn_gates(bench.teacher, bench.bank, FREE, batches, kept=2, seed=seed)
        expected.append(tuple(sorted(sorted(worth, key=worth.get)[-2:])))
    found = only(result, "gates")
    assert list(found) == [label, f"{label}:2"]
    assert [layout.attention_layers for layout in found.values()] == expected
    assert result.learnt[label].tokens == 512 and result.learnt[label].seconds > 0
    assert result.asked == {}
    assert f"Learning: {label} 512 tokens in " in counts(result)[-1]
    # Run again, nothing is learnt again.
    monkeypatch.setattr(workbench, "learn_gates", None)
    again, _ = search(study)
    assert essence(again) == essence(result)


def test_gates_as_the_strategy_propose_one_layout_a_restart(tmp_path):
    study = make_study(
        tmp_path, f"search.strategy={GATES}", "search.baselines=[]", "search.trials=5"
    )
    result, _ = search(study)
    assert 1 <= len(result.trials) <= 2
    assert all(trial.proposed_by.startswith("gates") for trial in result.trials)
    assert list(result.learnt) == ["gates(tokens=250, restarts=2, batch_size=4)"]


def test_a_study_stopped_while_gates_are_learnt_goes_on_as_if_unbroken(tmp_path, monkeypatch):
    whole, _ = search(make_study(tmp_path, f"search.baselines=[{GATES}, last]", "name=whole"))
    calls = []

    def stop_at(number, *args, **kwargs):
        calls.append(kwargs["seed"])
        if len(calls) == number:
            raise KeyboardInterrupt
        return learn_gates(*args, **kwargs)

    study = make_study(tmp_path, f"search.baselines=[{GATES}, last]", "name=broken")
    for number in (1, 3):
        monkeypatch.setattr(workbench, "learn_gates", functools.partial(stop_at, number))
        with pytest.raises(KeyboardInterrupt):
            search(study)
    monkeypatch.setattr(workbench, "learn_gates", functools.partial(stop_at, 0))
    result, _ = search(study)
    assert essence(result) == essence(whole)
    first, second = (trial_seed(0, number, "gates") for number in (1, 2))
    # The first was stopped once and learnt once, the second likewise.
    assert calls == [first, first, second, second]


def test_two_worker_processes_learn_the_gates_of_one(tmp_path):
    overrides = [f"search.baselines=[{GATES}, last]"]
    alone, _ = search(make_study(tmp_path, *overrides, "name=alone"))
    result, _ = search(make_study(tmp_path, *overrides, "name=two"), workers=2)
    assert result.baselines == alone.baselines
    assert {t.layout: t.value for t in result.trials} == {t.layout: t.value for t in alone.trials}
    learnt = {name: cost.tokens for name, cost in result.learnt.items()}
    assert learnt == {name: cost.tokens for name, cost in alone.learnt.items()}


class Learning:
    """Learns what the seed says, slowly; keeps what it was asked."""

    def __init__(self, pause=0.0, fails=()):
        self.asked, self.choices = [], []
        self._pause, self._fails, self._lock = pause, set(fails), threading.Lock()

    def __call__(self, *, seed, replacements, **choices):
        with self._lock:
            self.asked.append(seed)
            self.choices.append({"replacements": replacements, **choices})
            fails = len(self.asked) in self._fails
        threading.Event().wait(self._pause)
        if fails:
            raise TrainingError("gates: the loss is not finite; use a lower lr")
        worth = {layer: float((seed >> layer) % 97) for layer in replacements}
        return Learnt(worth=worth, tokens=10, seconds=self._pause)


THREE = {"name": "gates", "restarts": 3}


def made_up(learning, *, number=0, **options):
    config, space, budget = make(6, 2, trials=6, baselines=[THREE, "last"], **options)
    return run_study(
        config,
        space,
        budget,
        SyntheticScorer(6, pause=0.02),
        run_dir=None,
        worker=Worker(number=number),
        pace=Pace(beat_every=0.1, patience=5, look_every=0.02),
        learn_gates=learning,
    )


def test_several_workers_learn_each_restart_once(tmp_path):
    learning = Learning(pause=0.5)
    alone = made_up(Learning())
    storage = f"journal:{tmp_path / 'study.journal'}"
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda n: made_up(learning, number=n, storage=storage), range(2)))
    assert sorted(learning.asked) == sorted(trial_seed(0, n, "gates") for n in (1, 2, 3))
    # Two were learnt at the same time.
    assert learning.asked[0] != learning.asked[1]
    for result in results:
        assert result.baselines == alone.baselines and result.learnt["gates"].tokens == 30
    assert len(set(only(alone, "gates").values())) > 1


def test_what_a_worker_fails_to_learn_another_learns(tmp_path):
    learning, storage = Learning(fails=[1]), f"journal:{tmp_path / 'study.journal'}"
    with pytest.raises(TrainingError, match="use a lower lr"):
        made_up(learning, storage=storage)
    result = made_up(learning, storage=storage)
    first, second, third = (trial_seed(0, n, "gates") for n in (1, 2, 3))
    assert learning.asked == [first, first, second, third]
    assert result.baselines == made_up(Learning()).baselines


def killed_while_learning(storage):
    learning, learn = Learning(), Learning.__call__

    def call(**choices):
        if learning.asked:
            os.kill(os.getpid(), signal.SIGKILL)
        return learn(learning, **choices)

    made_up(call, storage=storage)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process cannot use CUDA")
def test_what_a_killed_worker_was_learning_another_learns(tmp_path):
    storage, learning = f"journal:{tmp_path / 'study.journal'}", Learning()
    process = multiprocessing.get_context("fork").Process(
        target=killed_while_learning, args=(storage,)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    result = made_up(learning, storage=storage)
    # What it had learnt before is kept.
    assert learning.asked == [trial_seed(0, number, "gates") for number in (2, 3)]
    assert result.baselines == made_up(Learning()).baselines


def test_pins_and_candidates_reach_the_learner():
    learning = Learning()
    config, space, budget = make(
        6,
        2,
        trials=2,
        baselines=["gates"],
        replacements=("a", "b"),
        pinned={0: ATTENTION, 5: "b"},
    )
    scorer = SyntheticScorer(6, replacements=("a", "b"))
    run_study(config, space, budget, scorer, run_dir=None, learn_gates=learning)
    choices = learning.choices[0]
    # In odd layers the second costs less.
    assert choices["replacements"] == {1: "b", 2: "a", 3: "b", 4: "a"}
    assert choices["pinned"] == {5: "b"} and choices["kept"] == 1


@pytest.mark.parametrize("num_attention", [0, 6])
def test_where_all_or_none_are_kept_nothing_is_learnt(num_attention):
    learning = Learning()
    config, space, budget = make(6, num_attention, trials=1, baselines=["gates"])
    scorer = SyntheticScorer(6)
    result = run_study(config, space, budget, scorer, run_dir=None, learn_gates=learning)
    assert list(result.baselines) == ["gates"] and not learning.asked


def test_what_gates_need_is_told(tmp_path):
    with pytest.raises(RunError, match="here are scores alone; leave gates and stage1_rank out"):
        made_up(None)
    study = make_study(tmp_path, "search.evaluation=per_trial", "search.strategy=gates")
    told = "search.evaluation: must be bank, whose mixers stand behind the gates, but is per_trial"
    assert find_problems(study) == [f"{told} (search.strategy: gates)"]
    with pytest.raises(ConfigError, match="whose mixers stand behind the gates"):
        search(study)
    low = make_study(tmp_path, "search.strategy={name: gates, restarts: 0}")
    assert find_problems(low) == ["search.strategy: `restarts >= 1` must hold, but got 0"]


def test_what_gates_will_learn_from_is_planned():
    quick = {"name": "gates", "tokens": 1000, "restarts": 4}
    config, space, budget = make(6, 2, trials=3, strategy="gates", baselines=[quick, "last"])
    plan = plan_search(config.search, space, budget)
    assert plan.learning == {"gates(tokens=1000, restarts=4)": 4000, "gates": 3 * 1_048_576}
    # Where all layouts are scored the strategy is not asked.
    config, space, budget = make(6, 2, trials=15, strategy="gates", baselines=[])
    assert plan_search(config.search, space, budget).learning == {}
    config, space, budget = make(6, 6, trials=1, strategy="random", baselines=["gates"])
    assert plan_search(config.search, space, budget).learning == {}


def test_the_plan_counts_what_learning_costs(tmp_path):
    without = make_plan(make_study(tmp_path))
    with_gates = make_plan(make_study(tmp_path, "search.baselines=[gates]"))
    assert with_gates.search.learning == {"gates": 3 * 1_048_576}
    assert "search, learning" not in without.flops
    # More than three passes of scoring over as many tokens.
    scored = with_gates.flops["search"] / with_gates.search.trials / with_gates.score_tokens
    assert with_gates.flops["search, learning"] > 3 * 1_048_576 * 3 * scored
