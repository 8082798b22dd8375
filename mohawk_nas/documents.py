"""Documents of a study's text, read from local files or from a data set on the hub.

Both are streamed by the ``datasets`` library, one document at a time. Whatever is wrong with a
file is told with its path and, where it has one, the line or the record.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mohawk_nas.config import DataConfig
from mohawk_nas.errors import ConfigError, DataError, MohawkError

__all__ = ["Corpus", "Document", "Reading", "SourceFile", "quiet_datasets"]

logger = logging.getLogger(__name__)

_KINDS: dict[str, Literal["text", "json", "parquet"]] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
}
_COMPRESSED = (".gz", ".xz", ".zst")
_SAMPLE = 65_536


class Document(NamedTuple):
    """One text."""

    text: str
    name: str | None
    """None where the record is the whole document; else records of one name belong together."""

    @property
    def key(self) -> str:
        """What stands for the document when documents are divided: its name, or its text."""
        return self.text if self.name is None else self.name


class SourceFile(NamedTuple):
    """A local file of documents."""

    path: Path
    kind: Literal["text", "json", "parquet"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """The text that a study names: local files, or one hub data set."""

    config: DataConfig
    files: tuple[SourceFile, ...]
    """In the order given, each once, those of a glob sorted; none for a hub data set."""

    @classmethod
    def find(cls, config: DataConfig) -> Corpus:
        """Look for what ``data.source`` names, without reading it.

        Raises:
            ConfigError: Every entry that is no file, or of a kind that cannot be read.
        """
        return cls(config=config, files=tuple(_find_files(config)))

    @property
    def names(self) -> list[str]:
        """Paths of the files, or the data set's name."""
        return [str(file.path) for file in self.files] or list(self.config.source)

    @property
    def has_text_files(self) -> bool:
        """Whether some files are plain text, in which a whole file is one document."""
        return any(file.kind == "text" for file in self.files)

    def identity(
        self, *, sampled: bool = False
    ) -> list[dict[str, str | int]] | dict[str, str | None]:
        """What the documents depend on, as JSON: the files' content, or the data set's name.

        Args:
            sampled: Take a file's size and a little of its beginning and end for its content:
                files that are streamed are too large to be read for this.

        Raises:
            DataError: A file is empty or cannot be read.
        """
        if self.files:
            return [_content(file, sampled=sampled) for file in self.files]
        config = self.config
        return {"name": config.source[0], "subset": config.subset, "split": config.split}

    @contextlib.contextmanager
    def reading(self) -> Iterator[Iterator[Document]]:
        """Every record that holds text, in order, for the length of a ``with`` block.

        Raises:
            DataError: While the documents are drawn: a file or a record is not what it must be.
        """
        with quiet_datasets(local=bool(self.files)):
            yield self.read()

    def read(self, after: Mapping[str, Any] | None = None) -> Reading:
        """What :meth:`reading` yields, for those who see to the library's messages themselves.

        Args:
            after: Go on behind the document at which :meth:`Reading.position` said this.
        """
        if self.files and self.config.subset is not None:
            logger.warning("data: data.subset is for hub data sets and is ignored for files")
        return Reading(self.config, self.files, after)


class Reading(Iterator[Document]):
    """Every record of a corpus that holds text, in order, and where the last one stands."""

    def __init__(
        self, config: DataConfig, files: Sequence[SourceFile], after: Mapping[str, Any] | None
    ) -> None:
        self._after: Mapping[str, Any] = after or {}
        self._file, self._record = self._after.get("file", 0), self._after.get("record", 0)
        self._rows: Any = None
        self._documents = self._read(config, files)

    def __next__(self) -> Document:
        return next(self._documents)

    def position(self) -> dict[str, Any]:
        """Where the document that was drawn last stands, as JSON; another reading goes on there."""
        if self._rows is not None:
            return {"rows": self._rows.state_dict()}
        return {"file": self._file, "record": self._record}

    def _read(self, config: DataConfig, files: Sequence[SourceFile]) -> Iterator[Document]:
        if not files:
            where = f"data.source: hub data set {config.source[0]!r}"
            yield from _read(self._hub_records(config, where), config, where=where, unit="record")
        first = self._file
        numbered = list(enumerate(files))[first:]
        for kind, group in itertools.groupby(numbered, key=lambda entry: entry[1].kind):
            entries = [(number, file.path) for number, file in group]
            if kind == "text":
                yield from self._whole_files(entries)
                continue
            for number, path in entries:
                done = self._record if number == first else 0
                where = f"data.source: {path}"
                records = (
                    _json_records(path, where, after=done)
                    if kind == "json"
                    else _parquet_records(path, config, where, after=done)
                )
                unit = "line" if kind == "json" else "record"
                records = self._noted(number, records)
                yield from _read(records, config, where=where, unit=unit, resumed=done > 0)

    def _noted(self, file: int, records: _Records) -> _Records:
        for number, record in records:
            self._file, self._record = file, number
            yield number, record

    def _whole_files(self, entries: Sequence[tuple[int, Path]]) -> Iterator[Document]:
        if entries[0][0] == self._file and self._record:
            entries = entries[1:]
        for (number, _), document in zip(
            entries, _text_documents([path for _, path in entries]), strict=True
        ):
            self._file, self._record = number, 1
            yield document

    def _hub_records(self, config: DataConfig, where: str) -> _Records:
        import datasets

        try:
            rows = datasets.load_dataset(
                config.source[0], config.subset, split=config.split, streaming=True
            )
            known = rows.column_names
            if known is not None and set(_fields(config)) <= set(known):
                # Images and audio beside the text would be decoded.
                rows = rows.select_columns(_fields(config))
            if "rows" in self._after:
                rows.load_state_dict(self._after["rows"])
            self._rows = rows
            yield from enumerate(rows, 1)
        # The library hands on whatever its HTTP client and the formats raise.
        except Exception as e:
            raise DataError(
                f"{where} (subset {config.subset}, split {config.split}) cannot be read: "
                f"{_one_line(e)}; check the network and the spelling of the names"
            ) from e


def _find_files(config: DataConfig) -> list[SourceFile]:
    if not config.source:
        raise ConfigError("data.source: must name at least one file or data set")
    if len(config.source) == 1 and _may_be_hub_name(config.source[0]):
        return []
    found: dict[Path, SourceFile] = {}
    problems: list[str] = []
    for entry in config.source:
        path = Path(entry).expanduser()
        if path.is_dir():
            problems.append(
                f"data.source: {entry} is a folder; name the files in it, e.g. {entry}/*.jsonl"
            )
            continue
        matches = _matches(path)
        if not matches:
            problems.append(
                f"data.source: no such file: {entry}; name a file, a glob that matches some, "
                "or one hub data set alone"
            )
        for match in matches:
            if (kind := _kind(match)) is not None:
                found.setdefault(match.resolve(), SourceFile(match, kind))
                continue
            problems.append(
                f"data.source: {match} must be text (.txt, .text, .md) or JSON lines (.jsonl, "
                f".ndjson, .json), as it is or with {', '.join(_COMPRESSED)}, or .parquet; rename "
                "or convert it"
            )
    if problems:
        raise ConfigError(problems)
    return list(found.values())


def _matches(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
    return [match for match in matches if match.is_file()]


def _may_be_hub_name(entry: str) -> bool:
    if Path(entry).exists() or entry.startswith(".") or re.search(r"\.[A-Za-z]\w*$", entry):
        return False
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", entry) is not None


def _kind(path: Path) -> Literal["text", "json", "parquet"] | None:
    name = path.name.lower()
    compressed = name.endswith(_COMPRESSED)
    kind = _KINDS.get(Path(name.rpartition(".")[0] if compressed else name).suffix)
    return None if kind == "parquet" and compressed else kind


def _content(file: SourceFile, *, sampled: bool) -> dict[str, str | int]:
    try:
        size = file.path.stat().st_size
        with file.path.open("rb") as stream:
            if sampled and size > 2 * _SAMPLE:
                ends = stream.read(_SAMPLE)
                stream.seek(-_SAMPLE, os.SEEK_END)
                digest = "ends " + hashlib.sha256(ends + stream.read()).hexdigest()
            else:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as e:
        raise DataError(f"data.source: {file.path} cannot be read: {e.strerror}") from e
    if size == 0:
        raise _empty(file.path)
    return {"name": file.path.name, "bytes": size, "sha256": digest}


def _empty(path: Path) -> DataError:
    return DataError(f"data.source: {path} must hold text, but is empty; leave it out")


_Records = Iterator[tuple[int, Mapping[str, Any]]]
"""Records, each with its number, which counts from 1."""


def _text_documents(paths: Sequence[Path]) -> Iterator[Document]:
    if not paths:
        return
    # Opened together, since a corpus may be thousands of small files: one row is one file.
    rows = _stream("text", paths, sample_by="document", encoding="utf-8-sig")
    for path in paths:
        with _readable(path):
            _check_zst(path)
            text = next(rows)["text"]
        if not text.strip():
            raise _empty(path)
        yield Document(text, None)


def _json_records(path: Path, where: str, *, after: int = 0) -> _Records:
    # Lines, not the library's JSON reader: that one guesses types from the first megabytes, turns
    # text that looks like a date into one, and stops at a record with a field it has not seen.
    for number, row in _rows("text", path, sample_by="line", encoding="utf-8-sig"):
        if number <= after or not row["text"].strip():
            continue
        try:
            record = json.loads(row["text"])
        except ValueError as e:
            raise DataError(
                f"{where}: line {number} must be one JSON object, but is not JSON: {e}; repair it "
                "or leave the file out"
            ) from e
        if not isinstance(record, dict):
            raise DataError(
                f"{where}: line {number} must be one JSON object, but is of type "
                f"{type(record).__name__}; write one object a line"
            )
        yield number, record


def _parquet_records(path: Path, config: DataConfig, where: str, *, after: int = 0) -> _Records:
    import pyarrow.parquet  # type: ignore[import-untyped]

    with _readable(path):
        known = pyarrow.parquet.read_schema(path).names
    for name in _fields(config):
        if name not in known:
            raise _missing_field(name, config, known, where=where)
    # The batch size bounds memory, and a file without rows fails without it.
    rows = _rows("parquet", path, columns=_fields(config), batch_size=1024)
    yield from itertools.islice(rows, after, None)


def _read(
    records: _Records, config: DataConfig, *, where: str, unit: str, resumed: bool = False
) -> Iterator[Document]:
    skipped = found = 0
    for number, record in records:
        for name in _fields(config):
            if name not in record:
                raise _missing_field(name, config, record, where=f"{where}: {unit} {number}")
        text = record[config.text_field]
        if text is None or text == "":
            skipped += 1
            continue
        if not isinstance(text, str):
            raise DataError(
                f"{where}: {unit} {number}: field {config.text_field!r} must be text, but is of "
                f"type {type(text).__name__}; name another in data.text_field"
            )
        document: str | None = None
        if config.document_field is not None:
            value = record[config.document_field]
            if not isinstance(value, str | int):
                raise DataError(
                    f"{where}: {unit} {number}: field {config.document_field!r} must be text or a "
                    f"number, but is of type {type(value).__name__}; name another in "
                    "data.document_field"
                )
            document = _valid(str(value))
        found += 1
        yield Document(_valid(text), document)
    if found == 0 and not resumed:
        raise DataError(
            f"{where} must hold text, but no {unit} has any in field {config.text_field!r}; leave "
            "it out, or name another field in data.text_field"
        )
    if skipped:
        logger.info("data: skipped %d records without text; %s", skipped, where)


def _fields(config: DataConfig) -> list[str]:
    return [config.text_field, *([config.document_field] if config.document_field else [])]


def _missing_field(name: str, config: DataConfig, known: Iterable[str], *, where: str) -> DataError:
    setting = "data.text_field" if name == config.text_field else "data.document_field"
    return DataError(
        f"{where} must have a field {name!r}, but has {', '.join(known) or 'none'}; name one of "
        f"them in {setting}"
    )


def _valid(text: str) -> str:
    # JSON can spell half a surrogate pair, which is no character and which tokenizers refuse.
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _rows(builder: str, path: Path, **options: Any) -> _Records:
    """Rows of one file, numbered from 1.

    Raises:
        DataError: The file is damaged, or not what its name says.
    """
    rows = _stream(builder, [path], **options)
    with _readable(path):
        _check_zst(path)
    for number in itertools.count(1):
        with _readable(path):
            row = next(rows, None)
        if row is None:
            return
        yield number, row


def _stream(builder: str, paths: Sequence[Path], **options: Any) -> Iterator[Mapping[str, Any]]:
    import datasets

    # The library takes names for globs.
    names = [glob.escape(str(path)) for path in paths]
    yield from datasets.load_dataset(
        builder, data_files=names, split="train", streaming=True, **options
    )


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except MohawkError:
        raise
    except UnicodeDecodeError as e:
        raise DataError(
            f"data.source: {path} must be text in UTF-8, but is not: {e}; convert it"
        ) from e
    # Decompressors and formats raise anything from EOFError to ArrowInvalid.
    except Exception as e:
        raise DataError(
            f"data.source: {path} cannot be read: {_one_line(e)}; the file is damaged or not what "
            "its name says"
        ) from e


def _check_zst(path: Path) -> None:
    """Raise if a .zst file is cut short: its reader takes that for the end."""
    if path.suffix.lower() != ".zst":
        return
    try:
        import zstandard
    except ImportError as e:
        raise DataError(
            f"data.source: {path} needs the zstandard package; run `pip install zstandard`"
        ) from e
    frame = zstandard.ZstdDecompressor().decompressobj()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            while chunk:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                frame.decompress(chunk)
                chunk = frame.unused_data
    if not frame.eof:
        raise EOFError("the file ends in the middle of its last frame")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@contextlib.contextmanager
def quiet_datasets(*, local: bool) -> Iterator[None]:
    """No progress bars; for local files, no messages beside our own and no use of the network.

    The library would report each opened file to the hub, which without a network can take seconds.
    """
    import datasets

    bars_disabled = datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    counts = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.disable_progress_bars()
    if local:
        datasets.logging.set_verbosity(logging.CRITICAL)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        datasets.logging.set_verbosity(verbosity)
        if not bars_disabled:
            datasets.enable_progress_bars()
