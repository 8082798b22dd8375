"""KL divergence of next-token distributions from logits, without anything in float32 beside them.

V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mohawk_nas.kernels._available import triton_obstacle

__all__ = ["kl_divergence"]


def kl_divergence(
    teacher_logits: Tensor,
    student_logits: Tensor,
    *,
    temperature: float = 1.0,
    backend: Literal["auto", "torch", "triton"] = "auto",
) -> Tensor:
    """Forward KL divergence, ``sum_v p_v (log p_v - log q_v)``, of the teacher's p and student's q.

    The teacher is frozen: gradients go to the student's logits.

    Args:
        teacher_logits: ``(..., V)``
        student_logits: ``(..., V)``
        temperature: Divides both logits.
        backend: ``torch`` is plain torch, ``triton`` a kernel that reads each logit once, ``auto``
            the kernel where it can run.

    Returns:
        ``(...)`` in nats, in float32, or in float64 where the logits are.

    Raises:
        ValueError: ``backend="triton"`` where the kernel cannot run.
    """
    teacher_logits = teacher_logits.detach()
    if backend != "torch":
        obstacle = _obstacle(teacher_logits, student_logits)
        if obstacle is None:
            from mohawk_nas.kernels._kl_divergence_triton import fused_kl_divergence

            return fused_kl_divergence(teacher_logits, student_logits, temperature=temperature)
        if backend == "triton":
            raise ValueError(f"kl_divergence: backend 'triton' cannot run: {obstacle}")
    teacher, student = (
        F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, -1)
        for logits in (teacher_logits, student_logits)
    )
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def _obstacle(teacher_logits: Tensor, student_logits: Tensor) -> str | None:
    """Why the fused kernel cannot run, or None."""
    if (obstacle := triton_obstacle(student_logits.device)) is not None:
        return obstacle
    for logits in (teacher_logits, student_logits):
        if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return f"no support for {logits.dtype}"
    return None
