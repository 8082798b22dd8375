"""KL divergence of logits: plain torch and the fused kernel against float64."""

import json

import interpreting
import pytest
import torch

from mohawk_nas.kernels import kl_divergence as module
from mohawk_nas.kernels.kl_divergence import kl_divergence

CASES = {
    "a prime": {"vocab": 61},
    "one block": {"vocab": 64},
    "blocks": {"vocab": 137},
    "temperature": {"vocab": 137, "temperature": 2.5},
    "large": {"vocab": 137, "offset": 300.0},
    "sharp": {"vocab": 61, "size": 80.0},
    "impossible tokens": {"vocab": 137, "impossible": 70},
    "rows apart": {"vocab": 61, "apart": True},
    "float16": {"vocab": 137, "dtype": torch.float16},
}


def logits_of(
    vocab, *, size=3.0, offset=0.0, impossible=0, apart=False, dtype=torch.float32, device="cpu"
):
    """Teacher's and student's logits, ``(2, 5, V)``."""
    generator = torch.Generator().manual_seed(vocab)
    found = []
    for number in range(2):
        logits = size * torch.randn(2, 5, vocab + apart, generator=generator) + number * offset
        logits[..., :impossible] = -torch.inf
        found.append(logits.to(device, dtype)[..., :vocab])
    return found


def naive(teacher, student, temperature):
    """In float64, from the definition; what the teacher rules out counts nothing."""
    p = (teacher / temperature).softmax(-1)
    terms = p * (p.log() - (student / temperature).log_softmax(-1))
    return torch.where(p > 0, terms, 0).sum(-1)


def errors(backend, *, temperature=1.0, **settings):
    """Errors of divergence and gradient: of the first beside 1 nat, of the second relative."""
    teacher, student = logits_of(**settings)
    student.requires_grad_()
    found = kl_divergence(teacher, student, temperature=temperature, backend=backend)
    assert found.dtype == torch.float32
    weights = torch.rand(found.shape, generator=torch.Generator().manual_seed(1)).to(found)
    (gradient,) = torch.autograd.grad((found * weights).sum(), student)
    assert gradient.dtype == student.dtype
    exact = student.detach().double().requires_grad_()
    expected = naive(teacher.double(), exact, temperature)
    (slope,) = torch.autograd.grad((expected * weights.double()).sum(), exact)
    # Where a logit is -inf the definition's own slope is 0 * inf.
    slope = slope.nan_to_num(0.0)
    return {
        "divergence": ((found - expected).abs() / expected.abs().clamp_min(1)).max().item(),
        "gradient": ((gradient.double() - slope).norm() / slope.norm()).item(),
    }


def interpreted():
    """Errors of the kernel by case; to be called where Triton interprets."""
    interpreting.ready()
    from mohawk_nas.kernels import _kl_divergence_triton as fused

    # So that small vocabularies have many blocks.
    fused.MAX_BLOCK = 64
    print(json.dumps({case: errors("triton", **settings) for case, settings in CASES.items()}))


@pytest.fixture(scope="module")
def interpreted_errors():
    return interpreting.errors_of(__name__)


def assert_small(found, case):
    assert found["divergence"] <= 3e-6
    assert found["gradient"] <= (1e-3 if case == "float16" else 3e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_fused_kernel_is_the_definition(interpreted_errors, case):
    assert_small(interpreted_errors[case], case)


@pytest.mark.parametrize("case", [case for case in CASES if case != "impossible tokens"])
def test_plain_torch_is_the_definition(case):
    assert_small(errors("torch", **CASES[case]), case)


def test_the_same_logits_are_no_distance_apart():
    teacher, _ = logits_of(61, size=20.0)
    assert kl_divergence(teacher, teacher).abs().max() == 0


def test_gradients_in_float64_are_those_of_finite_differences():
    teacher, student = (logits.double() for logits in logits_of(7))
    student.requires_grad_()
    assert kl_divergence(teacher, student).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda s: kl_divergence(teacher, s, temperature=2.0), student)


def test_the_kernel_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    teacher, student = logits_of(7)
    with pytest.raises(ValueError, match="cannot run: the tensors are on cpu"):
        kl_divergence(teacher, student, backend="triton")
    monkeypatch.setattr(module, "triton_obstacle", lambda device: None)
    with pytest.raises(ValueError, match=r"no support for torch\.float64"):
        kl_divergence(teacher, student.double(), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("vocab", [61, 4096, 50257, 51200, 128256])
def test_the_kernel_on_a_gpu_is_the_definition(vocab, temperature, dtype):
    found = errors("triton", vocab=vocab, temperature=temperature, dtype=dtype, device="cuda")
    assert found["divergence"] <= 3e-6
    assert found["gradient"] <= (4e-3 if dtype == torch.bfloat16 else 5e-6)


@pytest.mark.gpu
def test_equal_logits_are_no_distance_apart_on_a_gpu():
    teacher, _ = logits_of(50257, size=20.0, dtype=torch.bfloat16, device="cuda")
    assert kl_divergence(teacher, teacher, backend="triton").abs().max() == 0
