"""A mixer as a user may write one: each head sums the past with a decay of its own.

A study takes it up with ``plugins: [./moving_average.py]``.

B batch, T tokens, D model width, H heads, P head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mohawk_nas.errors import MixerError
from mohawk_nas.mixer import MIXERS, AttentionView, MatrixFactors, Mixer, MixerConfig, MixerState


@MIXERS.register("moving_average")
@dataclass(frozen=True, kw_only=True)
class MovingAverageConfig(MixerConfig):
    """One decay a head, whatever the input is."""

    symbol = "E"

    init: Literal["attention", "random"] = "random"
    num_heads: int = 4

    def __post_init__(self) -> None:
        if self.num_heads < 1:
            raise ValueError(f"`num_heads >= 1` must hold, but got ({self.num_heads=})")

    def build(self, view: AttentionView) -> MovingAverage:
        if view.d_model % self.num_heads:
            raise MixerError(
                f"layer {view.layer_idx}: `d_model % num_heads == 0` must hold, but got "
                f"({view.d_model=}, {self.num_heads=})"
            )
        return MovingAverage(view.d_model, self.num_heads)

    def num_params(self, view: AttentionView) -> int:
        return 2 * view.d_model**2 + self.num_heads

    def flops_per_token(self, view: AttentionView, context: int) -> int:
        return 4 * view.d_model**2 + 2 * view.d_model

    def state_bytes(
        self, view: AttentionView, *, batch: int, context: int, bytes_per_element: int = 2
    ) -> int:
        # Sums are kept in float32.
        return batch * view.d_model * 4


class MovingAverage(Mixer):
    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.decay = nn.Parameter(torch.linspace(0.0, 3.0, num_heads))

    def forward(
        self, hidden: Tensor, *, mask: Tensor | None = None, cache: MixerState | None = None
    ) -> Tensor:
        values = self.values(hidden, mask=mask)
        mixed = self.mixing_matrix(hidden, mask=mask) @ values.float()
        if cache is not None:
            if "sum" in cache.tensors:
                steps = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
                carried = (self._log_decay()[:, None] * steps).exp()
                mixed = mixed + carried[None, :, :, None] * cache.tensors["sum"]
            cache.tensors["sum"] = mixed[:, :, -1:].clone()
            cache.num_tokens += hidden.shape[1]
        return self.readout(mixed.to(hidden.dtype), hidden)

    def values(self, hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            hidden = hidden * mask[..., None]
        return self.v_proj(hidden).unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def readout(self, mixed: Tensor, hidden: Tensor) -> Tensor:
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def mixing_matrix(self, hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
        steps = torch.arange(hidden.shape[1], device=hidden.device)
        distance = (steps[:, None] - steps).clamp_min(0)
        matrix = (self._log_decay()[:, None, None] * distance).exp().tril()  # (H, T, T)
        matrix = matrix.expand(hidden.shape[0], -1, -1, -1)
        return matrix if mask is None else matrix * mask[:, None, None, :]

    def factors(self, hidden: Tensor, *, mask: Tensor | None = None) -> MatrixFactors:
        shape = (hidden.shape[0], self.num_heads, hidden.shape[1])
        ones = torch.ones(shape, device=hidden.device)
        return MatrixFactors(
            c=ones[..., None],
            b=(ones if mask is None else ones * mask[:, None])[..., None],
            log_decay=self._log_decay()[:, None].expand(shape),
            diagonal=None,
        )

    def _log_decay(self) -> Tensor:
        return F.logsigmoid(self.decay.float())
