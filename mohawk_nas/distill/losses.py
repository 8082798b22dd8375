"""Losses of stage 3, end-to-end distillation.

B batch, T tokens, D model width, V vocabulary, N tokens of a whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mohawk_nas.config import LogitsConfig
from mohawk_nas.kernels.kl_divergence import kl_divergence
from mohawk_nas.metrics import HEAD_VALUES
from mohawk_nas.teacher import logits_from_hidden

__all__ = ["logits_loss", "loss_of_hidden"]

NO_LABEL = -100
"""Stands for the token after a block's last one."""


def loss_of_hidden(
    teacher: Any,
    teacher_hidden: Tensor,
    student: Any,
    student_hidden: Tensor,
    tokens: Tensor,
    config: LogitsConfig,
) -> Tensor:
    """The configured loss from last hidden states, averaged over tokens, in float32.

    Where the logits of the whole batch are many, they are made for some tokens at a time. What
    they are needed for in backward, the gradients of hidden states and head, is then computed at
    once and kept instead of them.

    Args:
        teacher: The causal LM whose head makes the targets.
        teacher_hidden: ``(B, T, D of the teacher)``
        student: The causal LM whose head makes the logits.
        student_hidden: ``(B, T, D)``
        tokens: The text, ``(B, T)``.
        config: Choice of loss, temperature and share of hard labels.
    """
    labels = F.pad(tokens[:, 1:], (0, 1), value=NO_LABEL).flatten()
    target, hidden = teacher_hidden.flatten(0, 1), student_hidden.flatten(0, 1)
    at_once = _tokens_at_once(student, hidden)

    def loss_of(start: int, hidden: Tensor) -> Tensor:
        part = slice(start, start + hidden.shape[0])
        with torch.no_grad():
            taught = logits_from_hidden(teacher, target[part][None])[0]
        logits = logits_from_hidden(student, hidden[None])[0]
        # The one that is averaged over fewer: a block's last token has no label.
        share = tokens.shape[1] / max(1, tokens.shape[1] - 1)
        loss = logits_loss(taught, logits, labels[part], config, label_share=share)
        return loss * (hidden.shape[0] / labels.shape[0])

    if at_once >= labels.shape[0]:
        return loss_of(0, hidden)
    if not torch.is_grad_enabled():
        parts = hidden.split(at_once)
        return torch.stack([loss_of(i * at_once, part) for i, part in enumerate(parts)]).sum()
    head = student.get_output_embeddings()
    weights = [p for p in head.parameters() if p.requires_grad]
    loss: Tensor = _ByParts.apply(loss_of, at_once, hidden, *weights)  # type: ignore[no-untyped-call]
    return loss


def logits_loss(
    teacher_logits: Tensor,
    student_logits: Tensor,
    labels: Tensor,
    config: LogitsConfig,
    *,
    label_share: float = 1.0,
) -> Tensor:
    """The configured loss, averaged over tokens, in float32.

    ``soft_ce`` is MOHAWK's cross-entropy on the teacher's probabilities (arXiv 2408.10189);
    ``kl`` is the same less the teacher's entropy, so that zero means equal; ``reverse_kl`` is the
    divergence of the teacher from the student (arXiv 2306.08543). With a temperature the soft part
    is multiplied by its square, which keeps the gradient's size (Hinton et al. 2015).

    Args:
        teacher_logits: ``(..., V)``
        student_logits: ``(..., V)``
        labels: The tokens that are to be foretold, ``(...)``; -100 where there is none.
        config: Choice of loss, temperature and share of hard labels.
        label_share: Tokens of the whole batch for each one that has a label: the hard part is
            averaged over those.
    """
    temperature = config.temperature
    if config.loss == "kl":
        soft = kl_divergence(teacher_logits, student_logits, temperature=temperature)
    else:
        exact = torch.promote_types(student_logits.dtype, torch.float32)
        student = F.log_softmax(student_logits.to(exact) / temperature, dim=-1)
        taught = teacher_logits.to(exact) / temperature
        if config.loss == "soft_ce":
            soft = -(F.softmax(taught, dim=-1) * student).sum(-1)
        else:
            taught = F.log_softmax(taught, dim=-1)
            soft = F.kl_div(taught, student, reduction="none", log_target=True).sum(-1)
    loss = soft.mean() * temperature**2
    if config.hard_label_weight:
        hard = F.cross_entropy(
            student_logits.flatten(0, -2).float(),
            labels.flatten(),
            ignore_index=NO_LABEL,
            reduction="sum",
        )
        hard = hard * (label_share / labels.numel())
        loss = (1 - config.hard_label_weight) * loss + config.hard_label_weight * hard
    return loss


def _tokens_at_once(student: Any, hidden: Tensor) -> int:
    """Tokens whose logits may be alive at once."""
    vocab: int = student.config.get_text_config().vocab_size
    values = HEAD_VALUES.get(hidden.device.type, HEAD_VALUES["cuda"])
    return max(1, values // vocab)


class _ByParts(torch.autograd.Function):
    """A sum of losses over parts of some rows whose gradients are taken in the forward pass.

    One part's logits are gone before the next one's are made, and none is made twice. The
    gradients of a scalar are the same up to the factor that comes from above.
    """

    @staticmethod
    def forward(ctx: Any, loss_of: Any, at_once: int, hidden: Tensor, *weights: Tensor) -> Tensor:
        wanted: list[Tensor] = list(weights)
        total = hidden.new_zeros((), dtype=torch.float32)
        of_hidden: list[Tensor] = []
        of_weights: list[Tensor | None] = [None] * len(weights)
        for number, part in enumerate(hidden.split(at_once)):
            with torch.enable_grad():
                leaf = part.detach().requires_grad_()
                loss = loss_of(number * at_once, leaf)
                # A user's loss or head may leave some of them out.
                found = torch.autograd.grad(loss, [leaf, *wanted], allow_unused=True)
            total += loss.detach()
            of_hidden.append(torch.zeros_like(leaf) if found[0] is None else found[0])
            _add_up(of_weights, found[1:])
        ctx.types = [w.dtype for w in weights]
        ctx.save_for_backward(torch.cat(of_hidden), *of_weights)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, *of_weights = ctx.saved_tensors
        scaled = [
            None if gradient is None else (gradient * upstream).to(dtype)
            for gradient, dtype in zip(of_weights, ctx.types, strict=True)
        ]
        return None, None, (of_hidden * upstream).to(of_hidden.dtype), *scaled


def _add_up(totals: list[Tensor | None], found: Sequence[Tensor | None]) -> None:
    # In float32: a small part added to a large sum is lost in bfloat16.
    for number, gradient in enumerate(found):
        if gradient is None:
            continue
        total = totals[number]
        if total is None:
            totals[number] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        else:
            total += gradient
