"""Attention of one new token over a cache of fixed length that is filled up to some place.

B sequences, H query heads, K key-value heads, S places in the cache, P head size.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mohawk_nas.kernels._available import triton_obstacle

__all__ = ["AttentionBackend", "decode_attention", "pick_backend", "seen_places"]

AttentionBackend = Literal["auto", "torch", "triton"]

_LARGEST_HEAD = 256
"""Head size that the kernel can hold on chip."""


def pick_backend(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype
) -> Literal["torch", "triton"]:
    """What :func:`decode_attention` runs by.

    Raises:
        ValueError: ``triton`` was asked for and cannot run.
    """
    if backend == "torch":
        return "torch"
    obstacle = triton_obstacle(device)
    if obstacle is None and dtype not in (torch.float32, torch.float16, torch.bfloat16):
        obstacle = f"no support for {dtype}"
    if backend == "triton" and obstacle is not None:
        raise ValueError(f"decode_attention: backend 'triton' cannot run: {obstacle}")
    return "torch" if obstacle is not None else "triton"


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    last: Tensor,
    first: Tensor,
    scaling: float,
    window: int | None = None,
    seen: Tensor | None = None,
    backend: Literal["torch", "triton"],
) -> Tensor:
    """Softmax attention of the token at place ``last`` over places ``first`` to ``last``.

    Nothing waits for the GPU, so a recorded CUDA graph is right for every ``last``: the kernel
    reads the filled part alone, plain torch all of ``keys``.

    Args:
        query: ``(B, H, 1, P)``
        keys: ``(B, K, S, P)``; grouped heads are not repeated.
        values: ``(B, K, S, P)``, or of another width.
        last: The newest token's place, int64, ``()``.
        first: Each sequence's first place, int64, ``(B,)``.
        scaling: Factor of the scores.
        window: Tokens that are seen, the newest included; None sees all.
        seen: :func:`seen_places` of the same, for the plain path; made here if None.
        backend: As :func:`pick_backend` says.

    Returns:
        ``(B, H, 1, P)``, of the values' width.
    """
    # In some families values are of another width.
    fits = query.shape[-1] == values.shape[-1] <= _LARGEST_HEAD
    if backend == "triton" and fits:
        from mohawk_nas.kernels._decode_attention_triton import split_attention

        return split_attention(
            query, keys, values, last=last, first=first, scaling=scaling, window=window
        )
    if seen is None:
        seen = seen_places(keys.shape[2], last=last, first=first, window=window)
    # Query heads of one group stand as queries of their key head: no key is repeated, and the fast
    # kernels of grouped heads take no mask.
    groups = query.reshape(query.shape[0], keys.shape[1], -1, query.shape[-1])
    mixed = F.scaled_dot_product_attention(groups, keys, values, attn_mask=seen, scale=scaling)
    return mixed.reshape(*query.shape[:-1], -1)


def seen_places(length: int, *, last: Tensor, first: Tensor, window: int | None = None) -> Tensor:
    """True at the places that the newest token sees, ``(B, 1, 1, length)``."""
    places = torch.arange(length, device=last.device)
    seen = (places >= first[:, None]) & (places <= last)
    if window is not None:
        seen = seen & (places > last - window)
    return seen[:, None, None]
