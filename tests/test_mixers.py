"""The built-in mixers keep the contract, and the contract catches mixers that do not."""

import json
import lzma
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mohawk_nas.bank import candidate_seed
from mohawk_nas.config import TeacherConfig
from mohawk_nas.distill.hidden import relative_distance
from mohawk_nas.errors import ConfigError, MixerError, RegistryError
from mohawk_nas.mixer import (
    MIXERS,
    Mixer,
    MixerConfig,
    MixerState,
    build_mixer,
    identity_of,
    mixer_config,
)
from mohawk_nas.mixers import _backends
from mohawk_nas.teacher import Teacher, load_teacher
from mohawk_nas.testing import MixerContract, tiny_model, tiny_view

pytestmark = pytest.mark.usefixtures("poisoned_empty")

ASSETS = Path(__file__).parents[1] / "studies" / "assets"
FAMILIES = {
    "llama": {},
    "llama-no-groups": {"arch": "llama", "num_key_value_heads": 6},
    "llama-biases": {"arch": "llama", "attention_bias": True},
    "phi": {},
    "qwen2": {},
    # Heads wider than d_model / num_heads, a norm in each.
    "qwen3": {"head_dim": 8},
    # A norm over all heads at once.
    "olmo2": {},
    # Norms that multiply by 1 + weight, scores scaled by something else than the head size.
    "gemma3": {"arch": "gemma3_text", "query_pre_attn_scalar": 7},
    "mistral-window": {"arch": "mistral", "sliding_window": 5},
}


def mamba2(**options):
    return mixer_config({"mixer": "mamba2", **options})


def view_of(family, **sizes):
    settings = {"arch": family} | FAMILIES[family] | sizes
    return tiny_view(settings.pop("arch"), **settings)


class Mamba2Contract(MixerContract):
    @torch.no_grad()
    def long_memory(self, mixer):
        """Every alpha within 1e-4 of 1, whatever the input is."""
        heads = slice(-mixer.num_heads, None)
        mixer.in_proj.weight[heads] *= 0.01
        mixer.in_proj.bias[heads] = torch.linspace(1e-5, 8e-5, mixer.num_heads).log()


class TestMamba2(Mamba2Contract):
    config = mamba2()


class TestMamba2ShortChunks(Mamba2Contract):
    config = mamba2(chunk_size=5)


class TestMamba2SingleTokenChunks(Mamba2Contract):
    config = mamba2(chunk_size=1)


class TestMamba2WithoutConvolution(Mamba2Contract):
    config = mamba2(d_conv=1)


class TestMamba2WideConvolution(Mamba2Contract):
    config = mamba2(d_conv=7, chunk_size=4)


class TestMamba2Random(Mamba2Contract):
    config = mamba2(init="random")


class TestMamba2FewWideHeads(Mamba2Contract):
    config = mamba2(init="random", num_heads=3, d_state=5)


class TestMamba2ManyNarrowHeads(Mamba2Contract):
    config = mamba2(init="random", num_heads=12, d_state=7, d_conv=2)


# On a long sequence the next do the same as the first.


class TestMamba2Phi(Mamba2Contract):
    config = mamba2()
    long_length = 131
    arch = "phi"


class TestMamba2Qwen3(Mamba2Contract):
    config = mamba2()
    long_length = 131
    arch = "qwen3"
    sizes = FAMILIES["qwen3"]


class TestMamba2Olmo2(Mamba2Contract):
    config = mamba2()
    long_length = 131
    arch = "olmo2"


class TestMamba2Gemma3(Mamba2Contract):
    config = mamba2()
    long_length = 131
    arch = "gemma3_text"


class TestAttention(MixerContract):
    config = mixer_config({"mixer": "attention"})


class TestAttentionPhi(MixerContract):
    config = mixer_config({"mixer": "attention"})
    arch = "phi"


class TestAttentionQwen3(MixerContract):
    config = mixer_config({"mixer": "attention"})
    arch = "qwen3"
    sizes = FAMILIES["qwen3"]


class TestAttentionMistral(MixerContract):
    config = mixer_config({"mixer": "attention"})
    arch = "mistral"
    sizes = {"sliding_window": 5}  # noqa: RUF012


class TestAttentionGptNeox(MixerContract):
    # Fused projections, and the cache under an older name.
    config = mixer_config({"mixer": "attention"})
    arch = "gpt_neox"
    sizes = {"num_key_value_heads": 6}  # noqa: RUF012

    def view(self, *, meta=False, num_key_value_heads=None, **sizes):
        return super().view(meta=meta, **sizes)


def test_every_built_in_mixer_is_registered_under_its_file():
    assert {"attention", "mamba2"} <= set(MIXERS.names())
    for name in MIXERS.names():
        assert MIXERS.name_of(MIXERS.get(name)) == name


def test_uninitialised_memory_is_poisoned_in_our_code_only():
    for caller, poisoned in (("mohawk_nas.mixers.new", True), ("torch.nn.modules.new", False)):
        names = {"__name__": caller, "torch": torch, "like": torch.zeros(3)}
        exec("made = [torch.empty(3), torch.empty_like(like), like.new_empty(3)]", names)
        assert all(bool(tensor.isnan().all()) == poisoned for tensor in names["made"])


# Mamba-2


@pytest.mark.parametrize("init", ["attention", "random"])
@torch.no_grad()
def test_mamba2_gate_starts_at_one(init):
    mixer = build_mixer(mamba2(init=init), tiny_view("phi"), seed=0)
    hidden = 3 * torch.randn(2, 5, 24)
    *_, gate = mixer._inputs(hidden, None)
    torch.testing.assert_close(F.silu(gate), torch.ones_like(gate), rtol=0, atol=1.2e-7)


@pytest.mark.parametrize("d_conv", [1, 2, 4])
@torch.no_grad()
def test_mamba2_convolution_starts_as_the_identity(d_conv):
    mixer = build_mixer(mamba2(init="random", d_conv=d_conv), tiny_view(), seed=0)
    inputs = torch.randn(2, 9, sum(mixer.widths))
    assert torch.equal(mixer._convolved(inputs, None), inputs)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_mamba2_starts_from_attention(family):
    """C, B, x and the output are the teacher's q, k, v and o, without the rotary embedding."""
    view = view_of(family)
    mixer = build_mixer(mamba2(), view, seed=0)
    hidden = torch.randn(2, 9, view.d_model)
    module, norms = view.module, {}
    for role in "qk":
        norms[role] = getattr(module, f"{role}_norm", nn.Identity())

    def heads(role):
        flat = getattr(module, f"{role}_proj")(hidden)
        norm = norms.get(role, nn.Identity())
        over_all = role in norms and getattr(norm, "weight", torch.empty(0)).numel() > view.head_dim
        flat = norm(flat) if over_all else flat
        split = flat.unflatten(-1, (-1, view.head_dim))
        split = split if over_all else norm(split)
        return split.repeat_interleave(view.num_heads // split.shape[2], dim=2).transpose(1, 2)

    factors = mixer.factors(hidden)
    torch.testing.assert_close(factors.c, view.scaling * heads("q"))
    torch.testing.assert_close(factors.b, heads("k"))
    torch.testing.assert_close(mixer.values(hidden), heads("v"))
    mixed = torch.randn(2, view.num_heads, 9, view.head_dim)
    output = module.dense if hasattr(module, "dense") else module.o_proj
    torch.testing.assert_close(
        mixer.readout(mixed, hidden), output(mixed.transpose(1, 2).flatten(2)), rtol=1e-5, atol=1e-6
    )


@torch.no_grad()
def test_mamba2_matrix_is_the_definition():
    """Entry by entry: C_i . B_j times the decays after j up to i, D on the diagonal."""
    contract = TestMamba2()
    mixer, hidden = contract.mixer(), contract.hidden(2, 7)
    _, b, c, log_decay, _ = mixer._inputs(hidden, None)
    matrix = mixer.mixing_matrix(hidden)
    for i in range(7):
        for j in range(i + 1):
            entry = (c[:, :, i] * b[:, :, j]).sum(-1) * log_decay[:, :, j + 1 : i + 1].sum(-1).exp()
            entry = entry + (mixer.D if i == j else 0)
            torch.testing.assert_close(matrix[:, :, i, j], entry)


@torch.no_grad()
def test_mamba2_is_tested_with_decays_close_to_one():
    for contract in (TestMamba2(), TestMamba2Random()):
        mixer, hidden = contract.mixer(), contract.hidden(1, contract.long_length)
        contract.long_memory(mixer)
        forgotten = -mixer.factors(hidden).log_decay.expm1()
        # As far apart as the biases are: no floor of the step holds them.
        assert 5e-6 < forgotten.min() < 2e-5 and 5e-5 < forgotten.max() < 1e-4


def test_mamba2_pairs_heads_evenly():
    mixer = build_mixer(mamba2(init="random", num_heads=8), tiny_view(), seed=0)
    assert mixer.head_pairs(6).tolist() == [0, 0, 1, 2, 3, 3, 4, 5]
    assert mixer.head_pairs(8).tolist() == list(range(8))
    assert mixer.head_pairs(16).tolist() == [0, 2, 4, 6, 8, 10, 12, 14]


@pytest.fixture(scope="module")
def phi_tiny_captures():
    teacher = load_teacher(TeacherConfig(source=str(ASSETS / "phi-tiny"), device="cpu"))
    with lzma.open(ASSETS / "text" / "quickstart.jsonl.xz", "rt", encoding="utf-8") as lines:
        text = "\n".join(json.loads(next(lines))["text"] for _ in range(20))
    tokens = torch.tensor(teacher.tokenizer(text, verbose=False)["input_ids"])
    mask = torch.ones(8, 96, dtype=torch.bool)
    mask[3, :20] = False
    captures = []
    teacher.run(tokens[: 8 * 96].view(8, 96), mask=mask, on_layer=captures.append)
    return captures


@torch.no_grad()
def test_mamba2_calibration_brings_the_output_near_the_teachers(phi_tiny_captures):
    distances = []
    for capture in phi_tiny_captures:
        mixer = build_mixer(mamba2(), capture.view, seed=0)
        pair = []
        for calibrate in (False, True):
            if calibrate:
                mixer.calibrate(capture.hidden[:4], capture.output[:4], mask=capture.mask[:4])
            # On text that the calibration has not seen.
            output = mixer(capture.hidden[4:])
            pair.append(relative_distance(output, capture.output[4:]).mean().item())
        distances.append(pair)
    assert len(distances) == 8
    assert all(before > 100 and after < 1 for before, after in distances), distances


@torch.no_grad()
def test_mamba2_calibration_solves_for_scale_and_diagonal():
    """Where the target is within reach, calibration finds it."""
    view = tiny_view("phi")
    mixer, wanted = (build_mixer(mamba2(), view, seed=0) for _ in range(2))
    wanted._scale_c(torch.tensor([0.5, 2.0, 0.1, 1.0, 3.0, 0.2]))
    wanted.D.copy_(torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0, 0.3]))
    hidden = torch.randn(4, 50, 24, generator=torch.Generator().manual_seed(1))
    target = wanted(hidden)
    before = relative_distance(mixer(hidden), target).mean()
    mixer.calibrate(hidden, target)
    assert relative_distance(mixer(hidden), target).mean() < 1e-3 * before


def test_mamba2_random_is_not_calibrated():
    view = tiny_view()
    mixer = build_mixer(mamba2(init="random"), view, seed=0)
    before = {name: p.clone() for name, p in mixer.named_parameters()}
    mixer.calibrate(torch.randn(2, 9, 24), torch.randn(2, 9, 24))
    assert all(torch.equal(before[name], p) for name, p in mixer.named_parameters())


@pytest.mark.parametrize(
    ("options", "arch", "message"),
    [
        (
            {"d_state": 5},
            "llama",
            r"layer 1: .*state size \(6, 4, 4\), but got \(6, 4, 5\); use init",
        ),
        (
            {"num_heads": 3},
            "llama",
            r"layer 1: .*\(6, 4, 4\), but got \(3, 8, 4\); use init: random",
        ),
        (
            {"num_heads": 5, "init": "random"},
            "llama",
            r"layer 1: `num_heads` must divide .* 24, but",
        ),
        ({}, "gpt_neox", r"layer 1: .*separate query, key, value .*\['query_key_value', 'dense'\]"),
        ({}, "cohere", r"layer 1: .*one weight a channel, but CohereLayerNorm has none; use init"),
    ],
)
def test_mamba2_refuses_layers_it_does_not_fit(options, arch, message):
    sizes = {"use_qk_norm": True} if arch == "cohere" else {}
    view = tiny_view(arch, **sizes)
    with pytest.raises(MixerError, match=message):
        build_mixer(mamba2(**options), view, seed=0)


def test_mamba2_speed_is_no_part_of_what_it_is():
    plain, fast = mamba2(), mamba2(chunk_size=128, backend="torch")
    assert identity_of(plain) == identity_of(fast)
    assert set(identity_of(plain)) == {"init", "d_state", "num_heads", "d_conv"}
    assert candidate_seed(0, 1, plain) == candidate_seed(0, 1, fast)
    assert candidate_seed(0, 1, plain) != candidate_seed(0, 1, mamba2(d_conv=3))


def test_mamba2_refuses_a_back_end_it_cannot_have(monkeypatch):
    with pytest.raises(ConfigError, match=r"candidate\.backend: .*'cuda'"):
        mamba2(backend="cuda")
    monkeypatch.setattr(_backends, "_load", lambda name: (None, f"{name} is not installed"))
    with pytest.raises(MixerError, match=r"mamba_ssm is not installed; install it with `pip"):
        build_mixer(mamba2(backend="mamba_ssm"), tiny_view(), seed=0)
    build_mixer(mamba2(backend="torch"), tiny_view(), seed=0)
    # It may be installed and the tensors on a CPU.
    monkeypatch.setattr(_backends, "_load", lambda name: (object(), ""))
    mixer = build_mixer(mamba2(backend="mamba_ssm"), tiny_view(), seed=0)
    with pytest.raises(MixerError, match="needs a CUDA device"):
        mixer(torch.zeros(1, 5, 24))


# With norms in float32, and without.
@pytest.mark.parametrize("family", ["llama-biases", "qwen3", "olmo2"])
@torch.no_grad()
def test_mamba2_computes_in_bfloat16_under_autocast(family):
    contract = type("Contract", (Mamba2Contract,), {"config": mamba2()})()
    view = view_of(family)
    contract.view = lambda **sizes: view
    mixer, hidden = contract.mixer(), contract.hidden(3, 33)
    mask = torch.ones(3, 33, dtype=torch.bool)
    mask[1, :9] = False
    for given in (None, mask):
        expected = mixer(hidden, mask=given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = mixer(hidden, mask=given)
            x, b, c, log_decay, gate = mixer._inputs(hidden, given)
        assert {t.dtype for t in (output, x, b, c, gate)} == {torch.bfloat16}
        assert log_decay.dtype == torch.float32
        real = slice(None) if given is None else given
        error = (output.float() - expected)[real].norm() / expected[real].norm()
        assert error < 2e-2


@pytest.mark.parametrize("name", ["d_state", "num_heads", "d_conv", "chunk_size"])
def test_mamba2_refuses_sizes_below_one(name):
    with pytest.raises(ConfigError, match=rf"candidate: .*`{name} >= 1` must hold, but got 0"):
        mamba2(**{name: 0})


def test_unknown_options_are_all_named_with_the_nearest():
    with pytest.raises(ConfigError) as caught:
        mixer_config({"mixer": "mamba2", "d_stat": 8, "chunksize": 4, "zzz": 1}, where="space.m")
    first, second, third = caught.value.problems
    assert first == "space.m.d_stat: unknown option. Did you mean 'd_state'?"
    assert second == "space.m.chunksize: unknown option. Did you mean 'chunk_size'?"
    assert third.startswith("space.m.zzz: unknown option. Options of mamba2: ['init', 'd_state'")


def test_impossible_options_are_refused():
    with pytest.raises(ConfigError, match=r"space\.m\.d_state: .*'wide'"):
        mixer_config({"mixer": "mamba2", "d_state": "wide"}, where="space.m")
    with pytest.raises(ConfigError, match=r"space\.m\.init: .*'warm'"):
        mixer_config({"mixer": "mamba2", "init": "warm"}, where="space.m")
    with pytest.raises(RegistryError, match=r"unknown mixer 'mamba'; .*Did you mean 'mamba2'\?"):
        mixer_config({"mixer": "mamba"})
    with pytest.raises(ConfigError, match="must be a mapping with `mixer: NAME`"):
        mixer_config({"d_state": 4})


# Attention


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attention_does_what_the_module_does(family):
    """Called by its model, not by hand: masks and positions made here are transformers'."""
    settings = {"arch": family} | FAMILIES[family]
    teacher = Teacher(tiny_model(settings.pop("arch"), **settings))
    tokens = torch.randint(3, 61, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[1, :4] = False
    captures = []
    teacher.run(tokens, mask=mask, on_layer=captures.append)
    for capture in captures:
        mixer = build_mixer(mixer_config({"mixer": "attention"}), capture.view, seed=0)
        output = mixer(capture.hidden, mask=mask)
        torch.testing.assert_close(output[mask], capture.output[mask], rtol=1e-5, atol=1e-5)


def test_attention_costs_of_a_sliding_window_stop_growing():
    config = mixer_config({"mixer": "attention"})
    whole, window = (
        tiny_view("mistral", sliding_window=None),
        tiny_view("mistral", sliding_window=8),
    )
    for view, grows in ((whole, True), (window, False)):
        short, long = (config.state_bytes(view, batch=1, context=t) for t in (16, 64))
        assert (long > short) == grows
        assert (config.flops_per_token(view, 64) > config.flops_per_token(view, 16)) == grows
    assert config.state_bytes(whole, batch=3, context=10) == 2 * 3 * 10 * 2 * 4 * 2


def test_mamba2_costs_do_not_depend_on_the_context():
    view, config = tiny_view(), mamba2()
    assert config.state_bytes(view, batch=1, context=1) == config.state_bytes(
        view, batch=1, context=10**6
    )
    assert config.flops_per_token(view, 1) == config.flops_per_token(view, 10**6)


# The contract itself: a sound toy mixer passes, and each of its faults is found


@dataclass(frozen=True, kw_only=True)
class ToyConfig(MixerConfig):
    """A running sum with a fixed decay; ``fault`` breaks it in one way."""

    symbol = "T"
    fault: str = ""

    def build(self, view):
        return ToyMixer(self, view)

    def num_params(self, view):
        return 2 * view.d_model * (view.d_model + 1) - (self.fault == "num_params")

    def flops_per_token(self, view, context):
        return 4 * view.d_model**2

    def state_bytes(self, view, *, batch, context, bytes_per_element=2):
        return batch * view.d_model * bytes_per_element * (2 if self.fault == "state_bytes" else 1)


class ToyMixer(Mixer):
    def __init__(self, config, view):
        super().__init__()
        self.fault = config.fault
        self.decay = 0.5
        self.num_heads = 2
        self.value = nn.Linear(view.d_model, view.d_model)
        self.out = nn.Linear(view.d_model, view.d_model)
        if self.fault == "seed":
            self.value.weight.data.normal_(generator=torch.Generator().manual_seed(id(self)))
            torch.rand(1)
        if self.fault == "shares_teacher":
            self.out.weight = view.module.o_proj.weight

    def values(self, hidden, *, mask=None):
        values = self.value(hidden)
        if self.fault == "scaled_gradient_everywhere":
            values = scaled_gradient(values)
        if mask is not None and self.fault != "padding":
            values = values * mask[..., None]
        return values.unflatten(-1, (2, -1)).transpose(1, 2)

    def readout(self, mixed, hidden):
        if self.fault == "readout":
            mixed = mixed.flip(1)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def mixing_matrix(self, hidden, *, mask=None):
        i = torch.arange(hidden.shape[1])
        decay = self.decay ** (i[:, None] - i).clamp_min(0).float()
        decay = decay if self.fault == "matrix" else decay.tril()
        return decay.expand(len(hidden), 2, -1, -1)

    def forward(self, hidden, *, mask=None, cache=None):
        values = self.values(hidden, mask=mask)
        if self.fault == "readout":
            values = values.flip(1)
        if self.fault == "detached":
            values = values.detach() + 0 * self.value(hidden).sum()
        if self.fault == "scaled_gradient":
            values = scaled_gradient(values)
        if self.fault == "scaled_input_gradient":
            values = self.values(scaled_gradient(hidden), mask=mask)
        state = torch.zeros_like(values[:, :, 0])
        if cache is not None and "mean" in cache.tensors:
            state = cache.tensors["mean"]
        if self.fault == "drift":
            # Too little to be seen while the rest is soon forgotten.
            state = state * (1 - 1e-5)
        decay = min(self.decay, 1 - 2e-4) if self.fault == "forgets" else self.decay
        outputs = []
        for t in range(hidden.shape[1]):
            state = decay * state + values[:, :, t]
            outputs.append(state)
        mixed = torch.stack(outputs, dim=2)
        if self.fault == "overflow" and cache is None:
            # One product for the whole length, as in a scan without chunks.
            total = decay ** torch.arange(hidden.shape[1])[:, None]
            mixed = (total * (values.float() / total).cumsum(2)).to(values.dtype)
        if self.fault == "not_causal":
            mixed = mixed + 1e-3 * values.mean(2, keepdim=True)
        if cache is not None:
            cache.num_tokens += hidden.shape[1]
            if self.fault == "slice":
                state = mixed[:, :, -1]
            if not (self.fault == "state" and hidden.shape[1] == 1):
                cache.tensors["mean"] = state
        output = self.readout(mixed, hidden)
        return output.float() if self.fault == "dtype" else output

    def new_state(self):
        return UnorderedState() if self.fault == "reorder" else MixerState()


def scaled_gradient(tensor, factor=3):
    """The tensor itself, with a gradient that is wrong."""
    return tensor + (factor - 1) * (tensor - tensor.detach())


class UnorderedState(MixerState):
    def batch_select_indices(self, indices):
        """Forgets to."""


class ToyContract(MixerContract):
    def long_memory(self, mixer):
        mixer.decay = 1 - 1e-5


def failures(config, only=None):
    """Names of the contract's tests that this mixer fails."""
    found = set()
    contract = type("Contract", (ToyContract,), {"config": config})()
    for name in dir(contract):
        if not name.startswith("test_") or (only and name not in only):
            continue
        test = getattr(contract, name)
        cases = [{}]
        for mark in getattr(test, "pytestmark", []):
            names = [part.strip() for part in mark.args[0].split(",")]
            assert len(names) == 1
            cases = [case | {names[0]: value} for case in cases for value in mark.args[1]]
        for case in cases:
            try:
                test(**case)
            except pytest.skip.Exception:
                pass
            except Exception:
                found.add(name)
    return found


def test_contract_passes_a_sound_mixer():
    assert failures(ToyConfig(init="random")) == set()


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        ("not_causal", "test_causality"),
        ("padding", "test_left_padding_changes_nothing"),
        ("state", "test_state_continues_where_it_stands"),
        ("reorder", "test_state_follows_its_sequences"),
        ("num_params", "test_num_params_is_what_is_built"),
        ("state_bytes", "test_state_bytes_are_what_is_held"),
        ("slice", "test_state_bytes_are_what_is_held"),
        ("readout", "test_forward_is_readout_of_mixed_values"),
        ("matrix", "test_matrix_is_lower_triangular"),
        ("dtype", "test_shapes_and_dtypes"),
        ("detached", "test_gradients_reach_everything"),
        ("seed", "test_seed_decides"),
        ("shares_teacher", "test_the_teacher_is_left_alone"),
        ("scaled_input_gradient", "test_gradients_are_those_of_the_matrix"),
    ],
)
def test_contract_catches(fault, caught_by):
    if fault == "readout":
        # Values and readout are flipped alike, so forward is right and its parts are not.
        assert not failures(ToyConfig(init="random", fault=fault), only={"test_causality"})
    assert failures(ToyConfig(init="random", fault=fault), only={caught_by}) == {caught_by}


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        (
            "scaled_gradient",
            {"test_gradients_are_those_of_the_matrix", "test_gradients_are_slopes"},
        ),
        ("scaled_gradient_everywhere", {"test_gradients_are_slopes"}),
        ("drift", {"test_a_long_sequence"}),
        ("forgets", {"test_a_long_sequence"}),
        ("overflow", {"test_a_long_sequence"}),
    ],
)
def test_nothing_else_in_the_contract_catches(fault, caught_by):
    assert failures(ToyConfig(init="random", fault=fault)) == caught_by


def test_contract_wants_a_start_from_attention_where_it_is_asked_for():
    # Built with `init: attention`, which the toy does not support.
    assert failures(ToyConfig(init="attention")) == {"test_init_can_be"}
