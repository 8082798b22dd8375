import errno
import gzip
import logging
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sample_text import DOCUMENTS, lines_of, make_documents, write_jsonl
from transformers import AutoTokenizer

from mohawk_nas import data
from mohawk_nas.config import DataConfig
from mohawk_nas.data import SPLITS, BlockOrder, TokenBlocks, load_blocks, split_of
from mohawk_nas.errors import ConfigError, DataError, TrainingError
from mohawk_nas.files import read_json, save_tensors, write_json

PHI_TINY = Path(__file__).parents[1] / "studies/assets/phi-tiny"
BLOCK = 32
NEEDED = {"bank": 1600, "search": 96, "validation": 64, "test": 64}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(PHI_TINY)


def config_for(folder: Path, *sources: Path | str, **changes: Any) -> DataConfig:
    settings: dict[str, Any] = {
        "source": [str(source) for source in sources],
        "block_size": BLOCK,
        "cache": str(folder / "cache"),
    }
    return DataConfig(**(settings | changes))


def packed(
    tokenizer: Any, documents: list[str], split: str, wanted: int | None = None
) -> list[int]:
    """The plain twin: a share of one document after another, each behind a separator.

    None wants all of each.
    """
    share = wanted
    if wanted is not None and split != "bank":
        share = max(2 * BLOCK, wanted // 32)
    rests = [
        tokenizer.encode(text, add_special_tokens=False)
        for text in documents
        if split_of(text) == split
    ]
    tokens: list[int] = []
    while rests:
        for rest in rests:
            tokens += [tokenizer.eos_token_id, *rest[:share]]
        rests = [] if share is None else [rest[share:] for rest in rests if rest[share:]]
    return tokens[:wanted]


def rows_of(blocks: dict[str, TokenBlocks]) -> dict[str, list[list[int]]]:
    return {split: b.batch(range(len(b))).tolist() for split, b in blocks.items()}


def test_documents_are_packed_by_split(tokenizer: Any, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", DOCUMENTS)
    blocks = load_blocks(config_for(tmp_path, source), tokenizer, needed=NEEDED)
    for split, tokens in NEEDED.items():
        assert blocks[split].split == split
        assert blocks[split].tokens.dtype == torch.int32
        assert blocks[split].tokens.shape == (tokens // BLOCK, BLOCK)
        expected = packed(tokenizer, DOCUMENTS, split, tokens)
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
            owners = {split_of(document) for document in documents if text in document}
            # Documents begin with their number, and what is left of them may be a word or two.
            assert owners == {split} if re.match(r"\d+ of", text) else split in owners
            seen[text] = split
    assert set(seen.values()) == set(SPLITS)


def test_a_small_split_is_of_many_documents(tokenizer: Any, tmp_path: Path) -> None:
    documents = [" ".join(make_documents(30, seed=i)) for i in range(150)]
    source = write_jsonl(tmp_path / "d.jsonl", documents)
    needed = {"search": 8 * 2 * BLOCK, "bank": 8 * 2 * BLOCK}
    blocks = load_blocks(config_for(tmp_path, source), tokenizer, needed=needed)
    found = {
        split: [document for document in documents if split_of(document) == split]
        for split in needed
    }
    starts = {
        split: sum(
            tokenizer.encode(document, add_special_tokens=False)[:20]
            in [tokens[i : i + 20] for i in range(len(tokens) - 19)]
            for document in found[split]
        )
        for split in needed
        if (tokens := blocks[split].tokens.flatten().tolist())
    }
    assert len(tokenizer.encode(documents[0])) > needed["bank"]
    assert starts["bank"] == 1
    # A separator each: eight shares and the beginning of none.
    assert starts["search"] == min(8, len(found["search"])) > 4


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
        expected = packed(tokenizer, before + DOCUMENTS, split, 320)
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
    long = [" ".join(make_documents(20, seed=i)) for i in range(60)]
    documents = [*make_documents(40), *long, "x" * 999]
    source = write_jsonl(tmp_path / "d.jsonl", documents)
    monkeypatch.setattr(data, "_BATCH_CHARS", batch)
    monkeypatch.setattr(data, "_PIECE_CHARS", piece)
    needed = {"bank": 10**6, "search": 4 * BLOCK}
    found = load_blocks(config_for(tmp_path, source), tokenizer, needed=needed)
    blocks = found["bank"]
    expected = packed(tokenizer, documents[:-1], "bank", needed["bank"])
    count = (len(expected) // BLOCK - 1) * BLOCK
    search = packed(tokenizer, documents, "search", needed["search"])
    assert found["search"].tokens.flatten().tolist() == search
    assert blocks.tokens.flatten().tolist()[:count] == expected[:count]
    assert "".join(data.pieces(documents[-1])) == documents[-1]


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
    with pytest.raises(DataError, match=r"for bank \(.*: add documents .*; a text file is one"):
        load_blocks(config_for(tmp_path, tmp_path / "one.txt"), tokenizer, needed=everything)
    with pytest.raises(DataError, match=r"search.tokens: must hold at least one block of 32"):
        load_blocks(config_for(tmp_path, source), tokenizer, needed={"search": 31})
    with pytest.raises(ValueError, match=r"a split must be one of bank, .*'train'"):
        load_blocks(config_for(tmp_path, source), tokenizer, needed={"train": 64})
    nothing = load_blocks(config_for(tmp_path, source), tokenizer, needed={"bank": 0})["bank"]
    assert len(nothing) == 0


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


def test_block_order_leaves_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    BlockOrder(9, batch_size=2, seed=0).indices(0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_block_order_errors() -> None:
    with pytest.raises(ValueError, match=r"`num_blocks >= 1` .*num_blocks=0, batch_size=2"):
        BlockOrder(0, batch_size=2, seed=0)
    with pytest.raises(ValueError, match=r"`step >= 0` must hold, but got \(step=-1\)"):
        BlockOrder(3, batch_size=2, seed=0).indices(-1)


def test_a_file_that_cannot_be_read_leaves_no_cache(tokenizer: Any, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", DOCUMENTS)
    with source.open("ab") as stream:
        stream.write(b"not JSON\n")
    for needed in ({"bank": 10**6}, {"search": 10**6}):
        with pytest.raises(DataError, match=r"d.jsonl: line 151 must be one JSON object"):
            load_blocks(config_for(tmp_path, source), tokenizer, needed=needed)
    assert [p.name for p in tmp_path.iterdir()] == ["d.jsonl"]


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
