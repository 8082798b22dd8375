"""How a layout is scored: the assembled student against the teacher on the search split.

B blocks a batch, T tokens a block, D model width.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mohawk_nas.bank import Bank
from mohawk_nas.capture import LayerCapture
from mohawk_nas.config import OBJECTIVES
from mohawk_nas.data import TokenBlocks
from mohawk_nas.distill.hidden import relative_distance
from mohawk_nas.layout import Layout
from mohawk_nas.metrics import body, kl_of_hidden, kl_to, log_probabilities
from mohawk_nas.reporting import SILENT
from mohawk_nas.search.scoring import Score
from mohawk_nas.student import assemble
from mohawk_nas.teacher import Teacher

__all__ = ["BankScorer", "PerTrialScorer"]

KEPT_BYTES = 2**29
"""The teacher's log-probabilities on the search split are kept up to this size, else remade."""


class BankScorer:
    """Scores layouts with the bank's mixers.

    What the teacher does with the search split is computed once: its last hidden states, its
    mixers' outputs, and every candidate's distance to them.

    Args:
        teacher: The teacher.
        bank: Holds every candidate that a layout may name.
        blocks: The search split.
        pairs: Every (layer, candidate besides attention) that a layout may hold.
        weights: Objective -> weight. Only the objectives named are computed.
        batch_size: Blocks at once.
    """

    def __init__(
        self,
        teacher: Teacher,
        bank: Bank,
        blocks: TokenBlocks,
        *,
        pairs: Sequence[tuple[int, str]],
        weights: Mapping[str, float],
        batch_size: int,
    ) -> None:
        self.teacher = teacher
        self.bank = bank
        self.blocks = blocks
        self.pairs = pairs
        self.weights = weights
        self.num_layers = teacher.num_layers
        self._batches = [
            blocks.batch(list(range(start, min(start + batch_size, len(blocks)))))
            for start in range(0, len(blocks), batch_size)
        ]

    @torch.no_grad()
    def score(self, layout: Layout) -> Score:
        """Score one layout on every block of the search split; lower is better."""
        began = time.perf_counter()
        per_block: dict[str, list[float]] = {
            name: [] for name in OBJECTIVES if name in self.weights
        }
        if "stage2_local" in per_block:
            pairs = [(i, layout[i]) for i in layout.replaced_layers]
            rows = [self._local[pair] for pair in pairs]
            total = torch.stack(rows).sum(0) if rows else torch.zeros(len(self.blocks))
            per_block["stage2_local"] = total.tolist()
        if "kl" in per_block or "stage2_cascade" in per_block:
            self._score_assembled(layout, per_block)
        return Score(
            per_block={name: tuple(values) for name, values in per_block.items()},
            tokens=self.blocks.tokens.numel(),
            seconds=time.perf_counter() - began,
        )

    def stage2_losses(self) -> dict[tuple[int, str], float]:
        """Relative stage-2 distance of every (layer, candidate) on the search split."""
        return {pair: distances.mean().item() for pair, distances in self._local.items()}

    def _score_assembled(self, layout: Layout, per_block: dict[str, list[float]]) -> None:
        student = assemble(self.teacher, layout, self.bank)
        cascade = "stage2_cascade" in per_block
        outputs: dict[int, Tensor] = {}
        if cascade:
            for i in layout.replaced_layers:
                _record_output(self.teacher.slots[i].get(student), outputs, i)
        for number, tokens in enumerate(self._batches):
            hidden = body(student, tokens.to(self.teacher.device))
            if "kl" in per_block:
                per_block["kl"] += self._kl(number, student, hidden).tolist()
            if cascade:
                total = torch.zeros(len(tokens), device=hidden.device)
                for i, output in outputs.items():
                    total += relative_distance(output, self._outputs[number][i])
                per_block["stage2_cascade"] += total.tolist()

    def _kl(self, number: int, student: Any, hidden: Tensor) -> Tensor:
        if self._log_probs is None:
            return kl_of_hidden(self.teacher.model, self._hidden[number], student, hidden)
        return kl_to(self._log_probs[number], student, hidden)

    @cached_property
    def _log_probs(self) -> list[Tensor] | None:
        """The teacher's log-probabilities, batch by batch, where they are small enough to keep."""
        if self.blocks.tokens.numel() * self.teacher.vocab_size * 4 > KEPT_BYTES:
            return None
        return [log_probabilities(self.teacher.model, hidden) for hidden in self._hidden]

    @cached_property
    def _hidden(self) -> list[Tensor]:
        return [self.teacher.run(tokens.to(self.teacher.device)) for tokens in self._batches]

    @cached_property
    def _outputs(self) -> list[dict[int, Tensor]]:
        """The teacher's mixer outputs, batch by batch."""
        kept: list[dict[int, Tensor]] = []
        for tokens in self._batches:
            captures: list[LayerCapture] = []
            self.teacher.run(tokens.to(self.teacher.device), on_layer=captures.append)
            kept.append({capture.view.layer_idx: capture.output for capture in captures})
        return kept

    @cached_property
    def _local(self) -> dict[tuple[int, str], Tensor]:
        """Relative distance of every candidate on the teacher's inputs, one number a block."""
        parts: dict[tuple[int, str], list[Tensor]] = {}
        names: dict[int, list[str]] = {}
        for layer, name in self.pairs:
            names.setdefault(layer, []).append(name)

        def on_layer(capture: LayerCapture) -> None:
            layer = capture.view.layer_idx
            for name in names[layer]:
                mixer = self.bank.mixer(layer, name)
                output = mixer(capture.hidden.to(mixer.dtype))
                distance = relative_distance(output, capture.output)
                parts.setdefault((layer, name), []).append(distance.cpu())

        for tokens in self._batches:
            self.teacher.run(tokens.to(self.teacher.device), on_layer=on_layer, layers=names)
        return {pair: torch.cat(rows) for pair, rows in parts.items()}


class PerTrialScorer(BankScorer):
    """Trains a layout's mixers anew for each trial: the slow reference for :class:`BankScorer`.

    Seeds and the order of the text follow from the candidate alone, so the numbers must be the
    bank's.
    """

    def score(self, layout: Layout) -> Score:
        began = time.perf_counter()
        pairs = [(i, layout[i]) for i in layout.replaced_layers]
        self.bank.train(pairs, reporter=SILENT, keep=False)
        if "stage2_local" in self.weights:
            self.stage2_losses()
        score = super().score(layout)
        return dataclasses.replace(score, seconds=time.perf_counter() - began)

    def stage2_losses(self) -> dict[tuple[int, str], float]:
        if "_local" not in self.__dict__:
            self.bank.train(self.pairs, reporter=SILENT, keep=False)
        return super().stage2_losses()


def _record_output(slot: torch.nn.Module, into: dict[int, Tensor], layer: int) -> None:
    def record(module: torch.nn.Module, args: Any, result: Any) -> None:
        into[layer] = result[0]

    slot.register_forward_hook(record)
