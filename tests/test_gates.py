import copy

import pytest
import torch
from tiny_study import make_study

from mohawk_nas import recall
from mohawk_nas.errors import TrainingError
from mohawk_nas.pipeline import Workbench
from mohawk_nas.reporting import SILENT
from mohawk_nas.search.gates import learn_gates, soft_top_k


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
        template=recall.Template(),
        num_pairs=2,
        tokens=torch.randint(300, 400, (16, 12), generator=generator),
        positions=torch.tensor([9, 10]),
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
