import gzip
import itertools
import json
import logging
import lzma
import random
import re
import socket
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from sample_text import DOCUMENTS, lines_of, write_jsonl

from mohawk_nas.config import DataConfig
from mohawk_nas.documents import Corpus, Document
from mohawk_nas.errors import ConfigError, DataError


def config_for(*sources: Path | str, **changes: Any) -> DataConfig:
    return DataConfig(source=[str(source) for source in sources], **changes)


def read(*sources: Path | str, **changes: Any) -> list[Document]:
    with Corpus.find(config_for(*sources, **changes)).reading() as documents:
        return list(documents)


def texts(*sources: Path | str, **changes: Any) -> list[str]:
    return [document.text for document in read(*sources, **changes)]


@pytest.mark.parametrize("kind", ["jsonl", "xz", "gz", "zst", "parquet", "txt", "mixed"])
def test_every_format_gives_the_same_documents(kind: str, tmp_path: Path) -> None:
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

    assert read(*source) == [Document(text, None) for text in DOCUMENTS]
    assert Corpus.find(config_for(*source)).has_text_files == (kind in ("txt", "mixed"))


def test_documents_are_named_by_a_field(tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    source.write_bytes(lines_of([{"body": "a", "doc": 7}, {"body": "b", "doc": "x"}]))
    found = read(source, text_field="body", document_field="doc")
    assert found == [Document("a", "7"), Document("b", "x")]
    assert [document.key for document in found] == ["7", "x"]
    assert read(source, text_field="body")[0].key == "a"


def test_records_of_every_shape(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records: list[Any] = [{"text": "2020-01-01 00:00:00"}, {"text": None}, {"text": ""}]
    records += [{"text": text, f"field_{i % 7}": {"x": i}} for i, text in enumerate(DOCUMENTS)]
    source = tmp_path / "d.jsonl"
    half_pair = b'{"text": "half \\ud83d pair"}\n'
    source.write_bytes(b"\xef\xbb\xbf" + half_pair + b"\n" + lines_of(records))
    with caplog.at_level(logging.INFO, "mohawk_nas"):
        found = texts(source)
    half = "half \N{REPLACEMENT CHARACTER} pair"
    assert found == [half, "2020-01-01 00:00:00", *DOCUMENTS]
    assert caplog.messages == [f"data: skipped 2 records without text; data.source: {source}"]


def test_identity_follows_the_content(tmp_path: Path) -> None:
    one = write_jsonl(tmp_path / "one.jsonl", DOCUMENTS)

    def identity(*sources: Path | str, **changes: Any) -> Any:
        return json.loads(json.dumps(Corpus.find(config_for(*sources, **changes)).identity()))

    before = identity(one)
    (tmp_path / "moved").mkdir()
    assert identity(write_jsonl(tmp_path / "moved/one.jsonl", DOCUMENTS)) == before
    write_jsonl(one, DOCUMENTS[1:])
    assert identity(one) != before
    assert identity("org/name", subset="small") == {
        "name": "org/name",
        "subset": "small",
        "split": "train",
    }
    assert Corpus.find(config_for(one)).names == [str(one)]
    assert Corpus.find(config_for("org/name")).names == ["org/name"]


def test_local_files_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def refuse(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    assert len(read(write_jsonl(tmp_path / "d.jsonl", DOCUMENTS))) == len(DOCUMENTS)
    assert asked == []
    assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS is True
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize(
    "entry", ["missing.jsonl", "missing/*.txt", "./org/name", "data/part.parquet", "a b", "/no/x"]
)
def test_missing_files(entry: str) -> None:
    with pytest.raises(ConfigError, match=f"no such file: {re.escape(entry)}; name a file"):
        Corpus.find(config_for(entry))


def test_sources_that_do_not_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", DOCUMENTS)
    (tmp_path / "a.csv").write_text("text\na")
    (tmp_path / "a.parquet.gz").write_bytes(b"rubbish")
    with pytest.raises(ConfigError) as caught:
        Corpus.find(config_for(tmp_path, "org/name", source, tmp_path / "a.*"))
    kinds = (
        "must be text (.txt, .text, .md) or JSON lines (.jsonl, .ndjson, .json), as it is or with "
        ".gz, .xz, .zst, or .parquet; rename or convert it"
    )
    assert caught.value.problems == [
        f"data.source: {tmp_path} is a folder; name the files in it, e.g. {tmp_path}/*.jsonl",
        "data.source: no such file: org/name; name a file, a glob that matches some, or one hub "
        "data set alone",
        f"data.source: {tmp_path}/a.csv {kinds}",
        f"data.source: {tmp_path}/a.parquet.gz {kinds}",
    ]
    with pytest.raises(ConfigError, match=r"data.source: must name at least one file"):
        Corpus.find(config_for())
    with caplog.at_level(logging.WARNING):
        read(source, subset="x")
    assert caplog.messages == ["data: data.subset is for hub data sets and is ignored for files"]


def test_the_same_file_twice_is_read_once(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", DOCUMENTS)
    assert texts(source, tmp_path / "*.jsonl") == DOCUMENTS


def refuse(content: bytes, name: str, message: str, folder: Path) -> None:
    path = folder / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        corpus = Corpus.find(config_for(path))
        corpus.identity()
        with corpus.reading() as documents:
            list(documents)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "must hold text, but is empty; leave it out"),
        ("a.txt", b" \n", "must hold text, but is empty; leave it out"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "must hold text, but is empty; leave it out"),
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
        ("a.parquet", b"PAR1 rubbish", "cannot be read: ArrowInvalid: .*; the file is damaged or"),
        ("a.jsonl.gz", b"rubbish", "cannot be read: BadGzipFile: .*; the file is damaged or"),
        ("a.jsonl.xz", b"rubbish", "cannot be read: LZMAError: .*; the file is damaged or"),
        ("a.jsonl.zst", b"rubbish", "cannot be read: ZstdError: .*; the file is damaged or"),
    ],
)
def test_bad_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    refuse(content, name, message, tmp_path)


@pytest.mark.parametrize("kind", ["gz", "xz", "zst", "parquet"])
@pytest.mark.parametrize("stem", ["d.txt", "d.jsonl"])
def test_files_cut_short(
    kind: str, stem: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
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
    refuse(content[: len(content) * 2 // 3], f"{stem}.{kind}", message, tmp_path)
    assert capfd.readouterr() == ("", "")


def test_the_bad_one_of_many_files_is_named(tmp_path: Path) -> None:
    for i, text in enumerate(DOCUMENTS[:9]):
        (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / "5.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"[\\/]5.txt must be text in UTF-8"):
        read(tmp_path / "*.txt")


def test_parquet_errors(tmp_path: Path) -> None:
    source = tmp_path / "d.parquet"
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), source)
    with pytest.raises(DataError, match=r"d.parquet must have a field 'text', but has body, id; "):
        read(source)
    pq.write_table(pa.table({"text": ["a"], "id": [1]}), source)
    with pytest.raises(DataError, match=r"a field 'doc', but has text, id; .*document_field"):
        read(source, document_field="doc")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), source)
    with pytest.raises(DataError, match="must hold text, but no record has any in field 'text'"):
        read(source)
    pq.write_table(pa.table({"text": [b"a"]}), source)
    with pytest.raises(DataError, match=r"record 1: field 'text' must be text, .* type bytes"):
        read(source)


def test_document_field_must_name(tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    source.write_bytes(lines_of([{"text": "a", "doc": 1}, {"text": "b", "doc": None}]))
    with pytest.raises(
        DataError, match=r"line 2: field 'doc' must be text or a number, .*NoneType"
    ):
        read(source, document_field="doc")


def test_missing_zstandard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    source = tmp_path / "d.jsonl.zst"
    source.write_bytes(b"anything")
    with pytest.raises(DataError, match="needs the zstandard package; run `pip install zstandard`"):
        read(source)


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
        for i in itertools.count():
            self.num_read += 1
            yield {"text": DOCUMENTS[i]}


@pytest.mark.parametrize("columns", [None, ["text", "image"]])
def test_hub_data_set(columns: list[str] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub(columns)
    monkeypatch.setattr("datasets.load_dataset", hub.load)
    with Corpus.find(config_for("org/name", subset="small")).reading() as documents:
        found = [document.text for document in itertools.islice(documents, 50)]
    assert found == DOCUMENTS[:50]
    assert hub.num_read == 50


def test_hub_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("Couldn't reach 'org/name'\non the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    message = (
        r"hub data set 'org/name' \(subset None, split train\) cannot be read: ConnectionError: "
        r"Couldn't reach 'org/name' on the Hub; check the network and the spelling of the names$"
    )
    with pytest.raises(DataError, match=message):
        read("org/name")
    monkeypatch.setattr("datasets.load_dataset", FakeHub(["text"]).load)
    with pytest.raises(DataError, match="record 1 must have a field 'body', but has text"):
        read("org/name", subset="small", text_field="body")
