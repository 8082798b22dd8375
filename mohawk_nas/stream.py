"""Training text that fits neither memory nor disk: read, tokenised and shuffled while training.

Documents of the bank split are packed to blocks as in ``data.py``, so no held-out document is ever
seen. Blocks are numbered as they are packed, the parts of a mixture taking turns; each window of
``data.shuffle_blocks`` of them is then shuffled. This order follows from the text and the seed
alone, not from the number of ranks or workers, and ranks take their batches from it in turn. Each
rank reads all of the text and tokenises it for itself: for models of a billion parameters that is
little beside a training step, and nothing has to go between ranks.

A position is told by the chunk of documents in which the running window begins, with the tokens
that were left over before it. Going on from there reads that window again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mohawk_nas.config import DataConfig
from mohawk_nas.data import (
    Mixing,
    Part,
    TrainingBatches,
    check_same_text,
    describe_text,
    encode,
    find_parts,
    find_separator,
    naming,
    permutation,
    pieces,
    split_of,
)
from mohawk_nas.documents import quiet_datasets
from mohawk_nas.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextStream", "num_workers"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
_Tokens = np.ndarray[Any, np.dtype[np.int32]]

_CHUNK_CHARS = 262_144
"""Text that goes to a worker at once."""
_CHUNKS_AHEAD = 4
"""Chunks a worker has in hand, and chunks of each text that are read before they are wanted."""
_CHARS_A_TOKEN = 4
_MOST_WORKERS = 8


def num_workers(config: DataConfig) -> int:
    """Processes that tokenise a stream for this rank.

    Unless the study says, there are as many as the CPUs that the machine's ranks leave to each of
    them, less the one that trains; more than a few are never needed.
    """
    if config.workers is not None:
        return config.workers
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(_MOST_WORKERS, cpus // ranks - 1))


class TextStream:
    """A study's text as :class:`mohawk_nas.data.TrainingText`, none of which is kept.

    Args:
        config: Where the text is.
        tokenizer: The teacher's.

    Raises:
        ConfigError: A file is not there, or the separator is not a token.
        DataError: A file is empty or cannot be read.
    """

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config = config
        self.parts = find_parts(config)
        self.tokenizer = tokenizer
        self.separator = find_separator(config, tokenizer)
        described = {
            **describe_text(config, self.parts, tokenizer),
            "shuffle_blocks": config.shuffle_blocks,
        }
        text = json.dumps(described, sort_keys=True)
        self.fingerprint = hashlib.sha256(f"stream\n{text}".encode()).hexdigest()

    @property
    def block_size(self) -> int:
        return self.config.block_size

    def batches(
        self, *, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> TrainingBatches:
        """The text from its beginning; when it ends, it begins again."""
        return _StreamBatches(self, batch_size=batch_size, seed=seed, rank=rank, world=world)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mark:
    """Where a chunk of one text begins."""

    passes: int = 0
    """Times that the whole text has been read before."""
    reading: Mapping[str, Any] | None = None
    """The document before it in this pass, as :meth:`Reading.position` tells it."""
    document: str | None = None
    """That document's name."""
    blocks: int = 0
    """Blocks packed before it."""
    left_over: _Tokens
    """Tokens that filled no block yet."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "passes": self.passes,
            "reading": self.reading,
            "document": self.document,
            "blocks": self.blocks,
            "left_over": self.left_over.tolist(),
        }

    @classmethod
    def load(cls, state: Mapping[str, Any]) -> _Mark:
        return cls(**{**state, "left_over": np.array(state["left_over"], dtype=np.int32)})


_BEGINNING = _Mark(left_over=np.empty(0, np.int32))


class _Window(NamedTuple):
    """Where a window of the mixture begins."""

    taken: list[int]
    """Blocks taken of each part before it."""
    marks: list[_Mark]
    """Of each part, at or before its next block."""


class _Chunk(NamedTuple):
    """Some documents of one part, and where the next chunk begins."""

    part: int
    texts: list[str]
    starts: list[bool]
    """Whether a document starts with this text."""
    passes: int
    reading: Mapping[str, Any] | None
    document: str | None

    @property
    def num_chars(self) -> int:
        return sum(map(len, self.texts))


class _Tokenised(NamedTuple):
    chunk: _Chunk
    """Without its texts."""
    num_chars: int
    tokens: _Tokens


class _Tokeniser(Dataset[_Tokenised]):
    """What a worker does: a chunk of text comes in by way of an index, its tokens go out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator: int) -> None:
        self._tokenizer = tokenizer
        self._separator = separator

    def __getitem__(self, chunk: Any) -> _Tokenised:
        tokens: list[int] = []
        for ids, starts in zip(encode(self._tokenizer, chunk.texts), chunk.starts, strict=True):
            if starts:
                tokens.append(self._separator)
            tokens += ids
        # An array, since tensors would go through shared memory, of which containers have little.
        bare = chunk._replace(texts=[], starts=[])
        return _Tokenised(bare, chunk.num_chars, np.array(tokens, dtype=np.int32))


class _Packing:
    """Blocks of one part, in order."""

    def __init__(self, mark: _Mark, block_size: int) -> None:
        self._block_size = block_size
        # Where the next chunk to arrive begins.
        self._end = mark
        self._chunks: deque[tuple[_Mark, deque[_Tokens]]] = deque()
        self.num_blocks = 0
        """Blocks that wait."""
        self.num_expected = 0.0
        """Blocks that chunks on their way will make, about."""

    def expect(self, num_chars: int) -> None:
        self.num_expected += num_chars / (_CHARS_A_TOKEN * self._block_size)

    def add(self, tokenised: _Tokenised) -> None:
        chunk, before, size = tokenised.chunk, self._end, self._block_size
        self.num_expected -= tokenised.num_chars / (_CHARS_A_TOKEN * size)
        tokens = np.concatenate([before.left_over, tokenised.tokens])
        count = len(tokens) // size
        if count:
            self._chunks.append((before, deque(tokens[: count * size].reshape(count, size))))
            self.num_blocks += count
        self._end = _Mark(
            passes=chunk.passes,
            reading=chunk.reading,
            document=chunk.document,
            blocks=before.blocks + count,
            # A copy, or the whole chunk would stay in memory.
            left_over=tokens[count * size :].copy(),
        )

    def mark(self) -> _Mark:
        """Where the chunk begins in which the next block ends."""
        return self._chunks[0][0] if self._chunks else self._end

    def take(self) -> _Tokens:
        blocks = self._chunks[0][1]
        block = blocks.popleft()
        if not blocks:
            self._chunks.popleft()
        self.num_blocks -= 1
        return block


class _StreamBatches:
    """One rank's batches of a stream; see the module's docstring for their order."""

    def __init__(
        self, stream: TextStream, *, batch_size: int, seed: int, rank: int, world: int
    ) -> None:
        self._stream = stream
        self._batch_size, self._seed = batch_size, seed
        self._rank, self._world = rank, world
        self._size = stream.config.shuffle_blocks
        self._position = 0
        """Blocks that all ranks together have been given."""
        parts = len(stream.parts)
        self._begin(_Window([0] * parts, [_BEGINNING] * parts))

    def _begin(self, window: _Window) -> None:
        """Stand where the window begins that the position is in."""
        number = self._position // self._size
        self._pulled = number * self._size
        # Window -> where it begins, for the one being handed out and those that have been begun.
        self._windows = {number: window}
        self._blocks: dict[int, _Tokens] = {}
        self._orders: dict[int, list[int]] = {}
        weights = [part.weight for part in self._stream.parts]
        self._mixing = Mixing(weights, window.taken)
        self._packings = [_Packing(mark, self._stream.block_size) for mark in window.marks]
        self._readers: list[Generator[_Chunk]] = []
        self._loaded: Iterator[_Tokenised] | None = None
        self._error: Exception | None = None
        self._context = contextlib.ExitStack()
        self._end_workers: Callable[[], object] | None = None

    def next(self) -> Tensor:
        share, size = self._batch_size * self._world, self._size
        # A window ahead at every step, so that no step waits for a whole one.
        while self._pulled < self._position + share + size:
            self._pull()
        first = self._position + self._rank * self._batch_size
        block = self._stream.block_size
        rows = [self._blocks[self._shuffled(n)] for n in range(first, first + self._batch_size)]
        self._position += share
        number = self._position // size
        for old in [n for n in self._windows if n < number]:
            del self._windows[old]
            self._orders.pop(old, None)
            for n in range(old * size, (old + 1) * size):
                self._blocks.pop(n, None)
        return torch.from_numpy(np.stack(rows)).view(len(rows), block).long()

    def state_dict(self) -> dict[str, Any]:
        window = self._windows[self._position // self._size]
        return {
            "text": self._stream.fingerprint,
            "position": self._position,
            "taken": window.taken,
            "parts": [mark.state_dict() for mark in window.marks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_same_text(state, self._stream.fingerprint)
        self.close()
        self._position = state["position"]
        marks = [_Mark.load(part) for part in state["parts"]]
        self._begin(_Window(list(state["taken"]), marks))

    def close(self) -> None:
        # In this order: workers first, since they ask for what readers have.
        self._loaded = None
        if self._end_workers is not None:
            # An error's traceback may still hold the loader.
            self._end_workers()
            self._end_workers = None
        for reader in self._readers:
            reader.close()
        self._readers = []
        self._context.close()

    def _shuffled(self, position: int) -> int:
        """The block that is handed out at a position."""
        number, inside = divmod(position, self._size)
        if number not in self._orders:
            self._orders[number] = permutation(self._size, self._seed, number).tolist()
        return number * self._size + self._orders[number][inside]

    def _pull(self) -> None:
        """Take the next block of the mixture."""
        if self._loaded is None:
            self._open()
        number, inside = divmod(self._pulled, self._size)
        if inside == 0 and number not in self._windows:
            marks = [packing.mark() for packing in self._packings]
            self._windows[number] = _Window(list(self._mixing.taken), marks)
        self._blocks[self._pulled] = self._take(self._mixing.next())
        self._pulled += 1

    def _take(self, part: int) -> _Tokens:
        assert self._loaded is not None
        packing = self._packings[part]
        while not packing.num_blocks:
            arrived = next(self._loaded, None)
            if arrived is None:
                assert self._error is not None
                raise self._error
            self._packings[arrived.chunk.part].add(arrived)
        return packing.take()

    def _open(self) -> None:
        stream = self._stream
        local = all(part.corpus.files for part in stream.parts)
        self._context.enter_context(quiet_datasets(local=local))
        workers = num_workers(stream.config)
        self._readers = []
        for number, (part, packing) in enumerate(zip(stream.parts, self._packings, strict=True)):
            chunks = _chunks(part, number, packing.mark())
            self._readers.append(_ahead(chunks, _CHUNKS_AHEAD) if workers else chunks)
        ended = multiprocessing.RawValue("b", 0)
        # Called by `close`, or else when Python ends.
        self._end_workers = Finalize(self, setattr, args=(ended, "value", 1), exitpriority=0)
        loader = DataLoader(
            _Tokeniser(stream.tokenizer, stream.separator),
            batch_size=None,
            sampler=self._wanted(),
            num_workers=workers,
            prefetch_factor=_CHUNKS_AHEAD if workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=partial(_serve, os.getpid(), ended),
        )
        with _without_threads_of_tokenizers():
            self._loaded = iter(loader)
        # Blocks between the beginning of the chunk and that of the window.
        for part_number, packing in enumerate(self._packings):
            for _ in range(self._mixing.taken[part_number] - packing.mark().blocks):
                self._take(part_number)

    def _wanted(self) -> Iterator[_Chunk]:
        """Chunks without end, each of the part that is likely to run out of blocks first."""
        weights = [part.weight for part in self._stream.parts]
        while True:
            ahead = [
                (packing.num_blocks + packing.num_expected) / weight
                for packing, weight in zip(self._packings, weights, strict=True)
            ]
            part = ahead.index(min(ahead))
            try:
                chunk = next(self._readers[part])
            except Exception as e:
                # Told when what was read before is used up; here it would interrupt the loader,
                # which must end its workers.
                self._error = e
                return
            self._packings[part].expect(chunk.num_chars)
            yield chunk


def _chunks(part: Part, number: int, mark: _Mark) -> Generator[_Chunk]:
    """Chunks of the bank split's documents from a mark on, pass after pass, without end.

    Raises:
        DataError: The text cannot be read, or has no documents in that split.
    """
    passes, document, after = mark.passes, mark.document, mark.reading
    while True:
        found = after is not None
        texts: list[str] = []
        starts: list[bool] = []
        num_chars = 0
        with naming(part.where):
            reading = part.corpus.read(after)
            for record in reading:
                if split_of(record.key) != "bank":
                    continue
                found = True
                # Records that follow each other and name one document are one text.
                first = record.name is None or record.name != document
                document = record.name
                for text in pieces(record.text):
                    texts.append(text)
                    starts.append(first)
                    first = False
                num_chars += len(record.text)
                if num_chars >= _CHUNK_CHARS:
                    yield _Chunk(number, texts, starts, passes, reading.position(), document)
                    texts, starts, num_chars = [], [], 0
            if not found:
                raise DataError(
                    "data.source: must hold documents for the bank split, but all of them fall to "
                    "the others; give more text"
                )
        passes, document, after = passes + 1, None, None
        if passes == 1:
            logger.warning("data: all of %s.source has been read; it begins again", part.where)
        yield _Chunk(number, texts, starts, passes, None, None)


def _ahead(items: Generator[T], depth: int) -> Generator[T]:
    """The same items, drawn by a thread before they are asked for."""
    waiting: queue.Queue[Callable[[], T]] = queue.Queue(depth)
    stopping = threading.Event()

    def put(answer: Callable[[], T]) -> None:
        while not stopping.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(answer, timeout=0.1)
                return

    def draw() -> None:
        try:
            with contextlib.closing(items):
                for item in items:
                    put(lambda item=item: item)  # type: ignore[misc]
                    if stopping.is_set():
                        return
        except BaseException as e:
            error = e

            def fail() -> T:
                raise error

            put(fail)

    thread = threading.Thread(target=draw, name="reads text", daemon=True)
    thread.start()
    try:
        while True:
            yield waiting.get()()
    finally:
        stopping.set()
        thread.join()


def _as_it_is(item: T) -> T:
    return item


def _serve(parent: int, ended: Any, worker: int) -> None:
    """Let a worker end when the process that trains says so or ends, however that ends, not before.

    A signal to end goes to a whole group of processes, from torchrun as from a terminal; the one
    that trains still needs text for the step that it then finishes and saves. The library's own
    watch over the parent waits for what the worker has sent to be read, which nobody will.
    """
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent and not ended.value:
            time.sleep(1)
        # Anything else would be an error to the library.
        os._exit(0)

    threading.Thread(target=watch, name="watches its parent", daemon=True).start()


@contextlib.contextmanager
def _without_threads_of_tokenizers() -> Iterator[None]:
    # The library warns in each process that is forked after its threads have been used.
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
