"""The student: the teacher with other mixers in some layers' attention slots.

B batch, T tokens, D model width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.mixer import Mixer, MixerState
from mohawk_nas.precision import run_mixer
from mohawk_nas.teacher import Slot, Teacher, called_body, find_attention

__all__ = [
    "MixerSlot",
    "MixerSource",
    "Padding",
    "SwitchableStudent",
    "assemble",
    "decoder_layers",
    "install_mixers",
    "is_trained",
]


class MixerSource(Protocol):
    """Where an assembled student's mixers come from; a bank is one."""

    def mixer(self, layer: int, candidate: str) -> Mixer:
        """The trained mixer of one candidate in one layer."""
        ...


class Padding:
    """The padding mask of the forward pass that is running, for every mixer of one student.

    By the time a mask reaches a layer, transformers has made it None, 2D or 4D depending on the
    attention back end. Mixers want the plain one, so it is read where it enters the model.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def remember(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model's body."""
        if getattr(body.forward, "is_stub", False):
            # Logits are made of a hidden state: no pass of the mixers.
            return
        mask = kwargs.get("attention_mask")
        if len(args) > 1:
            bound = inspect.signature(body.forward).bind_partial(*args, **kwargs)
            mask = bound.arguments.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise ValueError(
                "a student with other mixers than attention needs `attention_mask` of shape "
                f"(batch, tokens), but got {getattr(mask, 'shape', type(mask).__name__)}"
            )
        self.mask = mask
        if not body.training:
            return
        # What backward runs again must not meet the mask of a later pass.
        for module in body.modules():
            again = getattr(module, "_gradient_checkpointing_func", None)
            if again is not None and getattr(again, "func", None) != self._checkpoint:
                module._gradient_checkpointing_func = partial(self._checkpoint, again)  # type: ignore[assignment]

    def _checkpoint(
        self, checkpoint: Callable[..., Any], run: Callable[..., Any], *args: Any
    ) -> Any:
        """Checkpoint a layer, with the same mask whenever it runs."""
        mask = self.mask

        def masked(*args: Any) -> Any:
            others, self.mask = self.mask, mask
            try:
                return run(*args)
            finally:
                self.mask = others

        return checkpoint(masked, *args)

    def of_last(self, num_tokens: int) -> Tensor | None:
        """True at real tokens among the newest ones, ``(B, num_tokens)``."""
        return None if self.mask is None else self.mask[:, -num_tokens:].bool()


class MixerSlot(nn.Module):
    """Stands where a layer's attention stood, and is called the way transformers calls that."""

    def __init__(self, mixer: Mixer, *, layer_idx: int, padding: Padding) -> None:
        super().__init__()
        self.mixer = mixer
        self.layer_idx = layer_idx
        self._padding = padding

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        cache: Any = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        # Its names: since transformers 5.24, before, and still in some families (GPT-NeoX).
        cache = next((c for c in (cache, past_key_values, layer_past) if c is not None), None)
        state = None if cache is None else self._state(cache)
        mask = self._padding.of_last(hidden_states.shape[1])
        # A float32 mixer may stand in a model of half precision.
        return run_mixer(self.mixer, hidden_states, mask=mask, cache=state), None

    def _state(self, cache: Any) -> MixerState:
        # The cache was made for attention everywhere; this layer's place in it is taken over when
        # the layer first runs.
        layers = getattr(cache, "layers", None)
        if layers is None:
            raise TypeError(f"a student needs a transformers Cache, but got {type(cache).__name__}")
        while len(layers) <= self.layer_idx:
            layers.append(cache.layer_class_to_replicate())
        if not isinstance(layers[self.layer_idx], MixerState):
            layers[self.layer_idx] = self.mixer.new_state()
        state: MixerState = layers[self.layer_idx]
        return state


def assemble(
    teacher: Teacher,
    layout: Layout,
    bank: MixerSource,
    *,
    share: bool = True,
    trained: str = "all",
) -> Any:
    """The hybrid that a layout describes: a plain causal LM of the teacher's own class.

    Args:
        teacher: Left as it is.
        layout: One candidate a layer. Layers with ``attention`` keep the teacher's module.
        bank: Where the other layers' mixers come from.
        share: Share every weight with the teacher and the bank: assembling costs no memory, and
            training the student would train them. False copies what is ``trained``.
        trained: What a student that does not share everything has of its own, by the names of
            ``distill.logits.trainable``; the rest are the teacher's parameters.

    Returns:
        The student, in eval mode. It shares no configuration object with the teacher.

    Raises:
        LayoutError: The layout has another number of layers than the teacher.
    """
    layout.check(sorted({ATTENTION, *layout.candidates}), num_layers=teacher.num_layers)
    mixers = {i: bank.mixer(i, layout[i]) for i in layout.replaced_layers}
    memo = _shared_tensors(teacher)
    if not share:
        mixers = {i: copy.deepcopy(mixer) for i, mixer in mixers.items()}
        own = dict(teacher.model.named_parameters())
        own = {name: p for name, p in own.items() if is_trained(name, trained)}
        for tensor in (*own.values(), *teacher.model.buffers()):
            memo.pop(id(tensor), None)
    for i in mixers:
        # Replaced anyway.
        memo[id(teacher.slots[i].get(teacher.model))] = None
    student = copy.deepcopy(teacher.model, memo)
    install_mixers(student, mixers, teacher.slots)
    return student.eval()


def is_trained(name: str, which: str, *, in_mixer: bool = False) -> bool:
    """Whether stage 3 trains the parameter of this name.

    Args:
        name: In the student; in the teacher, as far as it has the same parts.
        which: ``mixers``, ``all_but_mlp`` or ``all``.
        in_mixer: Whether it belongs to one of the student's new mixers.
    """
    parts = name.split(".")
    # OPT's layers hold theirs without a module around them.
    is_mlp = any(
        part in ("fc1", "fc2") or "mlp" in part or "feed_forward" in part for part in parts
    )
    return which == "all" or in_mixer or (which == "all_but_mlp" and not is_mlp)


def _shared_tensors(teacher: Teacher) -> dict[int, Any]:
    # deepcopy takes what is in its memo for a finished copy, so modules and configurations are
    # copied and tensors are not.
    tensors = [*teacher.model.parameters(), *teacher.model.buffers()]
    return {id(tensor): tensor for tensor in tensors}


class SwitchableStudent:
    """One student that takes on layout after layout; it shares every weight.

    Args:
        teacher: Left as it is.
        bank: Where mixers come from.
    """

    def __init__(self, teacher: Teacher, bank: MixerSource) -> None:
        self.model = copy.deepcopy(teacher.model, _shared_tensors(teacher)).eval()
        self._bank = bank
        self._slots = teacher.slots
        self._attention = [slot.get(self.model) for slot in teacher.slots]
        self._padding = Padding()
        called_body(self.model).register_forward_pre_hook(self._padding.remember, with_kwargs=True)

    @torch.no_grad()
    def switch(self, layout: Layout) -> list[nn.Module]:
        """Become the hybrid that a layout describes.

        Returns:
            What now stands in each layer's attention slot.
        """
        standing = list(self._attention)
        for i in layout.replaced_layers:
            mixer = self._bank.mixer(i, layout[i])
            standing[i] = MixerSlot(mixer, layer_idx=i, padding=self._padding)
        for slot, module in zip(self._slots, standing, strict=True):
            slot.put(self.model, module)
        return standing

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, each holding one attention slot."""
        return [self.model.get_submodule(slot.parent) for slot in self._slots]


def decoder_layers(student: nn.Module) -> list[nn.Module]:
    """The layers of a student or teacher, each holding one attention slot, in order."""
    found: dict[int, nn.Module] = {}
    for name, module in student.named_modules():
        layer = getattr(module, "layer_idx", None)
        mixes = isinstance(module, MixerSlot) or "Attention" in type(module).__name__
        if mixes and isinstance(layer, int):
            found[layer] = student.get_submodule(name.rpartition(".")[0])
    return [found[i] for i in sorted(found)]


def install_mixers(model: Any, mixers: dict[int, Mixer], slots: list[Slot] | None = None) -> Any:
    """Hang mixers into a causal LM's attention slots, in place.

    Args:
        model: A stock causal LM.
        mixers: Layer -> mixer.
        slots: Where the slots are; looked up in the model if None.
    """
    slots = find_attention(model) if slots is None else slots
    if not mixers:
        return model
    padding = Padding()
    for i, mixer in mixers.items():
        slots[i].put(model, MixerSlot(mixer, layer_idx=i, padding=padding))
    called_body(model).register_forward_pre_hook(padding.remember, with_kwargs=True)
    return model
