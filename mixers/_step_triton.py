# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""A decode step of discrete Mamba-2 between its projections, as one Triton kernel.

One program a sequence and head: it reads the head's columns of the projection, its channels of the
convolution's window and its state once, and writes both back with the gated output. All is computed
in float32.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from ._step import StepSizes

__all__ = ["fused_step"]


@triton.jit
def _window(projected, conv, first, size, channels, TAPS: tl.constexpr, ROWS: tl.constexpr,
            WIDE: tl.constexpr):  # fmt: skip
    """The last TAPS inputs of some channels, the newest in row TAPS - 1; ``(ROWS, WIDE)``."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, WIDE)[None, :]
    seen = columns < size
    before = tl.load(
        conv + rows * channels + first + columns, mask=seen & (rows < TAPS - 1), other=0.0
    ).to(tl.float32)
    newest = tl.load(
        projected + first + columns + rows * 0, mask=seen & (rows == TAPS - 1), other=0.0
    ).to(tl.float32)
    return before + newest


@triton.jit
def _convolved(window, weight, bias, first, size, TAPS: tl.constexpr, ROWS: tl.constexpr,
               WIDE: tl.constexpr):  # fmt: skip
    """``(WIDE,)``; zero beyond ``size``."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, WIDE)[None, :]
    taps = tl.load(
        weight + (first + columns) * TAPS + rows, mask=(columns < size) & (rows < TAPS), other=0.0
    ).to(tl.float32)
    each = tl.arange(0, WIDE)
    offset = tl.load(bias + first + each, mask=each < size, other=0.0).to(tl.float32)
    return tl.sum(window * taps, 0) + offset


@triton.jit
def _shift(window, conv, first, size, channels, TAPS: tl.constexpr, ROWS: tl.constexpr,
           WIDE: tl.constexpr):  # fmt: skip
    """Keep all but the oldest input."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, WIDE)[None, :]
    kept = (columns < size) & (rows > 0) & (rows < TAPS)
    tl.store(conv + (rows - 1) * channels + first + columns, window, mask=kept)


@triton.jit
def _step_kernel(
    projected, conv, ssm, weight, bias, skip, out, projected_stride, heads, channels, min_step,
    P: tl.constexpr, N: tl.constexpr, TAPS: tl.constexpr,
    WIDE_P: tl.constexpr, WIDE_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0)
    inner = heads * P
    projected += sequence * projected_stride
    conv += sequence * (TAPS - 1) * channels
    ssm += (sequence * heads + head) * N * P
    out += sequence * inner + head * P
    of_x = head * P
    of_b = inner + head * N
    of_c = inner + heads * N + head * N
    p = tl.arange(0, WIDE_P)
    n = tl.arange(0, WIDE_N)
    x_window = _window(projected, conv, of_x, P, channels, TAPS, ROWS, WIDE_P)
    b_window = _window(projected, conv, of_b, N, channels, TAPS, ROWS, WIDE_N)
    c_window = _window(projected, conv, of_c, N, channels, TAPS, ROWS, WIDE_N)
    places = ssm + n[:, None] * P + p[None, :]
    inside = (n[:, None] < N) & (p[None, :] < P)
    h = tl.load(places, mask=inside, other=0.0)
    # A small tensor is held by several threads: all must have read before one of them writes.
    tl.debug_barrier()
    x = _convolved(x_window, weight, bias, of_x, P, TAPS, ROWS, WIDE_P)
    b = _convolved(b_window, weight, bias, of_b, N, TAPS, ROWS, WIDE_N)
    c = _convolved(c_window, weight, bias, of_c, N, TAPS, ROWS, WIDE_N)
    _shift(x_window, conv, of_x, P, channels, TAPS, ROWS, WIDE_P)
    _shift(b_window, conv, of_b, N, channels, TAPS, ROWS, WIDE_N)
    _shift(c_window, conv, of_c, N, channels, TAPS, ROWS, WIDE_N)
    a = tl.load(projected + channels + inner + head).to(tl.float32)
    # softplus(a) = max(a, 0) + log(1 + e); where e is small, log(1 + e) as it stands would lose
    # what makes long memory (W. Kahan's way to log1p).
    e = tl.exp(-tl.abs(a))
    one_e = 1.0 + e
    rest = one_e - 1.0
    log1p = tl.where(rest == 0.0, e, tl.log(one_e) * (e / tl.where(rest == 0.0, 1.0, rest)))
    decay = tl.exp(-tl.maximum(tl.maximum(a, 0.0) + log1p, min_step))
    h = decay * h + b[:, None] * x[None, :]
    tl.store(places, h, mask=inside)
    y = tl.sum(c[:, None] * h, 0) + tl.load(skip + head).to(tl.float32) * x
    z = tl.load(projected + channels + head * P + p, mask=p < P, other=0.0).to(tl.float32)
    y = y * (z / (1.0 + tl.exp(-z)))
    tl.store(out + p, y, mask=p < P)


def fused_step(
    projected: Tensor,
    conv: Tensor,
    ssm: Tensor,
    *,
    weight: Tensor,
    bias: Tensor,
    skip: Tensor,
    sizes: StepSizes,
) -> Tensor:
    """:func:`._step.plain_step`; the states are contiguous."""
    assert conv.is_contiguous() and ssm.is_contiguous() and ssm.dtype == torch.float32
    assert projected.stride(-1) == 1
    batch, channels, taps = projected.shape[0], *weight.shape
    out = projected.new_empty(batch, sizes.heads * sizes.width)
    wide_p, wide_n, rows = (triton.next_power_of_2(n) for n in (sizes.width, sizes.state, taps))
    # Triton launches on the current device, which need not be the tensors'.
    device = torch.cuda.device(projected.device) if projected.is_cuda else contextlib.nullcontext()
    with device:
        _step_kernel[(sizes.heads, batch)](
            projected, conv, ssm, weight.contiguous(), bias, skip, out, projected.stride(0),
            sizes.heads, channels, sizes.min_step, P=sizes.width, N=sizes.state, TAPS=taps,
            WIDE_P=wide_p, WIDE_N=wide_n, ROWS=rows,
            num_warps=max(1, min(8, wide_p * wide_n // 1024)),
        )  # fmt: skip
    return out
