"""The short causal depthwise convolution of a mixer: plain torch, and a Triton kernel.

B batch, T tokens, C channels, W taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._backends import Backend, fused_kernels

__all__ = ["causal_conv", "last_inputs", "plain_conv"]


def causal_conv(
    inputs: Tensor,
    before: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """:func:`plain_conv`, by one kernel where it can run; that one adds up in float32."""
    kernels = None if backend == "torch" else fused_kernels(inputs)
    # The kernel has no gradient of what came before: nobody trains from the middle of a text.
    if kernels is None or (before is not None and torch.is_grad_enabled()):
        return plain_conv(inputs, before, weight, bias)
    return kernels.fused_conv(inputs, before, weight, bias)  # type: ignore[no-any-return]


def plain_conv(inputs: Tensor, before: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """``out_t = bias + sum_w weight_w inputs_{t - W + 1 + w}``, channel by channel.

    Args:
        inputs: ``(B, T, C)``
        before: The inputs before the first one, ``(B, W - 1, C)``; zeros if None.
        weight: Taps, the newest input's last, ``(C, W)``.
        bias: ``(C,)``

    Returns:
        ``(B, T, C)``, in the type of ``inputs``.
    """
    length, reach = inputs.shape[1], weight.shape[1] - 1
    window = torch.cat([_or_zeros(before, inputs, reach), inputs], dim=1)
    # A few shifted products: on a CPU faster than a grouped convolution of one channel a group.
    # Weights in the inputs' type, or products would be float32 whatever autocast says.
    taps = weight.to(inputs.dtype)
    out = bias.to(inputs.dtype).expand_as(inputs)
    for tap in range(reach + 1):
        out = out + taps[:, tap] * window[:, tap : tap + length]
    return out


def last_inputs(inputs: Tensor, before: Tensor | None, reach: int) -> Tensor:
    """The newest ``reach`` inputs ``(B, reach, C)``, from ``before`` on, as a copy.

    A slice would keep all of the prompt in memory.
    """
    newest = inputs[:, max(0, inputs.shape[1] - reach) :]
    kept = torch.cat([_or_zeros(before, inputs, reach), newest], dim=1)
    return kept[:, kept.shape[1] - reach :].clone()


def _or_zeros(before: Tensor | None, inputs: Tensor, reach: int) -> Tensor:
    if before is not None:
        return before.to(inputs.dtype)
    return inputs.new_zeros(inputs.shape[0], reach, inputs.shape[2])
