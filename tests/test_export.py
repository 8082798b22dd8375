import json

import pytest
import torch
from tiny_study import make_study
from transformers import AutoModelForCausalLM, AutoTokenizer

from mohawk_nas.errors import ExportError
from mohawk_nas.export import HybridForCausalLM, check, load_hybrid, save_hybrid
from mohawk_nas.export.hf import describe_candidates
from mohawk_nas.export.verify import verify_export
from mohawk_nas.layout import Layout
from mohawk_nas.mixer import build_mixer
from mohawk_nas.reporting import SILENT
from mohawk_nas.student import assemble, install_mixers
from mohawk_nas.teacher import find_attention
from mohawk_nas.testing import tiny_model
from mohawk_nas.workbench import Workbench

TOKENS = torch.randint(0, 4096, (2, 21), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    work = Workbench(make_study(tmp_path_factory.mktemp("export")))
    work.bank.train(work.space.replaceable, reporter=SILENT)
    return work


def save(bench, folder, *kept):
    layout = Layout.keeping(kept, num_layers=4, replacement="mamba2")
    student = assemble(bench.teacher, layout, bench.bank)
    candidates = describe_candidates(bench.space.candidates)
    save_hybrid(
        student, folder, layout=layout, candidates=candidates, tokenizer=bench.teacher.tokenizer
    )
    return student


# Attention first, last, nowhere and everywhere.
@pytest.mark.parametrize("kept", [(0, 2), (1, 3), (), (0, 1, 2, 3)])
def test_an_export_gives_the_students_logits_and_decodes_alike(bench, tmp_path, kept):
    student = save(bench, tmp_path, *kept)
    logits = student(TOKENS, use_cache=False).logits
    found = check.compare(str(tmp_path), TOKENS, logits)
    assert found["reloaded logits"] == 0


def test_stock_loading_saving_and_tokenizer(bench, tmp_path):
    save(bench, tmp_path / "one", 0, 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert isinstance(model, HybridForCausalLM)
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "two")
    again = load_hybrid(tmp_path / "two")
    assert torch.equal(model(TOKENS).logits, again(TOKENS).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert tokenizer("some text") == bench.teacher.tokenizer("some text")
    # Tied weights are stored once and tied again.
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_training_a_loaded_export_reaches_every_weight(bench, tmp_path):
    save(bench, tmp_path, 0, 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    model(TOKENS, labels=TOKENS).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_a_vocabulary_can_grow(bench, tmp_path):
    save(bench, tmp_path / "one", 0, 2)
    model = load_hybrid(tmp_path / "one")
    before = model(TOKENS).logits
    model.resize_token_embeddings(4099, mean_resizing=False)
    out = model(torch.cat([TOKENS, torch.full((2, 1), 4098)], 1), labels=torch.full((2, 22), 4097))
    assert out.loss.isfinite()
    assert (out.logits[:, :-1, :4096] - before).abs().max() <= 1e-5 * before.abs().max()
    model.save_pretrained(tmp_path / "two")
    again = load_hybrid(tmp_path / "two")
    assert again.config.vocab_size == again.causal_lm.config.vocab_size == 4099
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_no_path_of_this_machine_is_written(bench, tmp_path):
    save(bench, tmp_path, 0, 2)
    assert bench.teacher.source not in (tmp_path / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_other_families_are_exported_too(tmp_path, arch):
    torch.manual_seed(0)
    # Gemma 2 has no other implementation.
    model = tiny_model(arch, attention="eager" if arch == "gemma2" else "sdpa")
    slots = find_attention(model)
    from mohawk_nas.mixer import mixer_config

    config = mixer_config({"mixer": "mamba2"})
    mixers = {0: build_mixer(config, slots[0].view, seed=0)}
    layout = Layout.keeping(range(1, len(slots)), num_layers=len(slots), replacement="mamba2")
    install_mixers(model, mixers, slots)
    save_hybrid(model, tmp_path, layout=layout, candidates=describe_candidates({"mamba2": config}))
    tokens = TOKENS % model.config.vocab_size
    with torch.no_grad():
        logits = model.eval()(tokens, use_cache=False).logits
    check.compare(str(tmp_path), tokens, logits)


def test_the_check_in_a_fresh_process_passes_and_catches_a_changed_weight(bench, tmp_path):
    student = save(bench, tmp_path, 1)
    assert set(verify_export(tmp_path, student)) == {
        "reloaded logits",
        "prefill and decode",
        "saved and loaded again",
    }
    loaded = load_hybrid(tmp_path)
    with torch.no_grad():
        loaded.causal_lm.model.layers[2].self_attn.mixer.D += 0.5
    loaded.save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=r"fails its check: .*reloaded logits: logits differ by"):
        verify_export(tmp_path, student)


def test_a_folder_without_some_weights_is_refused(bench, tmp_path):
    from mohawk_nas.files import load_tensors, save_tensors

    save(bench, tmp_path, 0, 2)
    tensors = load_tensors(tmp_path / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("mixer.D"))
    kept = {name: tensor.clone() for name, tensor in tensors.items() if name != gone}
    save_tensors(tmp_path / "model.safetensors", kept, {"format": "pt"})
    with pytest.raises(ExportError, match="weights are missing"):
        load_hybrid(tmp_path)


def test_the_configuration_says_what_it_is(bench, tmp_path):
    save(bench, tmp_path, 0, 2)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "mohawk_hybrid"
    assert config["layout"] == ["attention", "mamba2", "attention", "mamba2"]
    assert config["candidates"]["mamba2"]["mixer"] == "mamba2"
    assert config["teacher"]["model_type"] == "phi"
