"""The fused kernel of stage 1's distance on a GPU: against plain torch in float64."""

import pytest
import torch

from mohawk_nas.kernels.matrix_orientation import matrix_distance
from mohawk_nas.mixer import MatrixFactors

pytestmark = pytest.mark.gpu

TRAINED = ("c", "b", "log_decay", "diagonal")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised memory holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(before)


def operands(
    length,
    *,
    batch=1,
    heads=3,
    teacher_heads=None,
    kv_heads=None,
    width=64,
    state=64,
    dtype=torch.bfloat16,
    decay=None,
    diagonal=True,
):
    """(query, key, factors, the teacher's heads), laid out as a teacher and a mixer lay them out.

    Without ``decay``, heads remember from a token to some hundreds.
    """
    generator = torch.Generator("cuda").manual_seed(0)
    teacher_heads = teacher_heads or heads
    kv_heads = kv_heads or teacher_heads

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    query = normal(batch, teacher_heads, length, width).to(dtype)
    key = normal(batch, length, kv_heads, width).to(dtype).transpose(1, 2)
    # Slices of one projection.
    mixed = (normal(batch, length, 2 * heads * state) * state**-0.5).to(dtype)
    c, b = (t.unflatten(-1, (heads, state)).transpose(1, 2) for t in mixed.chunk(2, -1))
    rate = torch.logspace(-2.5, 0.5, heads, device="cuda") if decay is None else -decay
    uniform = torch.rand(batch, length, heads, generator=generator, device="cuda")
    log_decay = (-rate * (0.5 + uniform)).transpose(1, 2)
    factors = MatrixFactors(
        c=c.requires_grad_(),
        b=b.requires_grad_(),
        log_decay=log_decay.requires_grad_(),
        diagonal=normal(heads).requires_grad_() if diagonal else None,
    )
    return query, key, factors, torch.arange(heads) * teacher_heads // heads


def trained(factors):
    return {n: getattr(factors, n) for n in TRAINED if getattr(factors, n) is not None}


def run(query, key, factors, pairs, *, backend="triton", **options):
    """The distance, and the gradients of a random combination, by name."""
    leaves = trained(factors)
    scaling = query.shape[-1] ** -0.5
    result = matrix_distance(
        query, key, factors, scaling=scaling, heads=pairs, backend=backend, **options
    )
    weights = torch.rand(result.shape, generator=torch.Generator().manual_seed(1)).to(result)
    found = torch.autograd.grad((result * weights).sum(), list(leaves.values()))
    return {"distance": result.detach(), **dict(zip(leaves, found, strict=True))}


def run_exactly(query, key, factors, pairs, **options):
    wide = {n: t.detach().double().requires_grad_() for n, t in trained(factors).items()}
    factors = MatrixFactors(**{"diagonal": None, **wide})
    return run(query.double(), key.double(), factors, pairs, backend="torch", **options)


def assert_exact(given, dtype, **options):
    actual = run(*given, **options)
    expected = run_exactly(*given, **options)
    assert actual["distance"].dtype == torch.float32
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    for name, tensor in trained(given[2]).items():
        assert actual[name].dtype == tensor.dtype, name
    for name, tensor in expected.items():
        error = (actual[name].double() - tensor).norm()
        # Not `error > limit`: NaN must fail. One token alone has no decay to learn from.
        assert error <= limit * tensor.norm().clamp_min(1e-30), (
            name,
            (error / tensor.norm()).item(),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [1, 17, 129, 1000])
def test_lengths(length, dtype):
    assert_exact(operands(length, batch=2, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("state", [16, 64, 128])
@pytest.mark.parametrize("width", [32, 64, 80, 128])
def test_head_and_state_sizes(width, state, dtype):
    assert_exact(operands(333, width=width, state=state, dtype=dtype), dtype)


@pytest.mark.parametrize(("width", "state"), [(256, 64), (64, 256), (5, 18)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_unusual_sizes(width, state, dtype):
    assert_exact(operands(200, heads=2, width=width, state=state, dtype=dtype), dtype)


@pytest.mark.parametrize(("heads", "teacher_heads", "kv_heads"), [(6, 6, 2), (8, 6, 3), (3, 6, 1)])
def test_grouped_and_unequal_heads(heads, teacher_heads, kv_heads):
    shape = {"heads": heads, "teacher_heads": teacher_heads, "kv_heads": kv_heads, "batch": 2}
    assert_exact(operands(300, **shape), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("decay", [-1e-6, -0.05, -1.0, -20.0])
@pytest.mark.parametrize("window", [None, 1, 100, 700])
def test_decays_and_windows(decay, window, dtype):
    assert_exact(operands(1000, heads=2, decay=decay, dtype=dtype), dtype, window=window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_matrix_without_diagonal(dtype):
    assert_exact(operands(300, diagonal=False, dtype=dtype), dtype)


def test_close_matrices_do_not_cancel():
    """A distance far below the norms of both matrices keeps its digits."""
    query, key, factors, pairs = operands(300, heads=1, dtype=torch.float32)
    with torch.no_grad():
        factors.c.zero_()
        factors.diagonal.fill_(1 - 1e-4)
    # A token that sees itself alone: the teacher's matrix is the identity.
    actual = run(query, key, factors, pairs, window=1)["distance"]
    expected = run_exactly(query, key, factors, pairs, window=1)["distance"]
    torch.testing.assert_close(expected, torch.full_like(expected, 300e-8), rtol=1e-2, atol=0)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=0)


def test_long_sequences_in_bounded_memory():
    length = 16384
    given = operands(length, heads=4)
    run(*given)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = run(*given)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    gradients = sum(t.numel() * t.element_size() for t in found.values())
    # The matrices would be 4 GiB.
    assert extra <= 3 * gradients, (extra, gradients)
    assert all(torch.isfinite(t).all() for t in found.values())


def test_the_same_inputs_give_the_same_bits():
    given = operands(1000, batch=2)
    first, second = run(*given), run(*given)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_auto_takes_the_kernel_and_leaves_padding_to_plain_torch():
    query, key, factors, pairs = operands(100)
    options = {"scaling": 0.125, "heads": pairs}
    auto, fused = (
        matrix_distance(query, key, factors, **options, backend=b) for b in ("auto", "triton")
    )
    assert torch.equal(auto, fused)
    mask = torch.ones(1, 100, dtype=torch.bool, device="cuda")
    padded = matrix_distance(query, key, factors, **options, mask=mask)
    torch.testing.assert_close(padded, fused, rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="padding mask"):
        matrix_distance(query, key, factors, **options, mask=mask, backend="triton")


def test_without_gradients_the_distance_is_the_same():
    query, key, factors, pairs = operands(300)
    options = {"scaling": 0.125, "heads": pairs, "backend": "triton"}
    with torch.no_grad():
        alone = matrix_distance(query, key, factors, **options)
    assert not alone.requires_grad
    with torch.autocast("cuda", dtype=torch.bfloat16):
        trained = matrix_distance(query, key, factors, **options)
    torch.testing.assert_close(alone, trained.detach(), rtol=1e-6, atol=0)


def test_backward_twice_over_one_graph():
    query, key, factors, pairs = operands(300)
    distance = matrix_distance(query, key, factors, scaling=0.125, heads=pairs, backend="triton")
    leaves = list(trained(factors).values())
    first = torch.autograd.grad(distance.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(distance.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_cuda_graph_of_it_follows_its_inputs():
    given = operands(300)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradients_of_the_sum(*given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients_of_the_sum(*given)
    with torch.no_grad():
        given[0].normal_()
        given[2].log_decay.mul_(0.5)
    expected = gradients_of_the_sum(*given)
    for tensor in captured:
        tensor.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def gradients_of_the_sum(query, key, factors, pairs):
    distance = matrix_distance(query, key, factors, scaling=0.125, heads=pairs, backend="triton")
    return [
        distance.detach(),
        *torch.autograd.grad(distance.sum(), list(trained(factors).values())),
    ]
