"""The short convolution, written out and as kernels, is torch's grouped one."""

import json

import interpreting
import pytest
import torch
import torch.nn.functional as F

from mohawk_nas.mixers import _backends
from mohawk_nas.mixers._conv import causal_conv, last_inputs, plain_conv

CASES = {
    "as in a model": {"length": 70, "channels": 144},
    "columns of a wider tensor": {"length": 33, "channels": 40, "wider": 3},
    "one tap": {"length": 5, "channels": 6, "taps": 1},
    "two taps": {"length": 64, "channels": 8, "taps": 2},
    "five taps": {"length": 40, "channels": 7, "taps": 5},
    "shorter than the taps": {"length": 2, "channels": 9},
    "half precision": {"length": 37, "channels": 12, "dtype": torch.bfloat16},
}


def errors(run, *, length, channels, taps=4, wider=0, dtype=torch.float32, device="cpu"):
    """Of outputs with and without inputs before, and of gradients; relative, against float64."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    inputs = normal(3, length, channels + wider).to(dtype)[..., :channels].requires_grad_()
    before = normal(3, taps - 1, channels).to(dtype)
    weight, bias = normal(channels, taps).requires_grad_(), normal(channels).requires_grad_()
    wanted = normal(3, length, channels).to(dtype)
    given = [inputs, weight, bias]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    found, expected = run(inputs, None, weight, bias), grouped(None, *exact)
    pairs = {"output": (found, expected)}
    for name, *pair in zip(
        ("inputs", "weight", "bias"),
        torch.autograd.grad(found, given, wanted),
        torch.autograd.grad(expected, exact, wanted.double()),
        strict=True,
    ):
        pairs[f"gradient of {name}"] = tuple(pair)
    with torch.no_grad():
        pairs["output, continued"] = run(inputs, before, weight, bias), grouped(before, *exact)
    assert found.dtype == dtype and pairs["gradient of weight"][0].dtype == torch.float32
    return {
        name: ((one.double() - other).norm() / other.norm()).item()
        for name, (one, other) in pairs.items()
    }


def grouped(before, inputs, weight, bias):
    """By torch's own convolution."""
    if before is None:
        before = torch.zeros(inputs.shape[0], weight.shape[1] - 1, inputs.shape[2])
    window = torch.cat([before.to(inputs), inputs], dim=1).mT
    return F.conv1d(window, weight[:, None], bias, groups=weight.shape[0]).mT


def interpreted():
    """Errors of the kernels by case; to be called where Triton interprets."""
    interpreting.ready()
    from mohawk_nas.mixers import _conv_triton as fused

    assert _backends.fused_kernels(torch.zeros(1)) is not None
    # Few blocks, so that there are several, and some programs have several to do.
    fused.TOKENS, fused.CHANNELS = 16, 16
    spread = {case: errors(causal_conv, **sizes) for case, sizes in CASES.items()}
    nothing = [torch.ones(0, 5, 3), torch.ones(3, 4), torch.ones(3)]
    nothing = [tensor.requires_grad_() for tensor in nothing]
    causal_conv(nothing[0], None, *nothing[1:]).sum().backward()
    assert not any(tensor.grad.any() for tensor in nothing)
    fused.PROGRAMS = 1
    together = {case: errors(causal_conv, **sizes) for case, sizes in CASES.items()}
    print(json.dumps({"spread": spread, "together": together}))


@pytest.fixture(scope="module")
def interpreted_errors():
    return interpreting.errors_of(__name__)


def assert_small(found, case):
    limit = 6e-3 if case.startswith("half") else 1e-6
    assert max(found.values()) <= limit, found


@pytest.mark.parametrize("case", CASES)
def test_the_plain_convolution_is_torchs(case):
    found = errors(plain_conv, **CASES[case])
    if case.startswith("half"):
        # Added up in bfloat16.
        assert max(found.values()) <= 2e-2, found
    else:
        assert_small(found, case)


@pytest.mark.parametrize("way", ["spread", "together"])
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_are_torchs(interpreted_errors, case, way):
    assert_small(interpreted_errors[way][case], case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_are_torchs_on_a_gpu(case):
    if _backends.fused_kernels(torch.zeros(1, device="cuda")) is None:
        pytest.skip("triton is not there")
    assert_small(errors(causal_conv, device="cuda", **CASES[case]), case)


@pytest.mark.parametrize("reach", [0, 1, 3])
def test_pieces_are_the_whole(reach):
    inputs = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.randn(5, reach + 1), torch.randn(5)
    kept, parts = None, []
    # The first piece is shorter than the convolution reaches.
    for piece in (slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 9)):
        parts.append(plain_conv(inputs[:, piece], kept, weight, bias))
        kept = last_inputs(inputs[:, piece], kept, reach)
    whole = plain_conv(inputs, None, weight, bias)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-6)
    assert torch.equal(kept, inputs[:, 9 - reach :])
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()
