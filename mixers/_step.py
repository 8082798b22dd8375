"""One token of a discrete Mamba-2 layer between its projections, with its states changed in place.

B sequences, H heads, P head width, N state size, W taps of the convolution. Channels are those of
x, B and C, one after the other: ``C = H P + 2 H N``. Columns of the projection are these, then the
gate's ``H P`` and the decays' ``H``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backends import Backend, fused_kernels

__all__ = ["StepSizes", "decode_step", "plain_step"]

LARGEST_STATE = 16_384
"""Numbers of one head's state that the fused kernel can hold on chip."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSizes:
    """Sizes of a layer."""

    heads: int
    width: int
    """P"""
    state: int
    """N"""
    min_step: float
    """Smallest ``-log`` of a decay."""

    @property
    def widths(self) -> list[int]:
        """Channels of x, B and C."""
        return [self.heads * self.width, self.heads * self.state, self.heads * self.state]


def decode_step(
    projected: Tensor,
    conv: Tensor,
    ssm: Tensor,
    *,
    weight: Tensor,
    bias: Tensor,
    skip: Tensor,
    sizes: StepSizes,
    backend: Backend = "auto",
) -> Tensor:
    """:func:`plain_step`, by one kernel where it can run."""
    fits = backend != "torch" and sizes.width * sizes.state <= LARGEST_STATE
    kernels = fused_kernels(projected) if fits else None
    step = plain_step if kernels is None else kernels.fused_step
    y: Tensor = step(projected, conv, ssm, weight=weight, bias=bias, skip=skip, sizes=sizes)
    return y


def plain_step(
    projected: Tensor,
    conv: Tensor,
    ssm: Tensor,
    *,
    weight: Tensor,
    bias: Tensor,
    skip: Tensor,
    sizes: StepSizes,
) -> Tensor:
    """Convolution, decay, ``h = alpha h + B x^T``, ``y = C h + D x``, gate.

    Args:
        projected: What the input projection puts out, ``(B, C + H P + H)``.
        conv: The convolution's last inputs, ``(B, W - 1, C)``; changed in place.
        ssm: States, ``(B, H, N, P)``, float32; changed in place.
        weight: Taps, the newest input's last, ``(C, W)``.
        bias: ``(C,)``
        skip: D, ``(H,)``
        sizes: Of the layer.

    Returns:
        What the output projection takes, ``(B, H P)``, in the type of ``projected``.
    """
    inner = sizes.heads * sizes.width
    inputs, gate, a = projected.split([sum(sizes.widths), inner, sizes.heads], dim=-1)
    window = torch.cat([conv.to(inputs.dtype), inputs[:, None]], dim=1)
    conv.copy_(window[:, 1:])
    mixed = (window.float() * weight.float().T).sum(1) + bias.float()
    x, b, c = (
        part.unflatten(-1, (sizes.heads, -1)) for part in mixed.split(sizes.widths, dim=-1)
    )  # (B, H, ·)
    decay = torch.exp(-F.softplus(a.float()).clamp_min(sizes.min_step))
    ssm.mul_(decay[..., None, None]).add_(b[..., :, None] * x[..., None, :])
    y = (c[..., None, :] @ ssm).squeeze(-2) + skip.float()[:, None] * x
    gated: Tensor = y.flatten(1) * F.silu(gate.float())
    return gated.to(projected.dtype)
