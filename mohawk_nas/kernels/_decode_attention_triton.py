# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Attention of one query a sequence, split over the keys (flash-decoding), as Triton kernels.

A program takes one key-value head of one sequence and a share of its filled places, and leaves its
softmax's maximum, sum and weighted values; a second kernel puts the shares together. How much is
filled is read on the GPU, so that one launch is right for every length.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mohawk_nas.kernels._available import launching_on

__all__ = ["split_attention"]

BLOCK = 64
"""Places that a program looks at at a time, at most."""
BLOCK_BYTES = 2**14
"""Their keys. Two blocks of keys and values are fetched ahead; some GPUs have 99 KiB for them."""
PROGRAMS = 1024
"""Programs that keep a GPU busy; shorter batches are split until there are so many."""
MOST_SPLITS = 64

# A finite floor of the running maximum: -inf - -inf would be NaN.
_FLOOR = tl.constexpr(-1e30)


@triton.jit
def _split_kernel(
    query, keys, values, out, tops, sums, last, first,
    key_batch, key_head, key_place, value_batch, value_head, value_place,
    kv_heads, scale, window,
    GROUP: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, P: tl.constexpr,
    WIDE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    # Of several queries each is a lane of the online softmax. Of a single one each place of a block
    # is: lanes then need not hear of each other before the end.
    pair = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    sequence = pair // kv_heads
    kv_head = pair % kv_heads
    stop = tl.load(last).to(tl.int32) + 1
    start = tl.load(first + sequence).to(tl.int32)
    if WINDOWED:
        start = tl.maximum(start, stop - window)
    share = tl.cdiv(tl.cdiv(stop - start, BLOCK), SPLITS) * BLOCK
    begin = start + split * share
    end = tl.minimum(begin + share, stop)
    columns = tl.arange(0, WIDE)
    rows = tl.arange(0, ROWS)
    places = tl.arange(0, BLOCK)
    inside = columns < P
    keys += sequence * key_batch + kv_head * key_head
    values += sequence * value_batch + kv_head * value_head
    # Rows beyond the group are zero, and are not stored.
    whole = (rows[:, None] < GROUP) & inside[None, :]
    q = tl.load(
        query + (pair * GROUP + rows[:, None]) * P + columns[None, :], mask=whole, other=0.0
    )
    top = tl.full((LANES,), _FLOOR, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    mixed = tl.zeros((LANES, WIDE), tl.float32)
    # Stages by name: without a matrix product loads are fetched ahead only where that is asked for.
    for place in tl.range(begin, end, BLOCK, num_stages=3):
        at = place + places
        filled = at < end
        mask = filled[:, None] & inside[None, :]
        k = tl.load(
            keys + at[:, None].to(tl.int64) * key_place + columns[None, :], mask=mask, other=0.0
        )
        v = tl.load(
            values + at[:, None].to(tl.int64) * value_place + columns[None, :],
            mask=mask,
            other=0.0,
        )
        if ROWS == 1:
            scores = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
            scores = tl.where(filled, scores, float("-inf"))
            risen = tl.maximum(top, scores)
            shrink = tl.exp2(top - risen)
            weights = tl.exp2(scores - risen)
            total = total * shrink + weights
            mixed = mixed * shrink[:, None] + weights[:, None] * v.to(tl.float32)
        else:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where(filled[None, :], scores, float("-inf"))
            risen = tl.maximum(top, tl.max(scores, 1))
            shrink = tl.exp2(top - risen)
            weights = tl.exp2(scores - risen[:, None])
            total = total * shrink + tl.sum(weights, 1)
            mixed = mixed * shrink[:, None]
            mixed += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = risen
    if ROWS == 1:
        highest = tl.max(top, 0)
        shrink = tl.exp2(top - highest)
        total = tl.zeros((ROWS,), tl.float32) + tl.sum(total * shrink, 0)
        mixed = tl.sum(mixed * shrink[:, None], 0)[None, :]
        top = tl.zeros((ROWS,), tl.float32) + highest
    row = (pair * SPLITS + split) * GROUP + rows
    if SPLITS == 1:
        tl.store(
            out + (pair * GROUP + rows[:, None]) * P + columns[None, :],
            mixed / total[:, None],
            mask=whole,
        )
    else:
        tl.store(out + row[:, None] * P + columns[None, :], mixed, mask=whole)
        tl.store(tops + row, top, mask=rows < GROUP)
        tl.store(sums + row, total, mask=rows < GROUP)


@triton.jit
def _join_kernel(
    parts, tops, sums, out, GROUP: tl.constexpr, P: tl.constexpr, WIDE: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    member = tl.program_id(1)
    splits = tl.arange(0, SPLITS)
    columns = tl.arange(0, WIDE)
    row = (pair * SPLITS + splits) * GROUP + member
    top = tl.load(tops + row)
    # A split without places has the floor for its maximum: its weight is zero.
    weights = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(weights * tl.load(sums + row), 0)
    mask = (row[:, None] >= 0) & (columns[None, :] < P)
    mixed = tl.load(parts + row[:, None] * P + columns[None, :], mask=mask, other=0.0)
    joined = tl.sum(mixed * weights[:, None], 0) / total
    tl.store(out + (pair * GROUP + member) * P + columns, joined, mask=columns < P)


def split_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    last: Tensor,
    first: Tensor,
    scaling: float,
    window: int | None,
) -> Tensor:
    """:func:`mohawk_nas.kernels.decode_attention.decode_attention`."""
    batch, heads, _, width = query.shape
    kv_heads, length = keys.shape[1:3]
    assert keys.stride(-1) == values.stride(-1) == 1
    query = query.contiguous()
    group, wide = heads // kv_heads, triton.next_power_of_2(width)
    # Matrix products have 16 rows at least, and 16 columns.
    rows = 1 if group == 1 else max(16, triton.next_power_of_2(group))
    wide = wide if rows == 1 else max(16, wide)
    block = min(BLOCK, BLOCK_BYTES // (wide * keys.element_size()))
    pairs = batch * kv_heads
    wanted = triton.next_power_of_2(triton.cdiv(PROGRAMS, pairs))
    splits = max(1, min(wanted, MOST_SPLITS, triton.next_power_of_2(length) // (2 * block)))
    out = torch.empty_like(query)
    # In float32 what is put together, in the query's type what is not.
    size = (pairs * splits * group, width)
    parts = out if splits == 1 else query.new_empty(size, dtype=torch.float32)
    tops, sums = query.new_empty(2, pairs * splits * group, dtype=torch.float32)
    with launching_on(query.device):
        _split_kernel[(pairs, splits)](
            query, keys, values, parts, tops, sums, last, first,
            *keys.stride()[:3], *values.stride()[:3],
            kv_heads, scaling * math.log2(math.e), window or 0,
            GROUP=group, ROWS=rows, LANES=block if rows == 1 else rows, P=width, WIDE=wide,
            SPLITS=splits, BLOCK=block, WINDOWED=window is not None, num_warps=4,
        )  # fmt: skip
        if splits > 1:
            _join_kernel[(pairs, group)](
                parts, tops, sums, out, GROUP=group, P=width, WIDE=wide, SPLITS=splits
            )
    return out
