"""The same functions in fewer kernels, where a stock model spells one out in many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

__all__ = ["fused_parts"]

RMS_NORMS = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Olmo2", "Olmo3", "Phi3")
"""Families whose norm is ``weight * x / rms(x)``; in others the weight is something else."""


@contextmanager
def fused_parts(*models: Any) -> Iterator[None]:
    """Run models with torch's own kernels for what their families write out.

    ``gelu_new`` (Phi, GPT-2) and torch's tanh approximation are one function; written out, each of
    its eight operations reads and writes the widest activations of a layer. So do those of an RMS
    norm, in float32. Its kernel rounds once, where some families round before the weight, too: on a
    CPU, where nothing is gained, it is left as it is.
    """
    modules = list(dict.fromkeys(module for model in models for module in model.modules()))
    written_out = [
        (parent, name, child)
        for parent in modules
        for name, child in parent.named_children()
        if type(child) is NewGELUActivation
    ]
    # Of the class: mixers that are built or put in place meanwhile hold such norms as well.
    names = {f"{family}RMSNorm" for family in RMS_NORMS}
    kinds: set[Any] = {type(module) for module in modules}
    norms = {
        kind: kind.forward
        for kind in kinds
        if kind.__name__ in names and not isinstance(kind.forward, _Fused)
    }
    for parent, name, _ in written_out:
        setattr(parent, name, nn.GELU(approximate="tanh"))
    for kind, forward in norms.items():
        kind.forward = _Fused(forward)
    try:
        yield
    finally:
        for parent, name, child in written_out:
            setattr(parent, name, child)
        for kind, forward in norms.items():
            kind.forward = forward


class _Fused:
    """An RMS norm's forward, by one kernel on a GPU."""

    def __init__(self, stock: Any) -> None:
        self.stock = stock

    def __get__(self, norm: Any, kind: Any = None) -> Any:
        return self if norm is None else partial(self, norm)

    def __call__(self, norm: Any, hidden_states: Tensor) -> Tensor:
        weight: Tensor = norm.weight
        if not hidden_states.is_cuda or weight.dtype != hidden_states.dtype:
            return self.stock(norm, hidden_states)  # type: ignore[no-any-return]
        return F.rms_norm(hidden_states, (weight.numel(),), weight, norm.variance_epsilon)
