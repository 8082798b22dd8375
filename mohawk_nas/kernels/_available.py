"""Whether and where Triton's kernels can run."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from typing import Any

import torch

__all__ = ["launching_on", "triton_obstacle"]


def triton_obstacle(device: torch.device) -> str | None:
    """Why no kernel can run on tensors of a device, or None."""
    # Triton's interpreter runs on the CPU, for tests.
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device.type}"
    if not _has_triton():
        return "triton is not installed"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU's compute capability is below 8.0"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def launching_on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
