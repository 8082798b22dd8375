"""Decoding in place is generate(), token by token; kernels of a step are what they stand for."""

import json
import sys
from pathlib import Path

import interpreting
import pytest
import torch
from test_student import FreshMixers, batch, layout_of, positions, student_of, teacher_of

from mohawk_nas import decoding
from mohawk_nas.decoding import Decoder, continue_tokens, decode_obstacle, sample
from mohawk_nas.distill.graph import RecordedStep
from mohawk_nas.errors import MixerError
from mohawk_nas.kernels.decode_attention import decode_attention, pick_backend
from mohawk_nas.layout import ATTENTION
from mohawk_nas.mixer import MIXERS, Mixer, build_mixer, mixer_config
from mohawk_nas.mixers._step import StepSizes, decode_step, plain_step
from mohawk_nas.registry import load_plugin
from mohawk_nas.student import assemble
from mohawk_nas.testing import perturb, tiny_model, tiny_view

BOTH = [("phi", "AMAM"), ("phi", "MMMM"), ("llama", "AAAA"), ("llama", "MAAM"), ("llama", "MMMM")]


def decoder_of(model, *, length=9, new=8, **options):
    return Decoder(model, batch=3, max_length=length + new, **options)


def decode(model, inputs, **options):
    """Greedy, by a decoder of its own."""
    decoder = decoder_of(model, **options)
    return sample(decoder, inputs["input_ids"], mask=inputs["attention_mask"], max_new_tokens=8)


# What transformers does


@pytest.mark.parametrize(("family", "pattern"), BOTH)
@torch.no_grad()
def test_generation_in_any_way_is_generation_without_a_cache(family, pattern):
    student = student_of(family, pattern)
    for padded in (False, True):
        inputs = batch(padded=padded)
        ways = {
            "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 7},
            "sampled beams": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
            "prefilled in chunks": {"do_sample": False, "prefill_chunk_size": 4},
        }
        for name, way in ways.items():
            texts = []
            for use_cache in (True, False):
                torch.manual_seed(3)
                if not use_cache:
                    way = {n: value for n, value in way.items() if n != "prefill_chunk_size"}
                texts.append(
                    student.generate(**inputs, max_new_tokens=5, use_cache=use_cache, **way)
                )
            assert torch.equal(*texts), (name, padded)


# The decoder is generate()


@pytest.mark.parametrize("family", ["phi", "llama", "mistral-window", "gemma3", "gpt_neox"])
@torch.no_grad()
def test_a_decoder_says_what_generate_says(family, monkeypatch):
    # So that steps look at more and more places.
    monkeypatch.setattr(decoding, "BUCKET", 4)
    for pattern in ("AAAA", "AMAM", "MMMM"):
        student = student_of(family, pattern)
        for padded in (False, True):
            inputs = batch(padded=padded)
            expected = student.generate(**inputs, max_new_tokens=8, do_sample=False)
            # All tokens at once, and one, three and four of each sequence at a time.
            for tokens in (1000, 3, 9, 13):
                found = decode(student, inputs, prefill_tokens=tokens)
                assert torch.equal(found, expected), (pattern, padded, tokens)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("family", "pattern"), BOTH)
@torch.no_grad()
def test_prefills_and_steps_are_one_forward(family, pattern, padded):
    student, inputs = student_of(family, pattern), batch(padded=padded, length=16)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = student(**inputs, position_ids=positions(mask), use_cache=False).logits
    decoder = decoder_of(student, length=16, new=0)
    found = {8: decoder.prefill(tokens[:, :8], mask[:, :8])}
    for t in (9, 10):
        found[t] = decoder.step(tokens[:, t - 1]).clone()
    # More text comes after some steps.
    found[13] = decoder.prefill(tokens[:, 10:13])
    for t in (14, 15, 16):
        found[t] = decoder.step(tokens[:, t - 1]).clone()
    assert decoder.length == 16
    for t, logits in found.items():
        error = (logits - whole[:, t - 1]).abs().max()
        assert error <= 2e-5 * whole[:, t - 1].abs().max(), t


@torch.no_grad()
def test_padding_may_reach_over_several_prefills():
    student, inputs = student_of("llama", "AMAM"), batch(padded=True)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    expected = decoder_of(student).prefill(tokens, mask)
    decoder = decoder_of(student)
    for piece in (slice(0, 2), slice(2, 5), slice(5, 9)):
        logits = decoder.prefill(tokens[:, piece], mask[:, piece])
    assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.6}])
@torch.no_grad()
def test_sampling_is_that_of_generate(settings):
    student, inputs = student_of("phi", "AMAM"), batch(padded=True)
    for temperature in (1.0, 2.0):
        torch.manual_seed(5)
        expected = student.generate(
            **inputs,
            max_new_tokens=8,
            do_sample=True,
            temperature=temperature,
            **({"top_k": 0} | settings),
        )
        torch.manual_seed(5)
        found = sample(
            decoder_of(student),
            inputs["input_ids"],
            mask=inputs["attention_mask"],
            max_new_tokens=8,
            temperature=temperature,
            **settings,
        )
        assert torch.equal(found, expected)


@torch.no_grad()
def test_sequences_end_where_those_of_generate_do():
    student, inputs = student_of("llama", "AMAM"), batch(padded=True)
    free = student.generate(**inputs, max_new_tokens=8, do_sample=False)[:, 9:]
    lengths = set()
    for end in (free[0, 2].item(), free[1, 5].item(), [t.item() for t in free[:, 3]]):
        options = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": end}
        expected = student.generate(**inputs, do_sample=False, **options)
        found = sample(
            decoder_of(student), inputs["input_ids"], mask=inputs["attention_mask"], **options
        )
        assert torch.equal(found, expected)
        lengths.add(found.shape[1])
    assert min(lengths) < 17


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("setting", [{}, {"top_k": 6}, {"repetition_penalty": 3.0}], ids=str)
@torch.no_grad()
def test_settings_of_a_model_hold(setting, temperature, monkeypatch):
    student, inputs = student_of("phi", "AMAM"), batch(padded=True)
    for name, value in setting.items():
        setattr(student.generation_config, name, value)
    made = []
    monkeypatch.setattr(decoding, "sample", lambda *a, **k: made.append(0) or sample(*a, **k))
    torch.manual_seed(2)
    found = continue_tokens(
        student,
        inputs["input_ids"],
        mask=inputs["attention_mask"].bool(),
        max_new_tokens=8,
        temperature=temperature,
    )
    # Only transformers knows all there is.
    assert len(made) == ("repetition_penalty" not in setting)
    way = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(2)
    expected = student.generate(**inputs, max_new_tokens=8, **way)
    assert torch.equal(found, expected)


# What it leaves alone, and what it holds


@torch.no_grad()
def test_the_model_is_left_as_it_is():
    student, inputs = student_of("phi", "AMAM", share=False), batch(padded=True)
    student.requires_grad_(True)
    before = student(**inputs).logits
    modules = {name: id(module) for name, module in student.named_modules()}
    decoder = decoder_of(student)
    decoder.prefill(inputs["input_ids"], inputs["attention_mask"])
    assert modules == {name: id(module) for name, module in student.named_modules()}
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert student.config._attn_implementation == "sdpa"
    assert torch.equal(student(**inputs).logits, before)
    # No weight is there twice.
    own = {p.data_ptr() for p in student.parameters()}
    assert {p.data_ptr() for p in decoder._model.parameters()} == own


@torch.no_grad()
def test_buffers_stay_where_they_are_and_are_used_again():
    student, inputs = student_of("llama", "AMAM"), batch(padded=True)
    decoder = decoder_of(student)
    options = {"mask": inputs["attention_mask"], "max_new_tokens": 8}
    expected = sample(decoder, inputs["input_ids"], **options)
    places = [tensor.data_ptr() for layer in decoder._layers for tensor in layer.held()]
    assert len(places) == 8
    other = batch(padded=False, seed=4, length=12)
    sample(decoder, other["input_ids"], max_new_tokens=3)
    assert torch.equal(sample(decoder, inputs["input_ids"], **options), expected)
    held = [tensor for layer in decoder._layers for tensor in layer.held()]
    assert [tensor.data_ptr() for tensor in held] == places
    assert all(
        tensor is layer._state.tensors[name]
        for layer in decoder._layers
        if hasattr(layer, "_places")
        for name, tensor in layer._places.items()
    )


@torch.no_grad()
def test_a_decoder_can_pretend_and_then_be_used():
    student, inputs = student_of("llama", "AMAM"), batch(padded=True)
    decoder, tokens = decoder_of(student), torch.zeros(3, dtype=torch.long)
    for length in (12, 5, 16):
        decoder.pretend(length)
        assert decoder.length == length
        assert decoder.step(tokens).isfinite().all() and decoder.length == length + 1
    options = {"mask": inputs["attention_mask"], "max_new_tokens": 8}
    expected = student.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(sample(decoder, inputs["input_ids"], **options), expected)
    decoder.reset()
    decoder.pretend(3)
    assert decoder.step(tokens).isfinite().all()
    decoder.release()
    assert decoder.cache_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "pattern"), BOTH)
@torch.no_grad()
def test_its_cache_is_as_large_as_a_budget_says(family, pattern, dtype):
    teacher = teacher_of(family)
    layout = layout_of(pattern)
    student = assemble(teacher, layout, FreshMixers(teacher), share=False).to(dtype)
    decoder = decoder_of(student, length=20)
    decoder.prefill(batch(padded=False)["input_ids"])
    configs = {
        ATTENTION: mixer_config({"mixer": "attention"}),
        "ssm": mixer_config({"mixer": "mamba2"}),
    }
    assert decoder.cache_bytes == sum(
        configs[layout[i]].state_bytes(view, batch=3, context=28, bytes_per_element=dtype.itemsize)
        for i, view in enumerate(teacher.views)
    )


@torch.no_grad()
def test_mixers_in_float32_are_cast_once_in_a_model_of_half_precision():
    teacher = teacher_of("phi")
    teacher.model.bfloat16()
    mixers = FreshMixers(teacher)
    for mixer in mixers.mixers.values():
        mixer.float()
    student, inputs = assemble(teacher, layout_of("AMAM"), mixers), batch(padded=True)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    decoder = decoder_of(student)
    assert {p.dtype for p in decoder._model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in mixers.mixers[1].parameters()} == {torch.float32}
    decoder.prefill(tokens[:, :8], mask[:, :8])
    found = decoder.step(tokens[:, 8]).float()
    expected = student(**inputs, position_ids=positions(mask)).logits[:, -1].float()
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


# Mixers of other kinds


@pytest.fixture
def moving_averages():
    """Mixers of a plugin, which other tests must not find registered."""
    before = dict(MIXERS._items)
    load_plugin(Path(__file__).with_name("moving_average.py"))
    config = MIXERS.get("moving_average")()

    class MovingAverages:
        def mixer(self, layer, candidate):
            view = tiny_view(layer=layer, num_hidden_layers=4)
            return build_mixer(config, view, seed=layer)

    yield MovingAverages()
    MIXERS._items.clear()
    MIXERS._items.update(before)
    for name in [name for name in sys.modules if name.startswith("mohawk_nas_plugin_")]:
        del sys.modules[name]


class Growing(Mixer):
    """Keeps all it has seen."""

    values = readout = mixing_matrix = None

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, hidden, *, mask=None, cache=None):
        seen = [cache.tensors["all"]] if "all" in cache.tensors else []
        cache.tensors["all"] = torch.cat([*seen, hidden], dim=1)
        return hidden


class GrowingMixers:
    def mixer(self, layer, candidate):
        return Growing()


@torch.no_grad()
def test_a_mixer_without_a_step_of_its_own_is_stepped_all_the_same(moving_averages):
    student = assemble(teacher_of("llama"), layout_of("AMMA"), moving_averages)
    inputs = batch(padded=True)
    expected = student.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(decode(student, inputs, prefill_tokens=9), expected)


class Counting(Mixer):
    """What it does follows the number of tokens that it has seen."""

    values = readout = mixing_matrix = None

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, hidden, *, mask=None, cache=None):
        seen = cache.num_tokens if cache is not None else 0
        if cache is not None:
            cache.tensors["last"] = hidden[:, -1]
            cache.num_tokens += hidden.shape[1]
        count = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)
        return self.weight * hidden * torch.sin(count.to(hidden))[:, None]


class CountingMixers:
    def mixer(self, layer, candidate):
        return Counting()


class Recording(RecordedStep):
    def __call__(self):
        raise AssertionError("a recording does not count")


@torch.no_grad()
def test_what_counts_in_python_is_not_recorded(monkeypatch):
    student = assemble(teacher_of("llama"), layout_of("AMMA"), CountingMixers())
    inputs = batch(padded=False)
    expected = student.generate(**inputs, max_new_tokens=8, do_sample=False)
    monkeypatch.setattr(decoding, "RecordedStep", Recording)
    assert torch.equal(decode(student, inputs), expected)
    with pytest.raises(AssertionError, match="does not count"):
        decode(student_of("llama", "AMMA"), inputs)


def test_a_state_that_grows_is_refused():
    decoder = decoder_of(assemble(teacher_of("llama"), layout_of("AMMA"), GrowingMixers()))
    decoder.prefill(batch(padded=False)["input_ids"])
    with pytest.raises(
        MixerError, match=r"a state of fixed size is needed .* `all` is now \(3, 10"
    ):
        decoder.step(torch.zeros(3, dtype=torch.long))


@torch.no_grad()
def test_generate_goes_on_where_a_state_grows():
    student = assemble(teacher_of("llama"), layout_of("AMMA"), GrowingMixers())
    inputs = batch(padded=True)
    found = continue_tokens(
        student,
        inputs["input_ids"],
        mask=inputs["attention_mask"].bool(),
        max_new_tokens=8,
    )
    assert torch.equal(found, student.generate(**inputs, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("norms", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("d_conv", [1, 2, 4])
@torch.no_grad()
def test_steps_of_mamba2_are_its_forward(d_conv, norms):
    view = tiny_view("qwen3" if norms else "llama")
    mixer = build_mixer(mixer_config({"mixer": "mamba2", "d_conv": d_conv}), view, seed=0)
    perturb(mixer, scale=0.3)
    hidden = torch.randn(3, 12, 24, generator=torch.Generator().manual_seed(1))
    expected, state = mixer(hidden), mixer.new_state()
    mixer(hidden[:, :7], cache=state)
    state.tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
    places = dict(state.tensors)
    steps = [mixer.step(hidden[:, t : t + 1], state) for t in range(7, 12)]
    error = (torch.cat(steps, 1) - expected[:, 7:]).abs().max()
    assert error <= 2e-5 * expected.abs().max()
    assert all(state.tensors[name] is tensor for name, tensor in places.items())
    assert state.get_seq_length() == 12


# What it refuses


def test_what_does_not_fit_is_refused():
    student = student_of("llama", "AMAM")
    tokens = batch(padded=False)["input_ids"]
    decoder = decoder_of(student, length=10, new=0)
    with pytest.raises(ValueError, match="prefill first"):
        decoder.step(tokens[:, 0])
    with pytest.raises(ValueError, match=r"tokens of shape \(3, 1 or more\) .* got \(2, 9\)"):
        decoder.prefill(tokens[:2])
    with pytest.raises(ValueError, match=r"the tokens' shape \(3, 9\), but has \(3, 8\)"):
        decoder.prefill(tokens, torch.ones(3, 8))
    decoder.prefill(tokens)
    with pytest.raises(ValueError, match=r"9 \+ 9 tokens must fit into 10 places"):
        decoder.prefill(tokens)
    decoder.step(tokens[:, 0])
    with pytest.raises(ValueError, match="10 are"):
        decoder.step(tokens[:, 0])
    with pytest.raises(ValueError, match="`max_new_tokens` must be at least 1, but got 0"):
        sample(decoder, tokens, max_new_tokens=0)
    with pytest.raises(ValueError, match="`max_length >= 1` must hold"):
        Decoder(student, batch=1, max_length=0)


def test_padding_elsewhere_than_on_the_left_is_refused():
    decoder = decoder_of(student_of("llama", "AMAM"))
    tokens = batch(padded=False)["input_ids"][:, :4]
    for row in ([1, 1, 1, 0], [0, 1, 0, 1]):
        mask = torch.tensor([[1, 1, 1, 1], row, [1, 1, 1, 1]])
        with pytest.raises(ValueError, match="pad on the left"):
            decoder.prefill(tokens, mask)
    decoder.prefill(tokens, torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="pad on the left"):
        decoder.prefill(tokens, torch.tensor([[0, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]))
    # A step's token is real.
    decoder.step(tokens[:, 0])
    with pytest.raises(ValueError, match="pad on the left"):
        decoder.prefill(tokens, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]))


def test_models_that_cannot_be_decoded_here_say_why():
    assert all(decode_obstacle(teacher_of(family).model) is None for family in ("phi", "gpt_neox"))
    gemma = tiny_model("gemma2", attention="eager", attn_logit_softcapping=50.0)
    assert "no support for `attn_logit_softcapping`" in decode_obstacle(gemma)
    with pytest.raises(ValueError, match=r"cannot decode this model: .*; use generate\(\)"):
        Decoder(gemma, batch=1, max_length=8)


# Kernels

STEPS = {
    "as in a model": {"heads": 4, "width": 16, "state": 16},
    "odd": {"heads": 3, "width": 5, "state": 7},
    "one tap": {"heads": 2, "width": 4, "state": 3, "taps": 1},
    "two taps": {"heads": 2, "width": 33, "state": 4, "taps": 2},
    "five taps": {"heads": 1, "width": 4, "state": 9, "taps": 5},
    "long memory": {"heads": 3, "width": 4, "state": 4, "a": -13.0},
    "no memory": {"heads": 3, "width": 4, "state": 4, "a": 40.0},
    "half precision": {"heads": 3, "width": 8, "state": 8, "dtype": torch.bfloat16},
}
ATTENTIONS = {
    "one head a key": {"heads": 3, "kv_heads": 3},
    "groups": {"heads": 6, "kv_heads": 2},
    "one key head": {"heads": 5, "kv_heads": 1},
    "odd width": {"heads": 2, "kv_heads": 2, "width": 12},
    "odd width, groups": {"heads": 4, "kv_heads": 2, "width": 12},
    "widest": {"heads": 2, "kv_heads": 2, "width": 256},
    "widest, groups": {"heads": 4, "kv_heads": 2, "width": 256},
    "narrow values": {"heads": 4, "kv_heads": 2, "value_width": 6},
    "window": {"heads": 3, "kv_heads": 3, "window": 9},
    "window of one": {"heads": 4, "kv_heads": 2, "window": 1},
    "one token": {"heads": 3, "kv_heads": 3, "last": 3},
    "full": {"heads": 4, "kv_heads": 2, "last": 99},
    "half precision": {"heads": 4, "kv_heads": 2, "dtype": torch.float16},
    "half precision, no groups": {"heads": 4, "kv_heads": 4, "dtype": torch.bfloat16},
    "half precision, bfloat16": {"heads": 4, "kv_heads": 2, "dtype": torch.bfloat16},
}
# Triton's interpreter multiplies matrices of bfloat16 by their bits.
INTERPRETED = [case for case in ATTENTIONS if case != "half precision, bfloat16"]


def step_errors(
    run, *, heads, width, state, taps=4, a=None, batch=3, dtype=torch.float32, device="cpu"
):
    """Errors of three steps and of the states after them, relative, against float64."""
    generator = torch.Generator().manual_seed(0)
    sizes = StepSizes(heads=heads, width=width, state=state, min_step=1e-6)
    channels = sum(sizes.widths)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    weights = {"weight": normal(channels, taps), "bias": normal(channels), "skip": normal(heads)}
    conv, ssm = normal(batch, taps - 1, channels), normal(batch, heads, state, width).float()
    exact_conv, exact_ssm = conv.double(), ssm.double()
    exact_weights = {name: tensor.double() for name, tensor in weights.items()}
    worst = {"output": 0.0, "conv": 0.0, "ssm": 0.0}
    for _ in range(3):
        projected = normal(batch, channels + heads * width + heads)
        if a is not None:
            projected[:, -heads:] = a + torch.arange(heads, device=device)
        found = run(projected, conv, ssm, **weights, sizes=sizes)
        expected = exact_step(
            projected.double(), exact_conv, exact_ssm, **exact_weights, sizes=sizes
        )
        exact_conv, exact_ssm = expected[1:]
        for name, one, other in zip(worst, (found, conv, ssm), expected, strict=True):
            if other.numel():
                error = (one.double() - other).abs().max() / other.abs().max()
                worst[name] = max(worst[name], error.item())
    return worst


def exact_step(projected, conv, ssm, *, weight, bias, skip, sizes):
    """From the formulas, with new states."""
    heads, width = sizes.heads, sizes.width
    channels = sum(sizes.widths)
    inputs, gate, a = projected.split([channels, heads * width, heads], dim=-1)
    window = torch.cat([conv, inputs[:, None]], 1)
    mixed = torch.einsum("bwc,cw->bc", window, weight) + bias
    x, b, c = (part.unflatten(-1, (heads, -1)) for part in mixed.split(sizes.widths, -1))
    step = torch.log1p(a.exp()).where(a < 30, a).clamp_min(sizes.min_step)
    ssm = torch.exp(-step)[..., None, None] * ssm + torch.einsum("bhn,bhp->bhnp", b, x)
    y = torch.einsum("bhn,bhnp->bhp", c, ssm) + skip[:, None] * x
    return y.flatten(1) * gate * torch.sigmoid(gate), window[:, 1:], ssm


def attention_error(
    backend, *, heads, kv_heads, width=16, value_width=None, window=None, last=70, length=100,
    dtype=torch.float32, device="cpu", batch=3,
):  # fmt: skip
    """Relative to softmax over what is seen, in float64; what is not seen holds anything."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    query = 3 * normal(batch, heads, 1, width)
    # As a decoder's buffers are cut.
    keys, values = (
        normal(batch, kv_heads, length + 9, size)[:, :, :length]
        for size in (width, value_width or width)
    )
    first = torch.tensor([0, 3, min(21, last)] * (batch // 3), device=device)
    keys[:, :, last + 1 :] = 100.0
    values[:, :, last + 1 :] = 100.0
    found = decode_attention(
        query,
        keys,
        values,
        last=torch.tensor(last, device=device),
        first=first,
        scaling=0.3,
        window=window,
        backend=backend,
    )
    assert found.shape == (batch, heads, 1, value_width or width) and found.dtype == dtype
    worst = 0.0
    for row in range(batch):
        begin = max(int(first[row]), last + 1 - window if window else 0)
        k, v = (
            t[row, :, begin : last + 1].double().repeat_interleave(heads // kv_heads, 0)
            for t in (keys, values)
        )
        weights = (0.3 * query[row].double() @ k.mT).softmax(-1)
        expected = weights @ v
        error = (found[row].double() - expected).abs().max() / expected.abs().max()
        worst = max(worst, error.item())
    return worst


def interpreted():
    """Errors of the kernels by case; to be called where Triton interprets."""
    interpreting.ready()
    from mohawk_nas.kernels import _decode_attention_triton as fused
    from mohawk_nas.mixers import _step

    assert _step.fused_kernels(torch.zeros(1)) is not None
    # So that few places have many blocks, and there are splits with and without any.
    fused.BLOCK = 16
    whole = {case: attention_error("triton", **ATTENTIONS[case]) for case in INTERPRETED}
    fused.PROGRAMS = 1
    unsplit = {case: attention_error("triton", **ATTENTIONS[case]) for case in INTERPRETED}
    steps = {case: step_errors(decode_step, **sizes) for case, sizes in STEPS.items()}
    print(json.dumps({"steps": steps, "split": whole, "unsplit": unsplit}))


@pytest.fixture(scope="module")
def interpreted_errors():
    return interpreting.errors_of(__name__)


def assert_small(found, case):
    half = case.startswith("half")
    assert found["output"] <= (1e-2 if half else 3e-6)
    assert found["conv"] == 0
    assert found["ssm"] <= 2e-6


@pytest.mark.parametrize("case", STEPS)
def test_a_plain_step_is_the_formula(case):
    assert_small(step_errors(plain_step, **STEPS[case]), case)


@pytest.mark.parametrize("case", STEPS)
def test_the_fused_step_is_the_formula(interpreted_errors, case):
    assert_small(interpreted_errors["steps"][case], case)


@pytest.mark.parametrize("case", ATTENTIONS)
def test_plain_attention_is_softmax(case):
    error = attention_error("torch", **ATTENTIONS[case])
    assert error <= (2e-2 if case.startswith("half") else 3e-6)


@pytest.mark.parametrize("way", ["split", "unsplit"])
@pytest.mark.parametrize("case", INTERPRETED)
def test_split_attention_is_softmax(interpreted_errors, case, way):
    error = interpreted_errors[way][case]
    assert error <= (2e-2 if case.startswith("half") else 3e-6)


def test_the_kernel_is_refused_where_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    assert pick_backend("auto", cpu, torch.float32) == "torch"
    with pytest.raises(ValueError, match="backend 'triton' cannot run: the tensors are on cpu"):
        pick_backend("triton", cpu, torch.float32)
    with pytest.raises(ValueError, match="backend 'triton' cannot run"):
        Decoder(teacher_of("llama").model, batch=1, max_length=8, backend="triton")
