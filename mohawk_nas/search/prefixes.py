"""Running many layouts on the same text: what two layouts share at their start is computed once.

Layouts that agree in their first layers have the same hidden states there. Those states are kept,
as far as memory allows, and a layout runs from the last layer at which one of them is at hand.

B blocks, T tokens, D model width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mohawk_nas.distill.hidden import relative_distance
from mohawk_nas.layout import Layout
from mohawk_nas.metrics import body
from mohawk_nas.student import MixerSlot, MixerSource, SwitchableStudent
from mohawk_nas.teacher import Teacher

__all__ = ["HybridRunner"]

Prefix = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """Where a batch stands after some layers of a layout."""

    hidden: Tensor
    """``(B, T, D)``, what the next layer is given."""
    distance: Tensor
    """Summed relative stage-2 distances of the layers so far, ``(B,)``."""

    @property
    def num_bytes(self) -> int:
        return self.hidden.numel() * self.hidden.element_size()


@dataclass(kw_only=True, slots=True)
class _Kept:
    """What is kept of one prefix."""

    states: dict[int, _State] = field(default_factory=dict)
    """By batch."""
    seen: int = 0
    """Layouts so far that begin with it."""


class HybridRunner:
    """Runs layouts on fixed batches.

    Args:
        teacher: The teacher.
        bank: Where mixers come from.
        batches: Tokens ``(B, T)`` each.
        max_bytes: Of hidden states to keep; 0 keeps none.
    """

    def __init__(
        self, teacher: Teacher, bank: MixerSource, batches: Sequence[Tensor], *, max_bytes: int
    ) -> None:
        self.teacher = teacher
        self.max_bytes = max_bytes
        self.kept_bytes = 0
        self.layers_run = 0
        """Layers run so far, all batches together; those that were not are what keeping saved."""
        self._batches = [tokens.to(teacher.device) for tokens in batches]
        self._student = SwitchableStudent(teacher, bank)
        self._layers = self._student.layers
        if len(set(self._layers)) < len(self._layers):
            # Several attention layers in one module: it cannot be entered in the middle.
            self.max_bytes = 0
        self._kept: dict[Prefix, _Kept] = {}
        self._seen: Counter[Prefix] = Counter()
        self._returns_tuple: dict[int, bool] = {}

    @property
    def model(self) -> Any:
        """The student of the layout that ran last."""
        return self._student.model

    @torch.no_grad()
    def run(
        self, layout: Layout, targets: Callable[[int], Mapping[int, Tensor]] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches' last hidden states under a layout, one batch after the other.

        Args:
            layout: One candidate a layer.
            targets: Batch number -> the teacher's mixer outputs by layer, to which the distances
                are taken; None takes none, and they are zero.

        Yields:
            After the final norm ``(B, T, D)``, and the sum over replaced layers of the relative
            distance between mixer output and teacher's output, ``(B,)``.
        """
        slots = self._student.switch(layout)
        candidates = layout.candidates
        for depth in range(1, len(candidates)):
            prefix = candidates[:depth]
            self._seen[prefix] += 1
            if prefix in self._kept:
                self._kept[prefix].seen += 1
        for number, tokens in enumerate(self._batches):
            wanted = None if targets is None else targets(number)
            start = self._deepest(candidates, number)
            with self._entering(candidates, number, start, slots, wanted) as distance:
                hidden = body(self.model, tokens)
            self.layers_run += len(candidates) - start
            yield hidden, distance()

    def _deepest(self, candidates: Prefix, number: int) -> int:
        for depth in range(len(candidates) - 1, 0, -1):
            kept = self._kept.get(candidates[:depth])
            if kept is not None and number in kept.states:
                return depth
        return 0

    @contextmanager
    def _entering(
        self,
        candidates: Prefix,
        number: int,
        start: int,
        slots: Sequence[nn.Module],
        targets: Mapping[int, Tensor] | None,
    ) -> Iterator[Callable[[], Tensor]]:
        """Skip the layers before ``start``, and keep what comes out of the others.

        Yields:
            The sum of distances so far, ``(B,)``.
        """
        kept = self._kept[candidates[:start]].states[number] if start else None
        zeros = torch.zeros(len(self._batches[number]), device=self.teacher.device)
        total = zeros if kept is None else kept.distance
        handles = []

        def measure(layer: int, output: Tensor) -> None:
            nonlocal total
            assert targets is not None
            # One after the other, so that the sum is the same wherever it was taken up.
            total = total + relative_distance(output, targets[layer])

        def keep(depth: int, result: Any) -> None:
            self._returns_tuple[depth - 1] = isinstance(result, tuple)
            hidden = result[0] if isinstance(result, tuple) else result
            state = _State(hidden=hidden, distance=total)
            self._keep(candidates[:depth], number, state)

        for layer in range(start, len(candidates)):
            if targets is not None and isinstance(slots[layer], MixerSlot):
                handle = slots[layer].register_forward_hook(
                    lambda module, args, result, layer=layer: measure(layer, result[0])
                )
                handles.append(handle)
            if self.max_bytes and layer + 1 < len(candidates):
                handle = self._layers[layer].register_forward_hook(
                    lambda module, args, result, depth=layer + 1: keep(depth, result)
                )
                handles.append(handle)
        for layer in range(start):
            self._layers[layer].forward = self._passing(layer, kept)
        try:
            yield lambda: total
        finally:
            for layer in range(start):
                del self._layers[layer].forward
            for handle in handles:
                handle.remove()

    def _passing(self, layer: int, kept: _State | None) -> Callable[..., Any]:
        """Stands in for a skipped layer: the last of them hands on what was kept."""
        assert kept is not None

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (kept.hidden,) if self._returns_tuple[layer] else kept.hidden

        return forward

    def _keep(self, prefix: Prefix, number: int, state: _State) -> None:
        """Keep a state if there is room, or if this prefix has come up more often than another."""
        seen = self._seen[prefix]
        while self.kept_bytes + state.num_bytes > self.max_bytes:
            rarest = min(self._kept.items(), key=lambda item: item[1].seen, default=None)
            if rarest is None or rarest[1].seen >= seen:
                return
            for dropped in self._kept.pop(rarest[0]).states.values():
                self.kept_bytes -= dropped.num_bytes
        kept = self._kept.setdefault(prefix, _Kept())
        kept.seen = seen
        kept.states[number] = state
        self.kept_bytes += state.num_bytes
