"""The hard budget that every layout must meet: exactly K attention layers."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from mohawk_nas.errors import LayoutError
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.search.space import SearchSpace

__all__ = ["Budget"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Knows which layouts of a space meet it, how many, and how to draw one."""

    attention_layers: int
    """Layers that keep attention, exactly."""

    def problems(self, space: SearchSpace) -> list[str]:
        """Why no layout of the space meets the budget; empty if one does."""
        name, wanted = "budget.attention_layers", self.attention_layers
        if wanted > space.num_layers:
            return [
                f"{name}: must be at most {space.num_layers}, the teacher's layers, "
                f"but got {wanted}"
            ]
        least = space.num_pinned_attention
        most = least + len(space.free_layers)
        if wanted < least:
            return [
                f"{name}: must be at least {least}, since space.pinned keeps attention in as many "
                f"layers, but got {wanted}"
            ]
        if wanted > most:
            return [
                f"{name}: must be at most {most}, since space.pinned replaces "
                f"{space.num_layers - most} of {space.num_layers} layers, but got {wanted}"
            ]
        return []

    def num_free(self, space: SearchSpace) -> int:
        """Attention layers that are left to choose once the pinned ones are counted."""
        return self.attention_layers - space.num_pinned_attention

    def meets(self, layout: Layout) -> bool:
        """Whether the layout is within the budget."""
        return len(layout.attention_layers) == self.attention_layers

    def check(self, layout: Layout) -> None:
        """Raise LayoutError unless the layout meets the budget."""
        if not self.meets(layout):
            raise LayoutError(
                f"the budget is exactly {self.attention_layers} attention layers, but the layout "
                f"keeps {len(layout.attention_layers)}: {list(layout.attention_layers)}"
            )

    def count(self, space: SearchSpace) -> int:
        """How many layouts of the space meet the budget."""
        free, kept = len(space.free_layers), self.num_free(space)
        if not 0 <= kept <= free:
            return 0
        replaced: int = len(space.replacements) ** (free - kept)
        return math.comb(free, kept) * replaced

    def enumerate(self, space: SearchSpace) -> Iterator[Layout]:
        """Every layout that meets the budget, in a fixed order."""
        for kept in itertools.combinations(space.free_layers, self.num_free(space)):
            replaced = [layer for layer in space.free_layers if layer not in kept]
            chosen = dict.fromkeys(kept, ATTENTION)
            for names in itertools.product(space.replacements, repeat=len(replaced)):
                yield space.fill(chosen | dict(zip(replaced, names, strict=True)))

    def random(self, space: SearchSpace, rng: random.Random) -> Layout:
        """One of them, all with the same chance."""
        kept = rng.sample(space.free_layers, self.num_free(space))
        return space.fill(
            {
                layer: ATTENTION if layer in kept else rng.choice(space.replacements)
                for layer in space.free_layers
            }
        )
