"""How a layout is scored: the assembled student against the teacher on the search split.

B blocks a batch, T tokens a block, D model width.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from mohawk_nas.bank import Bank
from mohawk_nas.capture import LayerCapture
from mohawk_nas.config import OBJECTIVES
from mohawk_nas.data import TokenBlocks
from mohawk_nas.distill.hidden import relative_distance
from mohawk_nas.layout import Layout
from mohawk_nas.metrics import kl_of_hidden, kl_to, log_probabilities
from mohawk_nas.reporting import SILENT
from mohawk_nas.search.prefixes import HybridRunner
from mohawk_nas.search.scoring import Score
from mohawk_nas.teacher import Teacher

__all__ = ["BankScorer", "PerTrialScorer"]

KEPT_BYTES = {"teacher": 2**29, "students": 2**28}
"""On a CPU, what is kept of the teacher's log-probabilities and mixer outputs, and of students'
hidden states; the rest is made again when it is needed."""

KEPT_SHARES = {"teacher": 0.25, "students": 0.25}
"""The same on a GPU, as shares of what is free when scoring begins."""


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
        kept_bytes: Memory for what is computed once and kept, of the ``teacher`` and of
            ``students``; None takes a share of what there is. No score depends on it.
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
        kept_bytes: Mapping[str, int] | None = None,
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
        self.kept_bytes = kept_bytes or _memory_for(teacher.device)
        """What may be kept of the ``teacher`` and of ``students``."""

    @torch.no_grad()
    def score(self, layout: Layout) -> Score:
        """Score one layout on every block of the search split; lower is better."""
        began = time.perf_counter()
        columns: dict[str, Tensor] = {}
        if "stage2_local" in self.weights:
            rows = [self._local[i, layout[i]] for i in layout.replaced_layers]
            columns["stage2_local"] = torch.stack([torch.zeros(len(self.blocks)), *rows]).sum(0)
        if "kl" in self.weights or "stage2_cascade" in self.weights:
            columns |= self._score_assembled(layout)
        return Score(
            per_block={n: tuple(columns[n].tolist()) for n in OBJECTIVES if n in self.weights},
            tokens=self.blocks.tokens.numel(),
            seconds=time.perf_counter() - began,
        )

    def stage2_losses(self) -> dict[tuple[int, str], float]:
        """Relative stage-2 distance of every (layer, candidate) on the search split."""
        return {pair: distances.mean().item() for pair, distances in self._local.items()}

    def _score_assembled(self, layout: Layout) -> dict[str, Tensor]:
        kl: list[Tensor] = []
        cascade: list[Tensor] = []
        targets = self._mixer_outputs if "stage2_cascade" in self.weights else None
        for number, (hidden, distance) in enumerate(self._runner.run(layout, targets)):
            cascade.append(distance)
            if "kl" in self.weights:
                kl.append(self._kl(number, hidden))
        # Read once, at the end: each look waits for the GPU.
        found = {"kl": kl, "stage2_cascade": cascade}
        return {name: torch.cat(found[name]) for name in found if name in self.weights}

    @cached_property
    def _runner(self) -> HybridRunner:
        return HybridRunner(
            self.teacher, self.bank, self._batches, max_bytes=self.kept_bytes["students"]
        )

    def _kl(self, number: int, hidden: Tensor) -> Tensor:
        student = self._runner.model
        if number not in self._log_probs:
            return kl_of_hidden(self.teacher.model, self._hidden[number], student, hidden)
        return kl_to(self._log_probs[number], student, hidden)

    @cached_property
    def _log_probs(self) -> dict[int, Tensor]:
        """The teacher's log-probabilities of as many batches as there is room for."""
        kept: dict[int, Tensor] = {}
        room = self.kept_bytes["teacher"]
        for number, hidden in enumerate(self._hidden):
            room -= hidden.shape[0] * hidden.shape[1] * self.teacher.vocab_size * 4
            if room < 0:
                break
            kept[number] = log_probabilities(self.teacher.model, hidden)
        return kept

    @cached_property
    def _hidden(self) -> list[Tensor]:
        return [self.teacher.run(tokens.to(self.teacher.device)) for tokens in self._batches]

    def _mixer_outputs(self, number: int) -> dict[int, Tensor]:
        """The teacher's mixer output in every layer, for one batch."""
        if number in self._kept_outputs:
            return self._kept_outputs[number]
        captures: list[LayerCapture] = []
        tokens = self._batches[number].to(self.teacher.device)
        self.teacher.run(tokens, on_layer=captures.append)
        outputs = {capture.view.layer_idx: capture.output for capture in captures}
        held = sum(o.numel() * o.element_size() for o in outputs.values())
        if held * (len(self._kept_outputs) + 1) <= self.kept_bytes["teacher"]:
            self._kept_outputs[number] = outputs
        return outputs

    @cached_property
    def _kept_outputs(self) -> dict[int, dict[int, Tensor]]:
        return {}

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
        # What was kept was made by other mixers.
        self.__dict__.pop("_runner", None)
        if "stage2_local" in self.weights:
            self.stage2_losses()
        score = super().score(layout)
        return dataclasses.replace(score, seconds=time.perf_counter() - began)

    def stage2_losses(self) -> dict[tuple[int, str], float]:
        if "_local" not in self.__dict__:
            self.bank.train(self.pairs, reporter=SILENT, keep=False)
        return super().stage2_losses()


def _memory_for(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return dict(KEPT_BYTES)
    free, _ = torch.cuda.mem_get_info(device)
    # What torch holds without using it is free too.
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return {name: int(share * free) for name, share in KEPT_SHARES.items()}
