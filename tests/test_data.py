import errno
import gzip
import json
import logging
import lzma
import os
import random
import re
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard
from safetensors.torch import load_file
from transformers import AutoTokenizer

from mohawk_nas import data, files
from mohawk_nas.config import DataConfig
from mohawk_nas.data import SPLITS, BlockOrder, TokenBlocks, load_blocks, split_of
from mohawk_nas.errors import ConfigError, DataError, TrainingError
from mohawk_nas.files import (
    DamagedFile,
    atomic_write,
    load_metadata,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
)

PHI_TINY = Path(__file__).parents[1] / "studies/assets/phi-tiny"
BLOCK = 32
NEEDED = {"bank": 1600, "search": 96, "validation": 64, "test": 64}
WORDS = ["the", "a", "river", "Stone", "walks", "42", "quietly,", "über", "東京", "under\n\nlight"]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(PHI_TINY)


def make_documents(count: int, *, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        f"{i} of {seed}: " + " ".join(rng.choices(WORDS, k=rng.randint(8, 40)))
        for i in range(count)
    ]


DOCUMENTS = make_documents(150)


def lines_of(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_jsonl(path: Path, documents: list[str]) -> Path:
    path.write_bytes(lines_of([{"text": text} for text in documents]))
    return path


def config_for(folder: Path, *sources: Path | str, **changes: Any) -> DataConfig:
    settings: dict[str, Any] = {
        "source": [str(source) for source in sources],
        "block_size": BLOCK,
        "cache": str(folder / "cache"),
    }
    return DataConfig(**(settings | changes))


def packed(tokenizer: Any, documents: list[str], split: str) -> list[int]:
    """The plain twin: one document after another, each behind its separator."""
    tokens: list[int] = []
    for text in documents:
        if split_of(text) == split:
            tokens += [tokenizer.eos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
    return tokens


def rows_of(blocks: dict[str, TokenBlocks]) -> dict[str, list[list[int]]]:
    return {split: b.batch(range(len(b))).tolist() for split, b in blocks.items()}


@pytest.mark.parametrize("kind", ["jsonl", "xz", "gz", "zst", "parquet", "txt", "mixed"])
def test_every_format_gives_the_same_blocks(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    records = [{"text": text, "id": i, "meta": {"a": i}} for i, text in enumerate(DOCUMENTS)]
    raw = lines_of(records)
    source: list[Path | str] = [tmp_path / f"d.jsonl.{kind}"]
    if kind == "jsonl":
        source = [tmp_path / "d.jsonl"]
        source[0].write_bytes(raw)
    elif kind == "xz":
        source[0].write_bytes(lzma.compress(raw))
    elif kind == "gz":
        # Two members, as `cat a.gz b.gz` makes.
        source[0].write_bytes(gzip.compress(raw[:5000]) + gzip.compress(raw[5000:]))
    elif kind == "zst":
        pack = zstandard.ZstdCompressor().compress
        source[0].write_bytes(pack(raw[:5000]) + pack(raw[5000:]))
    elif kind == "parquet":
        source = [tmp_path / "d.parquet"]
        pq.write_table(pa.Table.from_pylist(records), source[0], row_group_size=40)
    else:
        for i, text in enumerate(DOCUMENTS[:100] if kind == "mixed" else DOCUMENTS):
            (tmp_path / f"{i:03} [x] #.txt").write_bytes(text.encode())
        source = [tmp_path / "*.txt"]
        if kind == "mixed":
            (tmp_path / "b.json").write_bytes(lines_of(records[100:120]))
            pq.write_table(pa.Table.from_pylist(records[120:]), tmp_path / "a.parquet")
            source += [tmp_path / "b.json", tmp_path / "a.parquet"]

    blocks = load_blocks(config_for(tmp_path, *source), tokenizer, needed=NEEDED)

    for split, tokens in NEEDED.items():
        assert blocks[split].split == split
        assert blocks[split].tokens.dtype == torch.int32
        assert blocks[split].tokens.shape == (tokens // BLOCK, BLOCK)
        expected = packed(tokenizer, DOCUMENTS, split)[:tokens]
        assert blocks[split].tokens.flatten().tolist() == expected


def test_fingerprint_follows_the_tokens(tokenizer: Any, tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", DOCUMENTS)
    two = tmp_path / "two.jsonl.gz"
    two.write_bytes(gzip.compress(one.read_bytes()))
    changed = write_jsonl(tmp_path / "three.jsonl", ["!" + text for text in DOCUMENTS])

    def prints(source: Path, needed: dict[str, int]) -> dict[str, str]:
        blocks = load_blocks(config_for(tmp_path, source), tokenizer, needed=needed)
        return {split: b.fingerprint for split, b in blocks.items()}

    first = prints(one, NEEDED)
    assert len(set(first.values())) == 4
    assert prints(two, NEEDED) == first
    assert not set(prints(changed, NEEDED).values()) & set(first.values())
    # What one split needs changes no other.
    assert prints(one, {**NEEDED, "bank": 640})["test"] == first["test"]
    assert prints(one, {"test": 64}) == {"test": first["test"]}


def test_no_document_is_in_two_splits(tokenizer: Any, tmp_path: Path) -> None:
    documents = make_documents(100) * 3
    random.Random(1).shuffle(documents)
    source = write_jsonl(tmp_path / "d.jsonl", documents)
    needed = dict.fromkeys(SPLITS, 640)
    blocks = load_blocks(config_for(tmp_path, source), tokenizer, needed=needed)
    seen: dict[str, str] = {}
    for split, b in blocks.items():
        parts = tokenizer.decode(b.tokens.flatten().tolist()).split(tokenizer.eos_token)
        # The last one may be cut.
        for text in filter(None, parts[:-1]):
            assert text in documents
            assert seen.setdefault(text, split) == split == split_of(text)
    assert set(seen.values()) == set(SPLITS)


def test_shares_of_the_splits() -> None:
    counts = dict.fromkeys(SPLITS, 0)
    for i in range(4000):
        counts[split_of(f"document {i}")] += 1
    assert all(0.045 < counts[split] / 4000 < 0.075 for split in SPLITS if split != "bank")
    # Written down, since a change would move documents between the splits of existing runs.
    known = {"bank": "0", "search": "13", "validation": "4", "test": "15"}
    assert {split_of(name): name for name in known.values()} == known


def test_more_files_move_no_document(tokenizer: Any, tmp_path: Path) -> None:
    needed = dict.fromkeys(SPLITS, 320)

    def load(pattern: str) -> dict[str, TokenBlocks]:
        return load_blocks(config_for(tmp_path, tmp_path / pattern), tokenizer, needed=needed)

    write_jsonl(tmp_path / "b.jsonl", DOCUMENTS)
    alone = load("b.jsonl")
    write_jsonl(tmp_path / "c.jsonl", make_documents(150, seed=1))
    assert rows_of(load("[bc].jsonl")) == rows_of(alone)

    before = make_documents(40, seed=2)
    write_jsonl(tmp_path / "a.jsonl", before)
    for split, blocks in load("?.jsonl").items():
        expected = packed(tokenizer, before + DOCUMENTS, split)[:320]
        assert blocks.tokens.flatten().tolist() == expected


def test_parts_of_a_document_stay_together(tokenizer: Any, tmp_path: Path) -> None:
    records = [{"text": f"part {i} of {i // 3}. ", "doc": i // 3} for i in range(600)]
    source = tmp_path / "d.jsonl"
    source.write_bytes(lines_of(records))
    config = config_for(tmp_path, source, document_field="doc")
    blocks = load_blocks(config, tokenizer, needed={"search": 128})
    text = tokenizer.decode(blocks["search"].tokens.flatten().tolist())
    whole = text.split(tokenizer.eos_token)[1:-1]
    for document in whole:
        name = int(re.search(r"of (\d+)", document)[1])
        assert document == "".join(f"part {i} of {name}. " for i in range(3 * name, 3 * name + 3))
        assert split_of(str(name)) == "search"
    meta = read_json(next((tmp_path / "cache").glob("*/meta.json")))
    assert meta["splits"]["search"]["documents"] == len(whole) + 1


@pytest.mark.parametrize(("batch", "piece"), [(200, 10**6), (10**6, 300), (700, 200)])
def test_batches_and_pieces_change_nothing(
    batch: int, piece: int, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [*make_documents(40), " ".join(make_documents(200, seed=3)), "x" * 999]
    source = write_jsonl(tmp_path / "d.jsonl", documents)
    monkeypatch.setattr(data, "_BATCH_CHARS", batch)
    monkeypatch.setattr(data, "_PIECE_CHARS", piece)
    needed = {"bank": 10**6}
    blocks = load_blocks(config_for(tmp_path, source), tokenizer, needed=needed)["bank"]
    expected = packed(tokenizer, documents[:-1], "bank")
    count = (len(expected) // BLOCK - 1) * BLOCK
    assert blocks.tokens.flatten().tolist()[:count] == expected[:count]
    assert "".join(data._pieces(documents[-1])) == documents[-1]


def test_reading_stops_when_there_is_enough(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_BATCH_CHARS", 1000)
    source = write_jsonl(tmp_path / "d.jsonl", DOCUMENTS)
    with source.open("ab") as stream:
        stream.write(b"not JSON\n")
    blocks = load_blocks(config_for(tmp_path, source), tokenizer, needed={"bank": 640})
    assert len(blocks["bank"]) == 20
    with pytest.raises(DataError, match="line 151 must be one JSON object"):
        load_blocks(config_for(tmp_path, source), tokenizer, needed={"bank": 10**6})


def test_records_of_every_shape(tokenizer: Any, tmp_path: Path) -> None:
    records: list[Any] = [{"text": "2020-01-01 00:00:00"}, {"text": None}, {"text": ""}]
    records += [{"text": text, f"field_{i % 7}": {"x": i}} for i, text in enumerate(DOCUMENTS)]
    source = tmp_path / "d.jsonl"
    half_pair = b'{"text": "half \\ud83d pair"}\n'
    source.write_bytes(b"\xef\xbb\xbf" + half_pair + b"\n" + lines_of(records))
    blocks = load_blocks(config_for(tmp_path, source), tokenizer, needed={"bank": 10**4})
    text = tokenizer.decode(blocks["bank"].tokens.flatten().tolist())
    assert text.startswith(
        "<|endoftext|>half \N{REPLACEMENT CHARACTER} pair<|endoftext|>2020-01-01"
    )


def test_separator(tokenizer: Any, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", DOCUMENTS)

    def first(**changes: Any) -> int:
        config = config_for(tmp_path, source, **changes)
        return int(load_blocks(config, tokenizer, needed={"bank": 64})["bank"].tokens[0, 0])

    assert first() == tokenizer.eos_token_id
    assert first(separator="the") == tokenizer.get_vocab()["the"]
    assert first(separator="\n") == tokenizer.encode("\n")[0]
    with pytest.raises(ConfigError, match=r"data.separator: must be one token .* '<\|sep\|>' is"):
        first(separator="<|sep|>")

    bare = AutoTokenizer.from_pretrained(PHI_TINY)
    bare.eos_token = None
    config = config_for(tmp_path, source)
    with_bos = load_blocks(config, bare, needed={"bank": 64})["bank"]
    assert int(with_bos.tokens[0, 0]) == bare.bos_token_id
    bare.bos_token = None
    with pytest.raises(DataError, match="neither an end-of-text nor a begin-of-text token"):
        load_blocks(config, bare, needed={"bank": 64})


def test_texts_longer_than_the_model_warn_of_nothing(
    tokenizer: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder, capfd: Any, caplog: Any
) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [" ".join(DOCUMENTS * 4)])
    split = split_of(" ".join(DOCUMENTS * 4))
    with caplog.at_level(logging.WARNING):
        load_blocks(config_for(tmp_path, source), tokenizer, needed={split: 6400})
    assert caplog.messages == []
    assert [str(w.message) for w in recwarn] == []
    assert capfd.readouterr() == ("", "")


def test_local_files_need_no_network(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    asked = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    source = write_jsonl(tmp_path / "d.jsonl", DOCUMENTS)
    load_blocks(config_for(tmp_path, source), tokenizer, needed=NEEDED)
    assert asked == []
    assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS is True
    assert not datasets.are_progress_bars_disabled()


def no_reading(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("the text was read again")


def test_cache_is_used(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", DOCUMENTS)
    config = config_for(tmp_path, source)
    made = load_blocks(config, tokenizer, needed=NEEDED)
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["meta.json", *(f"{split}.safetensors" for split in SPLITS)]
    )
    meta = read_json(folder / "meta.json")
    assert meta["source"] == [str(source)]
    assert meta["splits"]["bank"]["tokens"] == 1600
    assert meta["splits"]["bank"]["documents"] > 10
    assert {"datasets", "transformers"} <= set(meta["versions"])

    monkeypatch.setattr("datasets.load_dataset", no_reading)
    # Padding and truncation are left in the tokenizer by the last call, and are not part of it.
    tokenizer(["a"], padding=True, truncation=True)
    again = load_blocks(config, tokenizer, needed=NEEDED)
    assert rows_of(again) == rows_of(made)
    assert {s: b.fingerprint for s, b in again.items()} == {
        s: b.fingerprint for s, b in made.items()
    }

    for changes in ({"block_size": 16}, {"separator": "the"}, {"document_field": "text"}):
        with pytest.raises(DataError, match="the text was read again"):
            load_blocks(config_for(tmp_path, source, **changes), tokenizer, needed=NEEDED)
    with pytest.raises(DataError, match="the text was read again"):
        load_blocks(config, tokenizer, needed={**NEEDED, "test": 32})
    write_jsonl(source, DOCUMENTS[1:])
    with pytest.raises(DataError, match="the text was read again"):
        load_blocks(config, tokenizer, needed=NEEDED)
    other = AutoTokenizer.from_pretrained(PHI_TINY)
    other.add_tokens(["<|more|>"])
    write_jsonl(source, DOCUMENTS)
    with pytest.raises(DataError, match="the text was read again"):
        load_blocks(config, other, needed=NEEDED)


@pytest.mark.parametrize("damage", ["cut", "rubbish", "gone", "shape", "meta", "empty meta", "key"])
def test_damaged_cache_is_made_again(
    damage: str, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_for(tmp_path, write_jsonl(tmp_path / "d.jsonl", DOCUMENTS))
    made = rows_of(load_blocks(config, tokenizer, needed=NEEDED))
    (folder,) = (tmp_path / "cache").iterdir()
    bank, meta = folder / "bank.safetensors", folder / "meta.json"
    if damage == "cut":
        bank.write_bytes(bank.read_bytes()[:-100])
    elif damage == "rubbish":
        bank.write_bytes(b"rubbish")
    elif damage == "gone":
        bank.unlink()
    elif damage == "shape":
        save_tensors(bank, {"tokens": load_file(bank)["tokens"][1:]})
    elif damage == "meta":
        write_json(meta, read_json(meta) | {"request": {}})
    elif damage == "empty meta":
        meta.write_bytes(b"")
    else:
        write_json(meta, {"request": read_json(meta)["request"]})
    with caplog.at_level(logging.WARNING):
        again = load_blocks(config, tokenizer, needed=NEEDED)
    assert rows_of(again) == made
    assert len(caplog.messages) == 1
    assert re.match(r"data: the cache in .* is damaged and made again: ", caplog.messages[0])
    caplog.clear()
    load_blocks(config, tokenizer, needed=NEEDED)
    assert caplog.messages == []


def test_a_small_bank_is_a_warning(tokenizer: Any, tmp_path: Path, caplog: Any) -> None:
    config = config_for(tmp_path, write_jsonl(tmp_path / "d.jsonl", DOCUMENTS))
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            bank = load_blocks(config, tokenizer, needed={"bank": 32_000})["bank"]
        passes = 32_000 / bank.tokens.numel()
        assert 2 < passes < 20
        (message,) = caplog.messages
        assert f"of 32,000 tokens; training will make {passes:.1f} passes" in message


def test_too_little_text(tokenizer: Any, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", DOCUMENTS)
    needed = {"bank": 64, "search": 96, "validation": 3200, "test": 6400}
    message = (
        r"too little text for validation \(has [\d,]+ tokens in blocks of 32, from \d+ documents; "
        r"needs 3,200, data.validation_tokens\), test \(.*data.test_tokens\); .*"
        r"\(search 6%, .*bank the rest\): add documents or lower these settings$"
    )
    with pytest.raises(DataError, match=message):
        load_blocks(config_for(tmp_path, source), tokenizer, needed=needed)
    (tmp_path / "one.txt").write_text("short")
    everything = dict.fromkeys(SPLITS, 32)
    with pytest.raises(DataError, match=r"for bank \(.*and a text file is one document: add"):
        load_blocks(config_for(tmp_path, tmp_path / "one.txt"), tokenizer, needed=everything)
    with pytest.raises(DataError, match=r"search.tokens: must hold at least one block of 32"):
        load_blocks(config_for(tmp_path, source), tokenizer, needed={"search": 31})
    with pytest.raises(ValueError, match=r"a split must be one of bank, .*'train'"):
        load_blocks(config_for(tmp_path, source), tokenizer, needed={"train": 64})
    nothing = load_blocks(config_for(tmp_path, source), tokenizer, needed={"bank": 0})["bank"]
    assert len(nothing) == 0


@pytest.mark.parametrize(
    "entry", ["missing.jsonl", "missing/*.txt", "./org/name", "data/part.parquet", "a b", "/no/x"]
)
def test_missing_files(entry: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"no such file: {re.escape(entry)}; name a file"):
        load_blocks(config_for(tmp_path, entry), tokenizer, needed=NEEDED)


def refuse(content: bytes, name: str, message: str, tokenizer: Any, folder: Path) -> None:
    path = folder / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_blocks(config_for(folder, path), tokenizer, needed=NEEDED)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (folder / "cache").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "must hold text, but is empty; leave it out"),
        ("a.txt", b" \n", "must hold text, but is empty; leave it out"),
        ("a.txt.gz", gzip.compress(b""), "must hold text, but is empty; leave it out"),
        ("a.jsonl", b"\n\n", "must hold text, but no line has any in field 'text'"),
        ("a.jsonl.xz", lzma.compress(b""), "must hold text, but no line has any in field 'text'"),
        ("a.txt", b"ab \xff", "must be text in UTF-8, but is not: .*0xff.*; convert it"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b', "line 2 must be one JSON object, but is not JS"),
        ("a.json", b'[\n{"text": "a"}]', "line 1 must be one JSON object, but is not JSON"),
        ("a.json", b'[{"text": "a"}]', "line 1 must be one JSON object, but is of type list"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: field 'text' must be text, but is of type int"),
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"body": "b", "id": 1}\n',
            "line 3 must have a field 'text', but has body, id; name one of them in data.text_f",
        ),
        ("a.csv", b"text\na", r"a.csv must be text \(.txt, .*or .parquet; rename or convert it"),
        ("a.parquet.gz", b"text\na", "must be text .*; rename or convert it"),
        ("a.parquet", b"PAR1 rubbish", "cannot be read: ArrowInvalid: .*; the file is damaged or"),
        ("a.jsonl.gz", b"rubbish", "cannot be read: BadGzipFile: .*; the file is damaged or"),
        ("a.jsonl.xz", b"rubbish", "cannot be read: LZMAError: .*; the file is damaged or"),
        ("a.jsonl.zst", b"rubbish", "cannot be read: ZstdError: .*; the file is damaged or"),
    ],
)
def test_bad_files(name: str, content: bytes, message: str, tokenizer: Any, tmp_path: Path) -> None:
    refuse(content, name, message, tokenizer, tmp_path)


@pytest.mark.parametrize("kind", ["gz", "xz", "zst", "parquet"])
@pytest.mark.parametrize("stem", ["d.txt", "d.jsonl"])
def test_files_cut_short(
    kind: str, stem: str, tokenizer: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(0)
    raw = lines_of([{"text": rng.randbytes(200).hex()} for _ in range(1000)])
    if kind == "parquet":
        pq.write_table(pa.table({"text": [str(raw)]}), tmp_path / "whole")
        content, stem = (tmp_path / "whole").read_bytes(), "d"
    else:
        pack = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress}[kind]
        content = pack(raw)
    message = "cannot be read: (EOFError|ArrowInvalid): .*; the file is damaged or not what its"
    refuse(content[: len(content) * 2 // 3], f"{stem}.{kind}", message, tokenizer, tmp_path)
    assert capfd.readouterr() == ("", "")


def test_the_bad_one_of_many_files_is_named(tokenizer: Any, tmp_path: Path) -> None:
    for i, text in enumerate(DOCUMENTS[:9]):
        (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / "5.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"[\\/]5.txt must be text in UTF-8"):
        load_blocks(config_for(tmp_path, tmp_path / "*.txt"), tokenizer, needed=NEEDED)


def test_parquet_errors(tokenizer: Any, tmp_path: Path) -> None:
    source = tmp_path / "d.parquet"
    config = config_for(tmp_path, source)
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), source)
    with pytest.raises(DataError, match=r"d.parquet must have a field 'text', but has body, id; "):
        load_blocks(config, tokenizer, needed=NEEDED)
    pq.write_table(pa.table({"text": ["a"], "id": [1]}), source)
    named = config_for(tmp_path, source, document_field="doc")
    with pytest.raises(DataError, match=r"a field 'doc', but has text, id; .*document_field"):
        load_blocks(named, tokenizer, needed=NEEDED)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), source)
    with pytest.raises(DataError, match="must hold text, but no record has any in field 'text'"):
        load_blocks(config, tokenizer, needed=NEEDED)
    pq.write_table(pa.table({"text": [b"a"]}), source)
    with pytest.raises(DataError, match=r"record 1: field 'text' must be text, .* type bytes"):
        load_blocks(config, tokenizer, needed=NEEDED)


def test_document_field_must_name(tokenizer: Any, tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    source.write_bytes(lines_of([{"text": "a", "doc": 1}, {"text": "b", "doc": None}]))
    config = config_for(tmp_path, source, document_field="doc")
    with pytest.raises(
        DataError, match=r"line 2: field 'doc' must be text or a number, .*NoneType"
    ):
        load_blocks(config, tokenizer, needed=NEEDED)


def test_sources_that_do_not_fit(tokenizer: Any, tmp_path: Path, caplog: Any) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", DOCUMENTS)
    with pytest.raises(DataError, match=r"is a folder; name the files in it, e.g. .*/\*.jsonl"):
        load_blocks(config_for(tmp_path, tmp_path), tokenizer, needed=NEEDED)
    with pytest.raises(DataError, match=r"no such file: org/name; .*one hub data set alone"):
        load_blocks(config_for(tmp_path, source, "org/name"), tokenizer, needed=NEEDED)
    with pytest.raises(ConfigError, match=r"data.source: must name at least one file"):
        load_blocks(config_for(tmp_path), tokenizer, needed=NEEDED)
    with caplog.at_level(logging.WARNING):
        load_blocks(config_for(tmp_path, source, subset="x"), tokenizer, needed=NEEDED)
    assert caplog.messages == ["data: data.subset is for hub data sets and is ignored for files"]


def test_the_same_file_twice_is_read_once(tokenizer: Any, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", DOCUMENTS)
    once = load_blocks(config_for(tmp_path, source), tokenizer, needed=NEEDED)
    twice = config_for(tmp_path, source, tmp_path / "*.jsonl")
    assert rows_of(load_blocks(twice, tokenizer, needed=NEEDED)) == rows_of(once)


def test_missing_zstandard(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "zstandard", None)
    source = tmp_path / "d.jsonl.zst"
    source.write_bytes(b"anything")
    with pytest.raises(DataError, match="needs the zstandard package; run `pip install zstandard`"):
        load_blocks(config_for(tmp_path, source), tokenizer, needed=NEEDED)


class FakeHub:
    """Stands in for a streamed hub data set and counts what is read of it."""

    def __init__(self, column_names: list[str] | None) -> None:
        self.column_names = column_names
        self.num_read = 0

    def load(self, name: str, subset: str | None, *, split: str, streaming: bool) -> "FakeHub":
        assert (name, subset, split, streaming) == ("org/name", "small", "train", True)
        return self

    def select_columns(self, names: list[str]) -> "FakeHub":
        assert names == ["text"]
        return self

    def __iter__(self) -> Any:
        for i in range(10**9):
            self.num_read += 1
            yield {"text": DOCUMENTS[i]} if i < len(DOCUMENTS) else {"text": f"more {i}"}


@pytest.mark.parametrize("columns", [None, ["text", "image"]])
def test_hub_data_set(
    columns: list[str] | None, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = write_jsonl(tmp_path / "d.jsonl", DOCUMENTS)
    expected = load_blocks(config_for(tmp_path, local), tokenizer, needed=NEEDED)
    hub = FakeHub(columns)
    monkeypatch.setattr("datasets.load_dataset", hub.load)
    monkeypatch.setattr(data, "_BATCH_CHARS", 5000)
    config = config_for(tmp_path, "org/name", subset="small")
    blocks = load_blocks(config, tokenizer, needed=NEEDED)
    assert rows_of(blocks) == rows_of(expected)
    assert 0 < hub.num_read < 1000
    monkeypatch.setattr("datasets.load_dataset", no_reading)
    load_blocks(config, tokenizer, needed=NEEDED)


def test_hub_errors(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach 'org/name'\non the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    message = (
        r"hub data set 'org/name' \(subset None, split train\) cannot be read: ConnectionError: "
        r"Couldn't reach 'org/name' on the Hub; check the network and the spelling of the names$"
    )
    with pytest.raises(DataError, match=message):
        load_blocks(config_for(tmp_path, "org/name"), tokenizer, needed=NEEDED)
    monkeypatch.setattr("datasets.load_dataset", FakeHub(["text"]).load)
    config = config_for(tmp_path, "org/name", subset="small", text_field="body")
    with pytest.raises(DataError, match="record 1 must have a field 'body', but has text"):
        load_blocks(config, tokenizer, needed=NEEDED)


def test_token_blocks() -> None:
    tokens = torch.arange(40, dtype=torch.int32).view(5, 8)
    blocks = TokenBlocks(split="bank", tokens=tokens, fingerprint="f")
    assert len(blocks) == 5
    for indices in ([3, 0], torch.tensor([3, 0]), torch.tensor([3, 0], dtype=torch.int32)):
        batch = blocks.batch(indices)
        assert batch.dtype == torch.long
        assert batch[:, 0].tolist() == [24, 0]
    assert blocks.take(47) is blocks
    part = blocks.take(31)
    assert (len(part), part.split, part.tokens[-1, -1]) == (3, "bank", 23)
    assert part.fingerprint not in ("f", blocks.take(32).fingerprint)
    assert part.fingerprint == blocks.take(24).fingerprint
    assert len(blocks.take(0)) == 0
    with pytest.raises(DataError, match="the bank split holds 40 tokens, but 48 are asked for"):
        blocks.take(48)


@pytest.mark.parametrize(("num_blocks", "batch_size"), [(7, 3), (8, 4), (5, 12), (1, 2), (13, 1)])
def test_block_order(num_blocks: int, batch_size: int) -> None:
    order = BlockOrder(num_blocks, batch_size=batch_size, seed=3)
    steps = 4 * num_blocks
    seen = torch.cat([order.indices(step) for step in range(steps)])
    assert seen.dtype == torch.long
    passes = seen[: len(seen) // num_blocks * num_blocks].view(-1, num_blocks)
    assert (passes.sort(dim=1).values == torch.arange(num_blocks)).all()
    if num_blocks > 4:
        assert len({tuple(p.tolist()) for p in passes}) > 1
        other = BlockOrder(num_blocks, batch_size=batch_size, seed=4)
        assert [other.indices(s).tolist() for s in range(9)] != [
            order.indices(s).tolist() for s in range(9)
        ]
    # Taken up anywhere, in any order.
    for step in random.Random(0).sample(range(steps), min(steps, 10)):
        fresh = BlockOrder(num_blocks, batch_size=batch_size, seed=3)
        expected = seen[step * batch_size : (step + 1) * batch_size]
        assert fresh.indices(step).tolist() == order.indices(step).tolist() == expected.tolist()
    assert order.epochs(steps) == steps * batch_size / num_blocks


def test_block_order_leaves_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    BlockOrder(9, batch_size=2, seed=0).indices(0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_block_order_errors() -> None:
    with pytest.raises(ValueError, match=r"`num_blocks >= 1` .*num_blocks=0, batch_size=2"):
        BlockOrder(0, batch_size=2, seed=0)
    with pytest.raises(ValueError, match=r"`step >= 0` must hold, but got \(step=-1\)"):
        BlockOrder(3, batch_size=2, seed=0).indices(-1)


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_while_caching(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tmp_path, write_jsonl(tmp_path / "d.jsonl", DOCUMENTS))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(TrainingError, match=r"cache/\w+/\w+.safetensors: no space left .*MiB"):
            load_blocks(config, tokenizer, needed=NEEDED)
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []
    load_blocks(config, tokenizer, needed=NEEDED)


def test_cache_that_cannot_be_written(tokenizer: Any, tmp_path: Path) -> None:
    config = config_for(tmp_path, write_jsonl(tmp_path / "d.jsonl", DOCUMENTS))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(
        DataError, match=r"data.cache: .* must be a folder that can be written, but"
    ):
        load_blocks(config, tokenizer, needed=NEEDED)


def test_atomic_write(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with atomic_write(path) as beside:
        beside.write_text("one")
        assert beside.parent == path.parent
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(KeyError), atomic_write(path) as beside:
        beside.write_text("two")
        raise KeyError
    assert path.read_text() == "one"
    with pytest.raises(FileNotFoundError), atomic_write(path):
        pass
    assert [p.name for p in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk(number: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    with (
        pytest.raises(TrainingError, match=r"file: no space left to write it \([\d,]+ MiB free\)"),
        atomic_write(path) as beside,
    ):
        beside.write_text("half")
        raise OSError(number, os.strerror(number))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "one"
    with pytest.raises(PermissionError), atomic_write(path):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_full_disk_as_safetensors_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise files.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(TrainingError, match="no space left to write it"):
        save_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(3)})
    assert list(tmp_path.iterdir()) == []


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = {"b": [1, 2.5, None, True], "a": "ü"}
    write_json(path, value)
    assert read_json(path) == value
    assert list(read_json(path)) == ["b", "a"]
    path.write_text('{"a": 1')
    with pytest.raises(DamagedFile, match=r"x.json: must hold JSON, but does not: "):
        read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DamagedFile, match=r"x.json: must hold JSON"):
        read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_tensors(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    tensors["c"] = torch.nn.Parameter(torch.zeros(1))
    save_tensors(path, tensors, {"note": "x"})
    assert load_metadata(path) == {"note": "x"}
    loaded = load_tensors(path)
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    # Like any other new file, so that a shared folder can be read by those who share it.
    plain = tmp_path / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode

    loaded["a"].fill_(7)
    assert torch.equal(load_tensors(path)["a"], tensors["a"])
    for content in (b"", path.read_bytes()[:-1], b"rubbish" * 9):
        path.write_bytes(content)
        with pytest.raises(DamagedFile, match=r"t.safetensors: must hold safetensors, but is dam"):
            load_tensors(path)
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "none.safetensors")
