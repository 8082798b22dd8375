"""In which type is computed: weights in training are float32, products may be bfloat16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["computing_in"]


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
