"""A layout under the names of other stacks."""

import pytest
import yaml
from tiny_study import make_teacher
from transformers import AutoConfig

from mohawk_nas.cli import main
from mohawk_nas.config import plain, study_from_dict
from mohawk_nas.export.stacks import interval_of, is_parallel, layout_names
from mohawk_nas.layout import Layout
from mohawk_nas.mixer import MIXERS
from mohawk_nas.teacher import Teacher
from mohawk_nas.testing import tiny_model

CANDIDATES = {"small": {"mixer": "mamba2"}, "large": {"mixer": "mamba2", "d_state": 8}}


def keeping(*layers, num_layers=8):
    return Layout.keeping(layers, num_layers=num_layers, replacement="small")


def test_every_stack_says_the_same_layers():
    layout = keeping(1, 4, 5).with_candidate(7, "large")
    teacher = Teacher(tiny_model("llama", num_hidden_layers=8, meta=True))
    names = layout_names(layout, CANDIDATES, teacher)
    assert names["layout"] == "M A M M A A M M2"
    assert names["symbols"] == {"A": "attention", "M": "small", "M2": "large"}
    assert names["attention_layers"] == [1, 4, 5]
    assert names["megatron_core"]["hybrid_layer_pattern"] == "M-*-M-M-*-*-M-M-"
    types = names["transformers"]["layer_types"]
    assert [i for i, kind in enumerate(types) if kind == "full_attention"] == [1, 4, 5]
    assert set(types) == {"full_attention", "linear_attention"}
    assert names["transformers"]["attn_layer_indices"] == [1, 4, 5]
    assert names["mamba_in_llama"] == {"attn_layers": [1, 4, 5], "ssm_layers": [0, 2, 3, 6, 7]}
    blocks = [(block["mixer"], block["n_layers"]) for block in names["mohawk"]["blocks"]]
    assert blocks == [
        ("small", 1),
        ("attention", 1),
        ("small", 2),
        ("attention", 2),
        ("small", 1),
        ("large", 1),
    ]
    assert names["parallel_blocks"] is False and names["notes"] == []


# transformers' own reading of an interval is the judge.
@pytest.mark.parametrize(
    ("kept", "interval"),
    [
        ((1, 3, 5, 7), 2),
        ((2, 5), 3),
        ((3, 7), 4),
        ((5,), 6),
        (tuple(range(8)), 1),
        ((0, 4), None),
        ((3,), None),
        ((1, 3, 5), None),
        ((2, 5, 7), None),
        ((), None),
    ],
)
def test_an_interval_stands_only_where_it_gives_back_the_layout(kept, interval):
    assert interval_of(keeping(*kept)) == interval
    types = layout_names(keeping(*kept), CANDIDATES, None)["transformers"]["layer_types"]
    by_rule = {
        n: AutoConfig.for_model(
            "qwen3_next", num_hidden_layers=8, full_attention_interval=n
        ).layer_types
        for n in range(1, 9)
    }
    assert [n for n, rule in by_rule.items() if rule == types] == ([interval] if interval else [])


@pytest.mark.parametrize(
    ("arch", "sizes", "parallel"),
    [
        ("phi", {}, True),
        ("gpt_neox", {}, True),
        ("gpt_neox", {"use_parallel_residual": False}, False),
        ("cohere", {}, True),
        ("llama", {}, False),
        ("qwen3", {}, False),
        ("gemma3_text", {}, False),
        ("olmo2", {}, False),
    ],
)
def test_blocks_side_by_side_are_recognised(arch, sizes, parallel):
    teacher = Teacher(tiny_model(arch, meta=True, **sizes))
    assert is_parallel(teacher) is parallel
    names = layout_names(keeping(0, num_layers=teacher.num_layers), CANDIDATES, teacher)
    assert (names["megatron_core"]["hybrid_layer_pattern"] is None) is parallel
    assert any("side by side" in note for note in names["notes"]) is parallel
    # The hooks are gone.
    assert not any(module._forward_hooks for module in teacher.model.modules())


def test_windows_and_unknown_mixers_are_said():
    windowed = Teacher(tiny_model("mistral", meta=True, sliding_window=8))
    names = layout_names(keeping(0, num_layers=2), CANDIDATES, windowed)
    types = ["sliding_attention", "linear_attention"]
    assert names["transformers"]["layer_types"] == types
    MIXERS._items["unknown"] = type("Unknown", (MIXERS.get("mamba2"),), {"elsewhere": {}})
    try:
        names = layout_names(
            Layout(("attention", "mine")), {"mine": {"mixer": "unknown"}}, windowed
        )
    finally:
        del MIXERS._items["unknown"]
    assert names["megatron_core"]["hybrid_layer_pattern"] is None
    assert names["transformers"] == {
        "layer_types": None,
        "full_attention_interval": None,
        "attn_layer_indices": [0],
    }
    assert names["notes"] == [
        "layer_types: has no name for mine",
        "hybrid_layer_pattern: has no symbol for mine",
    ]


def test_the_command(tmp_path, capsys):
    study = study_from_dict(
        {
            "name": "tiny",
            "teacher": {"source": str(tmp_path / "teacher"), "device": "cpu"},
            "data": {"source": "text.jsonl"},
            "budget": {"attention_layers": 1},
        }
    )
    best = {
        "layout": ["small", "small", "attention", "small"],
        "candidates": {"small": {"mixer": "mamba2"}},
        "teacher": {"fingerprint": "0"},
        "study": plain(study),
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run/best.yaml").write_text(yaml.safe_dump(best), encoding="utf-8")

    def call(*options):
        with pytest.raises(SystemExit) as ended:
            main(["export", str(tmp_path / "run"), "--format", "layout", *map(str, options)])
        return ended.value.code, *capsys.readouterr()

    def written(path="run/layout.yaml"):
        return yaml.safe_load((tmp_path / path).read_text(encoding="utf-8"))

    # A layout may travel without its teacher.
    assert call()[:2] == (0, f"Wrote  {tmp_path}/run/layout.yaml\n")
    assert written()["megatron_core"] == {"hybrid_layer_pattern": "M-M-*-M-"}
    holds, unseen = written()["notes"]
    assert "holds if attention and MLP stand one after another" in holds
    assert "the teacher's blocks were not looked at: teacher.source: " in unseen
    assert call()[::2] == (
        2,
        f"mohawk-nas: {tmp_path}/run/layout.yaml: is there already; use --force to set it aside, "
        "or --out\n",
    )
    make_teacher(tmp_path / "teacher")
    assert call("--force")[0] == 0
    assert "hybrid_layer_pattern: null" in (tmp_path / "run/layout.yaml").read_text()
    assert written("run/layout.yaml.old-1")["parallel_blocks"] is None
    assert call("--out", tmp_path / "run")[0] == 2
    assert call("--out", tmp_path / "mine.yaml")[0] == 0
    assert written("mine.yaml") == written()
