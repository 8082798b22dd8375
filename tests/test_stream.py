"""Text as a stream: the same blocks as packing everything, exactly resumed, shared out to ranks."""

import gzip
import itertools
import json
import lzma
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
import zstandard
from sample_text import DOCUMENTS, lines_of, make_documents, write_jsonl
from test_data import packed
from tiny_study import make_streamed_study, make_study
from transformers import AutoTokenizer

from mohawk_nas import pipeline, stream
from mohawk_nas.config import DataConfig, SourceConfig, dump, study_from_dict
from mohawk_nas.data import Mixing, load_blocks, split_of
from mohawk_nas.errors import ConfigError, DataError
from mohawk_nas.stream import TextStream

PHI_TINY = Path(__file__).parents[1] / "studies/assets/phi-tiny"
BLOCK = 32


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    # So that windows, chunks and files end at different places.
    monkeypatch.setattr(stream, "_CHUNK_CHARS", 700)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PHI_TINY)


@pytest.fixture
def shards(tmp_path):
    """The same kind of text in every format that is read."""
    parts = [make_documents(60, seed=seed) for seed in range(5)]
    raw = [lines_of([{"text": text} for text in part]) for part in parts]
    write_jsonl(tmp_path / "0.jsonl", parts[0])
    (tmp_path / "1.jsonl.xz").write_bytes(lzma.compress(raw[1]))
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(raw[2]))
    (tmp_path / "3.jsonl.zst").write_bytes(zstandard.compress(raw[3]))
    table = pa.Table.from_pylist([{"text": text} for text in parts[4]])
    pq.write_table(table, tmp_path / "4.parquet", row_group_size=25)
    return tmp_path, list(itertools.chain(*parts))


def config_for(folder, source="[0-9].*", **changes):
    settings = {
        "source": source if isinstance(source, list) else [str(folder / source)],
        "block_size": BLOCK,
        "cache": str(folder / "cache"),
        "streaming": True,
        "shuffle_blocks": 8,
        "workers": 0,
    }
    return DataConfig(**(settings | changes))


def draw(batches, count):
    return torch.stack([batches.next() for _ in range(count)])


def rows(batches):
    return [tuple(row) for row in batches.flatten(0, -2).tolist()]


def test_unshuffled_it_is_the_text_pass_after_pass(shards, tokenizer, caplog):
    folder, documents = shards
    text = TextStream(config_for(folder, shuffle_blocks=1), tokenizer)
    tokens = packed(tokenizer, documents, "bank")
    count = 3 * len(tokens) // (BLOCK * 2) * 2
    batches = text.batches(batch_size=2, seed=0)
    found = draw(batches, count // 2).flatten()
    batches.close()
    assert found.tolist() == (tokens * 4)[: len(found)]
    assert len(found) > 2.9 * len(tokens)
    assert [m for m in caplog.messages if "begins again" in m] == [
        "data: all of data.source has been read; it begins again"
    ]


def test_windows_are_shuffled_by_the_seed(shards, tokenizer):
    folder, _ = shards

    def read(seed, size):
        batches = TextStream(config_for(folder, shuffle_blocks=size), tokenizer).batches(
            batch_size=4, seed=seed
        )
        return rows(draw(batches, 10))

    plain, one, other = read(0, 1), read(0, 8), read(1, 8)
    assert one == read(0, 8)
    assert len({tuple(plain), tuple(one), tuple(other)}) == 3
    for start in range(0, 40, 8):
        window = sorted(plain[start : start + 8])
        assert sorted(one[start : start + 8]) == sorted(other[start : start + 8]) == window
    # Not the same order in each window.
    orders = {tuple(plain[s : s + 8].index(row) for row in one[s : s + 8]) for s in range(0, 40, 8)}
    assert len(orders) > 1


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_anywhere_it_goes_on_as_unbroken(shards, tokenizer, workers):
    folder, _ = shards
    text = TextStream(config_for(folder, workers=workers), tokenizer)
    whole = text.batches(batch_size=7, seed=5)
    states, expected = [], []
    # Well into the second pass.
    for _ in range(150):
        states.append(json.loads(json.dumps(whole.state_dict())))
        expected.append(whole.next())
    whole.close()
    assert states[-1]["parts"][0]["passes"] == 1
    again = text.batches(batch_size=7, seed=5)
    # Every kind of place without workers: starting them takes its time.
    for step in range(150) if not workers else (1, 77):
        again.load_state_dict(states[step])
        assert again.state_dict() == states[step]
        for later in range(step, min(step + 8, 150)):
            assert torch.equal(again.next(), expected[later]), (step, later)
    again.close()


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_see_disjoint_shares_of_the_stream_of_one(shards, tokenizer, world):
    folder, _ = shards
    text = TextStream(config_for(folder), tokenizer)

    def share(rank, world, batch_size, count):
        batches = text.batches(batch_size=batch_size, seed=1, rank=rank, world=world)
        return draw(batches, count), batches.state_dict()

    one, state = share(0, 1, 4 * world, 12)
    several = [share(rank, world, 4, 12) for rank in range(world)]
    assert torch.equal(torch.cat([found for found, _ in several], dim=1), one)
    assert all(found == state for _, found in several)
    assert len(set(rows(one))) == one.numel() // BLOCK
    # Another number of ranks goes on where these stopped.
    alone = text.batches(batch_size=2, seed=1)
    alone.load_state_dict(state)
    whole = text.batches(batch_size=2, seed=1)
    draw(whole, 12 * 2 * world)
    assert torch.equal(draw(alone, 5), draw(whole, 5))


def test_held_out_documents_are_never_trained_on(shards, tokenizer):
    folder, documents = shards
    config = config_for(folder, block_size=160)
    needed = {"search": 640, "validation": 640, "test": 640}
    held_out = load_blocks(config, tokenizer, needed=needed)
    batches = TextStream(config, tokenizer).batches(batch_size=8, seed=0)
    passes = 0
    seen = set()
    while passes < 2:
        seen.update(rows(batches.next()))
        passes = batches.state_dict()["parts"][0]["passes"]
    trained = set()
    for row in seen:
        # The first and last ones may be cut.
        trained.update(tokenizer.decode(list(row)).split(tokenizer.eos_token)[1:-1])
    assert len(trained) > 50 and trained <= {d for d in documents if split_of(d) == "bank"}
    for split, blocks in held_out.items():
        # Blocks are so long here that no document is more than its share.
        expected = packed(tokenizer, documents, split)[:640]
        assert blocks.tokens.flatten().tolist() == expected
        assert not {tuple(row) for row in blocks.tokens.tolist()} & seen


def test_blocks_of_a_pass_are_those_of_the_bank_split(shards, tokenizer):
    folder, documents = shards
    config = config_for(folder)
    count = len(packed(tokenizer, documents, "bank")) // BLOCK // 8 * 8
    blocks = load_blocks(config, tokenizer, needed={"bank": count * BLOCK})["bank"]
    batches = TextStream(config, tokenizer).batches(batch_size=8, seed=0)
    assert sorted(rows(draw(batches, count // 8))) == sorted(map(tuple, blocks.tokens.tolist()))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_keeps_to_its_weights(tmp_path, tokenizer, streaming):
    prose = write_jsonl(tmp_path / "prose.jsonl", make_documents(400))
    lines = [{"body": f"lookup {i}: " + "7 " * 40, "doc": i // 2} for i in range(800)]
    (tmp_path / "lookups.jsonl").write_bytes(lines_of(lines))
    config = DataConfig(
        mixture=[
            SourceConfig(source=[str(prose)], weight=3),
            SourceConfig(
                source=[str(tmp_path / "lookups.jsonl")],
                weight=1,
                text_field="body",
                document_field="doc",
            ),
        ],
        block_size=BLOCK,
        cache=str(tmp_path / "cache"),
        streaming=streaming,
        shuffle_blocks=8,
        workers=0,
    )
    needed = {"bank": 100 * BLOCK, "search": 20 * BLOCK, "test": 20 * BLOCK}
    blocks = load_blocks(config, tokenizer, needed=needed)
    alone = [load_blocks(part, tokenizer, needed=needed) for _, part in config.parts]
    for split, found in blocks.items():
        count = len(found)
        lookups = [
            i for i, row in enumerate(rows(found.tokens)) if row in rows(alone[1][split].tokens)
        ]
        assert len(lookups) == count // 4
        # Evenly spread, each part in its own order.
        assert all(4 * n <= i < 4 * n + 4 for n, i in enumerate(lookups))
        assert found.tokens[lookups].equal(alone[1][split].tokens[: count // 4])
        others = [i for i in range(count) if i not in lookups]
        assert found.tokens[others].equal(alone[0][split].tokens[: len(others)])
    if streaming:
        text = TextStream(config, tokenizer)
        batches = text.batches(batch_size=4, seed=0)
        states, found = [], []
        for _ in range(25):
            states.append(batches.state_dict())
            found.append(batches.next())
        assert sorted(rows(torch.cat(found))[:96]) == sorted(rows(blocks["bank"].tokens)[:96])
        for step in range(25):
            batches.load_state_dict(states[step])
            assert torch.equal(batches.next(), found[step])


def test_a_part_that_is_short_is_repeated_in_the_bank_only(tmp_path, tokenizer, caplog):
    sources = [
        write_jsonl(tmp_path / f"{i}.jsonl", make_documents(count, seed=i))
        for i, count in enumerate((300, 30))
    ]
    config = DataConfig(
        mixture=[SourceConfig(source=[str(path)], weight=1) for path in sources],
        block_size=BLOCK,
        cache=str(tmp_path / "cache"),
    )
    bank = load_blocks(config, tokenizer, needed={"bank": 200 * BLOCK})["bank"]
    unique = {tuple(row) for row in bank.tokens[1::2].tolist()}
    assert len(bank) == 200 and len(unique) < 60
    assert len({tuple(row) for row in bank.tokens[::2].tolist()}) == 100
    assert "data.mixture[1].source holds" in caplog.text and "are repeated" in caplog.text
    # More than either holds: the longer one is gone through once.
    longer = load_blocks(config, tokenizer, needed={"bank": 20_000 * BLOCK})["bank"]
    assert 400 < len(longer) < 20_000
    assert len({tuple(row) for row in longer.tokens[::2].tolist()}) == len(longer.tokens[::2])
    with pytest.raises(DataError, match=r"^data\.mixture\[1\]\.source: too little text for test"):
        load_blocks(config, tokenizer, needed={"test": 60 * BLOCK})


def test_parts_take_turns_by_weight():
    mixing = Mixing([0.85, 0.15])
    order = [mixing.next() for _ in range(1000)]
    assert mixing.taken == [850, 150]
    for end in range(1, 1001):
        assert abs(order[:end].count(1) - 0.15 * end) <= 1
    again = Mixing([17, 3], [order[:333].count(part) for part in (0, 1)])
    assert [again.next() for _ in range(667)] == order[333:]


def test_errors_of_a_part_name_it(tmp_path, tokenizer):
    good = SourceConfig(source=[str(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS))])
    missing = SourceConfig(source=["no/b.jsonl"])
    with pytest.raises(ConfigError, match=r"^data\.mixture\[1\]\.source: no such file: no/b"):
        TextStream(DataConfig(mixture=[good, missing], block_size=BLOCK), tokenizer)
    other = SourceConfig(source=good.source, text_field="body")
    for config in (
        DataConfig(mixture=[good, other], block_size=BLOCK, workers=0),
        DataConfig(mixture=[good, other], block_size=BLOCK, workers=1),
    ):
        batches = TextStream(config, tokenizer).batches(batch_size=2, seed=0)
        with pytest.raises(
            DataError, match=r"a field 'body', but .* in data\.mixture\[1\]\.text_f"
        ):
            batches.next()
        batches.close()


def test_a_position_in_another_text_is_refused(shards, tokenizer):
    folder, _ = shards
    state = TextStream(config_for(folder), tokenizer).batches(batch_size=2, seed=0).state_dict()
    other = TextStream(config_for(folder, shuffle_blocks=4), tokenizer)
    with pytest.raises(DataError, match="was taken in another text"):
        other.batches(batch_size=2, seed=0).load_state_dict(state)


def test_text_without_a_bank_document(tmp_path, tokenizer):
    documents = [d for d in DOCUMENTS if split_of(d) == "test"]
    text = TextStream(config_for(tmp_path, write_jsonl(tmp_path / "0.jsonl", documents)), tokenizer)
    with pytest.raises(DataError, match=r"data\.source: must hold documents for the bank split"):
        text.batches(batch_size=2, seed=0).next()


def test_closing_leaves_no_process_and_no_thread(shards, tokenizer):
    folder, _ = shards

    def running():
        # Beside these the library has threads of its own, which end when they get to it.
        readers = [t for t in threading.enumerate() if t.name == "reads text"]
        return set(multiprocessing.active_children()), readers

    before = running()
    batches = TextStream(config_for(folder, workers=1), tokenizer).batches(batch_size=2, seed=0)
    batches.next()
    assert running()[0] > before[0] and len(running()[1]) == 1
    batches.close()
    assert running() == before == (before[0], [])


def test_records_of_one_document_stay_together_across_chunks(tmp_path, tokenizer):
    records = [{"text": f"part {i} of {i // 40}. " * 4, "doc": i // 40} for i in range(400)]
    source = tmp_path / "0.jsonl"
    source.write_bytes(lines_of(records))
    config = config_for(tmp_path, document_field="doc", shuffle_blocks=1)
    expected = []
    for name in range(10):
        if split_of(str(name)) == "bank":
            expected.append(tokenizer.eos_token_id)
            for record in records[40 * name : 40 * name + 40]:
                expected += tokenizer.encode(record["text"])
    batches = TextStream(config, tokenizer).batches(batch_size=1, seed=0)
    found = []
    for number in range(len(expected) // BLOCK):
        # Taken up again now and then.
        if number % 7 == 3:
            batches.load_state_dict(json.loads(json.dumps(batches.state_dict())))
        found += batches.next().flatten().tolist()
    assert found == expected[: len(found)]


def test_a_hub_data_set_is_resumed(shards, tokenizer, monkeypatch):
    folder, _ = shards
    files = []
    for seed in range(3):
        table = pa.Table.from_pylist([{"text": t, "id": 1} for t in make_documents(50, seed=seed)])
        files.append(str(folder / f"hub-{seed}.parquet"))
        pq.write_table(table, files[-1], row_group_size=20)
    import datasets

    real, calls = datasets.load_dataset, []

    def from_hub(name, subset, *, split, streaming):
        # What the library gives for a data set of Parquet files, wherever they are.
        calls.append((name, subset))
        return real("parquet", data_files=files, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    config = config_for(folder, source=["org/name"], subset="small")
    text = TextStream(config, tokenizer)
    whole = text.batches(batch_size=8, seed=0)
    states, expected = [], []
    for _ in range(60):
        states.append(json.loads(json.dumps(whole.state_dict())))
        expected.append(whole.next())
    assert states[-1]["parts"][0]["passes"] >= 1 and set(calls) == {("org/name", "small")}
    assert any("rows" in (state["parts"][0]["reading"] or {}) for state in states)
    for step in range(0, 60, 7):
        whole.load_state_dict(states[step])
        assert torch.equal(whole.next(), expected[step]), step
    blocks = load_blocks(config, tokenizer, needed={"bank": 320, "test": 64})
    assert len(blocks["bank"]) == 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_workers_end_with_a_process_that_is_killed(tmp_path, tokenizer, monkeypatch):
    # More than a pipe holds, so that the worker is stuck with what nobody reads.
    monkeypatch.setattr(stream, "_CHUNK_CHARS", 300_000)
    write_jsonl(tmp_path / "0.jsonl", make_documents(8000))
    text = TextStream(config_for(tmp_path, workers=1), tokenizer)

    def killed():
        text.batches(batch_size=2, seed=0).next()
        (worker,) = multiprocessing.active_children()
        (tmp_path / "worker").write_text(str(worker.pid))
        os.kill(os.getpid(), signal.SIGKILL)

    child = multiprocessing.get_context("fork").Process(target=killed)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    worker = int((tmp_path / "worker").read_text())
    until = time.monotonic() + 20
    while is_running(worker):
        assert time.monotonic() < until, "the worker outlives its parent"
        time.sleep(0.1)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # Where nobody collects orphans, a dead one is still in the list.
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a forked process cannot use CUDA")
def test_a_distillation_that_is_killed_ends_as_an_unbroken_one(tmp_path):
    """Stages 2 and 3 on a mixture that is streamed, with a worker."""

    def study(name):
        return make_streamed_study(
            tmp_path,
            f"output={tmp_path / name}",
            "distill.hidden={tokens: 512, batch_size: 4}",
        )

    def run(name, at=None):
        # A batch each step of either stage, 8 and 10 of them.
        taken, real = itertools.count(1), stream._StreamBatches.next

        def next_or_die(self):
            if next(taken) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self)

        stream._StreamBatches.next = next_or_die
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump(study(name)), encoding="utf-8")
        best = pipeline.choose_layout(path)
        pipeline.write_given(best)
        pipeline.distill(best)

    write_jsonl(tmp_path / "more.jsonl", DOCUMENTS)
    context = multiprocessing.get_context("fork")
    ends = []
    kills = [("broken", at) for at in (6, 7, 5)]
    for name, at in [("whole", None), *kills, ("broken", None)]:
        child = context.Process(target=run, args=(name, at))
        child.start()
        child.join()
        ends.append(child.exitcode)
    assert ends == [0, *[-signal.SIGKILL] * 3, 0]
    whole, broken = (tmp_path / name / "tiny/distill" for name in ("whole", "broken"))
    for file in ("model/model.safetensors", "log.jsonl"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes(), file
    assert len((whole / "log.jsonl").read_text().splitlines()) == 10


def test_what_is_wrong_with_a_mixture_is_told_at_once(tmp_path):
    def problems(mixture, *overrides):
        with pytest.raises(ConfigError) as caught:
            make_study(tmp_path, f"data.mixture={mixture}", *overrides)
        return caught.value.problems

    assert problems("[{sorce: a.txt}, 5, {source: b.txt, weight: much}]", "data.source=[]") == [
        "data.mixture[0].sorce: unknown option. Did you mean 'source'?",
        "data.mixture[1]: must be a mapping with `source` and `weight`, got 5",
        "data.mixture[2].weight: Value 'much' of type 'str' could not be converted to Float",
    ]
    assert problems("[{source: a.txt, weight: 0}, {weight: 1}]") == [
        "data.mixture: data.source is given as well; give one of the two",
        "data.mixture[0].weight: must be above 0, but got 0.0",
        "data.mixture[1].source: must name at least one file or data set",
    ]
    text = write_jsonl(tmp_path / "text.jsonl", DOCUMENTS)
    study = make_study(tmp_path, "data.mixture=[{source: text.jsonl}]", "data.source=[]")
    assert study.data.mixture[0].source == [str(Path.cwd() / "text.jsonl")]
    assert study_from_dict(yaml.safe_load(dump(study))) == study
    (tmp_path / "a.yaml").write_text(dump(make_study(tmp_path)), encoding="utf-8")
    raw = yaml.safe_load((tmp_path / "a.yaml").read_text())
    raw["data"] |= {"source": [], "mixture": [{"source": "text.jsonl", "weight": 2}]}
    located = study_from_dict(raw, base=tmp_path)
    assert located.data.names == [str(text.resolve())]
