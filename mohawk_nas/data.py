"""Text to blocks of tokens: read once, cut into disjoint splits, cached.

Each document falls to one split by a hash of its name or text, so a document is never in two splits
and never moves when files are added. The small splits take a part of each of many documents, as far
as there are so many. Reading stops when every split has the tokens that are asked
for. The parts of a mixture are packed each by itself, and their blocks take turns by the weights.

What is trained on is a :class:`TrainingText`: these blocks, or a stream (``stream.py``).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from mohawk_nas.config import DataConfig
from mohawk_nas.documents import Corpus, Document
from mohawk_nas.errors import ConfigError, DataError, MohawkError
from mohawk_nas.files import DamagedFile, load_tensors, read_json, save_tensors, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "SPLITS",
    "BlockOrder",
    "Mixing",
    "Part",
    "TokenBlocks",
    "TrainingBatches",
    "TrainingText",
    "check_same_text",
    "describe_text",
    "encode",
    "find_parts",
    "find_separator",
    "load_blocks",
    "naming",
    "permutation",
    "pieces",
    "split_of",
]

logger = logging.getLogger(__name__)

SPLITS = ("bank", "search", "validation", "test")

_PERCENT = {"search": 6, "validation": 6, "test": 6}
"""Share of the documents that each small split gets; the bank gets the rest."""
_SETTINGS = {
    "search": "search.tokens",
    "validation": "data.validation_tokens",
    "test": "data.test_tokens",
}
_FORMAT = 2
"""Raised when the same request would give other blocks than before."""

_FEWEST_DOCUMENTS, _FEWEST_BLOCKS = 32, 2
"""A small split is drawn from so many documents, but so many blocks of each: what a few long
documents say of a layout does not hold for others, and pieces without context say little."""

_PIECE_CHARS = 65_536
_BATCH_CHARS = 524_288
_MANY_CHARS_PER_TOKEN = 8
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
_PROGRESS_SECONDS = 10.0


class TrainingBatches(Protocol):
    """Batches of text without end, and where to go on with them.

    With several ranks each gets its own share of one order that does not depend on their number:
    the ranks' batches of one step, rank by rank, are what a single rank with a batch as large as
    all of theirs would get. So the state is the same on every rank, and one of it will do for a
    checkpoint, whatever number of ranks goes on from it.
    """

    def next(self) -> Tensor:
        """This rank's next batch, ``(B, T)`` in torch.long on the CPU."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch stands, as JSON."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            DataError: It was taken of another text.
        """
        ...

    def close(self) -> None:
        """Let go of processes and files; there are no batches after this."""
        ...


class TrainingText(Protocol):
    """Text to train on."""

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of all that decides which tokens are read."""
        ...

    def batches(
        self, *, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> TrainingBatches:
        """The text from its beginning.

        Args:
            batch_size: Blocks of one rank's batch.
            seed: Of the order of the blocks.
            rank: Whose share.
            world: Ranks that share the text.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenBlocks:
    """Blocks of one split, in the order of the documents."""

    split: str
    tokens: Tensor
    """``(num_blocks, block_size)``, int32, read from disk when used."""
    fingerprint: str
    """Of the split's name, the block size and every token."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def block_size(self) -> int:
        return self.tokens.shape[1]

    def batches(
        self, *, batch_size: int, seed: int, rank: int = 0, world: int = 1
    ) -> TrainingBatches:
        """Shuffled passes over the blocks, as :class:`BlockOrder` has them."""
        return _BlockBatches(self, batch_size=batch_size, seed=seed, rank=rank, world=world)

    def batch(self, indices: Sequence[int] | Tensor) -> Tensor:
        """The blocks of these numbers, ``(len(indices), block_size)`` in torch.long on the CPU."""
        return self.tokens[torch.as_tensor(indices, dtype=torch.long)].long()

    def take(self, num_tokens: int) -> TokenBlocks:
        """The first ``num_tokens // block_size`` blocks.

        Raises:
            DataError: There are fewer.
        """
        count = num_tokens // self.tokens.shape[1]
        if count > len(self):
            raise DataError(
                f"the {self.split} split holds {self.tokens.numel():,} tokens, but {num_tokens:,} "
                "are asked for; give more text or ask for less"
            )
        if count == len(self):
            return self
        tokens = self.tokens[:count]
        return TokenBlocks(
            split=self.split, tokens=tokens, fingerprint=_fingerprint(self.split, tokens)
        )


class BlockOrder:
    """Which blocks each step sees: a shuffled pass over the split, then another, and so on.

    The order follows from the seed and the step alone, so a run can be taken up at any step. Each
    pass is shuffled anew, and a batch may straddle two.
    """

    def __init__(self, num_blocks: int, *, batch_size: int, seed: int) -> None:
        if num_blocks < 1 or batch_size < 1:
            raise ValueError(
                "`num_blocks >= 1` and `batch_size >= 1` must hold, but got "
                f"({num_blocks=}, {batch_size=})"
            )
        self.num_blocks = num_blocks
        self.batch_size = batch_size
        self.seed = seed
        # A batch asks for the same one or two passes as the batch before it.
        self._passes: dict[int, Tensor] = {}

    def indices(self, step: int) -> Tensor:
        """Blocks that the batch of this step holds, ``(batch_size,)``; steps count from 0."""
        if step < 0:
            raise ValueError(f"`step >= 0` must hold, but got ({step=})")
        return self.between(step * self.batch_size, (step + 1) * self.batch_size)

    def between(self, position: int, end: int) -> Tensor:
        """Blocks at these positions of the order, whatever the batches are."""
        parts = []
        while position < end:
            number, offset = divmod(position, self.num_blocks)
            parts.append(self._pass(number)[offset : offset + end - position])
            position += len(parts[-1])
        return torch.cat(parts)

    def _pass(self, number: int) -> Tensor:
        if number not in self._passes:
            self._passes = {n: order for n, order in self._passes.items() if n == number - 1}
            self._passes[number] = permutation(self.num_blocks, self.seed, number)
        return self._passes[number]


def permutation(count: int, seed: int, number: int) -> Tensor:
    """An order of ``count`` things, ``(count,)``, that seed and number alone decide."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(count, generator=generator)


class _BlockBatches:
    """Batches of blocks that are all there; the state is a position in their order."""

    def __init__(
        self, blocks: TokenBlocks, *, batch_size: int, seed: int, rank: int, world: int
    ) -> None:
        self._blocks = blocks
        self._order = BlockOrder(len(blocks), batch_size=batch_size, seed=seed)
        self._rank, self._world = rank, world
        self._position = 0

    def next(self) -> Tensor:
        size = self._order.batch_size
        first = self._position + self._rank * size
        self._position += self._world * size
        return self._blocks.batch(self._order.between(first, first + size))

    def state_dict(self) -> dict[str, Any]:
        return {"text": self._blocks.fingerprint, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_same_text(state, self._blocks.fingerprint)
        self._position = state["position"]

    def close(self) -> None:
        """Nothing to let go of."""


def check_same_text(state: Mapping[str, Any], fingerprint: str) -> None:
    """Raise DataError if a position was taken in another text than the one of this fingerprint."""
    if state["text"] != fingerprint:
        raise DataError(
            f"data: the position to go on from was taken in another text (fingerprint "
            f"{state['text'][:16]}, this one has {fingerprint[:16]}); restore the text, or use "
            "--force to start anew"
        )


class Mixing:
    """Which part each block of a mixture is taken from: the one furthest behind its weight.

    Args:
        weights: A part each; only their proportions matter.
        taken: Blocks taken of each so far.
    """

    def __init__(self, weights: Sequence[float], taken: Sequence[int] | None = None) -> None:
        self._shares = [weight / sum(weights) for weight in weights]
        self.taken = list(taken or [0] * len(weights))

    def next(self) -> int:
        """Number of the part that the next block is taken from."""
        total = sum(self.taken) + 1
        behind = [share * total - n for share, n in zip(self._shares, self.taken, strict=True)]
        part = behind.index(max(behind))
        self.taken[part] += 1
        return part


class Part(NamedTuple):
    """One text of a mixture, or the only one."""

    where: str
    """Dotted path of its settings."""
    weight: float
    config: DataConfig
    corpus: Corpus


def find_parts(config: DataConfig) -> list[Part]:
    """Look for the texts that a study names, without reading them.

    Raises:
        ConfigError: Every entry that is no file, or of a kind that cannot be read.
    """
    parts, problems = [], []
    for i, (weight, settings) in enumerate(config.parts):
        where = f"data.mixture[{i}]" if config.mixture else "data"
        try:
            with naming(where):
                parts.append(Part(where, weight, settings, Corpus.find(settings)))
        except ConfigError as e:
            problems += e.problems
    if problems:
        raise ConfigError(problems)
    return parts


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Let errors of one text of a mixture name its settings."""

    def named(text: str) -> str:
        return re.sub(r"\bdata\.(source|subset|text_field|document_field)\b", rf"{where}.\1", text)

    try:
        yield
    except ConfigError as e:
        raise ConfigError([named(problem) for problem in e.problems]) from e
    except DataError as e:
        raise DataError(named(str(e))) from e


def describe_text(
    config: DataConfig, parts: Sequence[Part], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """All that decides the order of tokens in a split, as JSON.

    Raises:
        DataError: A file is empty or cannot be read.
        ConfigError: The separator is not a token.
    """
    described = []
    for part in parts:
        with naming(part.where):
            described.append(
                {
                    "text_field": part.config.text_field,
                    "document_field": part.config.document_field,
                    "source": part.corpus.identity(sampled=config.streaming),
                }
            )
    total = sum(part.weight for part in parts)
    return {
        "format": _FORMAT,
        "tokenizer": _tokenizer_fingerprint(tokenizer),
        "separator": find_separator(config, tokenizer),
        "block_size": config.block_size,
        # A text that is the only one is described as it was before there were mixtures.
        **(
            {
                "mixture": [
                    {"weight": part.weight / total, **text}
                    for part, text in zip(parts, described, strict=True)
                ]
            }
            if config.mixture
            else described[0]
        ),
    }


def split_of(document: str) -> str:
    """The split that a document of this name, or of this text if it has none, falls to."""
    digest = hashlib.sha256(b"mohawk-nas document\n" + document.encode()).digest()
    point = int.from_bytes(digest[:8], "big") % 100
    for split, percent in _PERCENT.items():
        if point < percent:
            return split
        point -= percent
    return "bank"


def load_blocks(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, needed: Mapping[str, int]
) -> dict[str, TokenBlocks]:
    """Token blocks of the splits that are needed, from the cache if they are there.

    A split holds ``needed // block_size`` blocks whatever the other splits need; only the bank may
    get fewer, and its training then passes over it more often.

    Args:
        config: Where the text is.
        tokenizer: The teacher's.
        needed: Split -> tokens that will be read of it.

    Raises:
        DataError: The text cannot be read, or there is too little of it.
        ConfigError: A file is not there, or the separator is not a token.
        TrainingError: The disk is full.
    """
    _check_needed(needed, config.block_size)
    parts = find_parts(config)
    request = {
        **describe_text(config, parts, tokenizer),
        "blocks": {s: needed[s] // config.block_size for s in SPLITS if s in needed},
    }
    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:32]
    folder = Path(config.cache) / key
    blocks = _read_cache(folder, request)
    if blocks is None:
        _make_cache(folder, request, parts, tokenizer)
        blocks = _read_cache(folder, request)
        if blocks is None:
            raise DataError(f"data.cache: {folder} does not hold what was just written to it")
    if "bank" in blocks and len(blocks["bank"]) < needed["bank"] // config.block_size:
        tokens = blocks["bank"].tokens.numel()
        logger.warning(
            "data: the bank split holds %s of %s tokens; training will make %.1f passes over it; "
            "give more text to see each block once",
            f"{tokens:,}",
            f"{needed['bank']:,}",
            needed["bank"] / tokens,
        )
    return blocks


def _check_needed(needed: Mapping[str, int], block_size: int) -> None:
    for split, tokens in needed.items():
        if split not in SPLITS:
            raise ValueError(f"a split must be one of {', '.join(SPLITS)}, but got {split!r}")
        if 0 < tokens < block_size or tokens < 0:
            raise DataError(
                f"{_SETTINGS.get(split, split)}: must hold at least one block of {block_size} "
                f"tokens (data.block_size), but is {tokens}"
            )


def find_separator(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that is put in front of each document."""
    name = config.separator
    if name is None:
        for token in (tokenizer.eos_token_id, tokenizer.bos_token_id):
            if token is not None:
                return int(token)
        raise DataError(
            "data.separator: the tokenizer has neither an end-of-text nor a begin-of-text token; "
            "name one of its tokens"
        )
    vocabulary = tokenizer.get_vocab()
    if name in vocabulary:
        return int(vocabulary[name])
    tokens = tokenizer.encode(name, add_special_tokens=False)
    if len(tokens) != 1 or tokens[0] == tokenizer.unk_token_id:
        raise ConfigError(
            f"data.separator: must be one token of the tokenizer, but {name!r} is "
            f"{tokenizer.tokenize(name)}; leave it out to take {tokenizer.eos_token!r}"
        )
    return int(tokens[0])


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        described = json.loads(backend.to_str())
        # Left there by the last call, whoever made it.
        described["truncation"] = described["padding"] = None
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


@dataclass(kw_only=True, slots=True)
class _Packer:
    """Tokens of one split, up to as many as are wanted."""

    wanted: int
    share: int
    """Most tokens of one document, as long as there are other documents."""
    num_tokens: int = 0
    num_documents: int = 0
    of_document: int = 0
    """Tokens of the document that was met last."""
    left: list[list[int]] = field(default_factory=list)
    """What documents hold beyond their share, of each as much as could be needed."""
    num_waiting: int = 0
    """Characters in the batch that is being gathered."""
    chunks: list[np.ndarray[Any, np.dtype[np.int32]]] = field(default_factory=list)
    document: str | None = None
    """Name of the document that was met last."""

    def is_full(self) -> bool:
        return self.num_tokens >= self.wanted

    def may_be_full(self) -> bool:
        """Whether the waiting text is likely to be all that is missing."""
        return self.num_waiting >= _MANY_CHARS_PER_TOKEN * (self.wanted - self.num_tokens)

    def add(self, tokens: list[int], *, documents: int) -> None:
        chunk = np.array(tokens[: self.wanted - self.num_tokens], dtype=np.int32)
        self.chunks.append(chunk)
        self.num_tokens += len(chunk)
        self.num_documents += documents

    def take(self, tokens: list[int], *, starts: bool) -> list[int]:
        """What a document may give of its next tokens; the rest is laid aside."""
        if starts:
            self.of_document = 0
        taken = tokens[: max(0, self.share - self.of_document)]
        if rest := tokens[len(taken) :]:
            if self.of_document <= self.share:
                self.left.append([])
            self.left[-1] += rest[: self.wanted - len(self.left[-1])]
        self.of_document += len(tokens)
        return taken

    def fill(self, separator: int) -> None:
        """Take more of the documents, as much of each, since there are no others."""
        while self.left and not self.is_full():
            for rest in self.left:
                self.add([separator, *rest[: self.share]], documents=0)
            self.left = [rest[self.share :] for rest in self.left if rest[self.share :]]

    def blocks(self, block_size: int) -> Tensor:
        """``(num_blocks, block_size)``; a tail that fills no block is dropped."""
        tokens = torch.from_numpy(np.concatenate([*self.chunks, np.empty(0, np.int32)]))
        count = len(tokens) // block_size
        return tokens[: count * block_size].view(count, block_size)


class _Piece(NamedTuple):
    split: str
    text: str
    starts: bool
    """Whether a document starts here."""


def _tokenise(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    separator: int,
    block_size: int,
    wanted: Mapping[str, int],
) -> dict[str, _Packer]:
    """Read documents until every split has the tokens it wants, or there are no more."""
    packers = {
        split: _Packer(
            wanted=tokens,
            share=tokens
            if split not in _PERCENT
            else max(_FEWEST_BLOCKS * block_size, tokens // _FEWEST_DOCUMENTS),
        )
        for split, tokens in wanted.items()
    }
    batch: list[_Piece] = []
    reported = time.monotonic()
    for document in documents if any(wanted.values()) else ():
        packer = packers.get(split := split_of(document.key))
        if packer is None or packer.is_full():
            continue
        # Records that follow each other in a split and name one document are one text.
        starts = document.name is None or document.name != packer.document
        packer.document = document.name
        for text in pieces(document.text):
            batch.append(_Piece(split, text, starts))
            starts = False
            packer.num_waiting += len(text)
            if (
                sum(p.num_waiting for p in packers.values()) >= _BATCH_CHARS
                # Without this, little text would be read for long after there is enough.
                or all(p.may_be_full() for p in packers.values())
            ):
                _encode(batch, tokenizer, packers, separator=separator)
                batch = []
                if packer.is_full():
                    break
        if all(p.is_full() for p in packers.values()):
            break
        if time.monotonic() - reported > _PROGRESS_SECONDS:
            reported = time.monotonic()
            logger.info("data: tokens so far: %s", _progress(packers))
    _encode(batch, tokenizer, packers, separator=separator)
    for packer in packers.values():
        packer.fill(separator)
    return packers


def _encode(
    batch: Sequence[_Piece],
    tokenizer: PreTrainedTokenizerBase,
    packers: Mapping[str, _Packer],
    *,
    separator: int,
) -> None:
    if not batch:
        return
    encoded = encode(tokenizer, [piece.text for piece in batch])
    for split, packer in packers.items():
        tokens: list[int] = []
        documents = 0
        for piece, ids in zip(batch, encoded, strict=True):
            if piece.split != split:
                continue
            if packer.num_tokens + len(tokens) >= packer.wanted:
                break
            if piece.starts:
                tokens.append(separator)
                documents += 1
            tokens += packer.take(ids, starts=piece.starts)
        packer.add(tokens, documents=documents)
        packer.num_waiting = 0


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text, none added."""
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        # Blocks are shorter than the texts, so their length is nothing to warn of.
        verbose=False,
    )["input_ids"]
    return encoded


def pieces(text: str) -> Iterator[str]:
    """Cut a long text between two words, where tokenizers cut as well.

    A tokenizer holds a hundred times the size of each text in memory. Where the pieces begin
    depends on nothing but the text.
    """
    start = 0
    while len(text) - start > _PIECE_CHARS:
        end = start + _PIECE_CHARS
        spaces = list(_BETWEEN_WORDS.finditer(text, end - _PIECE_CHARS // 2, end))
        if spaces:
            end = spaces[-1].start()
        yield text[start:end]
        start = end
    yield text[start:]


def _progress(packers: Mapping[str, _Packer]) -> str:
    return ", ".join(
        f"{split} {packer.num_tokens:,} of {packer.wanted:,}" for split, packer in packers.items()
    )


def _fingerprint(split: str, tokens: Tensor) -> str:
    digest = hashlib.sha256(f"{split}\n{tokens.shape[1]}\n".encode())
    digest.update(tokens.to(torch.int32).contiguous().numpy().astype("<i4", copy=False).data)
    return digest.hexdigest()


def _make_cache(
    folder: Path,
    request: Mapping[str, Any],
    parts: Sequence[Part],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    block_size: int = request["block_size"]
    orders = {split: _mixed(parts, num_blocks) for split, num_blocks in request["blocks"].items()}
    packed: list[dict[str, Tensor]] = []
    documents = dict.fromkeys(request["blocks"], 0)
    for number, part in enumerate(parts):
        wanted = {split: order.count(number) * block_size for split, order in orders.items()}
        with naming(part.where), part.corpus.reading() as reading:
            packers = _tokenise(
                reading,
                tokenizer,
                separator=request["separator"],
                block_size=block_size,
                wanted=wanted,
            )
            logger.info("data: tokens: %s", _progress(packers))
            blocks = {split: packer.blocks(block_size) for split, packer in packers.items()}
            _check_enough(blocks, packers, part.corpus)
        packed.append(blocks)
        for split, packer in packers.items():
            documents[split] += packer.num_documents
    splits: dict[str, dict[str, Any]] = {}
    try:
        for split, order in orders.items():
            tokens = _take_turns(parts, [blocks[split] for blocks in packed], order)
            save_tensors(folder / f"{split}.safetensors", {"tokens": tokens})
            splits[split] = {
                "documents": documents[split],
                "tokens": tokens.numel(),
                "blocks": len(tokens),
                "fingerprint": _fingerprint(split, tokens),
            }
        write_json(
            folder / "meta.json",
            {
                "request": request,
                "splits": splits,
                "source": [name for part in parts for name in part.corpus.names],
                "versions": _versions(),
            },
        )
    except OSError as e:
        raise DataError(
            f"data.cache: {folder} must be a folder that can be written, but: {e.strerror}"
        ) from e


def _mixed(parts: Sequence[Part], num_blocks: int) -> list[int]:
    """The part that each of so many blocks is taken from."""
    if len(parts) == 1:
        return [0] * num_blocks
    mixing = Mixing([part.weight for part in parts])
    return [mixing.next() for _ in range(num_blocks)]


def _take_turns(parts: Sequence[Part], packed: Sequence[Tensor], order: list[int]) -> Tensor:
    """Blocks of one split, ``(num_blocks, block_size)``, mixed in this order.

    Where the text of the bank is too short, the part that lasts longest is gone through once, and
    the others again and again as their weights demand.
    """
    if len(parts) == 1 or not order:
        return packed[0]
    counts = [order.count(number) for number in range(len(parts))]
    lasts = max(
        1.0 if len(blocks) >= count else len(blocks) / count
        for blocks, count in zip(packed, counts, strict=True)
        if count
    )
    if lasts < 1:
        order = order[: int(len(order) * lasts)]
    starts = [sum(map(len, packed[:number])) for number in range(len(parts))]
    taken = [0] * len(parts)
    rows = []
    for number in order:
        rows.append(starts[number] + taken[number] % len(packed[number]))
        taken[number] += 1
    for part, count, blocks in zip(parts, taken, packed, strict=True):
        if count > len(blocks):
            logger.warning(
                "data: %s.source holds %s blocks of the bank split where its weight asks for %s; "
                "they are repeated",
                part.where,
                f"{len(blocks):,}",
                f"{count:,}",
            )
    return torch.cat(list(packed))[torch.tensor(rows, dtype=torch.long)]


def _check_enough(
    blocks: Mapping[str, Tensor], packers: Mapping[str, _Packer], corpus: Corpus
) -> None:
    short = [
        f"{split} (has {tokens.numel():,} tokens in blocks of {tokens.shape[1]}, from "
        f"{packers[split].num_documents} documents; needs {packers[split].wanted:,}"
        + (f", {_SETTINGS[split]})" if split in _SETTINGS else ")")
        for split, tokens in blocks.items()
        if tokens.numel() < packers[split].wanted and (split != "bank" or len(tokens) == 0)
    ]
    if short:
        small = ", ".join(f"{split} {percent}%" for split, percent in _PERCENT.items())
        advice = "add documents or lower these settings"
        if corpus.has_text_files:
            advice += "; a text file is one document, so divide a long one into many, or into JSON "
            advice += "lines"
        raise DataError(
            f"data.source: too little text for {', '.join(short)}; documents are divided by hash "
            f"({small}, bank the rest): {advice}"
        )


def _read_cache(folder: Path, request: Mapping[str, Any]) -> dict[str, TokenBlocks] | None:
    """What the cache holds for this request; None, with a logged line, if it is damaged."""
    if not (folder / "meta.json").exists():
        return None
    try:
        meta = read_json(folder / "meta.json")
        if not isinstance(meta, dict) or meta.get("request") != request:
            raise DamagedFile(f"{folder / 'meta.json'}: was written for another request")
        blocks = {}
        for split in request["blocks"]:
            path = folder / f"{split}.safetensors"
            tokens = load_tensors(path).get("tokens")
            expected = (meta["splits"][split]["blocks"], request["block_size"])
            if tokens is None or tokens.dtype != torch.int32 or tokens.shape != expected:
                raise DamagedFile(f"{path}: must hold int32 tokens of shape {expected}")
            blocks[split] = TokenBlocks(
                split=split, tokens=tokens, fingerprint=meta["splits"][split]["fingerprint"]
            )
    except (DamagedFile, KeyError, TypeError, OSError) as e:
        reason = str(e) if isinstance(e, MohawkError | OSError) else f"meta.json lacks {e}"
        logger.warning("data: the cache in %s is damaged and made again: %s", folder, reason)
        return None
    return blocks


def _versions() -> dict[str, str]:
    versions = {}
    for package in ("mohawk-nas", "datasets", "transformers", "tokenizers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
