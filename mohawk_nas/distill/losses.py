"""Losses of stage 3, end-to-end distillation.

B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mohawk_nas.config import LogitsConfig
from mohawk_nas.metrics import cross_entropy, kl_divergence, row_chunks
from mohawk_nas.teacher import logits_from_hidden

__all__ = ["logits_loss", "loss_of_hidden"]


def loss_of_hidden(
    teacher: Any,
    teacher_hidden: Tensor,
    student: Any,
    student_hidden: Tensor,
    tokens: Tensor,
    config: LogitsConfig,
) -> Tensor:
    """:func:`logits_loss` from last hidden states ``(B, T, D)``.

    Where the logits of the whole batch are many, they are made for a few blocks at a time and made
    again in backward.
    """

    def loss_of(rows: slice, hidden: Tensor) -> Tensor:
        with torch.no_grad():
            target = logits_from_hidden(teacher, teacher_hidden[rows])
        return logits_loss(target, logits_from_hidden(student, hidden), tokens[rows], config)

    chunks = list(row_chunks(student_hidden, student))
    if len(chunks) == 1:
        return loss_of(chunks[0], student_hidden)
    total = student_hidden.new_zeros((), dtype=torch.float32)
    for rows in chunks:
        hidden = student_hidden[rows]
        loss = checkpoint(loss_of, rows, hidden, use_reentrant=False, preserve_rng_state=False)
        total = total + loss * (len(hidden) / len(student_hidden))
    return total


def logits_loss(
    teacher_logits: Tensor, student_logits: Tensor, tokens: Tensor, config: LogitsConfig
) -> Tensor:
    """The configured loss, averaged over tokens, in float32.

    ``soft_ce`` is MOHAWK's cross-entropy on the teacher's probabilities (arXiv 2408.10189);
    ``kl`` is the same less the teacher's entropy, so that zero means equal. With a temperature the
    soft part is multiplied by its square, which keeps the gradient's size (Hinton et al. 2015).

    Args:
        teacher_logits: ``(B, T, V)``
        student_logits: ``(B, T, V)``
        tokens: The text, ``(B, T)``.
        config: Choice of loss, temperature and share of hard labels.
    """
    temperature = config.temperature
    if config.loss == "kl":
        soft = kl_divergence(teacher_logits, student_logits, temperature=temperature).mean()
    else:
        target = F.softmax(teacher_logits.float() / temperature, dim=-1)
        student = F.log_softmax(student_logits.float() / temperature, dim=-1)
        soft = -(target * student).sum(-1).mean()
    loss = soft * temperature**2
    if config.hard_label_weight:
        hard = cross_entropy(student_logits, tokens).mean()
        loss = (1 - config.hard_label_weight) * loss + config.hard_label_weight * hard
    return loss
