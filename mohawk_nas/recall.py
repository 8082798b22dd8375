"""Recall: values that a model can only know by looking up their keys earlier in the text.

A sequence names N pairs of a key and a value, then asks for some of them: the key comes once more,
and the next token must be its value. The other pairs are distractors. Keys and values are words
drawn at random, so nothing else in the text tells. Each split has templates and words of its own:
what a search was led by is not what its result is judged by. A sequence begins as a document does:
many models attend to the first token wherever there is nothing to look up, and without the one they
know there they recall next to nothing.

A probe is made for the teacher at hand: of the templates those that it solves, each in one size
of four, in turn. What it does not solve it cannot teach, and its students' answers would be noise.
Few tell little: students that recall nothing of 128 pairs differ on 16, and one that fails at a
notation may be at home in the next. The fewer are asked, the more the recall of two good layouts
differs from one set of them to the next, by more than the drawing of sequences explains
(studies/ground_truth). So there are many, the most in the splits by which the last choice is made
and judged, and where there are enough of them intervals are over notations, not sequences. Sizes
are no chance: how many notations are asked in each is taken as fixed, and what tells sizes apart is
in no interval.

Over length the question is another one: how far back does a model still find what it was told? The
same few pairs, or one fact, then stand at a distance, with prose of the test split in between. Such
a probe is made for any length, and what the teacher makes of it is told, not asked for.

S sequences, T tokens, Q scored questions a sequence.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mohawk_nas.errors import InputError
from mohawk_nas.metrics import body
from mohawk_nas.teacher import Teacher, logits_from_hidden

__all__ = [
    "LengthProbe",
    "Questions",
    "RecallProbe",
    "Split",
    "Template",
    "answers",
    "make_length_probes",
    "make_probe",
    "most_positions",
    "notation_of",
    "recall",
]

Split = Literal["bank", "search", "validation", "test"]

SOLVED = 0.7
"""Share of right answers from which on a teacher counts as solving a probe; guessing gives 0."""

NUM_PAIRS = (16, 32, 64, 128)
"""Sizes of a probe: templates take them in turn, as far as the teacher solves them."""

NUM_EXAMPLES = 4
"""Questions at the start that do not count: they show what is asked for."""
NUM_QUESTIONS = 12
"""That count; with the examples as many as the smallest size has pairs."""

NUM_SEQUENCES: Mapping[Split, int] = {"bank": 64, "search": 64, "validation": 192, "test": 192}
FEW_NOTATIONS = 8
"""Below this number their spread is not known."""
DEALT = "by size"
"""How answers are dealt to blocks: scores of studies that dealt otherwise do not go with these."""
NUM_TRIED = 8
"""Sequences on which is decided whether the teacher solves a size."""

MAX_WORDS = 6000
"""Words drawn from, the most frequent ones of the vocabulary."""

LENGTH_SEQUENCES = 16
"""Sequences of each length, and of each depth of a needle."""
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where in the prose a needle stands: 0 is its beginning, 1 its end."""
TOKENS_AT_ONCE = NUM_TRIED * 2048
"""Of sequences that are run together."""

FACT, FACT_END = "\nThe password of the lighthouse is", ".\n"
"""A needle is FACT, a word and FACT_END; in the end FACT comes once more, and asks for the word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """How a pair is written: ``before KEY between VALUE after``."""

    before: str = ""
    between: str = ""
    after: str = ""

    @classmethod
    def parse(cls, text: str) -> Template:
        """The template that is written like one of its pairs, such as ``" (KEY,VALUE)"``."""
        before, _, rest = text.partition("KEY")
        between, _, after = rest.partition("VALUE")
        return cls(before=before, between=between, after=after)

    def __str__(self) -> str:
        return f"{self.before}KEY{self.between}VALUE{self.after}".strip()


_WRITTEN: Mapping[Split, Sequence[str]] = {
    "bank": ("\nKEY -VALUE,", "KEYVALUE,"),
    "search": (
        *("\nKEY:VALUE", "KEYVALUE", "KEY +VALUE;", " [KEY,VALUE]"),
        *("KEY asVALUE,", "KEYVALUE:", "KEY $VALUE\n", " -KEYVALUE\n"),
    ),
    "validation": (
        *(" (KEY,VALUE)", "KEYVALUE;", "KEY =>VALUE\n", " {KEYVALUE}", "KEY <VALUE>"),
        *("KEY orVALUE;", "KEY &VALUE;", "KEYVALUE\n", "KEY ::VALUE,", " *KEYVALUE\n"),
        *("KEY atVALUE,", "KEY ..VALUE\n", "\nKEY >>VALUE", "KEY \\VALUE;", " ofKEYVALUE,"),
        *("KEY upVALUE,", "KEY !VALUE\n", " ^KEYVALUE", "KEYVALUE /", "KEY soVALUE;"),
        *("KEY _VALUE,", "KEYVALUE no", " =KEYVALUE;", "KEY |VALUE;"),
    ),
    "test": (
        *("KEY =VALUE,", "KEYVALUE.", ' "KEYVALUE"', "KEY ~VALUE\n", " #KEY %VALUE,"),
        *("KEY isVALUE,", "KEYVALUE |", "KEY toVALUE and", "KEY --VALUE;", " `KEYVALUE`"),
        *("KEY inVALUE,", "\n>KEY :VALUE", "KEYVALUE?", "KEY ==VALUE\n", "KEY doVALUE;"),
        *(" <<KEYVALUE>>", "KEY byVALUE,", "\n+KEYVALUE,", "KEY ;VALUE\n", "KEY ?VALUE."),
        *(" ifKEYVALUE,", "KEYVALUE!", "KEY onVALUE\n", "KEY *VALUE;"),
    ),
}
TEMPLATES: Mapping[Split, Sequence[Template]] = {
    split: tuple(map(Template.parse, written)) for split, written in _WRITTEN.items()
}
"""Of each split: some that read like text, and some in which a value follows its key at once."""


def notation_of(split: Split) -> str:
    """What a split's probes are made of, whoever answers them, as a hash."""
    made_of = (*TEMPLATES[split], NUM_PAIRS, NUM_EXAMPLES, NUM_QUESTIONS, NUM_SEQUENCES[split])
    made_of = (*made_of, DEALT)
    return hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]


_SHARES: Sequence[Split] = ("search", "validation", "test")
"""Splits that share the words in small letters; the bank's are those with a capital."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Sequences in which the next token is asked for at some places."""

    tokens: Tensor
    """``(S, T)``, on the CPU."""
    positions: Tensor
    """Where the next token is asked for, ``(S, Q)``, on the CPU."""

    @property
    def fingerprint(self) -> str:
        """What is asked, as a hash: two probes that print alike may hold other words."""
        asked = (self.tokens, self.positions)
        return hashlib.sha256(b"".join(x.numpy().tobytes() for x in asked)).hexdigest()[:16]

    def batches(self, size: int) -> Iterator[Questions]:
        """The same, ``size`` sequences at a time, without what comes after their last questions."""
        for tokens, positions in zip(
            self.tokens.split(size), self.positions.split(size), strict=True
        ):
            end = int(positions.max()) + 2
            yield Questions(tokens=tokens[:, :end], positions=positions)

    def logits(self, model: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What a model says at the questions, and what is right.

        Args:
            model: Makes logits of hidden states.
            hidden: Its last ones of all sequences, ``(S, T, D)``.

        Returns:
            ``(S, Q, V)`` and ``(S, Q)``.
        """
        positions = self.positions.to(hidden.device)
        width = hidden.shape[-1]
        asked = hidden.gather(1, positions[:, :, None].expand(-1, -1, width))
        answers = self.tokens.to(hidden.device).gather(1, positions + 1)
        return logits_from_hidden(model, asked), answers

    def right(self, model: Any, hidden: Tensor) -> Tensor:
        """Share of right answers of each sequence, ``(S,)`` in float32; see :meth:`logits`."""
        logits, answers = self.logits(model, hidden)
        return (logits.argmax(-1) == answers).float().mean(-1)


@dataclass(frozen=True, kw_only=True)
class RecallProbe(Questions):
    """Sequences that ask for values, short ones first, and how many of them the teacher knows."""

    split: Split
    asked: Sequence[tuple[Template, int]]
    """Templates, and the pairs that each is asked with."""
    asked_by: Tensor
    """Which of ``asked`` each sequence is of, ``(S,)``, on the CPU."""
    teacher_recall: float
    """Share of the teacher's answers that are right, 0 to 1."""

    def __str__(self) -> str:
        """For people: what is asked."""
        sizes = sorted({num_pairs for _, num_pairs in self.asked})
        pairs = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
        count = len({template for template, _ in self.asked})
        such = "" if count == 1 else f"{count} notations such as "
        return f"{such}'{self.asked[0][0]}', {pairs} pairs"

    @property
    def fingerprint(self) -> str:
        """What is asked and how answers are dealt, as a hash."""
        return hashlib.sha256(f"{super().fingerprint} {DEALT}".encode()).hexdigest()[:16]

    @property
    def parts_are(self) -> Literal["notations", "sequences"]:
        """What :meth:`parts` stand for, and errors of recall are over."""
        return "sequences" if len(self.asked) < FEW_NOTATIONS else "notations"

    def parts(self, right: Tensor) -> Tensor:
        """What an interval of recall is over: one figure a notation, of :func:`answers`, ``(S,)``.

        A notation's mean, less what is its size's, plus the mean of all: their mean is that of the
        notations, and they spread as notations do within a size (N of them in Z sizes by
        N - Z degrees of freedom). So one may lie beyond 0 or 1. A formula for N independent figures
        then gets their error right but counts N - 1 degrees: over 8 notations in 4 sizes a t
        interval of 95 % holds in 93 % of cases, over 24 in 95 %. There must be fewer sizes than
        notations.

        Where notations are fewer than ``FEW_NOTATIONS``, the sequences: such an interval knows
        nothing of other notations and is too narrow.
        """
        if self.parts_are == "sequences":
            return right
        notation = self.asked_by.to(right.device)
        each = _means(right, notation)
        _, size = self._sizes.to(right.device).unique(return_inverse=True)
        rest = each - _means(each, size)[size]
        free = (len(each) - 1) / (len(each) - int(size.max()) - 1)
        found: Tensor = each.mean() + rest * free**0.5
        return found

    @property
    def _sizes(self) -> Tensor:
        return torch.tensor([num_pairs for _, num_pairs in self.asked])

    def by_block(self, right: Tensor, num_blocks: int) -> Tensor:
        """:func:`answers`, ``(S,)``, dealt out to the blocks of a text that they are added to.

        A block's are of all sizes alike, as far as they go, and of each of one notation or of few.
        So what tells blocks apart tells notations apart, too; where these are few, an error over
        blocks is still too small. ``num_blocks`` must divide S.
        """
        order = self._order.to(right.device)
        dealt: Tensor = right[order].unflatten(0, (num_blocks, -1)).mean(1)
        return dealt

    @cached_property
    def _order(self) -> Tensor:
        """Sequences as they are dealt, ``(S,)``: every layout's are, so it is found once."""
        sizes = self._sizes[self.asked_by]
        place = torch.empty(len(sizes), dtype=torch.double)
        for size in sizes.unique():
            (rows,) = (sizes == size).nonzero(as_tuple=True)
            rows = rows[self.asked_by[rows].argsort(stable=True)]
            # From 0 to 1 through a size's sequences, one notation after the other.
            place[rows] = (torch.arange(len(rows), dtype=torch.double) + 0.5) / len(rows)
        return place.argsort(stable=True)


def _means(values: Tensor, group: Tensor) -> Tensor:
    """Of each group, counted from 0."""
    count = group.bincount()
    return values.new_zeros(len(count)).index_add(0, group, values) / count


@dataclass(frozen=True, kw_only=True)
class LengthProbe(Questions):
    """Sequences of one length that ask, in the end, for what they were told before."""

    kind: Literal["key-value", "needle"]
    """Pairs at the beginning, or one fact at a depth of the prose."""
    length: int
    """T: all of a sequence, answers included."""
    depth: float | None = None
    """Of a needle, 0 to 1."""

    def __str__(self) -> str:
        """For people: what is asked."""
        depth = "" if self.depth is None else f", depth {self.depth:g}"
        return f"{self.kind}, {self.length:,} tokens{depth}"


def make_probe(
    teacher: Teacher,
    split: Split,
    *,
    separator: int | None,
    num_sequences: int | None = None,
    seed: int = 0,
) -> RecallProbe | None:
    """What the teacher solves of a split: its templates, each in one size if they are enough.

    Args:
        teacher: Answers first.
        split: Whose templates and words are taken.
        separator: Token in front of each document, and of each sequence; None puts nothing there.
        num_sequences: S, dealt out evenly; None takes ``NUM_SEQUENCES``.
        seed: Of the words drawn.

    Returns:
        None if it solves none.
    """
    words = _words(teacher, split)
    start = [] if separator is None else [separator]
    written = [(template, _glue(teacher, template)) for template in TEMPLATES[split]]
    usable = [(template, glue) for template, glue in written if glue is not None]
    solved: dict[tuple[Template, int], tuple[list[int], list[int], list[int]]] = {}
    # Where there are fewer templates than sizes, some are asked in several.
    for number in range(max(len(usable), len(NUM_PAIRS)) if usable else 0):
        template, glue = usable[number % len(usable)]
        largest = number % len(NUM_PAIRS)
        size = _size(teacher, glue, words, start, f"{seed} {split} {template}", largest)
        if size is not None:
            solved[template, size] = glue
    if not solved:
        return None
    num_sequences = num_sequences or NUM_SEQUENCES[split]
    parts = []
    for number, ((template, num_pairs), glue) in enumerate(solved.items()):
        count = len(range(number, num_sequences, len(solved)))
        rng = random.Random(f"{seed} {split} {template} {num_pairs}")
        parts.append((number, *_rows(words, start, glue, num_pairs, count, rng)))
    # Few sequences may not be enough for all.
    parts = sorted((part for part in parts if len(part[1])), key=lambda part: part[1].shape[1])
    length = parts[-1][1].shape[1]
    # Nothing after a question has a say in its answer.
    padded = [F.pad(tokens, (0, length - tokens.shape[1])) for _, tokens, _ in parts]
    numbers = [torch.full((len(tokens),), number) for number, tokens, _ in parts]
    probe = RecallProbe(
        split=split,
        asked=tuple(solved)[: len(parts)],
        asked_by=torch.cat(numbers),
        tokens=torch.cat(padded),
        positions=torch.cat([positions for _, _, positions in parts]),
        teacher_recall=0.0,
    )
    return replace(probe, teacher_recall=recall(teacher.model, probe))


def _size(
    teacher: Teacher,
    glue: tuple[list[int], list[int], list[int]],
    words: Sequence[int],
    start: list[int],
    seed: str,
    largest: int,
) -> int | None:
    """The largest number of pairs, up to ``NUM_PAIRS[largest]``, that the teacher solves."""
    solved = None
    for num_pairs in NUM_PAIRS[: largest + 1]:
        if 2 * num_pairs > len(words):
            break
        # Others than are asked later, which this choice would favour.
        rng = random.Random(f"{seed} {num_pairs} tried")
        tokens, positions = _rows(words, start, glue, num_pairs, NUM_TRIED, rng)
        if tokens.shape[1] > teacher.context:
            break
        tried = Questions(tokens=tokens, positions=positions)
        if answers(teacher.model, tried).mean() < SOLVED:
            break
        solved = num_pairs
    return solved


@torch.no_grad()
def recall(model: Any, probe: RecallProbe) -> float:
    """Share of a model's answers to a probe that are right, 0 to 1."""
    return answers(model, probe).mean().item()


@torch.no_grad()
def answers(model: Any, probe: Questions) -> Tensor:
    """Share of right answers in each sequence, ``(S,)``."""
    device = next(model.parameters()).device
    shares = []
    for part in probe.batches(max(1, min(NUM_TRIED, TOKENS_AT_ONCE // probe.tokens.shape[1]))):
        shares.append(part.right(model, body(model, part.tokens.to(device))))
    return torch.cat(shares)


def make_length_probes(
    teacher: Teacher,
    text: Tensor,
    lengths: Sequence[int],
    *,
    separator: int | None,
    template: Template | None = None,
    num_sequences: int = LENGTH_SEQUENCES,
    seed: int = 0,
) -> list[LengthProbe]:
    """Probes of each length: pairs at the beginning, and a needle at each depth.

    Words that stand in the prose are not drawn, as long as there are others.

    Args:
        teacher: Whose tokenizer writes them.
        text: Prose to stand in between, tokens ``(N,)``; used again from its start where it is
            shorter than a sequence.
        lengths: T of each, in tokens.
        separator: Token in front of each document, and of each sequence; None puts nothing there.
        template: How a pair is written; None takes the test split's first.
        num_sequences: S.
        seed: Of words and passages.

    Raises:
        InputError: A length leaves no room for the questions.
    """
    start = [] if separator is None else [separator]
    glue = _glue(teacher, template or TEMPLATES["test"][0])
    assert glue is not None
    probes = []
    for length in sorted(set(lengths)):
        rng = random.Random(f"{seed} length {length}")
        prose = _passages(text, length, num_sequences, rng)
        seen, words = set(prose.flatten().tolist()), _words(teacher, "test")
        unseen = [word for word in words if word not in seen]
        words = unseen if len(unseen) >= 2 * NUM_PAIRS[0] else words
        probes.append(_pairs_at_distance(words, start, glue, prose, rng))
        for depth in DEPTHS:
            probes.append(_needle(teacher, words, start, prose, depth, rng))
    return probes


def most_positions(teacher: Teacher) -> int | None:
    """Tokens that a sequence can have at most; None where positions are computed, not learnt."""
    model, most = teacher.model, teacher.context
    learnt = any(
        # Some families keep a few rows in front for padding.
        isinstance(module, nn.Embedding) and 0 <= module.num_embeddings - most <= 8
        for module in model.modules()
        if module is not model.get_input_embeddings()
    )
    return most if learnt else None


def _passages(text: Tensor, length: int, count: int, rng: random.Random) -> Tensor:
    """Passages of a text ``(count, length)``, each from a place of its own on."""
    starts = torch.tensor([rng.randrange(len(text)) for _ in range(count)])
    return text[(starts[:, None] + torch.arange(length)) % len(text)]


def _pairs_at_distance(
    words: Sequence[int],
    start: list[int],
    glue: tuple[list[int], list[int], list[int]],
    prose: Tensor,
    rng: random.Random,
) -> LengthProbe:
    num_pairs, (count, length) = NUM_PAIRS[0], prose.shape
    rows, positions = _rows(words, start, glue, num_pairs, count, rng)
    between = length - rows.shape[1]
    if between < 0:
        raise InputError(
            f"--recall-lengths: each must hold {num_pairs} pairs and the questions for them, "
            f"{rows.shape[1]} tokens, but one is {length}"
        )
    told = len(start) + num_pairs * (sum(map(len, glue)) + 2)
    tokens = torch.cat([rows[:, :told], prose[:, :between], rows[:, told:]], dim=1)
    return LengthProbe(
        kind="key-value", length=length, tokens=tokens, positions=positions + between
    )


def _needle(
    teacher: Teacher,
    words: Sequence[int],
    start: list[int],
    prose: Tensor,
    depth: float,
    rng: random.Random,
) -> LengthProbe:
    cue, end = (
        teacher.tokenizer.encode(part, add_special_tokens=False) for part in (FACT, FACT_END)
    )
    length = prose.shape[1]
    room = length - len(start) - 2 * len(cue) - len(end) - 2
    if room < 0:
        raise InputError(
            f"--recall-lengths: each must hold a needle and its question, {length - room} tokens, "
            f"but one is {length}"
        )
    before = round(depth * room)
    rows = []
    for passage in prose[:, :room].tolist():
        word = rng.choice(words)
        told = [*passage[:before], *cue, word, *end, *passage[before:]]
        rows.append([*start, *told, *cue, word])
    return LengthProbe(
        kind="needle",
        length=length,
        depth=depth,
        tokens=torch.tensor(rows),
        positions=torch.full((len(rows), 1), length - 2),
    )


def _rows(
    words: Sequence[int],
    start: list[int],
    glue: tuple[list[int], list[int], list[int]],
    num_pairs: int,
    num_sequences: int,
    rng: random.Random,
) -> tuple[Tensor, Tensor]:
    """Sequences ``(S, T)`` and the positions of scored questions ``(S, Q)``."""
    before, between, after = glue
    rows = []
    positions: list[int] = []
    for _ in range(num_sequences):
        drawn = rng.sample(words, 2 * num_pairs)
        pairs = list(zip(drawn[::2], drawn[1::2], strict=True))
        row = list(start)
        positions = []
        # Each is asked for once: an answer that was given is no question.
        for key, value in [*pairs, *rng.sample(pairs, NUM_EXAMPLES + NUM_QUESTIONS)]:
            row += [*before, key, *between]
            positions.append(len(row) - 1)
            row += [value, *after]
        rows.append(row)
    scored = positions[num_pairs + NUM_EXAMPLES :]
    return torch.tensor(rows), torch.tensor([scored] * num_sequences)


def _glue(teacher: Teacher, template: Template) -> tuple[list[int], list[int], list[int]] | None:
    parts = (template.before, template.between, template.after)
    if teacher.tokenizer is None:
        return ([], [], []) if not any(parts) else None
    before, between, after = (
        teacher.tokenizer.encode(part, add_special_tokens=False) if part else [] for part in parts
    )
    return before, between, after


def _words(teacher: Teacher, split: Split) -> list[int]:
    """Token ids of a split's words: those with a space in front of a few small letters.

    Where a vocabulary has few of them, or is unknown, any tokens but the first 256, which most
    vocabularies keep for control tokens and bytes. The bank's words start with a capital, and
    there may be none.
    """
    words: list[int] = []
    if teacher.tokenizer is not None:
        for text, token in teacher.tokenizer.get_vocab().items():
            # What byte-level and sentencepiece vocabularies write for a space.
            word = text[1:] if text[:1] in ("\u0120", "\u2581") else ""
            fits = word.istitle() if split == "bank" else word.islower()
            if len(word) >= 3 and word.isascii() and word.isalpha() and fits:
                words.append(token)
    # Most vocabularies are sorted by frequency.
    words = sorted(words)[:MAX_WORDS]
    if split == "bank":
        return words
    if len(words) < 6 * NUM_PAIRS[0]:
        words = list(range(min(256, teacher.vocab_size // 2), teacher.vocab_size))[:MAX_WORDS]
    return words[_SHARES.index(split) :: len(_SHARES)]
