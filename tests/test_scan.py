"""The chunked scan is the recurrence: outputs, final state and every gradient."""

import pytest
import torch

from mohawk_nas.mixers._scan import chunked_scan, decay_mask, naive_scan

pytestmark = pytest.mark.usefixtures("poisoned_empty")

NAMES = ("c", "b", "x", "log_decay", "state")


def inputs(length, *, decays=(-2.0, -0.01), state=True, dtype=torch.float64, seed=0, heads=2):
    """Random operands; log-decays spread evenly on a logarithmic scale."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    low, high = (torch.tensor(-d, dtype=torch.float64).log() for d in decays)
    spread = torch.rand(2, heads, length, generator=generator, dtype=torch.float64)
    made = {
        "c": normal(2, heads, length, 3),
        "b": normal(2, heads, length, 3),
        "x": normal(2, heads, length, 5),
        "log_decay": -(low + (high - low) * spread).exp(),
        "state": normal(2, heads, 3, 5) if state else None,
    }
    # The chunked scan reads decays in float32, so both get what float32 holds.
    made["log_decay"] = made["log_decay"].float().double()
    return {n: None if t is None else t.to(dtype).requires_grad_() for n, t in made.items()}


def run(scan, operands, **options):
    """Outputs, final state, and gradients of a random function of both."""
    operands = {n: None if t is None else t.detach().requires_grad_() for n, t in operands.items()}
    y, state = scan(*operands.values(), **options)
    generator = torch.Generator().manual_seed(9)
    loss = sum(
        (part.double() * torch.randn(part.shape, generator=generator)).sum() for part in (y, state)
    )
    loss.backward()
    return {"y": y.detach(), "final": state.detach()} | {
        name: tensor.grad for name, tensor in operands.items() if tensor is not None
    }


def assert_near(actual, expected, tolerance):
    """Every output and gradient, relative to its own largest entry unless that vanishes."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.isfinite(actual[name]).all(), name
        error = (actual[name].double() - tensor.double()).abs().max()
        assert error <= tolerance * tensor.abs().max() + 1e-12, (name, error.item())


@pytest.mark.parametrize("state", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize("chunk_size", [1, 2, 7, 16, 64])
@pytest.mark.parametrize("length", [1, 2, 7, 15, 33])
def test_chunked_is_naive(length, chunk_size, state):
    operands = inputs(length, state=state)
    expected = run(naive_scan, operands)
    # Decays are float32 in float64 too.
    assert_near(run(chunked_scan, operands, chunk_size=chunk_size), expected, 1e-6)


@pytest.mark.parametrize("chunk_size", [3, 64])
def test_chunked_is_naive_in_float32(chunk_size):
    operands = inputs(65)
    expected = run(naive_scan, operands)
    single = {name: tensor.float() for name, tensor in operands.items()}
    assert_near(run(chunked_scan, single, chunk_size=chunk_size), expected, 2e-6)


@pytest.mark.parametrize("chunk_size", [64, 100])
def test_long_memory_is_kept(chunk_size):
    """Decays within 1e-3 and 1e-6 of 1 over thousands of tokens."""
    operands = inputs(4096, decays=(-1e-3, -1e-6), heads=1)
    expected = run(naive_scan, operands)
    assert_near(run(chunked_scan, operands, chunk_size=chunk_size), expected, 2e-6)
    single = {name: tensor.float() for name, tensor in operands.items()}
    assert_near(run(chunked_scan, single, chunk_size=chunk_size), expected, 2e-5)


def test_a_single_token_is_remembered_as_long_as_its_decay_says():
    """In closed form: what the first token left after 4,095 steps of one size."""
    for step in (1e-6, 1e-4, 1e-3):
        c = b = x = torch.zeros(1, 1, 4096, 1)
        b, x = b.clone(), x.clone()
        b[0, 0, 0], x[0, 0, 0] = 1, 1
        log_decay = torch.full((1, 1, 4096), -step)
        y, state = chunked_scan(c + 1, b, x, log_decay, chunk_size=64)
        exact = torch.exp(torch.tensor(-4095 * step, dtype=torch.float64))
        assert abs(y[0, 0, -1, 0].item() / exact - 1) < 1e-5
        assert abs(state.item() / exact - 1) < 1e-5


@pytest.mark.parametrize("chunk_size", [4, 64])
def test_forgetting_everything_is_finite(chunk_size):
    """Log-decays of -60 among others close to 0: no overflow, no NaN in any gradient."""
    operands = inputs(65, decays=(-60.0, -1e-6))
    operands["log_decay"] = operands["log_decay"].detach()
    operands["log_decay"][..., ::7] = -60.0
    expected = run(naive_scan, operands)
    # Sums of a whole chunk reach -600, where float32 is 6e-5 apart.
    assert_near(run(chunked_scan, operands, chunk_size=chunk_size), expected, 1e-4)
    operands["log_decay"][:] = -60.0
    expected = run(naive_scan, operands)
    assert_near(run(chunked_scan, operands, chunk_size=chunk_size), expected, 1e-5)


def test_bfloat16_stays_near():
    operands = inputs(65)
    rounded = {n: t.detach().to(torch.bfloat16) for n, t in operands.items()}
    rounded["log_decay"] = operands["log_decay"].detach().float()
    expected, _ = naive_scan(*(tensor.double() for tensor in rounded.values()))
    y, state = chunked_scan(*rounded.values(), chunk_size=16)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert (y - expected).norm() < 0.02 * expected.norm()


def test_two_halves_are_the_whole():
    operands = inputs(33, state=False, dtype=torch.float32)
    operands.pop("state")
    whole, final = chunked_scan(*operands.values(), chunk_size=8)
    state, parts = None, []
    for piece in (slice(0, 13), slice(13, 14), slice(14, 33)):
        y, state = chunked_scan(*(t[:, :, piece] for t in operands.values()), state, chunk_size=8)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=2), whole)
    torch.testing.assert_close(state, final)


def test_matrix_times_values_is_the_scan():
    operands = inputs(33, state=False)
    c, b, x, log_decay = (operands[name] for name in NAMES[:4])
    matrix = c @ b.transpose(-1, -2) * decay_mask(log_decay.cumsum(-1))
    assert not matrix.triu(1).any()
    torch.testing.assert_close(matrix @ x, naive_scan(c, b, x, log_decay)[0])


def test_decay_mask_has_finite_gradients_where_it_is_masked():
    # Above the diagonal the exponent would be +5,000.
    total = torch.tensor([0.0, -5000.0, -5000.5], requires_grad=True)
    mask = decay_mask(total)
    mask.sum().backward()
    expected = torch.tensor([[1, 0, 0], [0, 1, 0], [0, torch.tensor(-0.5).exp(), 1]])
    torch.testing.assert_close(mask.detach(), expected)
    assert torch.isfinite(total.grad).all()
