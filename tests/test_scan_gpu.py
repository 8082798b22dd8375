"""mamba-ssm's kernels do what plain torch does, on a GPU.

Errors are ``||out - reference|| / ||reference||``; references are computed in float64.
"""

import copy
import functools

import pytest
import torch

from mohawk_nas.mixer import MixerState, build_mixer, mixer_config
from mohawk_nas.mixers import _backends
from mohawk_nas.mixers._scan import KERNEL_CHUNK, chunked_scan, naive_scan, scan
from mohawk_nas.testing import tiny_view

pytestmark = pytest.mark.gpu

# Products of float32 are TF32 in mamba-ssm, with 10 bits of mantissa; bfloat16 has 7.
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 1.2e-2}


@pytest.fixture
def kernels():
    return found("mamba_ssm")


def found(package):
    functions = _backends.find(package)
    if functions is None:
        pytest.skip(f"{_backends._load(package)[1]}")
    return functions


def error(actual, reference):
    return ((actual.double() - reference.double()).norm() / reference.double().norm()).item()


def inputs(
    length,
    *,
    batch=2,
    heads=2,
    width=64,
    d_state=64,
    decay=(-3.0, 1.0),
    dtype=torch.bfloat16,
    state=False,
    skip=True,
    padded=0,
):
    """Operands as the mixer makes them: views of one tensor, in two types.

    Args:
        decay: Range of a, where a log-decay is -softplus(a), clamped as in the mixer.
        padded: Positions of the first sequence that are padding.
    """
    generator = torch.Generator("cuda").manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    sizes = [heads * d_state, heads * d_state, heads * width]
    flat = normal(batch, length, sum(sizes)).to(dtype)
    a = torch.empty(batch, length, heads, device="cuda").uniform_(*decay, generator=generator)
    log_decay = -torch.nn.functional.softplus(a).clamp_min(1e-6).transpose(1, 2)
    if padded:
        flat[0, :padded] = 0
        log_decay[0, :, :padded] = 0
    c, b, x = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in flat.split(sizes, dim=-1))
    return {
        "c": c,
        "b": b,
        "x": x,
        "log_decay": log_decay,
        "state": normal(batch, heads, d_state, width) if state else None,
        "skip": normal(heads) if skip else None,
    }


def results(function, operands):
    """Outputs, and gradients of a random function of them."""
    leaves = {n: None if t is None else t.detach().requires_grad_() for n, t in operands.items()}
    skip = leaves.pop("skip")
    y, final = function(*leaves.values(), skip=skip)
    generator = torch.Generator("cuda").manual_seed(9)
    made = {"y": y, "final": final}
    loss = sum(
        (t.double() * torch.randn(t.shape, generator=generator, device="cuda")).sum()
        for t in made.values()
    )
    loss.backward()
    leaves["skip"] = skip
    return made | {f"d{n}": t.grad for n, t in leaves.items() if t is not None}


def reference(c, b, x, log_decay, state=None, *, skip=None):
    scanned = functools.partial(chunked_scan, chunk_size=KERNEL_CHUNK)
    if x.shape[2] < 20:
        scanned = naive_scan
    y, final = scanned(c, b, x, log_decay, state)
    return (y if skip is None else y + skip[:, None, None] * x), final


def exact(operands):
    return {n: None if t is None else t.detach().double() for n, t in operands.items()}


def compare(operands, tolerance):
    actual = results(functools.partial(scan, backend="mamba_ssm"), operands)
    expected = results(reference, exact(operands))
    assert actual.keys() == expected.keys()
    assert actual["y"].dtype == operands["x"].dtype and actual["final"].dtype == torch.float32
    errors = {n: error(actual[n], t) for n, t in expected.items() if t.norm() > 0}
    assert all(torch.isfinite(t).all() for t in actual.values())
    assert max(errors.values()) < tolerance, errors


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("length", [1, 17, 129, 1000])
def test_kernels_are_the_plain_scan(kernels, length, dtype):
    compare(inputs(length, dtype=dtype, state=True), TOLERANCES[dtype])


@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 1},
        {"heads": 6, "width": 64, "d_state": 64},
        {"heads": 32, "width": 64, "d_state": 64},
        {"width": 32, "d_state": 16},
        {"width": 80, "d_state": 80},
        {"width": 128, "d_state": 128},
        {"width": 128, "d_state": 16},
    ],
    ids=str,
)
def test_kernels_at_other_sizes(kernels, sizes):
    compare(inputs(129, **sizes), TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("decay", "length"),
    # Within 6e-6 of 1, below the clamp, forgotten at once, and all of it side by side.
    [((-12.1, -11.9), 1000), ((-20, -15), 1000), ((19, 21), 129), ((-14, 20), 257)],
    ids=str,
)
def test_kernels_at_the_ends_of_the_decay(kernels, decay, length, dtype):
    """Gradients too: nothing is divided by a small step and multiplied with it again."""
    operands = inputs(length, decay=decay, dtype=dtype, state=True)
    if decay[0] > 0:
        # The log-decay's own gradient is then some 1e-8 of the others, below their rounding.
        operands["log_decay"] = operands["log_decay"].detach()
        actual = results(functools.partial(scan, backend="mamba_ssm"), operands)
        expected = results(reference, exact(operands))
        assert actual.pop("dlog_decay").abs().max() < 1e-3
        for name, tensor in actual.items():
            if name != "dstate":
                assert error(tensor, expected[name]) < TOLERANCES[dtype], name
        return
    compare(operands, TOLERANCES[dtype])


@pytest.mark.parametrize("state", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize("skip", [False, True], ids=["no_skip", "skip"])
def test_kernels_with_and_without_what_is_optional(kernels, state, skip):
    compare(inputs(100, state=state, skip=skip), TOLERANCES[torch.bfloat16])


def test_kernels_with_padding(kernels):
    compare(inputs(150, padded=70, state=True), TOLERANCES[torch.bfloat16])


def test_two_halves_are_the_whole(kernels):
    operands = inputs(150)
    skip = operands.pop("skip")
    operands.pop("state")
    run = functools.partial(scan, skip=skip, backend="mamba_ssm")
    whole, final = run(*operands.values())
    parts, state = [], None
    for piece in (slice(0, 77), slice(77, 78), slice(78, 150)):
        y, state = run(*(t[:, :, piece] for t in operands.values()), state)
        parts.append(y)
    assert error(torch.cat(parts, dim=2), whole) < TOLERANCES[torch.bfloat16]
    assert error(state, final) < TOLERANCES[torch.bfloat16]


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "bfloat16"])
def test_a_step_is_the_recurrence(kernels, dtype):
    operands = inputs(1, batch=3, dtype=dtype, state=True)
    expected, after = reference(**exact(operands))
    y, state = scan(**operands, backend="mamba_ssm")
    # No matrix product: float32 is float32.
    assert error(y, expected) < (1e-6 if dtype == torch.float32 else 4e-3)
    assert error(state, after) < 1e-6
    assert state.data_ptr() == operands["state"].data_ptr()


def test_float32_is_left_to_torch_unless_tf32_is_allowed(kernels):
    operands = inputs(64, dtype=torch.float32)
    plain, _ = scan(**operands, backend="torch")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert torch.equal(scan(**operands)[0], plain)
        torch.set_float32_matmul_precision("high")
        assert not torch.equal(scan(**operands)[0], plain)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("chunks", [1, 5, 64, 65])
def test_plain_scan_on_a_gpu(chunks):
    """By a product up to 64 chunks, one by one beyond."""
    operands = inputs(8 * chunks - 3, width=16, d_state=16, dtype=torch.float32, state=True)

    def plain(*args, skip):
        return scan(*args, skip=skip, backend="torch", chunk_size=8)

    actual, expected = results(plain, operands), results(reference, exact(operands))
    for name, tensor in expected.items():
        assert error(actual[name], tensor) < 5e-6, name


def test_kernels_in_a_cuda_graph(kernels):
    operands = inputs(129, state=True)
    leaves = [t.detach().clone().requires_grad_() for t in operands.values()]

    def step():
        y, final = scan(*leaves[:5], skip=leaves[5], backend="mamba_ssm")
        return torch.autograd.grad(y.float().square().sum() + final.square().sum(), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = [tensor.clone() for tensor in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.fill_(torch.nan)
    graph.replay()
    for tensor, wanted in zip(captured, expected, strict=True):
        assert error(tensor, wanted) < 1e-3


def test_tuning_is_read_from_disk(kernels, monkeypatch):
    """What one process measured the next does not measure again; hooks stay with the choice."""
    from mamba_ssm.ops.triton.ssd_chunk_state import _chunk_state_bwd_db_kernel as tuner
    from mamba_ssm.ops.triton.ssd_state_passing import _state_passing_fwd_kernel as plain_tuner

    if not hasattr(tuner, "check_disk_cache"):
        pytest.skip("this Triton keeps nothing on disk")
    operands = inputs(129)
    run = functools.partial(scan, backend="mamba_ssm")
    for each in (tuner, plain_tuner):
        each.cache.clear()
    expected = results(run, operands)
    chosen = {each: dict(each.cache) for each in (tuner, plain_tuner)}

    def refuse(*args, **kwargs):
        raise AssertionError("measured again")

    for each in (tuner, plain_tuner):
        each.cache.clear()
        monkeypatch.setattr(each, "_bench", refuse)
    actual = results(run, operands)
    assert chosen == {each: dict(each.cache) for each in (tuner, plain_tuner)}
    assert all(config.pre_hook for config in tuner.cache.values())
    for name, tensor in expected.items():
        assert error(actual[name], tensor) < 1e-3, name


# The mixer

VIEW = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


def mixers(arch="llama", **options):
    """The same mixer on the CPU and on the GPU, away from where it started."""
    config = mixer_config({"mixer": "mamba2", **options})
    view = tiny_view(arch, **VIEW)
    mixer = build_mixer(config, view, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    hidden = torch.randn(3, 150, 128, generator=generator)
    return mixer, copy.deepcopy(mixer).cuda(), hidden


def run_mixer(mixer, hidden, mask, *, autocast):
    device = mixer.D.device
    hidden = hidden.to(device).requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        output = mixer(hidden, mask=mask.to(device))
    real = mask.to(device)[..., None]
    (output.float() * real).square().sum().backward()
    gradients = {name: p.grad.cpu() for name, p in mixer.named_parameters()}
    return output, {"output": (output * real).cpu(), "hidden": hidden.grad.cpu()} | gradients


@pytest.mark.parametrize("backend", ["mamba_ssm", "torch"])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_mixer_under_autocast_is_the_mixer_on_a_cpu(backend, arch):
    if backend == "mamba_ssm":
        found("mamba_ssm")
    mixer, other, hidden = mixers(arch, backend="auto")
    other._scan = functools.partial(scan, backend=backend, chunk_size=64)
    mask = torch.ones(3, 150, dtype=torch.bool)
    mask[1, :40] = False
    _, expected = run_mixer(mixer, hidden.clone(), mask, autocast=False)
    output, actual = run_mixer(other, hidden.clone(), mask, autocast=True)
    assert output.dtype == torch.bfloat16
    errors = {name: error(actual[name], tensor) for name, tensor in expected.items()}
    assert max(errors.values()) < 4e-2, errors
    assert errors["output"] < 2e-2, errors


@torch.no_grad()
@pytest.mark.parametrize("backend", ["mamba_ssm", "torch", "auto"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_steps_are_the_forward(backend, autocast):
    if backend == "mamba_ssm":
        found("mamba_ssm")
    _, mixer, hidden = mixers(backend=backend)
    hidden = hidden.cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        whole = mixer(hidden)
        state = MixerState()
        parts = [mixer(hidden[:, :100], cache=state)]
        parts += [mixer(hidden[:, t : t + 1], cache=state) for t in range(100, 120)]
        parts.append(mixer(hidden[:, 120:], cache=state))
    assert error(torch.cat(parts, dim=1), whole) < (2e-2 if autocast else 2e-3)
