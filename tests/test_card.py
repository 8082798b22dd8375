"""The model card of an export, and the licence in it."""

import json
import os
import re

import pytest
import yaml

from mohawk_nas.config import study_from_dict
from mohawk_nas.export.card import Licence, find_licence, model_card, read_evaluation
from mohawk_nas.layout import Layout

RESULT = {
    "scores": {"objectives": {"kl": 0.25}, "layouts_scored": 20, "layouts_possible": 220},
    "validation_kl": {"before": 0.31234, "after": 0.12345},
    "tokens": {"hidden": 0, "logits": 5_000_000},
    "provenance": {"versions": {"torch": "2.6"}},
}


def card(source, licence, distill=None, **options):
    study = study_from_dict(
        {
            "distill": distill or {},
            "name": "tiny",
            "teacher": {"source": str(source)},
            "data": {"source": ["/a/place/of/mine/text.jsonl", "wikitext"]},
            "budget": {"attention_layers": 1},
            "bank": {"matrix": {"tokens": 2048}, "hidden": {"tokens": 4096}},
        }
    )
    candidates = {"mamba2": {"mixer": "mamba2", "d_conv": 4}}
    options = {"fingerprint": "f00", "dtype": "bfloat16", "standalone": False} | options
    layout = Layout.keeping([1], num_layers=4, replacement="mamba2")
    text = model_card(layout, candidates, study, RESULT, licence, **options)
    _, matter, body = text.split("---\n", 2)
    return yaml.safe_load(matter), body


def test_it_says_what_the_model_is_and_how_good_it_is():
    matter, body = card("org/name", Licence(metadata={"license": "mit"}))
    assert matter["base_model"] == "org/name" and matter["license"] == "mit"
    assert matter["library_name"] == "transformers"
    assert {"mamba2", "hybrid"} < set(matter["tags"]) and "custom_code" not in matter["tags"]
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", body, re.MULTILINE))
    assert rows["layout"] == "`M A M M` (A = attention, M = mamba2)"
    assert rows["layers that keep attention (counted from 0)"] == "1"
    assert rows["teacher"] == "org/name (fingerprint `f00`)"
    assert rows["text"] == "text.jsonl, wikitext"
    tokens = {name: rows[name] for name in rows if name.startswith("tokens")}
    assert tokens == {
        "tokens of stage 1, in the bank": "2,048",
        "tokens of stage 2, in the bank": "4,096",
        "tokens of stage 3": "5,000,000",
    }
    assert rows["validation KL to the teacher, undistilled"] == "0.3123 nats a token"
    assert rows["validation KL to the teacher, distilled"] == "0.1235 nats a token"
    assert rows["layouts scored by the search"] == "20 of 220 possible ones"
    assert rows["weights on disk"] == "bfloat16" and rows["made with"] == "torch 2.6"
    assert "import mohawk_nas.export" in body and "trust_remote_code" not in body


def test_another_teacher_of_stage_3_and_stages_from_scratch_are_told():
    distill = {
        "start": "scratch",
        "matrix": {"tokens": 2048},
        "hidden": {"tokens": 4096},
        "teacher": {"source": "org/larger"},
    }
    _, body = card("org/name", Licence(metadata={"license": "mit"}), distill)
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", body, re.MULTILINE))
    assert rows["teacher of stage 3"] == "org/larger"
    assert rows["tokens of stage 1"] == "2,048"
    assert not [name for name in rows if name.endswith("in the bank")]
    # What the KL was to.
    assert "validation KL to org/larger, distilled" in rows
    assert "Stage 3 was taught by org/larger: look up what its licence" in body


def test_one_that_stands_alone_says_so(tmp_path):
    matter, body = card(tmp_path, Licence(), standalone=True)
    # The name of a folder here may be that of another model on the hub.
    assert "base_model" not in matter and "license" not in matter
    assert "custom_code" in matter["tags"]
    assert "trust_remote_code=True" in body and "import mohawk_nas" not in body
    assert str(tmp_path) not in body
    assert f"not found in the files of {tmp_path.name} (" in body


def test_what_evaluate_found_is_on_it(tmp_path):
    layout = Layout.keeping([1], num_layers=4, replacement="mamba2")
    (tmp_path / "distill").mkdir()
    result, record = tmp_path / "distill/result.json", tmp_path / "evaluation.json"
    found = {
        "layout": list(layout.candidates),
        "models": [
            {
                "name": "teacher",
                "perplexity": 20.5,
                "text": [{"name": "KL to the teacher", "value": 0.0}],
                "tasks": [{"name": "piqa acc", "value": 0.7}],
            },
            {
                "name": "distilled student",
                "perplexity": 22.25,
                "text": [{"name": "KL to the teacher", "value": 0.125}],
                "tasks": [],
            },
        ],
    }
    result.write_text("{}")
    assert read_evaluation(tmp_path, layout) is None
    record.write_text(json.dumps(found))
    os.utime(result, (1000, 1000))
    assert read_evaluation(tmp_path, layout) == found
    assert read_evaluation(tmp_path, layout.with_candidate(0, "attention")) is None
    _, body = card("org/name", Licence(), evaluation=found)
    lines = body.splitlines()
    start = lines.index("| test split | perplexity | KL to the teacher | piqa acc |")
    assert lines[start + 1 : start + 4] == [
        "|---|---|---|---|",
        "| teacher | 20.5000 | 0.0000 | 0.7000 |",
        "| distilled student | 22.2500 | 0.1250 |  |",
    ]
    # Distilled anew since.
    os.utime(record, (900, 900))
    assert read_evaluation(tmp_path, layout) is None


README = """---
license: other
license_name: special
license_link: LICENSE
language: en
---
# A model
"""


def test_a_folders_licence(tmp_path):
    assert find_licence(str(tmp_path)) == Licence()
    (tmp_path / "config.json").write_text('{"license": "bsd-3-clause"}')
    assert find_licence(str(tmp_path)).metadata == {"license": "bsd-3-clause"}
    (tmp_path / "README.md").write_text(README)
    for name in ("LICENSE.txt", "Notice", "USE_POLICY.md", "weights.safetensors"):
        (tmp_path / name).write_text(name)
    found = find_licence(str(tmp_path))
    assert found.metadata == {
        "license": "other",
        "license_name": "special",
        "license_link": "LICENSE",
    }
    (tmp_path / "export").mkdir()
    found.copy(tmp_path / "export")
    copied = {path.name: path.read_text() for path in (tmp_path / "export").iterdir()}
    assert copied == {name: name for name in ("LICENSE.txt", "Notice", "USE_POLICY.md")}
    matter, body = card(tmp_path, found)
    assert matter["license_name"] == "special"
    assert "teacher's: special, text in [LICENSE.txt](LICENSE.txt), [Notice]" in body


@pytest.mark.parametrize("source", ["gone", "gone/model.gguf"])
def test_a_teacher_that_is_gone_has_none_to_tell(tmp_path, source):
    assert find_licence(str(tmp_path / source)) == Licence()


@pytest.mark.parametrize("text", ["", "# no matter", "---\nlicense: [\n---\n", "---\n- a\n---\n"])
def test_a_card_without_one(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert find_licence(str(tmp_path)) == Licence()


def test_a_gguf_files_licence(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("llama3.2")
    writer.add_license_link("somewhere")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (tmp_path / "LICENSE").write_text("text")
    found = find_licence(str(path))
    assert found.metadata == {"license": "llama3.2", "license_link": "somewhere"}
    assert [text.name for text in found.texts] == ["LICENSE"]


def test_a_hub_models_licence(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "LICENSE").write_text("text")
    asked = []

    def cached_file(source, name, **options):
        asked.append((source, name, bool(options)))
        if options and source == "org/name":
            raise OSError("not in the cache")
        if source != "org/name" or not (tmp_path / name).exists():
            raise OSError("not there")
        return str(tmp_path / name)

    monkeypatch.setattr("transformers.utils.cached_file", cached_file)
    found = find_licence("org/name")
    assert found.metadata["license_name"] == "special"
    assert [text.name for text in found.texts] == ["LICENSE"]
    assert find_licence("org/other") == Licence()
    # A model without a card is not asked for more.
    assert [name for source, name, _ in asked if source == "org/other"] == ["README.md"] * 2
    # The cache is asked first.
    assert [cached for source, name, cached in asked if name == "LICENSE"] == [True, False]
