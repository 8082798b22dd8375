"""Distance between a teacher's attention matrices and a student's, without storing either.

B batch, H heads of the student, T tokens, P head size, N state size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mohawk_nas.kernels._available import triton_obstacle
from mohawk_nas.mixer import MatrixFactors

__all__ = ["blockwise_matrix_distance", "matrix_distance"]


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
    backend: Literal["auto", "torch", "triton"] = "auto",
) -> Tensor:
    """Squared Frobenius distance of mixing matrices.

    The teacher's matrix is ``softmax(scaling * q k^T)`` under the causal mask, the student's
    ``(C B^T) * decay mask + diagonal``. The teacher is frozen: gradients go to the factors.

    Args:
        query: After the rotary embedding, ``(B, teacher heads, T, P)``.
        key: ``(B, teacher key-value heads, T, P)``; grouped heads are indexed, not repeated.
        factors: The student's.
        scaling: Factor of the teacher's scores.
        heads: The teacher's head for each of the student's, ``(H,)``.
        window: Tokens a query sees, itself included; None sees all before it.
        mask: True at real tokens, ``(B, T)``; rows of padded queries do not count.
        block_size: Queries at a time in plain torch.
        backend: ``torch`` is plain torch, ``triton`` the fused kernel, ``auto`` the kernel where it
            can run. Products of bfloat16 operands are rounded to bfloat16 in the kernel's backward
            and in plain torch nowhere.

    Returns:
        ``(B, H)`` in float32, or in float64 where the factors are. Its root is the norm of
        MOHAWK's stage 1 (arXiv 2408.10189).

    Raises:
        ValueError: ``backend="triton"`` where the kernel cannot run.
    """
    if backend != "torch":
        obstacle = _obstacle(query, key, factors, scaling=scaling, mask=mask)
        if obstacle is None:
            from mohawk_nas.kernels._matrix_orientation_triton import fused_matrix_distance

            return fused_matrix_distance(
                query,
                key,
                factors.c,
                factors.b,
                factors.log_decay,
                factors.diagonal,
                scaling=scaling,
                heads=heads,
                window=window,
            )
        if backend == "triton":
            raise ValueError(f"matrix_distance: backend 'triton' cannot run: {obstacle}")
    return blockwise_matrix_distance(
        query,
        key,
        factors,
        scaling=scaling,
        heads=heads,
        window=window,
        mask=mask,
        block_size=block_size,
    )


def _obstacle(
    query: Tensor, key: Tensor, factors: MatrixFactors, *, scaling: float, mask: Tensor | None
) -> str | None:
    """Why the fused kernel cannot run, or None."""
    if mask is not None:
        return "the batch has a padding mask"
    if (obstacle := triton_obstacle(query.device)) is not None:
        return obstacle
    types = (torch.float32, torch.float16, torch.bfloat16)
    for tensors in ((query, key), (factors.c, factors.b)):
        if tensors[0].dtype not in types or tensors[1].dtype != tensors[0].dtype:
            return f"no support for {tensors[0].dtype} times {tensors[1].dtype}"
    sizes = (query.shape[-1], factors.c.shape[-1])
    if not all(1 <= size <= _LARGEST for size in sizes):
        return f"head and state size must be at most {_LARGEST}, not {sizes}"
    if scaling <= 0:
        return f"scaling must be positive, not {scaling}"
    return None


_LARGEST = 256
"""Head or state size that the fused kernel can hold on chip."""


def blockwise_matrix_distance(
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
    """:func:`matrix_distance` in plain torch, block by block of queries.

    Forward keeps no block; backward computes each again, so at most one ``block_size x T`` slice a
    head is alive. Computes in float32, or in float64 where the factors are.
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
    wide = torch.promote_types(c.dtype, torch.float32)
    # A finite floor: a padded row sees nothing, and softmax over -inf alone would be NaN.
    scores = (query.to(wide) * scaling) @ key.to(wide).transpose(-1, -2)
    scores = scores.masked_fill(~seen, torch.finfo(wide).min)
    teacher = scores.softmax(-1).masked_fill(~seen, 0.0)

    # Relative to the block's first row, so that float32 holds the differences near the diagonal
    # however long the sequence is.
    relative = (total - total[..., start : start + 1]).to(wide)
    difference = relative[..., start:, None] - relative[..., None, :]
    decay = difference.masked_fill(j > i, -torch.inf).exp()
    student = c.to(wide) @ b.to(wide).transpose(-1, -2) * decay
    if diagonal is not None:
        student = student + diagonal.to(wide)[:, None, None] * (i == j)
    error = teacher - student
    if mask is not None:
        error = error * mask[:, None, start:, None]
    return error.square().sum((-1, -2))
