"""What a model is measured by on text, defined once for objectives, distillation and evaluation.

B batch (blocks), T tokens a block, D model width, V vocabulary. Everything is in nats a token and
in float32.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mohawk_nas.capture import without_masks
from mohawk_nas.data import TokenBlocks
from mohawk_nas.kernels.kl_divergence import kl_divergence
from mohawk_nas.teacher import Teacher, logits_from_hidden

__all__ = [
    "BlockFigures",
    "Figure",
    "blocks_at_once",
    "body",
    "cross_entropy",
    "evaluate_blocks",
    "kl_divergence",
    "kl_of_hidden",
    "kl_to",
    "row_chunks",
]

BLOCKS_ON_CPU = 8
TOKENS_ON_GPU = 49_152
"""Text run through a model at once where nobody says: on a CPU more is no faster, and less than
this leaves a GPU waiting for Python if the model is small."""

HEAD_VALUES = {"cpu": 2**21, "cuda": 2**26}
"""Logits computed at once: on a CPU what stays in its caches, on a GPU what fills it."""


def cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of each token after a block's first one.

    Args:
        logits: ``(B, T, V)``
        tokens: ``(B, T)``

    Returns:
        ``(B, T - 1)``
    """
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    return losses.view(tokens.shape[0], -1)


def body(model: Any, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """Last hidden state ``(B, T, D)`` of a causal LM, without its logits and without a cache."""
    # A loaded hybrid is a shell around what it runs.
    inner = getattr(model, "causal_lm", model)
    with without_masks(inner) if mask is None else nullcontext():
        out = model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)
    return out.last_hidden_state  # type: ignore[no-any-return]


def kl_of_hidden(
    teacher: Any, teacher_hidden: Tensor, student: Any, student_hidden: Tensor
) -> Tensor:
    """Mean KL divergence of each block, from last hidden states ``(B, T, D)``.

    The logits are made for a few blocks at a time and never kept.

    Returns:
        ``(B,)``
    """
    parts = []
    for rows in row_chunks(teacher_hidden, teacher):
        target = logits_from_hidden(teacher, teacher_hidden[rows])
        parts.append(kl_to(target, student, student_hidden[rows]))
    return torch.cat(parts)


def kl_to(target: Tensor, student: Any, student_hidden: Tensor) -> Tensor:
    """Mean KL divergence of each block to the teacher's logits ``(B, T, V)``."""
    parts = []
    for rows in row_chunks(student_hidden, student):
        logits = logits_from_hidden(student, student_hidden[rows])
        parts.append(kl_divergence(target[rows], logits).mean(1))
    return torch.cat(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockFigures:
    """Figures of one model on one split, one number a block."""

    kl: tuple[float, ...]
    cross_entropy: tuple[float, ...]

    @property
    def mean_kl(self) -> float:
        return sum(self.kl) / len(self.kl)

    @property
    def mean_cross_entropy(self) -> float:
        return sum(self.cross_entropy) / len(self.cross_entropy)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One number that a model is judged by, and how far it can be trusted."""

    name: str
    value: float
    standard_error: float | None
    """None where nobody knows it."""
    items: tuple[float, ...] = ()
    """A number a block, notation or question, of which the value is the mean: models are compared
    item by item. Empty where the value is no mean."""
    higher_is_better: bool = False

    @classmethod
    def mean_of(cls, name: str, items: Sequence[float], *, higher_is_better: bool) -> Figure:
        """The mean of some items."""
        return cls(
            name=name,
            value=statistics.fmean(items),
            standard_error=_error_of_mean(items),
            items=tuple(items),
            higher_is_better=higher_is_better,
        )

    def minus(self, other: Figure) -> Figure:
        """The difference to the same figure of another model.

        Its standard error is that of the paired differences, where both know their items; else the
        two errors are added as if they were independent, which over the same questions is too much.
        """
        if self.items and len(self.items) == len(other.items):
            gaps = [a - b for a, b in zip(self.items, other.items, strict=True)]
            return Figure.mean_of(self.name, gaps, higher_is_better=self.higher_is_better)
        errors = [f.standard_error for f in (self, other) if f.standard_error is not None]
        return Figure(
            name=self.name,
            value=self.value - other.value,
            standard_error=math.hypot(*errors) if len(errors) == 2 else None,
            higher_is_better=self.higher_is_better,
        )


def _error_of_mean(items: Sequence[float]) -> float | None:
    return statistics.stdev(items) / math.sqrt(len(items)) if len(items) > 1 else None


@torch.no_grad()
def evaluate_blocks(
    teacher: Teacher, model: Any, blocks: TokenBlocks, *, batch_size: int | None = None
) -> BlockFigures:
    """KL divergence to the teacher and cross-entropy of a causal LM on every block."""
    batch_size = batch_size or blocks_at_once(blocks, teacher.device)
    kl: list[float] = []
    losses: list[float] = []
    for start in range(0, len(blocks), batch_size):
        indices = range(start, min(start + batch_size, len(blocks)))
        tokens = blocks.batch(list(indices)).to(teacher.device)
        targets, hidden = teacher.run(tokens), body(model, tokens)
        kl += kl_of_hidden(teacher.model, targets, model, hidden).tolist()
        for rows in row_chunks(hidden, model):
            logits = logits_from_hidden(model, hidden[rows])
            losses += cross_entropy(logits, tokens[rows]).mean(1).tolist()
    return BlockFigures(kl=tuple(kl), cross_entropy=tuple(losses))


def blocks_at_once(blocks: TokenBlocks, device: torch.device) -> int:
    """Blocks of a batch that is run without gradients, where nobody says."""
    if device.type == "cpu":
        return BLOCKS_ON_CPU
    return max(1, TOKENS_ON_GPU // blocks.tokens.shape[1])


def row_chunks(hidden: Tensor, model: Any) -> Iterator[slice]:
    """Rows of ``(B, T, D)`` whose logits may be alive at once."""
    vocab = model.config.get_text_config().vocab_size
    values = HEAD_VALUES.get(hidden.device.type, HEAD_VALUES["cuda"])
    rows = max(1, values // (hidden.shape[1] * vocab))
    for start in range(0, hidden.shape[0], rows):
        yield slice(start, start + rows)
