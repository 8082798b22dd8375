"""A layout: one candidate for each layer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mohawk_nas.errors import LayoutError, did_you_mean

ATTENTION = "attention"
"""Name of the candidate that keeps the teacher's attention; every search space has it."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One candidate's name for each layer, first layer first.

    >>> Layout.keeping([1, 3], num_layers=4, replacement="mamba2").strip({"mamba2": "M"})
    'M A M A'
    """

    candidates: tuple[str, ...]

    @classmethod
    def keeping(cls, layers: Iterable[int], *, num_layers: int, replacement: str) -> Layout:
        """Attention in ``layers`` (counted from 0), ``replacement`` everywhere else.

        Raises:
            LayoutError: A layer is out of range or named twice.
        """
        kept = list(layers)
        for layer in kept:
            if not 0 <= layer < num_layers:
                raise LayoutError(
                    f"layer {layer} is out of range: layers are counted from 0 and must be below "
                    f"{num_layers}"
                )
        if len(set(kept)) != len(kept):
            raise LayoutError(f"each layer may be named once, but got {kept}")
        return cls(tuple(ATTENTION if i in set(kept) else replacement for i in range(num_layers)))

    @classmethod
    def parse(cls, text: str, *, num_layers: int, symbols: Mapping[str, str]) -> Layout:
        """Read ``"4,10,16,22"`` (the attention layers) or ``"M M A M"`` (a strip).

        Args:
            text: What the user typed. Spaces in a strip may be left out.
            num_layers: Layers of the teacher.
            symbols: Candidate name -> symbol, as :meth:`strip` prints it. With the comma form the
                first candidate that is not attention takes the other layers.

        Raises:
            LayoutError: The text is neither, or does not fit the model.
        """
        text = text.strip()
        others = [name for name in symbols if name != ATTENTION]
        if not text or text[0].isdigit() or text[0] == "-":
            try:
                layers = [int(part) for part in text.split(",") if part.strip()]
            except ValueError as e:
                raise LayoutError(
                    f"a layout is a list of attention layers like 1,5 or a strip like "
                    f"{' '.join('MA')}, but got {text!r}"
                ) from e
            if not others and len(layers) < num_layers:
                raise LayoutError("the search space has no candidate besides attention")
            replacement = others[0] if others else ATTENTION
            return cls.keeping(layers, num_layers=num_layers, replacement=replacement)
        names = {symbol: name for name, symbol in symbols.items()}
        # Without spaces a symbol is a letter and the digits that follow it: "MM2A" is M, M2, A.
        strip = text.split() if " " in text else re.findall(r"\D\d*", text)
        unknown = sorted({symbol for symbol in strip if symbol not in names})
        if unknown:
            known = ", ".join(f"{symbol} ({name})" for symbol, name in names.items())
            raise LayoutError(f"unknown symbols in layout: {' '.join(unknown)}; known: {known}")
        if len(strip) != num_layers:
            raise LayoutError(
                f"a layout must name all {num_layers} layers, but {text!r} names {len(strip)}"
            )
        return cls(tuple(names[symbol] for symbol in strip))

    def __len__(self) -> int:
        return len(self.candidates)

    def __getitem__(self, layer: int) -> str:
        return self.candidates[layer]

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers that keep the teacher's attention."""
        return tuple(i for i, name in enumerate(self.candidates) if name == ATTENTION)

    @property
    def replaced_layers(self) -> tuple[int, ...]:
        """Layers that get another mixer."""
        return tuple(i for i, name in enumerate(self.candidates) if name != ATTENTION)

    def with_candidate(self, layer: int, candidate: str) -> Layout:
        """The same layout with another candidate in one layer."""
        changed = list(self.candidates)
        changed[layer] = candidate
        return Layout(tuple(changed))

    def strip(self, symbols: Mapping[str, str]) -> str:
        """One symbol a layer, e.g. ``"M M M A M M M M"``."""
        return " ".join(symbols[name] for name in self.candidates)

    def check(self, candidates: Sequence[str], *, num_layers: int) -> None:
        """Raise LayoutError unless the layout has this length and these names only."""
        if len(self) != num_layers:
            raise LayoutError(
                f"the layout has {len(self)} layers, but the teacher has {num_layers}"
            )
        for i, name in enumerate(self.candidates):
            if name not in candidates:
                raise LayoutError(
                    f"layer {i}: unknown candidate {name!r}; available: {', '.join(candidates)}."
                    f"{did_you_mean(name, candidates)}"
                )

    def key(self) -> str:
        """Stable short hash, the same on every machine."""
        return hashlib.sha256("\n".join(self.candidates).encode()).hexdigest()[:16]


def num_attention(text: str) -> int:
    """Attention layers that a layout's text keeps; it need not fit any model.

    >>> num_attention("4,10"), num_attention("MAM2 M"), num_attention("")
    (2, 1, 0)
    """
    if text.strip()[:1].isalpha():
        return re.findall(r"[A-Za-z]\d*", text).count("A")
    return len([part for part in text.split(",") if part.strip()])


def assign_symbols(letters: Mapping[str, str]) -> dict[str, str]:
    """A distinct symbol for each candidate: its mixer's letter, numbered where two share one.

    Args:
        letters: Candidate name -> its mixer's letter, in the search space's order.

    >>> assign_symbols({"attention": "A", "small": "M", "large": "M"})
    {'attention': 'A', 'small': 'M', 'large': 'M2'}
    """
    count: dict[str, int] = {}
    symbols: dict[str, str] = {}
    for name, letter in letters.items():
        count[letter] = count.get(letter, 0) + 1
        symbols[name] = letter if count[letter] == 1 else f"{letter}{count[letter]}"
    return symbols
