"""In which type is computed: weights in training are float32, products may be bfloat16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mohawk_nas.mixer import Mixer, MixerState

__all__ = ["computing_in", "run_mixer"]


def computing_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Matrix products in bfloat16 where the teacher is held in it, else everything as it stands.

    float16 is left out: gradients underflow in it unless the loss is scaled.

    Args:
        dtype: Of the teacher's weights.
        device: Where is computed.
    """
    if dtype != torch.bfloat16:
        return nullcontext()
    # A cast that is kept for the next use would be read by a recorded CUDA graph after it is gone.
    return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def run_mixer(
    mixer: Mixer, hidden: Tensor, *, mask: Tensor | None = None, cache: MixerState | None = None
) -> Tensor:
    """A mixer's output ``(B, T, D)`` in the type of its input, whatever type its weights have."""
    if hidden.dtype == mixer.dtype:
        return mixer(hidden, mask=mask, cache=cache)  # type: ignore[no-any-return]
    inputs = hidden if hidden.dtype == torch.bfloat16 else hidden.to(mixer.dtype)
    with computing_in(hidden.dtype, hidden.device):
        mixed: Tensor = mixer(inputs, mask=mask, cache=cache)
    return mixed.to(hidden.dtype)
