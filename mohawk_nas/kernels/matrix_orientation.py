"""Distance between a teacher's attention matrices and a student's, without storing either.

B batch, H heads of the student, T tokens, P head size, N state size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mohawk_nas.mixer import MatrixFactors

__all__ = ["matrix_distance"]


def matrix_distance(
    query: Tensor,
    key: Tensor,
    factors: MatrixFactors,
    *,
    scaling: float,
    heads: Tensor,
    window: int | None = None,
    mask: Tensor | None = None,
    block_size: int = 128,
) -> Tensor:
    """Squared Frobenius distance of mixing matrices, block by block of queries.

    The teacher's matrix is ``softmax(scaling * q k^T)`` under the causal mask, the student's
    ``(C B^T) * decay mask + diagonal``. Forward keeps no block; backward computes each again, so
    at most one ``block_size x T`` slice a head is alive.

    Args:
        query: After the rotary embedding, ``(B, teacher heads, T, P)``.
        key: ``(B, teacher key-value heads, T, P)``; grouped heads are indexed, not repeated.
        factors: The student's.
        scaling: Factor of the teacher's scores.
        heads: The teacher's head for each of the student's, ``(H,)``.
        window: Tokens a query sees, itself included; None sees all before it.
        mask: True at real tokens, ``(B, T)``; rows of padded queries do not count.
        block_size: Queries at a time.

    Returns:
        ``(B, H)`` in float32. Its root is the norm of MOHAWK's stage 1 (arXiv 2408.10189).
    """
    length = query.shape[2]
    kv_heads = torch.div(heads * key.shape[1], query.shape[1], rounding_mode="floor")
    key = key[:, kv_heads.to(key.device)]
    query = query[:, heads.to(query.device)]
    total = factors.log_decay.double().cumsum(-1)
    parts = []
    for start in range(0, length, block_size):
        stop = min(start + block_size, length)
        # Views, which cost nothing to keep for backward; what is computed from them is not kept.
        arguments = (
            query[:, :, start:stop],
            key[:, :, :stop],
            factors.c[:, :, start:stop],
            factors.b[:, :, :stop],
            total[..., :stop],
            factors.diagonal,
            None if mask is None else mask[:, :stop],
            window,
            scaling,
        )
        parts.append(checkpoint(_block_distance, *arguments, use_reentrant=False))
    return torch.stack(parts).sum(0)


def _block_distance(
    query: Tensor,
    key: Tensor,
    c: Tensor,
    b: Tensor,
    total: Tensor,
    diagonal: Tensor | None,
    mask: Tensor | None,
    window: int | None,
    scaling: float,
) -> Tensor:
    rows, columns = query.shape[2], key.shape[2]
    start = columns - rows
    i = torch.arange(start, columns, device=query.device)[:, None]
    j = torch.arange(columns, device=query.device)[None]
    seen = j <= i
    if window is not None:
        seen = seen & (j > i - window)
    seen = seen.expand(query.shape[0], 1, rows, columns)
    if mask is not None:
        seen = seen & mask[:, None, None]
    # A finite floor: a padded row sees nothing, and softmax over -inf alone would be NaN.
    scores = (query.float() * scaling) @ key.float().transpose(-1, -2)
    scores = scores.masked_fill(~seen, torch.finfo(torch.float32).min)
    teacher = scores.softmax(-1).masked_fill(~seen, 0.0)

    # Relative to the block's first row, so that float32 holds the differences near the diagonal
    # however long the sequence is.
    relative = (total - total[..., start : start + 1]).float()
    difference = relative[..., start:, None] - relative[..., None, :]
    decay = difference.masked_fill(j > i, -torch.inf).exp()
    student = c.float() @ b.float().transpose(-1, -2) * decay
    if diagonal is not None:
        student = student + diagonal.float()[:, None, None] * (i == j)
    error = teacher - student
    if mask is not None:
        error = error * mask[:, None, start:, None]
    return error.square().sum((-1, -2))
