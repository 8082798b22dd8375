# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The short causal depthwise convolution and its gradients, as Triton kernels.

A program reads its inputs once for all taps; written out in torch every tap reads and writes the
widest activations of a mixer. All is added up in float32.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["fused_conv"]

TOKENS = 32
"""A program looks at so many at a time."""
CHANNELS = 128
PROGRAMS = 1024
"""Of backward, about: enough to fill a GPU, and few enough that their parts of the weights'
gradient are small."""


@triton.jit
def _forward_kernel(
    x, before, weight, bias, out, x_sequence, x_token, length, channels,
    TAPS: tl.constexpr, HAS_BEFORE: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    t = (tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    known = c < channels
    total = tl.load(bias + c, mask=known, other=0.0).to(tl.float32) + tl.zeros(
        (TOKENS, CHANNELS), tl.float32
    )
    for tap in tl.static_range(TAPS):
        s = t - (TAPS - 1) + tap
        value = tl.load(
            x + sequence * x_sequence + s * x_token + c,
            mask=known & (s >= 0) & (s < length),
            other=0.0,
        ).to(tl.float32)
        if HAS_BEFORE:
            value += tl.load(
                before + (sequence * (TAPS - 1) + s + TAPS - 1) * channels + c,
                mask=known & (s < 0),
                other=0.0,
            ).to(tl.float32)
        total += tl.load(weight + c * TAPS + tap, mask=known, other=0.0).to(tl.float32) * value
    place = out + (sequence * length + t) * channels + c
    tl.store(place, total.to(out.dtype.element_ty), mask=known & (t < length))


@triton.jit
def _backward_kernel(
    x, weight, dout, dx, parts, x_sequence, x_token, dout_sequence, dout_token, length, channels,
    rounds, TAPS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    known = c < channels
    rows = tl.arange(0, ROWS)[:, None]
    x += sequence * x_sequence
    dout += sequence * dout_sequence
    # Rows of taps, and below them the bias'.
    found = tl.zeros((ROWS, CHANNELS), tl.float32)
    for number in range(rounds):
        first = (tl.program_id(2) * rounds + number) * TOKENS
        t = (first + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
        here = tl.load(
            dout + t * dout_token + c, mask=known & (t < length), other=0.0
        ).to(tl.float32)  # fmt: skip
        found += tl.where(rows == TAPS, tl.sum(here, 0)[None, :], 0.0)
        total = tl.zeros((TOKENS, CHANNELS), tl.float32)
        for tap in tl.static_range(TAPS):
            s = t - (TAPS - 1) + tap
            value = tl.load(
                x + s * x_token + c, mask=known & (s >= 0) & (s < length), other=0.0
            ).to(tl.float32)  # fmt: skip
            found += tl.where(rows == tap, tl.sum(here * value, 0)[None, :], 0.0)
            s = t + (TAPS - 1) - tap
            later = tl.load(
                dout + s * dout_token + c, mask=known & (s < length), other=0.0
            ).to(tl.float32)  # fmt: skip
            total += tl.load(weight + c * TAPS + tap, mask=known, other=0.0).to(tl.float32) * later
        place = dx + (sequence * length + t) * channels + c
        tl.store(place, total.to(dx.dtype.element_ty), mask=known & (t < length))
    part = sequence * tl.num_programs(2) + tl.program_id(2)
    place = parts + (part * (TAPS + 1) + rows) * channels + c
    tl.store(place, found, mask=known & (rows <= TAPS))


def fused_conv(inputs: Tensor, before: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """:func:`._conv.plain_conv`; no gradient goes to ``before``."""
    out: Tensor = _Convolution.apply(inputs, before, weight, bias)
    return out


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, before: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        x = x if x.stride(2) == 1 else x.contiguous()
        weight = weight.contiguous()
        batch, length, channels = x.shape
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        # Sequences first: of the others there may be 65,535.
        grid = (batch, triton.cdiv(channels, CHANNELS), triton.cdiv(length, TOKENS))
        with _on(x):
            _forward_kernel[grid](
                x, x if before is None else before.contiguous(), weight, bias, out, x.stride(0),
                x.stride(1), length, channels, TAPS=weight.shape[1],
                HAS_BEFORE=before is not None and weight.shape[1] > 1,
                TOKENS=TOKENS, CHANNELS=CHANNELS,
            )  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.bias_type = bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if not x.numel():
            return (
                torch.zeros_like(x),
                None,
                torch.zeros_like(weight),
                weight.new_zeros(len(weight)),
            )
        dout = dout if dout.stride(2) == 1 else dout.contiguous()
        batch, length, channels = x.shape
        taps = weight.shape[1]
        blocks, wide = triton.cdiv(length, TOKENS), triton.cdiv(channels, CHANNELS)
        rounds = triton.cdiv(blocks, max(1, min(blocks, PROGRAMS // (batch * wide))))
        each = triton.cdiv(blocks, rounds)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        parts = x.new_empty(batch * each, taps + 1, channels, dtype=torch.float32)
        with _on(x):
            _backward_kernel[(batch, wide, each)](
                x, weight, dout, dx, parts, x.stride(0), x.stride(1), dout.stride(0),
                dout.stride(1), length, channels, rounds, TAPS=taps,
                ROWS=triton.next_power_of_2(taps + 1), TOKENS=TOKENS, CHANNELS=CHANNELS,
            )  # fmt: skip
        summed = parts.sum(0)
        return dx, None, summed[:taps].T.to(weight.dtype), summed[taps].to(ctx.bias_type)


def _on(tensor: Tensor) -> Any:
    # Triton launches on the current device, which need not be the tensors'.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
