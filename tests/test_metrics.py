import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_study import make_study

from mohawk_nas import metrics
from mohawk_nas.workbench import Workbench


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Workbench(make_study(tmp_path_factory.mktemp("metrics")))


def test_kl_divergence_equals_its_definition():
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 3, 5, 11)
    p = teacher.double().softmax(-1)
    expected = (p * (p.log() - student.double().log_softmax(-1))).sum(-1)
    found = metrics.kl_divergence(teacher, student)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    assert metrics.kl_divergence(teacher, teacher).abs().max() == 0
    cold = metrics.kl_divergence(teacher, student, temperature=2.0)
    torch.testing.assert_close(cold, metrics.kl_divergence(teacher / 2, student / 2))


def test_cross_entropy_predicts_the_next_token():
    tokens = torch.tensor([[3, 1, 2]])
    logits = torch.full((1, 3, 5), -20.0)
    logits[0, 0, 1] = logits[0, 1, 2] = 20.0
    assert metrics.cross_entropy(logits, tokens).abs().max() < 1e-6


@pytest.mark.parametrize("values", [1, 2**20])
def test_evaluation_does_not_depend_on_how_it_is_cut(bench, monkeypatch, values):
    monkeypatch.setattr(metrics, "HEAD_VALUES", {"cpu": values, "cuda": values})
    blocks = bench.blocks["test"]
    figures = metrics.evaluate_blocks(bench.teacher, bench.teacher.model, blocks, batch_size=3)
    tokens = blocks.batch(range(len(blocks)))
    logits = bench.teacher.model(tokens).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert len(figures.kl) == len(blocks)
    assert figures.mean_cross_entropy == pytest.approx(expected.item(), rel=1e-5)
    assert figures.mean_kl == pytest.approx(0, abs=1e-6)


def test_kl_of_hidden_states_is_the_kl_of_logits(bench):
    teacher = bench.teacher
    tokens = bench.blocks["test"].batch([0, 1, 2])
    hidden = teacher.run(tokens)
    other = hidden + 0.1 * torch.randn_like(hidden)
    found = metrics.kl_of_hidden(teacher.model, hidden, teacher.model, other)
    expected = metrics.kl_divergence(teacher.logits(hidden), teacher.logits(other)).mean(1)
    torch.testing.assert_close(found, expected)


def test_a_loaded_hybrid_is_spared_its_masks_too(bench):
    inner, seen = bench.teacher.model, []
    shell = SimpleNamespace(config=copy.copy(inner.config), causal_lm=inner)
    shell.base_model = lambda **inputs: (
        seen.append(inner.config._attn_implementation) or inner.base_model(**inputs)
    )
    metrics.body(shell, bench.blocks["search"].batch([0]))
    assert seen == ["mohawk_nas_maskless_sdpa"]


def test_perplexity_is_the_exponential_of_cross_entropy():
    from mohawk_nas.evaluate import Evaluation

    figures = metrics.BlockFigures(kl=(0.0,), cross_entropy=(2.0,))
    assert Evaluation(name="x", figures=figures, recall=0.0).perplexity == math.exp(2)
