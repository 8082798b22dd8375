"""Plain-torch scans shared by mixers whose matrix is ``(C B^T) * decay mask``.

B batch, H heads, T tokens, N state size, P head width, K chunks, Q tokens a chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_scan(
    c: Tensor, b: Tensor, x: Tensor, log_decay: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, one token at a time; the reference for :func:`chunked_scan`.

    ``h_t = exp(log_decay_t) h_{t-1} + B_t x_t^T`` and ``y_t = C_t h_t``.

    Args:
        c: ``(B, H, T, N)``
        b: ``(B, H, T, N)``
        x: ``(B, H, T, P)``
        log_decay: ``(B, H, T)``
        state: State before the first token, ``(B, H, N, P)``; zeros if None.

    Returns:
        ``y``, ``(B, H, T, P)``, and the state after the last token.
    """
    h = x.new_zeros(*x.shape[:2], b.shape[-1], x.shape[-1]) if state is None else state
    outputs = []
    for t in range(x.shape[2]):
        h = h * log_decay[:, :, t, None, None].exp() + b[:, :, t, :, None] * x[:, :, t, None, :]
        outputs.append(torch.einsum("bhn,bhnp->bhp", c[:, :, t], h))
    return torch.stack(outputs, dim=2), h


def chunked_scan(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    *,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """:func:`naive_scan` as matrix products over chunks (Mamba-2, arXiv 2405.21060).

    Decay sums are taken in float32 inside a chunk, so a decay close to 1 over thousands of tokens
    keeps its small logarithm, and the state travels between chunks in float32.
    """
    length, dtype = x.shape[2], x.dtype
    chunk = min(chunk_size, length)
    if pad := -length % chunk:
        # Zeros add nothing to the state, and a log-decay of zero keeps it.
        c, b, x = (F.pad(tensor, (0, 0, 0, pad)) for tensor in (c, b, x))
        log_decay = F.pad(log_decay, (0, pad))
    c, b, x = (tensor.unflatten(2, (-1, chunk)) for tensor in (c, b, x))  # (B, H, K, Q, ·)
    total = log_decay.float().unflatten(2, (-1, chunk)).cumsum(-1)  # (B, H, K, Q)

    # 1. Inside a chunk: the mixing matrix of the chunk.
    matrix = (c @ b.transpose(-1, -2)) * decay_mask(total).to(dtype)  # (B, H, K, Q, Q)
    y = matrix @ x

    # 2. What each chunk adds to the state at its end.
    to_end = (total[..., -1:] - total).exp().to(dtype)
    added = (b * to_end[..., None]).transpose(-1, -2) @ x  # (B, H, K, N, P)

    # 3. The state at each chunk's start, from chunk to chunk.
    across = total[..., -1].exp()[..., None, None]  # (B, H, K, 1, 1)
    h = torch.zeros_like(added[:, :, 0], dtype=torch.float32) if state is None else state.float()
    starts = []
    for k in range(added.shape[2]):
        starts.append(h)
        h = across[:, :, k] * h + added[:, :, k].float()

    # 4. What that state gives to the chunk's outputs.
    from_start = total.exp().to(dtype)
    y = y + (c * from_start[..., None]) @ torch.stack(starts, dim=2).to(dtype)
    return y.flatten(2, 3)[:, :, :length], h


def decay_mask(total: Tensor) -> Tensor:
    """``exp(total_i - total_j)`` for j <= i and 0 above, from cumulative log-decays.

    Args:
        total: ``(..., T)``

    Returns:
        ``(..., T, T)``
    """
    above = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device)
    difference = total[..., :, None] - total[..., None, :]
    # Masked before exp: above the diagonal the difference is positive and may overflow, and
    # 0 * inf would reach the gradients.
    return difference.masked_fill(above.triu(1), -torch.inf).exp()
