"""The teacher's own attention, seen as a mixer.

A layer that keeps attention keeps the stock module itself, so no student ever holds this class. It
says what attention costs beside the other mixers, and takes any stock module apart into values,
matrix and readout, so that other mixers can be tested and compared against it.

No family is known here. The module runs whole, with its own norms, rotary embedding, gates and
projections; only what it hands to transformers' attention interface is replaced.

B batch, T new tokens, S tokens that they may see, D model width, H heads, P head width.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mohawk_nas.mixer import MIXERS, AttentionView, Mixer, MixerConfig, MixerState

_TAKEN_APART = "mohawk_nas_taken_apart"

# What takes attention's place in the module that is running; a list, so that it can nest.
_attending: list[Callable[..., Tensor]] = []


def _attend(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _attending[-1](*args, **kwargs), None


AttentionInterface.register(_TAKEN_APART, _attend)


@MIXERS.register("attention")
@dataclass(frozen=True, kw_only=True)
class AttentionConfig(MixerConfig):
    """The layer as the teacher has it. ``init`` changes nothing: the weights are the teacher's."""

    symbol: ClassVar[str] = "A"
    keeps_attention: ClassVar[bool] = True

    def build(self, view: AttentionView) -> AttentionMixer:
        return AttentionMixer(view)

    def num_params(self, view: AttentionView) -> int:
        return sum(p.numel() for p in view.module.parameters())

    def flops_per_token(self, view: AttentionView, context: int) -> int:
        projections = sum(p.numel() for p in view.module.parameters() if p.dim() == 2)
        seen = min(context + 1, view.sliding_window or context + 1)
        # Scores and the weighted sum of values.
        return 2 * (projections + 2 * view.num_heads * view.head_dim * seen)

    def state_bytes(
        self, view: AttentionView, *, batch: int, context: int, bytes_per_element: int = 2
    ) -> int:
        kept = context if view.sliding_window is None else min(context, view.sliding_window - 1)
        return 2 * batch * kept * view.num_kv_heads * view.head_dim * bytes_per_element


class AttentionState(MixerState):
    """Keys and values of one layer, as the module expects them in its cache.

    Of a sliding window, the tokens that the next one sees are kept: the window less one.
    """

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window

    @property
    def num_kept(self) -> int:
        """Tokens whose keys are held."""
        return self.tensors["key"].shape[2] if "key" in self.tensors else 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new keys and values; returns all that the new tokens may see."""
        new = {"key": args[0], "value": args[1]}
        self.num_tokens += new["key"].shape[2]
        # Copies, all of them: a view would keep in memory what it was cut from, such as fused
        # projections or the whole prompt.
        full = {
            name: torch.cat([self.tensors.get(name, tensor[:, :, :0]), tensor], dim=2)
            for name, tensor in new.items()
        }
        drop = 0 if self.window is None else max(0, full["key"].shape[2] - self.window + 1)
        for name, tensor in full.items():
            self.tensors[name] = tensor[:, :, drop:].clone() if drop else tensor
        return full["key"], full["value"]


class AttentionMixer(Mixer):
    """A copy of one stock attention module."""

    def __init__(self, view: AttentionView) -> None:
        super().__init__()
        self.num_heads = view.num_heads
        self.window = view.sliding_window
        self.module = copy.deepcopy(view.module).requires_grad_(True)
        # In a tuple, so that it is no submodule: casting the mixer must not round its frequencies.
        self._rotary = (copy.deepcopy(view.rotary),)
        # The copy has a configuration of its own. Masks are made here, as these two take them.
        config: Any = self.module.config
        if config._attn_implementation not in ("eager", "sdpa"):
            config._attn_implementation = "sdpa"

    def forward(
        self, hidden: Tensor, *, mask: Tensor | None = None, cache: MixerState | None = None
    ) -> Tensor:
        assert cache is None or isinstance(cache, AttentionState)
        return self._run(hidden, mask=mask, cache=cache)

    def values(self, hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
        found: list[Tensor] = []

        def attend(
            module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
        ) -> Tensor:
            found.append(_repeated(value, query))
            return found[0].transpose(1, 2).contiguous()

        self._run(hidden, mask=mask, attend=attend)
        return found[0]

    def readout(self, mixed: Tensor, hidden: Tensor) -> Tensor:
        return self._run(hidden, attend=lambda *_, **__: mixed.transpose(1, 2).contiguous())

    def mixing_matrix(self, hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
        implementation = self.module.config._attn_implementation  # type: ignore[union-attr]
        # Eager attention is not registered: each modelling file brings its own.
        eager = getattr(sys.modules[type(self.module).__module__], "eager_attention_forward", None)
        found: list[Tensor] = []

        def attend(
            module: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, **kwargs: Any
        ) -> Tensor:
            # Attention over unit vectors is the matrix itself, whatever else the family does to
            # its scores.
            units = torch.eye(key.shape[2], dtype=value.dtype, device=value.device)
            attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
            matrix, _ = attention(
                module, query, key, units.expand(*value.shape[:2], -1, -1), bias, **kwargs
            )
            # A padded query sees nothing, which softmax cannot express.
            found.append(matrix.transpose(1, 2).float().masked_fill(bias < 0, 0.0))
            return torch.zeros_like(_repeated(value, query)).transpose(1, 2).contiguous()

        self._run(hidden, mask=mask, attend=attend)
        return found[0]

    @torch.no_grad()
    def init_from_attention(self, view: AttentionView) -> None:
        self.module.load_state_dict(view.module.state_dict())

    def new_state(self) -> AttentionState:
        return AttentionState(self.window)

    def _run(
        self,
        hidden: Tensor,
        *,
        mask: Tensor | None = None,
        cache: AttentionState | None = None,
        attend: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """The module's output ``(B, T, D)``, with ``attend`` in attention's place if given."""
        first = cache.num_tokens if cache else 0
        kept = cache.num_kept if cache else 0
        padding = cache.tensors.get("padding") if cache else None
        if mask is not None:
            new = (~mask).sum(-1)
            padding = new if padding is None else padding + new
            if cache:
                cache.tensors["padding"] = padding
        stop = first + hidden.shape[1]
        i = torch.arange(first, stop, device=hidden.device)
        j = torch.arange(first - kept, stop, device=hidden.device)
        seen = j <= i[:, None]
        if self.window is not None:
            seen = seen & (j > i[:, None] - self.window)
        positions, seen = i[None], seen[None, None]  # (1, T), (1, 1, T, S)
        if padding is not None:
            positions = (i - padding[:, None]).clamp_min(0)
            seen = seen & (j >= padding[:, None])[:, None, None]
        bias = hidden.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(hidden.dtype).min)
        # transformers 5.24 renamed it; models from before its Cache classes kept the oldest name.
        known = inspect.signature(self.module.forward).parameters
        past = next((n for n in ("cache", "layer_past") if n in known), "past_key_values")
        inputs = {"attention_mask": bias, "position_ids": positions, past: cache}
        if self._rotary[0] is not None:
            inputs["position_embeddings"] = self._rotate(self._rotary[0], hidden, positions)
        if attend is None:
            return self.module(hidden, **inputs)[0]  # type: ignore[no-any-return]
        config: Any = self.module.config
        implementation, config._attn_implementation = config._attn_implementation, _TAKEN_APART
        _attending.append(attend)
        try:
            return self.module(hidden, **inputs)[0]  # type: ignore[no-any-return]
        finally:
            _attending.pop()
            config._attn_implementation = implementation

    def _rotate(self, rotary: nn.Module, hidden: Tensor, positions: Tensor) -> Any:
        # Models with several kinds of attention layers keep frequencies for each kind.
        if "layer_type" in inspect.signature(rotary.forward).parameters:
            return rotary(hidden, positions, self.module.layer_type)
        return rotary(hidden, positions)


def _repeated(value: Tensor, query: Tensor) -> Tensor:
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
