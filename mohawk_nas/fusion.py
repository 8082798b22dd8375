"""The same functions in fewer kernels, where a stock model spells one out in many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.activations import NewGELUActivation

__all__ = ["fused_activations"]


@contextmanager
def fused_activations(*models: Any) -> Iterator[None]:
    """Run models whose GELU is written out (Phi, GPT-2) with torch's own kernel for it.

    ``gelu_new`` and torch's tanh approximation are one function; written out, each of its eight
    operations reads and writes the widest activations of a layer.
    """
    found = [
        (parent, name, child)
        for model in models
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is NewGELUActivation
    ]
    for parent, name, _ in found:
        setattr(parent, name, nn.GELU(approximate="tanh"))
    try:
        yield
    finally:
        for parent, name, child in found:
            setattr(parent, name, child)
