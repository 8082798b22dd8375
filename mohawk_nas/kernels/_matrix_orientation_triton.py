# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Stage 1's distance of mixing matrices and its gradients, as Triton kernels.

The teacher's matrix is ``P_ij = softmax(scaling * q_i . k_j)`` under the causal mask, the
student's ``M_ij = (C_i . B_j) exp(L_i - L_j) + D [i = j]``, where L is the inclusive cumulative sum
of the logarithms of the decays. The distance is the sum of ``(M - P)^2`` (MOHAWK's stage 1, arXiv
2408.10189); both matrices are computed tile by tile on chip and never stored, as attention is in
FlashAttention-2 (arXiv 2307.08691).

Because the teacher is frozen, the gradient is the same whatever follows, but for one factor a head:
``dS/dM = 2 (M - P)``. So what runs over the tiles is

1. ``_decay_kernel``: L in float64, kept as two float32, and tables of the decays within a tile;
2. ``_softmax_kernel``: the normalisation of P's rows;
3. ``_rows_kernel``: the distance, C's gradient, and the diagonal's, row by row;
4. ``_columns_kernel`` in backward: B's gradient, column by column.

The distance is a sum of squares of differences: nothing cancels where the matrices are close. No
kernel adds atomically: the same inputs give the same bits.

Decays. Below the diagonal tiles, the decay from column j to row i is a product of three numbers
that are at most one: within j's tile up to its end, between the tiles, within i's tile from its
start. Where the one between the tiles falls below float32's normal range, M is zero there, and only
P remains: its squares are summed while its rows are normalised, and the tile is not visited again.

B batch, H heads of the student, T tokens, P head size of the teacher, N state size.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mohawk_nas.kernels._available import launching_on

__all__ = ["fused_matrix_distance"]

_LOG2E = tl.constexpr(math.log2(math.e))
# Powers of two below this are not normal float32 numbers.
_DEAD = tl.constexpr(-126.0)
# A finite floor of a row's maximum: -inf - -inf would be NaN.
_FLOOR = tl.constexpr(-1e30)
# Ends of tiles that are looked at together to find those without decay left.
_LOOK = tl.constexpr(64)

# Numbers that no other machine code is made for.
_VARYING = [
    "heads",
    "teacher_heads",
    "kv_heads",
    "length",
    "window",
    "tiles",
    "batch_heads",
    "group",
]


@triton.jit
def _place(tiles, batch_heads, group):
    """(rank of the tile, batch and head) of this program.

    Tiles of ``group`` heads run side by side, the first of all of them first: programs of equal
    rank have equal work, and the keys of so many heads fit into the cache.
    """
    pid = tl.program_id(0)
    first = pid // (group * tiles) * group
    heads = tl.minimum(batch_heads - first, group)
    within = pid % (group * tiles)
    return within // heads, first + within % heads


@triton.jit
def _tile(pointer, start, stride, rows, columns, length, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """Rows ``start + rows`` of a matrix, zero beyond its length and its ``SIZE`` columns."""
    # The first row's offset may not fit into 32 bits.
    pointer += tl.cast(start, tl.int64) * stride
    offsets = rows[:, None] * stride + columns[None, :]
    if MASKED:
        seen = (start + rows < length)[:, None] & (columns < SIZE)[None, :]
        return tl.load(pointer + offsets, mask=seen, other=0.0)
    elif columns.shape[0] > SIZE:
        return tl.load(pointer + offsets, mask=(columns < SIZE)[None, :], other=0.0)
    else:
        return tl.load(pointer + offsets)


@triton.jit(do_not_specialize=["heads", "length"])
def _decay_kernel(
    log_decay,
    high,
    low,
    from_start,
    to_end,
    stride_b,
    stride_h,
    stride_t,
    heads,
    length,
    ROW_STEP: tl.constexpr,
    COLUMN_STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """L in powers of two, as ``high + low``, and the decays from and to the borders of tiles.

    ``from_start``: from the first token of the row's tile of ``ROW_STEP`` to the row;
    ``to_end``: from the column to the last token of its tile of ``COLUMN_STEP``.
    """
    bh = tl.program_id(0)
    batch = (bh // heads).to(tl.int64)
    head = (bh % heads).to(tl.int64)
    log_decay += batch * stride_b + head * stride_h
    here = bh.to(tl.int64) * length
    carry = tl.zeros((), tl.float64)
    for start in range(0, length, BLOCK):
        t = start + tl.arange(0, BLOCK)
        seen = t < length
        # Zeros beyond the end: L stays there, and with it the border of the last tile.
        steps = tl.load(log_decay + t.to(tl.int64) * stride_t, mask=seen, other=0.0)
        steps = steps.to(tl.float64) * _LOG2E
        total = carry + tl.cumsum(steps, 0)
        carry += tl.sum(steps, 0)
        rounded = total.to(tl.float32)
        tl.store(high + here + t, rounded, mask=seen)
        tl.store(low + here + t, (total - rounded.to(tl.float64)).to(tl.float32), mask=seen)
        # L never rises: its largest value in a tile is the first, its smallest the last.
        tiles = tl.reshape(total, (BLOCK // ROW_STEP, ROW_STEP))
        decay = tl.exp2((tiles - tl.max(tiles, 1)[:, None]).to(tl.float32))
        tl.store(from_start + here + t, tl.reshape(decay, (BLOCK,)), mask=seen)
        tiles = tl.reshape(total, (BLOCK // COLUMN_STEP, COLUMN_STEP))
        decay = tl.exp2((tl.min(tiles, 1)[:, None] - tiles).to(tl.float32))
        tl.store(to_end + here + t, tl.reshape(decay, (BLOCK,)), mask=seen)


@triton.jit
def _softmax_step(
    q,
    key,
    start,
    stride,
    i,
    columns,
    length,
    largest,
    weight,
    squares,
    scale,
    window,
    P: tl.constexpr,
    STEP: tl.constexpr,
    DIAGONAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    SQUARES: tl.constexpr,
):
    """Rows' (maximum, sum of weights, sum of their squares) with one more tile of keys."""
    rows = tl.arange(0, STEP)
    k = _tile(key, start, stride, rows, columns, length, P, DIAGONAL)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    j = start + rows
    if DIAGONAL:
        scores = tl.where(i[:, None] >= j[None, :], scores, float("-inf"))
    if WINDOWED:
        scores = tl.where(i[:, None] - j[None, :] < window, scores, float("-inf"))
    larger = tl.maximum(largest, tl.max(scores, 1))
    shrink = tl.exp2(largest - larger)
    weights = tl.exp2(scores - larger[:, None])
    weight = weight * shrink + tl.sum(weights, 1)
    squares = squares * shrink * shrink
    if SQUARES:
        squares += tl.sum(weights * weights, 1)
    return larger, weight, squares


@triton.jit(do_not_specialize=[*_VARYING, "slots"])
def _softmax_kernel(
    query,
    key,
    pairs,
    high,
    logsum,
    visited,
    partial,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    heads,
    teacher_heads,
    kv_heads,
    length,
    window,
    scale,
    tiles,
    batch_heads,
    group,
    slots,
    P: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """For a tile of rows: log2 of P's normalisation, and the columns left of which M is zero.

    The squares of P in those columns are this tile's ``partial``.
    """
    rank, bh = _place(tiles, batch_heads, group)
    tile = tiles - 1 - rank
    batch = (bh // heads).to(tl.int64)
    teacher_head = tl.load(pairs + bh % heads).to(tl.int64)
    query += batch * q_b + teacher_head * q_h
    key += batch * k_b + teacher_head * kv_heads // teacher_heads * k_h
    here = bh.to(tl.int64) * length

    top = tile * BLOCK
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, WIDTH)
    i = top + rows
    before = tl.load(high + here + top)
    dead = 0
    for start in range(0, top, STEP * _LOOK):
        ends = start + tl.arange(0, _LOOK) * STEP + STEP - 1
        after = tl.load(high + here + ends, mask=ends < top, other=float("-inf"))
        dead += tl.sum((before - after < _DEAD).to(tl.int32), 0)
    first = dead * STEP
    begin = 0
    if WINDOWED:
        begin = tl.maximum(top - window + 1, 0) // STEP * STEP

    q = _tile(query, top, q_t, rows, columns, length, P, True)
    largest = tl.full((BLOCK,), _FLOOR, tl.float32)
    weight = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, first, STEP):
        largest, weight, squares = _softmax_step(
            q, key, start, k_t, i, columns, length, largest, weight, squares, scale, window,
            P, STEP, False, WINDOWED, True,
        )  # fmt: skip
    for start in range(tl.maximum(begin, first), top, STEP):
        largest, weight, squares = _softmax_step(
            q, key, start, k_t, i, columns, length, largest, weight, squares, scale, window,
            P, STEP, False, WINDOWED, False,
        )  # fmt: skip
    for start in range(top, tl.minimum(top + BLOCK, length), STEP):
        largest, weight, squares = _softmax_step(
            q, key, start, k_t, i, columns, length, largest, weight, squares, scale, window,
            P, STEP, True, WINDOWED, False,
        )  # fmt: skip
    tl.store(logsum + here + i, largest + tl.log2(weight), mask=i < length)
    squares = tl.where(i < length, squares / (weight * weight), 0.0)
    tl.store(visited + bh * tiles + tile, first)
    tl.store(partial + bh.to(tl.int64) * slots + tile, tl.sum(squares, 0))


@triton.jit(do_not_specialize=[*_VARYING, "slots", "slot", "visited_tiles"])
def _rows_kernel(
    query,
    key,
    c,
    b,
    diagonal,
    pairs,
    high,
    low,
    to_end,
    logsum,
    visited,
    partial,
    c_grad,
    rows_grad,
    diagonal_grad,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    c_b,
    c_h,
    c_t,
    b_b,
    b_h,
    b_t,
    g_b,
    g_h,
    g_t,
    diagonal_stride,
    heads,
    teacher_heads,
    kv_heads,
    length,
    window,
    scale,
    tiles,
    batch_heads,
    group,
    slots,
    slot,
    visited_tiles,
    P: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    VISITED_BLOCK: tl.constexpr,
    WINDOWED: tl.constexpr,
    DIAGONAL: tl.constexpr,
    TRAINED: tl.constexpr,
):
    """For a tile of rows: the distance and, where trained, what the gradients need of these rows.

    ``c_grad`` is the gradient of the distance, ``rows_grad`` half the sum of ``dS/dM M`` over each
    row left of the diagonal, ``diagonal_grad`` half the sum of ``dS/dM`` on the diagonal.
    """
    rank, bh = _place(tiles, batch_heads, group)
    tile = tiles - 1 - rank
    batch = (bh // heads).to(tl.int64)
    head = (bh % heads).to(tl.int64)
    teacher_head = tl.load(pairs + head).to(tl.int64)
    query += batch * q_b + teacher_head * q_h
    key += batch * k_b + teacher_head * kv_heads // teacher_heads * k_h
    c += batch * c_b + head * c_h
    b += batch * b_b + head * b_h
    here = bh.to(tl.int64) * length

    top = tile * BLOCK
    rows = tl.arange(0, BLOCK)
    steps = tl.arange(0, STEP)
    columns = tl.arange(0, WIDTH)
    states = tl.arange(0, STATE)
    i = top + rows
    real = i < length
    # Beyond the end, P and M are zero: infinite normalisation, and zeros in C.
    normal = tl.load(logsum + here + i, mask=real, other=float("inf"))
    row_high = tl.load(high + here + tl.minimum(i, length - 1))
    row_low = tl.load(low + here + tl.minimum(i, length - 1))
    top_high = tl.load(high + here + top)
    top_low = tl.load(low + here + top)
    from_top = tl.exp2((row_high - top_high) + (row_low - top_low))
    first = tl.load(visited + bh * visited_tiles + top // VISITED_BLOCK)

    q = _tile(query, top, q_t, rows, columns, length, P, True)
    c_rows = _tile(c, top, c_t, rows, states, length, N, True)
    distance = tl.zeros((BLOCK,), tl.float32)
    along = tl.zeros((BLOCK,), tl.float32)
    gradient = tl.zeros((BLOCK, STATE), tl.float32)
    for start in range(first, top, STEP):
        k = _tile(key, start, k_t, steps, columns, length, P, False)
        b_rows = _tile(b, start, b_t, steps, states, length, N, False)
        end = here + start + STEP - 1
        between = (top_high - tl.load(high + end)) + (top_low - tl.load(low + end))
        left = tl.load(to_end + here + start + steps) * tl.exp2(between)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        teacher = tl.exp2(scores * scale - normal[:, None])
        if WINDOWED:
            j = start + steps
            teacher = tl.where(i[:, None] - j[None, :] < window, teacher, 0.0)
        student = tl.dot(c_rows, tl.trans(b_rows), input_precision="ieee")
        student = student * from_top[:, None] * left[None, :]
        error = student - teacher
        distance += tl.sum(error * error, 1)
        if TRAINED:
            along += tl.sum(error * student, 1)
            weighted = (error * left[None, :]).to(b_rows.dtype)
            gradient = tl.dot(weighted, b_rows, gradient, input_precision="ieee")
    gradient = gradient * from_top[:, None]

    on_diagonal = tl.zeros((BLOCK,), tl.float32)
    for start in range(top, tl.minimum(top + BLOCK, length), STEP):
        k = _tile(key, start, k_t, steps, columns, length, P, True)
        b_rows = _tile(b, start, b_t, steps, states, length, N, True)
        j = start + steps
        column_high = tl.load(high + here + tl.minimum(j, length - 1))
        column_low = tl.load(low + here + tl.minimum(j, length - 1))
        seen = i[:, None] >= j[None, :]
        same = i[:, None] == j[None, :]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        # Scores right of the diagonal may exceed the row's normalisation by any amount.
        exponent = tl.where(seen, scores * scale - normal[:, None], float("-inf"))
        if WINDOWED:
            exponent = tl.where(i[:, None] - j[None, :] < window, exponent, float("-inf"))
        exponent_decay = (row_high[:, None] - column_high[None, :]) + (
            row_low[:, None] - column_low[None, :]
        )
        decay = tl.exp2(tl.where(seen, exponent_decay, float("-inf")))
        student = tl.dot(c_rows, tl.trans(b_rows), input_precision="ieee") * decay
        error = student - tl.exp2(exponent)
        if DIAGONAL:
            added = tl.load(diagonal + head * diagonal_stride).to(tl.float32)
            error += tl.where(same & real[:, None], added, 0.0)
        distance += tl.sum(error * error, 1)
        if TRAINED:
            along += tl.sum(tl.where(same, 0.0, error * student), 1)
            on_diagonal += tl.sum(tl.where(same, error, 0.0), 1)
            weighted = (error * decay).to(b_rows.dtype)
            gradient = tl.dot(weighted, b_rows, gradient, input_precision="ieee")

    tl.store(partial + bh.to(tl.int64) * slots + slot + tile, tl.sum(distance, 0))
    if TRAINED:
        tl.store(rows_grad + here + i, along, mask=real)
        tl.store(diagonal_grad + bh * tiles + tile, tl.sum(on_diagonal, 0))
        c_grad += batch * g_b + head * g_h + tl.cast(top, tl.int64) * g_t
        seen = real[:, None] & (states < N)[None, :]
        offsets = rows[:, None] * g_t + states[None, :]
        tl.store(c_grad + offsets, (2.0 * gradient).to(c_grad.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=_VARYING)
def _columns_kernel(
    query,
    key,
    c,
    b,
    diagonal,
    pairs,
    high,
    low,
    from_start,
    logsum,
    upstream,
    b_grad,
    columns_grad,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    c_b,
    c_h,
    c_t,
    b_b,
    b_h,
    b_t,
    g_b,
    g_h,
    g_t,
    diagonal_stride,
    heads,
    teacher_heads,
    kv_heads,
    length,
    window,
    scale,
    tiles,
    batch_heads,
    group,
    P: tl.constexpr,
    WIDTH: tl.constexpr,
    N: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    WINDOWED: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    """For a tile of columns: B's gradient, and ``columns_grad``, as ``rows_grad`` above.

    Tiles are computed transposed, columns first: what is summed over rows then lies along a thread.
    """
    tile, bh = _place(tiles, batch_heads, group)
    batch = (bh // heads).to(tl.int64)
    head = (bh % heads).to(tl.int64)
    teacher_head = tl.load(pairs + head).to(tl.int64)
    query += batch * q_b + teacher_head * q_h
    key += batch * k_b + teacher_head * kv_heads // teacher_heads * k_h
    c += batch * c_b + head * c_h
    b += batch * b_b + head * b_h
    here = bh.to(tl.int64) * length

    left = tile * BLOCK
    rows = tl.arange(0, BLOCK)
    steps = tl.arange(0, STEP)
    columns = tl.arange(0, WIDTH)
    states = tl.arange(0, STATE)
    j = left + rows
    column_high = tl.load(high + here + tl.minimum(j, length - 1))
    column_low = tl.load(low + here + tl.minimum(j, length - 1))
    last = tl.minimum(left + BLOCK, length) - 1
    last_high = tl.load(high + here + last)
    last_low = tl.load(low + here + last)
    to_last = tl.exp2((last_high - column_high) + (last_low - column_low))
    alive = 0
    below = left + BLOCK
    for start in range(below, length, STEP * _LOOK):
        starts = start + tl.arange(0, _LOOK) * STEP
        later = tl.load(high + here + starts, mask=starts < length, other=float("-inf"))
        alive += tl.sum((later - last_high >= _DEAD).to(tl.int32), 0)

    k = _tile(key, left, k_t, rows, columns, length, P, True)
    b_rows = _tile(b, left, b_t, rows, states, length, N, True)
    along = tl.zeros((BLOCK,), tl.float32)
    gradient = tl.zeros((BLOCK, STATE), tl.float32)
    for start in range(below, below + alive * STEP, STEP):
        q = _tile(query, start, q_t, steps, columns, length, P, True)
        c_rows = _tile(c, start, c_t, steps, states, length, N, True)
        i = start + steps
        normal = tl.load(logsum + here + i, mask=i < length, other=float("inf"))
        between = (tl.load(high + here + start) - last_high) + (
            tl.load(low + here + start) - last_low
        )
        down = tl.load(from_start + here + i, mask=i < length, other=0.0) * tl.exp2(between)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        teacher = tl.exp2(scores * scale - normal[None, :])
        if WINDOWED:
            teacher = tl.where(i[None, :] - j[:, None] < window, teacher, 0.0)
        student = tl.dot(b_rows, tl.trans(c_rows), input_precision="ieee")
        student = student * to_last[:, None] * down[None, :]
        error = student - teacher
        along += tl.sum(error * student, 1)
        weighted = (error * down[None, :]).to(c_rows.dtype)
        gradient = tl.dot(weighted, c_rows, gradient, input_precision="ieee")
    gradient = gradient * to_last[:, None]

    for start in range(left, tl.minimum(below, length), STEP):
        q = _tile(query, start, q_t, steps, columns, length, P, True)
        c_rows = _tile(c, start, c_t, steps, states, length, N, True)
        i = start + steps
        normal = tl.load(logsum + here + i, mask=i < length, other=float("inf"))
        row_high = tl.load(high + here + tl.minimum(i, length - 1))
        row_low = tl.load(low + here + tl.minimum(i, length - 1))
        seen = i[None, :] >= j[:, None]
        same = i[None, :] == j[:, None]
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        exponent = tl.where(seen, scores * scale - normal[None, :], float("-inf"))
        if WINDOWED:
            exponent = tl.where(i[None, :] - j[:, None] < window, exponent, float("-inf"))
        exponent_decay = (row_high[None, :] - column_high[:, None]) + (
            row_low[None, :] - column_low[:, None]
        )
        decay = tl.exp2(tl.where(seen, exponent_decay, float("-inf")))
        student = tl.dot(b_rows, tl.trans(c_rows), input_precision="ieee") * decay
        error = student - tl.exp2(exponent)
        along += tl.sum(tl.where(same, 0.0, error * student), 1)
        if DIAGONAL:
            added = tl.load(diagonal + head * diagonal_stride).to(tl.float32)
            error += tl.where(same, added, 0.0)
        # Rows beyond the end are zero in C.
        weighted = (error * decay).to(c_rows.dtype)
        gradient = tl.dot(weighted, c_rows, gradient, input_precision="ieee")

    real = j < length
    tl.store(columns_grad + here + j, along, mask=real)
    gradient = gradient * (2.0 * tl.load(upstream + bh))
    b_grad += batch * g_b + head * g_h + tl.cast(left, tl.int64) * g_t
    seen = real[:, None] & (states < N)[None, :]
    offsets = rows[:, None] * g_t + states[None, :]
    tl.store(b_grad + offsets, gradient.to(b_grad.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["length"])
def _decay_gradient_kernel(
    rows_grad, columns_grad, upstream, grad, length, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradient of the logarithm of each decay: it scales every entry whose path it lies on.

    L_i occurs in row i, and with a minus in column i; the sum of all that come later, in float64.
    """
    bh = tl.program_id(0)
    here = bh.to(tl.int64) * length
    factor = 2.0 * tl.load(upstream + bh)
    carry = tl.zeros((), tl.float64)
    blocks = tl.cdiv(length, BLOCK)
    for block in range(0, blocks):
        t = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        seen = t < length
        change = tl.load(rows_grad + here + t, mask=seen, other=0.0).to(tl.float64)
        change -= tl.load(columns_grad + here + t, mask=seen, other=0.0).to(tl.float64)
        total = carry + tl.cumsum(change, 0, reverse=True)
        carry += tl.sum(change, 0)
        tl.store(grad + here + t, total.to(tl.float32) * factor, mask=seen)


@dataclass(frozen=True)
class Launch:
    """Sizes of one kernel."""

    block: int
    """Rows (or columns) of a program."""
    step: int
    """Columns (or rows) it takes at a time; divides ``block``."""
    warps: int
    stages: int


@dataclass(frozen=True)
class Launches:
    """Sizes of the three large kernels.

    The softmax kernel's block and step are multiples of the rows kernel's.
    """

    softmax: Launch
    rows: Launch
    columns: Launch


def choose(size: int, *, exact: bool, shared_memory: int) -> Launches:
    """Sizes for the larger of head and state size, a power of two.

    Args:
        size: 16 to 256.
        exact: An operand is float32, and products are taken without tensor cores.
        shared_memory: Bytes a program may have.
    """
    if exact:
        # Such products hold whole rows of their operands in registers.
        side = 32 if size <= 64 else 16
        return Launches(
            Launch(side, side, 4, 1), Launch(side, side, 4, 1), Launch(side, side, 4, 1)
        )
    if shared_memory < 160 * 1024 or size > 128:
        return Launches(Launch(64, 32, 4, 2), Launch(64, 32, 4, 1), Launch(64, 32, 4, 1))
    if size > 64:
        return Launches(Launch(128, 64, 8, 3), Launch(128, 64, 8, 2), Launch(128, 64, 8, 2))
    # The fastest of those tried on an H100 with head and state size 64.
    return Launches(Launch(64, 64, 4, 3), Launch(64, 64, 4, 3), Launch(64, 64, 4, 3))


@functools.cache
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


# Never forgotten: a captured CUDA graph may hold an entry's address.
@functools.cache
def _on_device(heads: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(heads, dtype=torch.int32, device=device)


def _group(tensors: list[Tensor], batch_heads: int) -> int:
    """Heads whose keys and queries fit together into half of an H100's second-level cache."""
    bytes_per_head = sum(t.shape[2] * t.shape[3] * t.element_size() for t in tensors)
    return max(1, min(batch_heads, 25 * 2**20 // bytes_per_head))


def _rowwise(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty_gradient(tensor: Tensor) -> Tensor:
    """With the strides of the tensor where they are dense: its producer then need not copy."""
    empty = torch.empty_like(tensor)
    if empty.stride(-1) == 1:
        return empty
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


class _MatrixDistance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        c: Tensor,
        b: Tensor,
        log_decay: Tensor,
        diagonal: Tensor | None,
        query: Tensor,
        key: Tensor,
        pairs: Tensor,
        scaling: float,
        window: int | None,
        trained: bool,
    ) -> Tensor:
        batch, heads, length, state = c.shape
        width = query.shape[3]
        batch_heads = batch * heads
        wide = max(16, triton.next_power_of_2(width))
        deep = max(16, triton.next_power_of_2(state))
        exact = torch.float32 in (query.dtype, c.dtype)
        sizes = choose(max(wide, deep), exact=exact, shared_memory=_shared_memory(c.device))

        high, low, from_start, to_end, logsum = c.new_empty(
            (5, batch, heads, length), dtype=torch.float32
        )
        block = max(1024, sizes.rows.step, sizes.columns.step)
        _decay_kernel[(batch_heads,)](
            log_decay, high, low, from_start, to_end, *log_decay.stride(), heads, length,
            ROW_STEP=sizes.columns.step, COLUMN_STEP=sizes.rows.step, BLOCK=block, num_warps=8,
        )  # fmt: skip

        # One distance a tile: what the softmax kernel saw alone, and the rest.
        softmax_tiles = triton.cdiv(length, sizes.softmax.block)
        rows_tiles = triton.cdiv(length, sizes.rows.block)
        slots = softmax_tiles + rows_tiles
        partial = c.new_empty((batch, heads, slots), dtype=torch.float32)
        visited = c.new_empty((batch, heads, softmax_tiles), dtype=torch.int32)
        scale = scaling * math.log2(math.e)
        teacher = (heads, query.shape[1], key.shape[1], length, window or 0, scale)
        _softmax_kernel[(batch_heads * softmax_tiles,)](
            query, key, pairs, high, logsum, visited, partial,
            *query.stride()[:3], *key.stride()[:3], *teacher,
            softmax_tiles, batch_heads, _group([query, key], batch_heads), slots,
            P=width, WIDTH=wide, BLOCK=sizes.softmax.block, STEP=sizes.softmax.step,
            WINDOWED=window is not None,
            num_warps=sizes.softmax.warps, num_stages=sizes.softmax.stages,
        )  # fmt: skip

        c_grad = _empty_gradient(c) if trained else c
        rows_grad = torch.empty_like(high) if trained else high
        diagonal_grad = c.new_empty((batch, heads, rows_tiles), dtype=torch.float32)
        group = _group([query, key, c, b], batch_heads)
        _rows_kernel[(batch_heads * rows_tiles,)](
            query, key, c, b, diagonal, pairs, high, low, to_end, logsum, visited, partial,
            c_grad, rows_grad, diagonal_grad,
            *query.stride()[:3], *key.stride()[:3], *c.stride()[:3], *b.stride()[:3],
            *c_grad.stride()[:3], 0 if diagonal is None else diagonal.stride(0), *teacher,
            rows_tiles, batch_heads, group, slots, softmax_tiles, softmax_tiles,
            P=width, WIDTH=wide, N=state, STATE=deep, BLOCK=sizes.rows.block,
            STEP=sizes.rows.step, VISITED_BLOCK=sizes.softmax.block,
            WINDOWED=window is not None, DIAGONAL=diagonal is not None, TRAINED=trained,
            num_warps=sizes.rows.warps, num_stages=sizes.rows.stages,
        )  # fmt: skip

        if trained:
            ctx.save_for_backward(
                query, key, c, b, diagonal, pairs, high, low, from_start, logsum,
                c_grad, rows_grad, diagonal_grad,
            )  # fmt: skip
            ctx.teacher, ctx.window, ctx.group = teacher, window, group
            ctx.sizes, ctx.wide, ctx.deep = sizes.columns, wide, deep
            ctx.decay_dtype = log_decay.dtype
        return partial.sum(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (
            query, key, c, b, diagonal, pairs, high, low, from_start, logsum,
            c_grad, rows_grad, diagonal_grad,
        ) = ctx.saved_tensors  # fmt: skip
        batch, heads, length, state = c.shape
        upstream = upstream.contiguous()
        sizes = ctx.sizes
        tiles = triton.cdiv(length, sizes.block)
        b_grad = _empty_gradient(b)
        columns_grad = torch.empty_like(high)
        with launching_on(c.device):
            _columns_kernel[(batch * heads * tiles,)](
                query, key, c, b, diagonal, pairs, high, low, from_start, logsum, upstream,
                b_grad, columns_grad,
                *query.stride()[:3], *key.stride()[:3], *c.stride()[:3], *b.stride()[:3],
                *b_grad.stride()[:3], 0 if diagonal is None else diagonal.stride(0),
                *ctx.teacher, tiles, batch * heads, ctx.group,
                P=query.shape[3], WIDTH=ctx.wide, N=state, STATE=ctx.deep, BLOCK=sizes.block,
                STEP=sizes.step, WINDOWED=ctx.window is not None, DIAGONAL=diagonal is not None,
                num_warps=sizes.warps, num_stages=sizes.stages,
            )  # fmt: skip
            decay_grad = torch.empty_like(high)
            _decay_gradient_kernel[(batch * heads,)](
                rows_grad, columns_grad, upstream, decay_grad, length, BLOCK=1024, num_warps=8
            )
        # Written apart: the saved one may be asked for again (retain_graph).
        scaled = torch.empty_like(c_grad)
        torch.mul(c_grad, upstream[:, :, None, None], out=scaled)
        d_grad = None
        if diagonal is not None:
            d_grad = (2 * upstream * diagonal_grad.sum(-1)).sum(0).to(diagonal.dtype)
        return (
            scaled, b_grad, decay_grad.to(ctx.decay_dtype), d_grad,
            None, None, None, None, None, None,
        )  # fmt: skip


def fused_matrix_distance(
    query: Tensor,
    key: Tensor,
    c: Tensor,
    b: Tensor,
    log_decay: Tensor,
    diagonal: Tensor | None,
    *,
    scaling: float,
    heads: Tensor,
    window: int | None,
) -> Tensor:
    """Squared Frobenius distance of mixing matrices, ``(B, H)`` in float32.

    Gradients go to the student's factors; the teacher's queries and keys get none.

    Args:
        query: ``(B, teacher heads, T, P)`` in float32, float16 or bfloat16; P at most 256.
        key: ``(B, teacher key-value heads, T, P)``, of the same type.
        c: ``(B, H, T, N)``; N at most 256.
        b: ``(B, H, T, N)``, of the same type.
        log_decay: ``(B, H, T)``, never positive.
        diagonal: ``(H,)``
        scaling: Factor of the teacher's scores, positive.
        heads: The teacher's head for each of the student's, ``(H,)``. From the CPU it is copied
            once for all calls, so that a CUDA graph can be captured after one eager call.
        window: Tokens a query sees, itself included; None sees all before it.
    """
    if heads.device != c.device:
        heads = _on_device(tuple(heads.tolist()), c.device)
    factors = (c, b, log_decay, diagonal)
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in factors)
    with launching_on(c.device):
        result: Tensor = _MatrixDistance.apply(
            _rowwise(c), _rowwise(b), log_decay, diagonal,
            _rowwise(query.detach()), _rowwise(key.detach()),
            heads, float(scaling), window, trained,
        )  # fmt: skip
    return result
