# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""The KL divergence of logits and its gradient, as Triton kernels.

One program a token reads teacher's and student's logits once. With m and n the largest logits of
each, ``w_v = exp(t_v - m)`` and W and U the sums of ``exp(t_v - m)`` and ``exp(s_v - n)``,

    KL = sum_v w_v ((t_v - m) - (s_v - n)) / W - log W + log U.

All are taken online, as softmax is in arXiv 1805.02867, so nothing of the vocabulary's size is
written forward, and nothing large cancels. Backward writes the gradient,
``(softmax(s) - softmax(t)) / temperature``, from the logits, the maxima and the sums.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mohawk_nas.kernels._available import launching_on

__all__ = ["fused_kl_divergence"]

_LN2 = tl.constexpr(math.log(2))
# A finite floor of the running maximum: -inf - -inf would be NaN.
_FLOOR = tl.constexpr(-1e30)

MAX_BLOCK = 4096
"""Logits a program looks at at a time."""


@triton.jit(do_not_specialize=["rows", "vocab"])
def _forward_kernel(
    teacher, student, divergence, tops, sums, teacher_stride, student_stride, rows, vocab, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    teacher += row * teacher_stride
    student += row * student_stride
    t_top = tl.full((), _FLOOR, tl.float32)
    s_top = tl.full((), _FLOOR, tl.float32)
    t_sum = tl.zeros((), tl.float32)
    s_sum = tl.zeros((), tl.float32)
    apart = tl.zeros((), tl.float32)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        seen = columns < vocab
        t = tl.load(teacher + columns, mask=seen, other=float("-inf")).to(tl.float32)
        s = tl.load(student + columns, mask=seen, other=float("-inf")).to(tl.float32)
        t_risen = tl.maximum(t_top, tl.max(t, 0))
        s_risen = tl.maximum(s_top, tl.max(s, 0))
        t_below = t - t_risen
        s_below = s - s_risen
        weights = tl.exp2(t_below * scale)
        # What came before is seen from the new maxima. Differences are taken before they are
        # scaled: a fused multiplication and subtraction would leave rounding of equal logits.
        t_step = t_top - t_risen
        s_step = s_top - s_risen
        shrink = tl.exp2(t_step * scale)
        apart = (apart + t_sum * (t_step - s_step)) * shrink
        # Where the teacher gives no probability nothing is lost, whatever the student says.
        apart += tl.sum(tl.where(weights > 0, weights * (t_below - s_below), 0.0), 0)
        t_sum = t_sum * shrink + tl.sum(weights, 0)
        s_sum = s_sum * tl.exp2(s_step * scale) + tl.sum(tl.exp2(s_below * scale), 0)
        t_top = t_risen
        s_top = s_risen
    tl.store(divergence + row, (apart / t_sum * scale - (tl.log2(t_sum) - tl.log2(s_sum))) * _LN2)
    tl.store(tops + row, t_top)
    tl.store(tops + rows + row, s_top)
    tl.store(sums + row, t_sum)
    tl.store(sums + rows + row, s_sum)


@triton.jit(do_not_specialize=["rows", "vocab"])
def _backward_kernel(
    teacher, student, tops, sums, upstream, gradient, teacher_stride, student_stride,
    upstream_stride, rows, vocab, scale, temperature, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = columns < vocab
    t = tl.load(teacher + row * teacher_stride + columns, mask=seen).to(tl.float32)
    s = tl.load(student + row * student_stride + columns, mask=seen).to(tl.float32)
    p = tl.exp2((t - tl.load(tops + row)) * scale) / tl.load(sums + row)
    q = tl.exp2((s - tl.load(tops + rows + row)) * scale) / tl.load(sums + rows + row)
    factor = tl.load(upstream + row * upstream_stride) / temperature
    tl.store(gradient + row * vocab + columns, factor * (q - p), mask=seen)


class _KLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        rows, vocab = student.shape
        divergence = student.new_empty(rows, dtype=torch.float32)
        tops, sums = student.new_empty(2, 2, rows, dtype=torch.float32)
        ctx.scale = math.log2(math.e) / temperature
        ctx.temperature = temperature
        ctx.save_for_backward(student, teacher, tops, sums)
        if rows:
            block = min(MAX_BLOCK, triton.next_power_of_2(vocab))
            with launching_on(student.device):
                _forward_kernel[(rows,)](
                    teacher, student, divergence, tops, sums, teacher.stride(0), student.stride(0),
                    rows, vocab, ctx.scale, BLOCK=block, num_warps=8,
                )  # fmt: skip
        return divergence

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, tops, sums = ctx.saved_tensors
        rows, vocab = student.shape
        gradient = torch.empty(rows, vocab, dtype=student.dtype, device=student.device)
        if rows:
            block = min(MAX_BLOCK, triton.next_power_of_2(vocab))
            with launching_on(student.device):
                _backward_kernel[(rows, triton.cdiv(vocab, block))](
                    teacher, student, tops, sums, upstream, gradient, teacher.stride(0),
                    student.stride(0), upstream.stride(0), rows, vocab, ctx.scale,
                    ctx.temperature, BLOCK=block, num_warps=8,
                )  # fmt: skip
        return gradient, None, None


def fused_kl_divergence(teacher: Tensor, student: Tensor, *, temperature: float) -> Tensor:
    """Forward KL divergence of logits ``(..., V)`` in float32, float16 or bfloat16; ``(...)``.

    Gradients go to the student's logits.
    """
    vocab = student.shape[-1]
    rows = [_rowwise(logits.reshape(-1, vocab)) for logits in (student, teacher)]
    result: Tensor = _KLDivergence.apply(*rows, float(temperature))
    return result.view(student.shape[:-1])


def _rowwise(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()
