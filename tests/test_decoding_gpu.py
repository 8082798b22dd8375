"""Decoding on a GPU: recorded steps are plain ones, kernels are what they stand for."""

import pytest
import torch
from test_decoding import (
    ATTENTIONS,
    STEPS,
    CountingMixers,
    assert_small,
    attention_error,
    decoder_of,
    step_errors,
)
from test_student import FreshMixers, batch, layout_of, positions, teacher_of

from mohawk_nas.decoding import Decoder, sample
from mohawk_nas.distill import graph
from mohawk_nas.mixers._step import decode_step
from mohawk_nas.student import assemble

pytestmark = pytest.mark.gpu

LARGE_STEPS = {
    "phi-1.5": {"heads": 32, "width": 64, "state": 64, "batch": 33},
    "phi-1.5, half precision": {
        "heads": 32,
        "width": 64,
        "state": 64,
        "batch": 33,
        "dtype": torch.bfloat16,
    },
    "large state": {"heads": 5, "width": 64, "state": 128, "batch": 6},
}
LARGE_ATTENTIONS = {
    "one sequence": {"heads": 32, "kv_heads": 32, "width": 64, "last": 8000, "length": 8192},
    "a group": {"heads": 32, "kv_heads": 8, "width": 64, "last": 5001, "length": 8192},
    "wide": {"heads": 8, "kv_heads": 8, "width": 128, "last": 700, "length": 1000},
    "widest": {"heads": 8, "kv_heads": 8, "width": 256, "last": 700, "length": 1000},
    "wide groups": {"heads": 9, "kv_heads": 3, "width": 256, "last": 700, "length": 1000},
    "window": {"heads": 32, "kv_heads": 8, "width": 64, "last": 5001, "length": 8192, "window": 99},
    "many": {"heads": 32, "kv_heads": 32, "width": 64, "last": 900, "length": 1024, "batch": 48},
}


@pytest.fixture(autouse=True)
def exact_products():
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.mark.parametrize("case", STEPS | LARGE_STEPS)
def test_the_fused_step_is_the_formula(case):
    sizes = (STEPS | LARGE_STEPS)[case]
    found = step_errors(decode_step, device="cuda", **sizes)
    assert_small(found, "half" if sizes.get("dtype") else case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("case", ATTENTIONS | LARGE_ATTENTIONS)
def test_attention_of_a_step_is_softmax(case, backend, dtype):
    sizes = (ATTENTIONS | LARGE_ATTENTIONS)[case] | {"dtype": dtype}
    error = attention_error(backend, device="cuda", **sizes)
    assert error <= (2e-2 if dtype == torch.bfloat16 else 1e-5)


def student_on_gpu(family, pattern, dtype=torch.float32):
    teacher = teacher_of(family, hidden_size=32, head_dim=16, num_attention_heads=4)
    student = assemble(teacher, layout_of(pattern), FreshMixers(teacher), share=False)
    return student.to("cuda", dtype)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("pattern", ["AAAA", "AMAM", "MMMM"])
@pytest.mark.parametrize("family", ["phi", "llama"])
@torch.no_grad()
def test_recorded_steps_say_what_generate_says(family, pattern, backend):
    student = student_on_gpu(family, pattern)
    for padded in (False, True):
        inputs = {name: tensor.cuda() for name, tensor in batch(padded=padded).items()}
        expected = student.generate(**inputs, max_new_tokens=30, do_sample=False)
        decoder = decoder_of(student, new=30, backend=backend, prefill_tokens=12)
        options = {"mask": inputs["attention_mask"], "max_new_tokens": 30}
        assert torch.equal(sample(decoder, inputs["input_ids"], **options), expected)
        assert decoder.recorded
        # What was recorded is used again.
        assert torch.equal(sample(decoder, inputs["input_ids"], **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["AAAA", "AMAM", "MMMM"])
@torch.no_grad()
def test_recorded_steps_are_plain_ones(pattern, dtype, monkeypatch):
    student = student_on_gpu("phi", pattern, dtype)
    tokens = batch(padded=False, length=40)["input_ids"].cuda()
    found = {}
    for plain_steps in (3, 10**9):
        monkeypatch.setattr(graph, "PLAIN_STEPS", plain_steps)
        decoder = decoder_of(student, length=40, new=0)
        decoder.prefill(tokens[:, :9])
        found[plain_steps] = [decoder.step(tokens[:, t]).clone() for t in range(9, 40)]
        assert decoder.recorded == (plain_steps == 3)
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@torch.no_grad()
def test_what_counts_in_python_is_right_and_not_recorded():
    student = assemble(teacher_of("llama"), layout_of("AMMA"), CountingMixers(), share=False).cuda()
    inputs = {name: tensor.cuda() for name, tensor in batch(padded=False).items()}
    expected = student.generate(**inputs, max_new_tokens=8, do_sample=False)
    decoder = decoder_of(student)
    assert torch.equal(sample(decoder, inputs["input_ids"], max_new_tokens=8), expected)
    assert not decoder.recorded


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pattern", ["AAAA", "AMAM", "MMMM"])
@torch.no_grad()
def test_prefill_in_pieces_of_half_precision_is_one_prefill(pattern, padded):
    """By the fast kernels for grouped heads, whose triangle ends at the last key."""
    teacher = teacher_of("llama", hidden_size=128, head_dim=64, num_attention_heads=4)
    student = assemble(teacher, layout_of(pattern), FreshMixers(teacher), share=False)
    inputs = batch(padded=padded, length=80)
    given = inputs["input_ids"].cuda(), inputs["attention_mask"].cuda()
    exact = decoder_of(student.cuda(), length=80).prefill(*given)
    student = student.bfloat16()
    rounded = student(*given, position_ids=positions(given[1]), use_cache=False).logits[:, -1]
    noise = (rounded.float() - exact).norm()
    assert noise <= 0.3 * exact.norm()
    for tokens in (1000, 99):
        logits = decoder_of(student, length=80, prefill_tokens=tokens).prefill(*given)
        assert (logits.float() - exact).norm() <= 2 * noise


@torch.no_grad()
def test_what_a_decoder_holds_is_given_back():
    student = student_on_gpu("phi", "AMAM", torch.bfloat16)

    def once():
        decoder = Decoder(student, batch=64, max_length=4096)
        decoder.pretend(100)
        for _ in range(6):
            decoder.step(torch.zeros(64, dtype=torch.long))
        assert decoder.recorded and decoder.cache_bytes > 2**24
        torch.cuda.synchronize()
        decoder.release()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    before = once()
    assert max(once() for _ in range(3)) <= before + 2**22
