"""Shipped studies can be planned anywhere; a layout that a study gives is distilled as it is."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from tiny_study import make_study, make_teacher, make_text
from transformers import PhiConfig, PhiForCausalLM

from mohawk_nas import pipeline
from mohawk_nas.cli import main
from mohawk_nas.config import dump, load_study, study_from_dict
from mohawk_nas.errors import ConfigError, RunError
from mohawk_nas.evaluate import find_target
from mohawk_nas.files import load_tensors
from mohawk_nas.forecast import make_forecast
from mohawk_nas.layout import Layout, num_attention
from mohawk_nas.metrics import body
from mohawk_nas.plan import find_problems, make_plan
from mohawk_nas.reporting import SILENT
from mohawk_nas.runs import claim_run_dir
from mohawk_nas.student import assemble
from mohawk_nas.workbench import Workbench

STUDIES = Path(__file__).parents[1] / "studies"
RECIPES = sorted((STUDIES / "recipes").glob("*.yaml"))
H100 = {"gpus": 8, "peak": 989e12, "utilisation": 0.4}


@functools.cache
def planned(path):
    """Layout and forecast of a recipe; both find every problem there is."""
    best = pipeline.choose_layout(path)
    return best.layout, make_forecast(best.study, best.layout, **H100)


@pytest.fixture
def call(capsys):
    def run_it(*args):
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run_it


def test_the_recipes_are_there():
    names = ["distilled_reasoner_1b", "distilled_reasoner_3b", "hybrid_phi_mamba"]
    names += ["llamba_1b", "llamba_3b", "llamba_8b", "phi_mamba"]
    assert [path.stem for path in RECIPES] == names


@pytest.mark.parametrize(
    "path", sorted(STUDIES.rglob("*.yaml")), ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_every_shipped_study_can_be_planned(path, monkeypatch):
    # Measuring this machine takes seconds and is no part of it.
    monkeypatch.setattr("mohawk_nas.plan._measure_rate", lambda *args: 1e12)
    config = load_study(path)
    if path not in RECIPES:
        # Others name models and texts that their headers say how to get.
        problems = [p for p in find_problems(config) if not re.match(r"(teacher|data)\.", p)]
        assert problems == []
        if not find_problems(config):
            assert make_plan(config).num_entries > 0
        return
    layout, forecast = planned(path)
    assert forecast.replaced == len(layout) - config.budget.attention_layers
    assert all(stage.seconds > 0 and stage.memory for stage in forecast.stages.values())


FACTS = {
    # Recipe -> teacher's parameters, layers, attention layers, tokens of the stages.
    "phi_mamba": (1_418_270_720, 24, 0, (80e6, 160e6, 2.76e9)),
    "hybrid_phi_mamba": (1_418_270_720, 24, 4, (80e6, 160e6, 4.76e9)),
    "llamba_1b": (1_235_814_400, 16, 0, (0.3e9, 2.7e9, 5e9)),
    "llamba_3b": (3_212_749_824, 28, 0, (0.5e9, 4e9, 5.5e9)),
    "llamba_8b": (8_030_261_248, 32, 0, (0.5e9, 5e9, 6.5e9)),
    "distilled_reasoner_1b": (1_235_814_400, 16, 4, (0, 0.5e9, 7.5e9)),
    "distilled_reasoner_3b": (3_212_749_824, 28, 6, (0, 0.5e9, 7.5e9)),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_hold_what_their_systems_are_known_by(path):
    layout, forecast = planned(path)
    study = load_study(path)
    distill = study.distill
    tokens = tuple(getattr(distill, stage).tokens for stage in ("matrix", "hidden", "logits"))
    kept = len(layout.attention_layers)
    assert (forecast.teacher_params, len(layout), kept, tokens) == FACTS[path.stem]
    text = path.read_text(encoding="utf-8")
    for said in ("# Needs:", "# Run:", "# Reach:", "Not run here."):
        assert said in text
    if path.stem == "llamba_3b":
        assert study.space.candidates["mamba2"]["num_heads"] == 32
    if path.stem == "hybrid_phi_mamba":
        assert layout.attention_layers == (4, 10, 16, 22)
        # Searched, it has the budget of four layers.
        searched = load_study(path, ["layout=null", "name=my_hybrid"])
        assert find_problems(searched) == [] and searched.budget == study.budget


def test_a_forecast_counts_what_the_student_is(tmp_path):
    config = make_study(
        tmp_path,
        "layout=[0, 2]",
        "distill.start=scratch",
        "distill.hidden.tokens=1024",
        "distill.logits.trainable=mixers",
    )
    layout = Layout.keeping([0, 2], num_layers=4, replacement="mamba2")
    forecast = make_forecast(config, layout, gpus=1, peak=1e9, utilisation=0.5)
    bench = Workbench(config)
    mixers = [bench.space.candidates["mamba2"].build(bench.teacher.views[i]) for i in (1, 3)]
    mixer_params = sum(p.numel() for mixer in mixers for p in mixer.parameters())
    assert forecast.mixer_params == forecast.trained_params == mixer_params
    teacher = sum(p.numel() for p in bench.teacher.model.parameters())
    attention = sum(p.numel() for p in bench.teacher.views[0].module.parameters())
    assert forecast.student_params == teacher - 2 * attention + mixer_params
    assert list(forecast.stages) == ["2 (hidden)", "3 (logits)"]
    stage = forecast.stages["3 (logits)"]
    assert (stage.tokens, stage.steps, stage.tokens_a_step) == (640, 10, 64)
    assert stage.seconds == pytest.approx(stage.flops / 0.5e9)
    # What is not trained is the teacher's own.
    held = stage.memory["student: weights, masters, gradients, moments"]
    assert held == 16 * mixer_params
    whole = make_forecast(
        load_with(config, "distill.logits.trainable=all"), layout, gpus=2, peak=1e9, utilisation=0.5
    )
    stock = teacher - 2 * attention
    states = 16 * mixer_params + 20 * stock
    again = whole.stages["3 (logits)"]
    assert again.memory["student: weights, masters, gradients, moments"] == states
    assert again.options["the student sharded over 2 GPUs"] == 16 * (mixer_params + stock) // 2
    kept = again.options["the same, layers kept from forward to backward"]
    assert kept == 8 * (mixer_params + stock) + 4 * mixer_params + 2 * stock
    divided = again.options["stage 3's teacher sharded over 2 GPUs"]
    assert divided == again.memory["teacher's weights"] // 2 == teacher
    # Each process has half of a step's blocks.
    needs = "what the backward pass needs"
    alone = make_forecast(
        load_with(config, "distill.logits.trainable=all"), layout, gpus=1, peak=1e9, utilisation=0.5
    ).stages["3 (logits)"]
    assert stage.memory[needs] < alone.memory[needs] == 2 * again.memory[needs]
    # Where layers are run again they keep their inputs alone, and there is nothing to choose.
    again = make_forecast(
        load_with(
            config,
            "distill.logits.trainable=all",
            "distill.logits.activation_checkpointing=true",
        ),
        layout,
        gpus=1,
        peak=1e9,
        utilisation=0.5,
    ).stages["3 (logits)"]
    assert alone.options == {"the backward pass with every layer checkpointed": again.memory[needs]}
    assert again.memory[needs] < alone.memory[needs] and not again.options
    # A teacher of stage 3 alone is held and run, too; of another type, it shares nothing.
    large = make_teacher(tmp_path / "large", num_layers=5, hidden_size=48, seed=1)
    guided = make_forecast(
        load_with(config, f"distill.teacher={{source: {large}, dtype: float32}}"),
        layout,
        gpus=1,
        peak=1e9,
        utilisation=0.5,
    ).stages["3 (logits)"]
    weights = sum(p.numel() for p in PhiForCausalLM.from_pretrained(large).parameters())
    assert guided.memory["weights of stage 3's own teacher"] == 4 * weights
    assert (
        guided.memory["student: weights, masters, gradients, moments"]
        == 16 * mixer_params + 4 * stock
    )
    assert guided.flops > stage.flops
    assert whole.stages["2 (hidden)"].seconds < forecast.stages["2 (hidden)"].seconds


def load_with(config, *overrides):
    return study_from_dict(yaml.safe_load(dump(config)), overrides=overrides)


def test_a_plan_counts_stage_1_where_the_distillation_has_one(tmp_path, monkeypatch):
    monkeypatch.setattr("mohawk_nas.plan._measure_rate", lambda *args: 1e12)
    anew = ["distill.start=scratch", "distill.matrix={tokens: 128, batch_size: 4}"]
    assert make_plan(make_study(tmp_path)).distill_tokens == {"hidden": 0, "logits": 640}
    plan = make_plan(make_study(tmp_path, *anew))
    assert plan.distill_tokens == {"matrix": 128, "hidden": 0, "logits": 640}


def test_what_backward_passes_need_is_what_autograd_keeps(tmp_path):
    """The count on the meta device is that of a real forward pass."""
    config = make_study(tmp_path, "layout=[0, 2]", "teacher.dtype=float32")
    layout = Layout.keeping([0, 2], num_layers=4, replacement="mamba2")
    stage = make_forecast(config, layout, gpus=1, peak=1e9, utilisation=0.5).stages["3 (logits)"]
    bench = Workbench(config)
    bench.bank.train(bench.space.replaceable, reporter=SILENT)
    student = assemble(bench.teacher, layout, bench.bank, share=False).requires_grad_(True)
    known = {p.untyped_storage().data_ptr() for p in student.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    tokens = torch.zeros(1, 16, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        body(student, tokens)
    real = sum(size for size, _ in kept.values())
    counted = stage.memory["what the backward pass needs"] // config.distill.logits.batch_size
    assert counted == pytest.approx(real, rel=0.1)


def test_dry_run_prints_and_leaves_nothing(tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = STUDIES / "recipes/llamba_3b.yaml"
    code, out, err = call("distill", recipe, "--dry-run", "--gpus", "8", "--tflops", "500")
    assert (code, err) == (0, "")
    assert "5,500,000,000 tokens, 20,980 steps of 262,144" in out
    assert "Least time on 8 GPUs, assuming 40% of 500 TFLOP/s" in out
    assert "the student sharded over 8 GPUs" in out and "token cache" in out
    told = " ".join(out.split())
    assert "distill.logits.batch_size must be a multiple of 8 for that many processes" in told
    more = ("distill.logits.batch_size=8", "distill.logits.accumulate=16")
    _, again, _ = call("distill", recipe, *more, "--dry-run", "--gpus", "8", "--tflops", "500")
    # The same, but for what was told.
    assert "must be a multiple" not in again
    assert set(again.splitlines()) <= set(out.splitlines())
    assert list(tmp_path.iterdir()) == []
    code, _, err = call("search", recipe, "--dry-run")
    assert code == 2
    assert "layout: is given (no attention layers), so there is nothing to search" in err
    code, _, err = call("distill", STUDIES / "quickstart.yaml", "--dry-run")
    assert code == 2 and "layout: must be given where a study is distilled as it is" in err


def test_a_given_layout_is_distilled_without_a_search(tmp_path, call):
    config = make_study(
        tmp_path,
        "layout=M A M A",
        "distill.start=scratch",
        "distill.matrix={tokens: 128, batch_size: 4}",
        "distill.hidden={tokens: 256, batch_size: 4}",
    )
    path = tmp_path / "study.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert call("validate", path)[0] == 0
    code, out, err = call("distill", path)
    assert code == 0, err
    run = tmp_path / "runs/tiny"
    assert f"mohawk-nas export {run / 'distill'}" in out.replace("\n", "")
    result = json.loads((run / "distill/result.json").read_text())
    assert result["layout"] == ["mamba2", "attention", "mamba2", "attention"]
    best = pipeline.load_best(run)
    assert (best.study.layout, best.study.budget.attention_layers) == ("M A M A", 2)
    assert find_target(run).model is not None
    # The bank has no part in it.
    assert not (tmp_path / "bank").exists()
    # Again is no work, other settings are refused, and nothing changes then.
    assert call("distill", path)[0] == 0
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for change, message in (
        ("distill.logits.lr=1e-5", "other settings (distill.logits.lr: "),
        ("layout=[0, 1]", "other settings (layout: "),
        ("layout=null", "layout: must be given"),
        ("layout=[4]", "layout: layer 4 is out of range"),
        ("layout=[0, 1, 2, 3]", "keeps attention in every layer, so there is nothing to distil"),
    ):
        code, _, err = call("distill", path, change)
        assert code == 2 and message in err, err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    with pytest.raises(ConfigError, match="nothing to search"):
        pipeline.search(config)


def test_a_searched_run_is_not_taken_over(tmp_path):
    config = make_study(tmp_path)
    # As a search leaves it.
    claim_run_dir(config, force=False)
    (config.run_dir / "best.yaml").write_text("strip: M M A A", encoding="utf-8")
    study = tmp_path / "study.yaml"
    study.write_text(dump(load_with(config, "layout=[0, 1]")), encoding="utf-8")
    before = (config.run_dir / "best.yaml").read_bytes()
    with pytest.raises(RunError, match=r"begun with other settings \(layout: None -> '0,1'\)"):
        pipeline.write_given(pipeline.choose_layout(study))
    assert (config.run_dir / "best.yaml").read_bytes() == before
    # What the message offers.
    pipeline.write_given(pipeline.choose_layout(study), force=True)
    aside = config.run_dir.with_name("tiny.old-1")
    assert (aside / "best.yaml").read_bytes() == before
    assert pipeline.load_best(config.run_dir).layout.attention_layers == (0, 1)
    # What is this study's own stays where it is.
    pipeline.write_given(pipeline.choose_layout(study), force=True)
    assert not config.run_dir.with_name("tiny.old-2").exists()


@pytest.mark.parametrize(
    ("written", "text", "kept"),
    [
        ([1, 3], "1,3", 2),
        ([], "", 0),
        (2, "2", 1),
        ("M A M A", "M A M A", 2),
        ("MM2AM", "MM2AM", 1),
    ],
)
def test_forms_of_a_layout(tmp_path, written, text, kept):
    raw = yaml.safe_load(dump(make_study(tmp_path)))
    study = study_from_dict({**raw, "budget": {}, "layout": written})
    assert (study.layout, study.budget.attention_layers) == (text, kept)
    assert num_attention(text) == kept
    assert study_from_dict(yaml.safe_load(dump(study))) == study


def test_heads_that_do_not_match_go_through_all_stages(tmp_path):
    """Llamba-3B's case: 24 teacher heads and 32 of the student's, here 3 and 4."""
    folder = tmp_path / "teacher"
    make_teacher(folder)
    torch.manual_seed(0)
    shape = PhiConfig.from_pretrained(folder)
    shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads = 48, 3, 3
    PhiForCausalLM(shape).save_pretrained(folder)
    make_text(tmp_path / "text.jsonl")
    config = make_study(
        tmp_path,
        "layout=[]",
        "space.candidates={m: {mixer: mamba2, init: random, num_heads: 4, d_state: 8}}",
        "distill.start=scratch",
        "distill.matrix={tokens: 2048, batch_size: 4, lr: 3e-3}",
        "distill.hidden={tokens: 1024, batch_size: 4, lr: 3e-3}",
    )
    study = tmp_path / "study.yaml"
    study.write_text(dump(config), encoding="utf-8")
    result, run = pipeline.distill(pipeline.choose_layout(study))
    assert result.after.mean_kl < result.before.mean_kl
    bench = Workbench(config)
    mixer = bench.space.candidates["m"].build(bench.teacher.views[0])
    assert mixer.head_pairs(3).tolist() == [0, 0, 1, 2]
    for record in (run / "bank").glob("*.json"):
        losses = json.loads(record.read_text())["losses"]
        matrix = [entry["loss"] for entry in losses if entry["stage"] == "matrix"]
        assert matrix[-1] < matrix[0]
    assert len(list((run / "bank").glob("*.json"))) == 4
    assert load_tensors(run / "model/model.safetensors")
