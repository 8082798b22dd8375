"""Seeing what flows through a stock model's attention layers, without knowing its family.

A function registered with transformers' attention interface sees every layer's queries and keys
after the rotary embedding; forward hooks on the attention modules see their inputs and outputs.

B batch, T tokens, D model width, H heads, P head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mohawk_nas.errors import TeacherError
from mohawk_nas.mixer import AttentionView

__all__ = ["LayerCapture", "capturing", "without_masks"]

_CAPTURE = "mohawk_nas_capture_"
_MASKLESS = "mohawk_nas_maskless_"


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCapture:
    """What one attention layer of the teacher saw and did with one batch."""

    view: AttentionView
    hidden: Tensor
    """The mixer's input, ``(B, T, D)``."""
    output: Tensor
    """The mixer's output, before it joins the residual stream, ``(B, T, D)``."""
    mask: Tensor | None
    """True at real tokens, ``(B, T)``; None where all are."""
    query: Tensor | None
    """After the rotary embedding, ``(B, H, T, P)``; None unless matrices were asked for."""
    key: Tensor | None
    """After the rotary embedding, ``(B, key-value heads, T, P)``."""
    scaling: float | None
    """Of the scores of these two; some families scale the query itself, and have 1 here."""


# What the registered attention function reports to: the innermost capture that is running.
_recorders: list[dict[nn.Module, tuple[Tensor, Tensor, float]]] = []


@contextmanager
def capturing(
    model: Any,
    views: Sequence[AttentionView],
    on_layer: Callable[[LayerCapture], None],
    *,
    mask: Tensor | None,
    matrices: bool,
) -> Iterator[None]:
    """Show each of these layers to ``on_layer`` as soon as its attention has run.

    Args:
        model: The causal LM they belong to.
        views: The layers.
        on_layer: Called once a layer and forward pass.
        mask: What the model will be given, ``(B, T)``.
        matrices: Also show queries and keys.

    Raises:
        TeacherError: ``matrices`` are asked of a layer whose matrix is not plain causal softmax.
    """
    recorder: dict[nn.Module, tuple[Tensor, Tensor, float]] = {}
    inputs: dict[nn.Module, Tensor] = {}
    by_module = {view.module: view for view in views}

    # Hooks return None, or torch would take what they return for the module's result.
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[module] = args[0] if args else kwargs["hidden_states"]

    def after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        query, key, scaling = recorder.pop(module, (None, None, None))
        if matrices and query is None:
            raise TeacherError(
                f"layer {by_module[module].layer_idx}: {type(module).__name__} does not use "
                "transformers' attention interface, so its matrix cannot be seen; set the stage-1 "
                "tokens to 0"
            )
        on_layer(
            LayerCapture(
                view=by_module[module],
                hidden=inputs.pop(module),
                output=result[0] if isinstance(result, tuple) else result,
                mask=None if mask is None else mask.bool(),
                query=query,
                key=key,
                scaling=scaling,
            )
        )

    handles = []
    for module in by_module:
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    config = model.config.get_text_config()
    implementation = config._attn_implementation
    if matrices:
        config._attn_implementation = _reporting(implementation)
        _recorders.append(recorder)
    try:
        yield
    finally:
        if matrices:
            _recorders.pop()
            config._attn_implementation = implementation
        for handle in handles:
            handle.remove()


@contextmanager
def without_masks(model: Any) -> Iterator[None]:
    """Run a model on whole blocks, without padding, and spare it the making of masks.

    transformers looks at the positions of every batch for packed sequences, which waits for the
    GPU; and while a CUDA graph is recorded it cannot look, and makes a mask that keeps
    ``scaled_dot_product_attention`` from its fast kernels. The result is the same. Models with
    sliding windows or with another attention implementation keep their masks.
    """
    config = model.config.get_text_config()
    implementation = config._attn_implementation
    windows = ("sliding_window", "attention_chunk_size")
    # Families that do not go through the interface branch on the name itself.
    goes_through = getattr(model, "_supports_attention_backend", False)
    windowed = any(getattr(config, name, None) for name in windows)
    if implementation != "sdpa" or windowed or not goes_through:
        yield
        return
    # No mask function stands under this name, and then transformers makes no mask.
    name = _MASKLESS + implementation
    AttentionInterface.register(name, ALL_ATTENTION_FUNCTIONS[implementation])
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = implementation


def _reporting(implementation: str) -> str:
    """Name of an attention implementation that reports and hands on to ``implementation``."""
    name = _CAPTURE + implementation
    if name in ALL_ATTENTION_FUNCTIONS:
        return name

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        for obstacle in ("softcap", "s_aux", "position_bias"):
            if kwargs.get(obstacle) is not None:
                raise TeacherError(
                    f"layer {getattr(module, 'layer_idx', '?')}: {type(module).__name__} uses "
                    f"{obstacle}, so its matrix is not a plain causal softmax; set the stage-1 "
                    "tokens to 0"
                )
        if _recorders:
            scaling = kwargs.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            _recorders[-1][module] = (query, key, scaling)
        # Eager attention is not registered: each modelling file brings its own.
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
        return attention(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(name, attend)
    # Without a mask function of the same name transformers would build no mask at all.
    if implementation in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name
