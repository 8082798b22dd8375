"""The chunked scan is the recurrence: outputs, final state and every gradient.

The kernels that stand in for it on a GPU are tested in test_scan_gpu.py; here, how they are chosen.
"""

import copy
import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from mohawk_nas.errors import MixerError
from mohawk_nas.mixers import _backends, _scan
from mohawk_nas.mixers._scan import (
    chunked_scan,
    decay_mask,
    naive_scan,
    pass_by_product,
    pass_one_by_one,
    scan,
)

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


@pytest.mark.parametrize("decays", [(-2.0, -0.01), (-100.0, -60.0), (-1e-3, -1e-6)])
@pytest.mark.parametrize("chunks", [1, 2, 33])
def test_states_pass_by_a_product_as_one_by_one(chunks, decays):
    operands = inputs(chunks, decays=decays)
    added = torch.einsum("bhkn,bhkp->bhknp", operands["b"], operands["x"]).detach()
    operands = {"h": operands["state"], "added": added, "total": operands["log_decay"]}
    expected = run(pass_one_by_one, operands)
    single = {name: tensor.detach().float() for name, tensor in operands.items()}
    assert_near(run(pass_by_product, single), expected, 2e-6)


def test_scan_on_a_cpu_is_the_chunked_scan_and_the_skip():
    operands = inputs(33, dtype=torch.float32)
    skip = torch.tensor([0.5, -2.0])
    expected, state = chunked_scan(*operands.values(), chunk_size=16)
    for backend in ("auto", "torch"):
        options = {"backend": backend, "chunk_size": 16}
        y, final = scan(*operands.values(), **options)
        assert torch.equal(y, expected) and torch.equal(final, state)
        y, _ = scan(*operands.values(), skip=skip, **options)
        assert torch.equal(y, expected + skip[:, None, None] * operands["x"])
    with pytest.raises(MixerError, match=r"backend mamba_ssm: needs a CUDA device, .* on cpu"):
        scan(*operands.values(), backend="mamba_ssm")


# Which back end


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A function that writes a file of a fake package; real ones are out of sight meanwhile."""
    _backends._load.cache_clear()
    for name in list(sys.modules):
        if name.split(".")[0] == "mamba_ssm":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    monkeypatch.syspath_prepend(tmp_path)

    def write(path, source):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(source)
        name = path.split("/")[0].removesuffix(".py")
        monkeypatch.delitem(sys.modules, name, raising=False)

    yield write
    for name in list(sys.modules):
        if name.split(".")[0] == "mamba_ssm":
            del sys.modules[name]
    _backends._load.cache_clear()


def mamba_ssm_source(**changes):
    """Functions named and with arguments as in mamba-ssm, that do nothing."""
    taken = _backends._MAMBA_SSM | changes
    return "".join(
        f"def {name}({', '.join(arguments.split())}): pass\n"
        for name, arguments in taken.items()
        if arguments
    )


def on_gpu(dtype=torch.bfloat16):
    return SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda:0")


def test_without_mamba_ssm_plain_torch_runs(packages, caplog):
    caplog.set_level(logging.INFO, "mohawk_nas")
    for _ in range(2):
        assert _scan._kernels("auto", on_gpu(), products=True) is None
    (record,) = caplog.records
    assert record.getMessage().startswith("mamba_ssm is not installed: plain torch")
    with pytest.raises(MixerError, match=r"backend mamba_ssm: mamba_ssm is not installed; install"):
        _scan._kernels("mamba_ssm", on_gpu(), products=True)


@pytest.mark.parametrize("kind", ["ImportError", "OSError", "RuntimeError"])
def test_a_package_that_does_not_import_is_passed_over(packages, caplog, kind):
    packages("mamba_ssm/__init__.py", f"raise {kind}('undefined symbol: _ZN3c10\\nand so on')")
    caplog.set_level(logging.INFO, "mohawk_nas")
    for _ in range(2):
        assert _scan._kernels("auto", on_gpu(), products=True) is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"mamba_ssm cannot be used ({kind}: undefined symbol: _ZN3c10)" in record.getMessage()
    with pytest.raises(MixerError, match=rf"cannot be used \({kind}: .*pip install"):
        _scan._kernels("mamba_ssm", on_gpu(), products=True)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"_chunk_scan_bwd_dC": ""}, "has no _chunk_scan_bwd_dC"),
        ({"_chunk_state_fwd": "B x dt states_in_fp32"}, "_chunk_state_fwd does not take"),
    ],
)
def test_another_version_of_private_functions_is_passed_over(packages, changes, problem):
    for name in ("__init__", "ops/__init__", "ops/triton/__init__"):
        packages(f"mamba_ssm/{name}.py", "")
    packages("mamba_ssm/ops/triton/ssd_combined.py", mamba_ssm_source(**changes))
    packages("mamba_ssm/ops/triton/selective_state_update.py", "")
    assert _scan._kernels("auto", on_gpu(), products=True) is None
    with pytest.raises(MixerError, match=problem):
        _scan._kernels("mamba_ssm", on_gpu(), products=True)


def test_mamba_ssm_is_taken_where_it_fits(packages, caplog):
    for name in ("ops/__init__", "ops/triton/__init__"):
        packages(f"mamba_ssm/{name}.py", "")
    packages("mamba_ssm/__init__.py", "__version__ = '2.3.2'")
    packages("mamba_ssm/ops/triton/ssd_combined.py", mamba_ssm_source())
    packages("mamba_ssm/ops/triton/selective_state_update.py", "")
    pytest.importorskip("triton")
    caplog.set_level(logging.INFO, "mohawk_nas")
    for backend in ("auto", "mamba_ssm", "auto"):
        assert _scan._kernels(backend, on_gpu(), products=True) is not None
    assert [r.getMessage() for r in caplog.records] == ["mamba_ssm 2.3.2 is used"]
    assert _scan._kernels("torch", on_gpu(), products=True) is None
    assert _scan._kernels("auto", on_gpu(torch.float64), products=True) is None
    cpu = torch.zeros(1, dtype=torch.bfloat16)
    assert _scan._kernels("auto", cpu, products=True) is None
    # Its float32 products are TF32.
    single = on_gpu(torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert _scan._kernels("auto", single, products=True) is None
        assert _scan._kernels("auto", single, products=False) is not None
        assert _scan._kernels("mamba_ssm", single, products=True) is not None
        torch.set_float32_matmul_precision("high")
        assert _scan._kernels("auto", single, products=True) is not None
    finally:
        torch.set_float32_matmul_precision(before)


def test_nothing_optional_is_imported_on_a_cpu(packages, tmp_path):
    packages("mamba_ssm/__init__.py", "raise SystemExit('imported')")
    program = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
import torch
from mohawk_nas.mixer import build_mixer, mixer_config
from mohawk_nas.testing import tiny_view
build_mixer(mixer_config({{"mixer": "mamba2"}}), tiny_view(), seed=0)(torch.zeros(1, 5, 24))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_step_by_the_decoding_kernel_is_the_recurrence():
    """With a stand-in that computes what mamba-ssm's documentation says."""

    def selective_state_update(state, x, dt, A, B, C, D, dt_bias):
        dt = dt + dt_bias
        state *= (dt[..., None] * A).exp()
        state += dt[..., None] * B[:, :, None] * x[..., None]
        return (state * C[:, :, None]).sum(-1) + D * x

    kernels = SimpleNamespace(selective_state_update=selective_state_update)
    operands = {n: t.detach() for n, t in inputs(1, dtype=torch.float32).items()}
    skip = torch.tensor([0.5, -2.0])
    for given in (None, skip):
        expected, after = naive_scan(*operands.values())
        if given is not None:
            expected = expected + given[:, None, None] * operands["x"]
        state = operands["state"].clone()
        c, b, x, log_decay = (operands[name] for name in NAMES[:4])
        y, final = _scan._kernel_step(kernels, c, b, x, log_decay, state, given)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(final, after)
        torch.testing.assert_close(state, after)


# What is kept of tuning


@dataclass(unsafe_hash=True)
class Config:
    size: int
    pre_hook: object = None


class Tuner:
    """Caches as Triton's autotuner does: on disk as JSON, and not with hooks."""

    def __init__(self, disk, **sizes):
        self.disk, self.nargs, self.cache = disk, sizes, {}
        self.measured = 0

    def check_disk_cache(self, key, configs, benchmark):
        assert not any(config.pre_hook for config in configs)
        entry = json.dumps([key, [config.size for config in configs]])
        if entry in self.disk:
            timings = {Config(**config): time for config, time in json.loads(self.disk[entry])}
            self.cache[key] = min(timings, key=timings.get)
            return True
        benchmark()
        self.disk[entry] = json.dumps([(vars(c), t) for c, t in self.configs_timings.items()])
        return False

    def run(self, configs):
        def benchmark():
            self.measured += 1
            self.configs_timings = {config: abs(config.size - 3) for config in configs}
            self.cache["key",] = min(self.configs_timings, key=self.configs_timings.get)

        stored = _backends._tuned(self, self.check_disk_cache, ("key",), configs, benchmark)
        assert list(self.cache) == [("key",)]
        return self.cache["key",], stored


def test_tuning_is_kept_with_its_hooks():
    disk = {}
    configs = [Config(size, pre_hook=copy.copy) for size in (1, 2, 4, 3)]
    for measured in (1, 0):
        tuner = Tuner(disk, pointer=None, seqlen=2048, flag=True)
        chosen, stored = tuner.run(configs)
        assert chosen is configs[-1] and tuner.measured == measured and stored == (not measured)
    assert all(config.pre_hook for config in configs)
    # The choice of another size is its own; up to a power of two it is the same.
    for seqlen, measured in ((2049, 0), (17, 1), (4096, 1)):
        tuner = Tuner(disk, pointer=None, seqlen=seqlen, flag=True)
        assert tuner.run(configs)[0] is configs[-1] and tuner.measured == measured
