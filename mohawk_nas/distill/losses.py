"""Losses of stage 3, end-to-end distillation.

B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from mohawk_nas.config import LogitsConfig
from mohawk_nas.metrics import cross_entropy, kl_divergence

__all__ = ["logits_loss"]


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
