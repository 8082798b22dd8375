import importlib
import json
import lzma
import re
from pathlib import Path

import pytest

from mohawk_nas.recall import TEMPLATES

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "studies" / "assets" / "make_lookups.py"
TEXT = ROOT / "studies" / "assets" / "text" / "quickstart.jsonl.xz"
NOTATIONS = (
    r"(\w+) -> (\w+);",
    r"\| (\w+) \| (\w+) \|",
    r"(\w+) means (\w+)\.",
    r"(\w+)/(\w+)",
    r"\[(\w+)\] (\w+)",
    r"'(\w+)', '(\w+)'",
)


@pytest.fixture(scope="module")
def make_lookups():
    with pytest.MonkeyPatch.context() as patch:
        # As Python does for a script that is run.
        patch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module("make_lookups").main


@pytest.fixture(scope="module")
def lookups(make_lookups, tmp_path_factory):
    path = tmp_path_factory.mktemp("lookups") / "a.jsonl"
    assert make_lookups(["--words", str(TEXT), "--out", str(path), "--size", "100K"]) == 0
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def pairs_of(text):
    (found,) = [
        pairs
        for notation in NOTATIONS
        if len(pairs := re.findall(notation, text)) > 4 and re.sub(notation, "", text).strip() == ""
    ]
    return found


def test_what_is_asked_was_told_and_told_once(lookups):
    assert sum(map(len, lookups)) >= 100_000
    for text in lookups:
        pairs = pairs_of(text)
        told = pairs[: next(i for i, pair in enumerate(pairs) if pair in pairs[:i])]
        asked = pairs[len(told) :]
        assert len({word for pair in told for word in pair}) == 2 * len(told)
        assert set(asked) <= set(told) and len(set(asked)) == len(asked)
        assert len(told) // 2 <= len(asked) <= len(told)


def test_no_notation_is_one_that_recall_is_measured_with(lookups):
    written = {re.sub(r"\w+", "W", text)[:12] for text in lookups}
    for templates in TEMPLATES.values():
        for template in templates:
            # Keys and values have a space in front.
            probe = f"{template.before} KEY{template.between} VALUE{template.after}" * 3
            assert re.sub(r"\w+", "W", probe).strip()[:12] not in written


def test_the_same_seed_writes_the_same(make_lookups, tmp_path, lookups):
    for name, seed in (("b", "0"), ("c", "1")):
        given = ["--words", str(TEXT), "--out", str(tmp_path / name)]
        make_lookups([*given, "--size", "10K", "--seed", seed])
    first = json.loads((tmp_path / "b").read_text().splitlines()[0])["text"]
    assert first == lookups[0]
    assert (tmp_path / "c").read_text() != (tmp_path / "b").read_text()


def test_lookups_stand_among_other_text(make_lookups, tmp_path):
    out = tmp_path / "mixed.jsonl"
    assert make_lookups(["--among", str(TEXT), "--share", "0.3", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    lookups = [row for row in rows if row["source"].startswith("lookups ")]
    assert len({row["source"] for row in lookups}) == len(lookups) > 100
    assert all(pairs_of(row["text"]) for row in lookups)
    with lzma.open(TEXT, "rt") as given:
        others = [row for row in rows if row not in lookups]
        assert others == [json.loads(line) for line in given]
    # So everywhere, whatever part of the text a split takes.
    for half in (rows[: len(rows) // 2], rows):
        size = sum(len(row["text"]) for row in half)
        share = sum(len(row["text"]) for row in half if row in lookups) / size
        assert 0.29 < share < 0.31
    assert make_lookups(["--out", str(out)]) == 2
    assert make_lookups(["--among", str(TEXT), "--share", "1", "--out", str(out)]) == 2


def test_too_few_words(make_lookups, tmp_path, capsys):
    path = tmp_path / "short.jsonl"
    path.write_text(json.dumps({"text": "only these words"}) + "\n")
    assert make_lookups(["--words", str(path), "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "must hold at least 512 different words" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
