"""Assembled students: the teacher where nothing is replaced, and sound decoders where much is."""

import copy

import pytest
import torch
from transformers import DynamicCache

from mohawk_nas.errors import LayoutError
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.mixer import build_mixer, mixer_config
from mohawk_nas.student import MixerSlot, assemble
from mohawk_nas.teacher import Teacher, cache_name, logits_from_hidden
from mohawk_nas.testing import perturb, tiny_model

FAMILIES = {
    "phi": {},
    "llama": {},
    "qwen2": {},
    "qwen2-window": {
        "arch": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
    },
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "mistral-window": {"arch": "mistral", "sliding_window": 5},
    "gemma3": {
        "arch": "gemma3_text",
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "smollm3": {},
    "olmo2": {},
    "gpt_neox": {"num_key_value_heads": 6},
    # Its causal LM reaches past its body.
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 24, "num_key_value_heads": 6},
}
PATTERNS = ["AMAM", "MAMA", "MMMM", "MAAM"]
SYMBOLS = {ATTENTION: "A", "ssm": "M"}


class FreshMixers:
    """A bank of mixers that were never trained, only moved; one object for each layer."""

    def __init__(self, teacher, **options):
        self.mixers = {}
        for view in teacher.views:
            fused = not hasattr(view.module, "q_proj")
            init = {"init": "random"} if fused else {}
            config = mixer_config({"mixer": "mamba2", "chunk_size": 4, **init, **options})
            mixer = build_mixer(config, view, seed=view.layer_idx)
            perturb(mixer, scale=0.05)
            # Attention's weights without its softmax: keep the outputs in range.
            with torch.no_grad():
                mixer.out_proj.weight.mul_(0.2)
            self.mixers[view.layer_idx] = mixer.requires_grad_(False)

    def mixer(self, layer, candidate):
        assert candidate == "ssm"
        return self.mixers[layer]


def teacher_of(family, **settings):
    settings = {"arch": family, "num_hidden_layers": 4} | FAMILIES[family] | settings
    model = tiny_model(settings.pop("arch"), **settings)
    # Random models like to repeat themselves; an end of text would hide what comes after.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return Teacher(model)


def layout_of(pattern):
    return Layout.parse(pattern, num_layers=4, symbols=SYMBOLS)


def student_of(family, pattern, *, share=True):
    teacher = teacher_of(family)
    return assemble(teacher, layout_of(pattern), FreshMixers(teacher), share=share)


def slots_of(student):
    return [module for module in student.modules() if isinstance(module, MixerSlot)]


def batch(*, padded, size=3, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 61, (size, length), generator=generator)
    mask = torch.ones(size, length, dtype=torch.long)
    if padded:
        mask[0, :5] = 0
        mask[2, :1] = 0
        tokens = tokens * mask
    return {"input_ids": tokens, "attention_mask": mask}


# All attention


@pytest.mark.parametrize("share", [True, False], ids=["shared", "copied"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_all_attention_is_the_teacher_bit_for_bit(family, share):
    teacher = teacher_of(family)
    student = assemble(teacher, layout_of("AAAA"), FreshMixers(teacher), share=share)
    assert type(student) is type(teacher.model)
    for padded in (False, True):
        inputs = batch(padded=padded)
        assert torch.equal(student(**inputs).logits, teacher.model(**inputs).logits)
        options = {"max_new_tokens": 8, "do_sample": False}
        generated = teacher.model.generate(**inputs, **options)
        assert torch.equal(student.generate(**inputs, **options), generated)


# Decoding


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generation_with_a_cache_is_generation_without(family, pattern):
    student = student_of(family, pattern)
    for padded in (False, True):
        for beams in (1, 3):
            texts = [
                student.generate(
                    **batch(padded=padded),
                    max_new_tokens=7,
                    do_sample=False,
                    num_beams=beams,
                    use_cache=use_cache,
                )
                for use_cache in (True, False)
            ]
            assert texts[0].shape == (3, 16)
            assert torch.equal(*texts), (padded, beams)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_chunked_prefill_and_steps_are_one_forward(family, pattern):
    student = student_of(family, pattern)
    for padded in (False, True):
        inputs = batch(padded=padded, length=15)
        whole = student(**inputs, use_cache=False).logits
        cache, pieces, start = DynamicCache(config=student.config), [], 0
        for size in (3, 6, 1, 1, 4):
            stop = start + size
            output = student(
                inputs["input_ids"][:, start:stop],
                attention_mask=inputs["attention_mask"][:, :stop],
                position_ids=positions(inputs["attention_mask"])[:, start:stop],
                **{cache_name(student): cache},
            )
            pieces.append(output.logits)
            start = stop
            assert cache.get_seq_length() == stop
        # Positions that count padding would be right only up to rotation.
        whole = student(
            **inputs, position_ids=positions(inputs["attention_mask"]), use_cache=False
        ).logits
        real = inputs["attention_mask"].bool()
        error = (torch.cat(pieces, dim=1) - whole)[real].abs().max()
        assert error <= 2e-5 * whole[real].abs().max()


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp_min(0)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_changes_nothing(family, pattern):
    student = student_of(family, pattern)
    inputs = batch(padded=True)
    mask = inputs["attention_mask"]
    together = student(**inputs, position_ids=positions(mask)).logits
    for row in range(3):
        real = mask[row].bool()
        alone = student(inputs["input_ids"][row : row + 1, real]).logits[0]
        error = (together[row, real] - alone).abs().max()
        assert error <= 2e-5 * alone.abs().max()
    # A padding mask is not remembered.
    plain = student(inputs["input_ids"]).logits
    assert torch.equal(plain, student(inputs["input_ids"], attention_mask=None).logits)
    assert not torch.equal(plain, together)


@torch.no_grad()
def test_a_mask_may_come_without_its_name():
    student = student_of("llama", "AMAM")
    inputs = batch(padded=True)
    named = student(**inputs).logits
    assert torch.equal(student(inputs["input_ids"], inputs["attention_mask"]).logits, named)
    body = student.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    assert torch.equal(logits_from_hidden(student, body), named)
    # Which is no pass with another mask.
    assert slots_of(student)[0]._padding.mask is inputs["attention_mask"]


@pytest.mark.parametrize("shape", [(3, 1, 9, 9), (3, 9, 9)])
def test_a_mask_of_another_shape_is_refused(shape):
    student = student_of("llama", "AMAM")
    tokens = batch(padded=False)["input_ids"]
    with pytest.raises(ValueError, match=r"`attention_mask` of shape \(batch, tokens\), but got"):
        student(tokens, attention_mask=torch.ones(shape, dtype=torch.bool))


def test_a_legacy_cache_is_refused():
    student = student_of("llama", "MMMM")
    slot = student.model.layers[0].self_attn
    assert isinstance(slot, MixerSlot)
    with pytest.raises(TypeError, match="a student needs a transformers Cache, but got tuple"):
        slot(torch.zeros(1, 2, 24), past_key_values=())


@torch.no_grad()
def test_a_state_takes_less_than_the_keys_it_replaces():
    student = student_of("llama", "AMAM")
    short, long = DynamicCache(config=student.config), DynamicCache(config=student.config)
    student(**batch(padded=False, length=9), **{cache_name(student): short})
    student(**batch(padded=False, length=60), **{cache_name(student): long})
    for layer in (1, 3):
        assert short.layers[layer].num_bytes() == long.layers[layer].num_bytes() > 0
        assert long.layers[layer].keys is None
    assert long.layers[0].keys.shape[2] == 60


# What is shared and what is not


def storages(module):
    return {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}


def test_a_sharing_student_costs_no_memory():
    teacher = teacher_of("llama")
    bank = FreshMixers(teacher)
    student = assemble(teacher, layout_of("AMAM"), bank)
    available = storages(teacher.model).union(*(storages(m) for m in bank.mixers.values()))
    assert storages(student) <= available
    assert student.lm_head.weight is teacher.model.lm_head.weight


def test_a_copying_student_shares_nothing():
    teacher = teacher_of("llama")
    bank = FreshMixers(teacher)
    student = assemble(teacher, layout_of("AMAM"), bank, share=False)
    available = storages(teacher.model).union(*(storages(m) for m in bank.mixers.values()))
    assert not storages(student) & available
    inputs = batch(padded=True)
    shared = assemble(teacher, layout_of("AMAM"), bank)
    with torch.no_grad():
        before = shared(**inputs).logits
        assert torch.equal(student(**inputs).logits, before)
        perturb(student, scale=0.1)
        assert torch.equal(shared(**inputs).logits, before)
        assert not torch.equal(student(**inputs).logits, before)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_configuration_is_shared(family, share):
    teacher = teacher_of(family)
    student = assemble(teacher, layout_of("AMAM"), FreshMixers(teacher), share=share)

    def configurations(model):
        found = {id(getattr(module, "config", None)) for module in model.modules()}
        return found | {id(model.generation_config)}

    frozen = {id(None), *(id(slot.mixer.config) for slot in slots_of(student))}
    assert not configurations(student) & configurations(teacher.model) - frozen
    student.config.use_cache = not student.config.use_cache
    assert teacher.model.config.use_cache != student.config.use_cache


@torch.no_grad()
def test_assembling_leaves_the_teacher_as_it_is():
    teacher = teacher_of("llama")
    inputs = batch(padded=True)
    before = teacher.model(**inputs).logits
    modules = {name: id(module) for name, module in teacher.model.named_modules()}
    student = assemble(teacher, layout_of("MMMM"), FreshMixers(teacher))
    student(**inputs)
    assert modules == {name: id(module) for name, module in teacher.model.named_modules()}
    assert torch.equal(teacher.model(**inputs).logits, before)
    assert not teacher.model.base_model._forward_pre_hooks


@torch.no_grad()
def test_students_of_one_teacher_do_not_meet():
    """Two students share every module of a mixer, and each keeps its own padding."""
    teacher = teacher_of("llama")
    bank = FreshMixers(teacher)
    first, second = (assemble(teacher, layout_of(p), bank) for p in ("AMAM", "MMMM"))
    padded, plain = batch(padded=True), batch(padded=False, seed=1)
    expected = [first(**padded).logits, second(**plain).logits]
    caches = [DynamicCache(config=first.config), DynamicCache(config=second.config)]
    first(**padded, **{cache_name(first): caches[0]})
    second(**plain, **{cache_name(second): caches[1]})
    assert torch.equal(first(**padded).logits, expected[0])
    assert torch.equal(second(**plain).logits, expected[1])


@torch.no_grad()
def test_a_deep_copy_keeps_its_own_padding():
    student = student_of("llama", "AMAM", share=False)
    other = copy.deepcopy(student)
    padded, plain = batch(padded=True), batch(padded=False)
    expected = student(**padded).logits
    student(**plain)
    assert torch.equal(other(**padded).logits, expected)
    paddings = {id(slot._padding) for slot in (*slots_of(student), *slots_of(other))}
    assert len(paddings) == 2
    # The original has seen no padding since, and the copy's did not reach it.
    assert student.model.layers[1].self_attn._padding.mask.all()
    assert not other.model.layers[1].self_attn._padding.mask.all()


def test_layouts_of_another_length_are_refused():
    teacher = teacher_of("llama")
    layout = Layout.parse("MAM", num_layers=3, symbols=SYMBOLS)
    with pytest.raises(LayoutError, match="the layout has 3 layers, but the teacher has 4"):
        assemble(teacher, layout, FreshMixers(teacher))


# Training
# transformers renames the switch that is used here; the new name is not in every supported version.

ignore_renaming = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")


@ignore_renaming
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("family", ["phi", "llama", "gemma3"])
def test_a_training_step_reaches_every_mixer(family, checkpointing):
    student = student_of(family, "AMMA", share=False).train().requires_grad_(True)
    if checkpointing:
        student.gradient_checkpointing_enable()
    inputs = batch(padded=True)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    before = student(**inputs, labels=labels).loss
    before.backward()
    slots = slots_of(student)
    assert [slot.layer_idx for slot in slots] == [1, 2]
    for slot in slots:
        for name, parameter in slot.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.any(), name
    for parameter in student.parameters():
        assert parameter.grad is not None
    torch.optim.SGD(student.parameters(), lr=1e-3).step()
    assert student(**inputs, labels=labels).loss < before


@ignore_renaming
def test_gradients_agree_with_and_without_checkpointing():
    grads = []
    for checkpointing in (False, True):
        student = student_of("llama", "AMMA", share=False).train().requires_grad_(True)
        if checkpointing:
            student.gradient_checkpointing_enable()
        inputs = batch(padded=True)
        loss = student(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        # A pass with another mask comes before the first one's layers run again.
        student(**batch(padded=False), use_cache=False)
        loss.backward()
        grads.append([parameter.grad for parameter in student.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)
