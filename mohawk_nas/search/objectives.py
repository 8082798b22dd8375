"""How a layout is scored: the assembled student against the teacher on the search split.

B blocks a batch, T tokens a block, D model width.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from mohawk_nas.bank import Bank
from mohawk_nas.capture import LayerCapture
from mohawk_nas.config import FIGURES
from mohawk_nas.data import TokenBlocks
from mohawk_nas.distill.hidden import relative_distance
from mohawk_nas.fusion import fused_parts
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.metrics import blocks_at_once, kl_of_hidden, kl_to, row_chunks
from mohawk_nas.mixer import MixerConfig, mixer_config
from mohawk_nas.precision import run_mixer
from mohawk_nas.ranks import gpu_sharers
from mohawk_nas.recall import Questions, RecallProbe
from mohawk_nas.reporting import SILENT
from mohawk_nas.search.prefixes import HybridRunner
from mohawk_nas.search.scoring import Score
from mohawk_nas.teacher import Teacher

__all__ = ["BankScorer", "PerTrialScorer"]

T = TypeVar("T")

KEPT_BYTES = {"teacher": 2**29, "students": 2**28}
"""On a CPU, what is kept of the teacher's logits and mixer outputs, and of students'
hidden states; the rest is made again when it is needed."""

KEPT_SHARES = {"teacher": 0.25, "students": 0.25}
"""The same on a GPU, as shares of what is free when scoring begins."""
LEAST_KEPT_BYTES = 2**24
"""Less is not worth keeping."""


class BankScorer:
    """Scores layouts with the bank's mixers.

    What the teacher does with the search split is computed once: its last hidden states, its
    mixers' outputs, and every candidate's distance to them.

    Args:
        teacher: The teacher.
        bank: Holds every candidate that a layout may name.
        blocks: The search split.
        probe: Asked for objective ``recall``.
        pairs: Every (layer, candidate besides attention) that a layout may hold.
        weights: Figure -> weight. Only the figures named are computed.
        batch_size: Blocks at once; None takes what suits the device.
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
        probe: RecallProbe | None = None,
        batch_size: int | None = None,
        kept_bytes: Mapping[str, int] | None = None,
    ) -> None:
        self.teacher = teacher
        self.bank = bank
        self.blocks = blocks
        self.pairs = pairs
        self.weights = weights
        self.probe = probe
        self.num_layers = teacher.num_layers
        batch_size = batch_size or blocks_at_once(blocks, teacher.device)
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
        while True:
            try:
                return self._score(layout, began)
            except torch.OutOfMemoryError:
                if not any(self.kept_bytes.values()):
                    raise
            # Not within the except clause, which would hold on to the tensors of the failed one.
            # Somebody else has come to this GPU since its free memory was looked at.
            self.release()
            free = _memory_for(self.teacher.device)
            self.kept_bytes = {
                name: _halved(min(kept, free[name])) for name, kept in self.kept_bytes.items()
            }

    def _score(self, layout: Layout, began: float) -> Score:
        columns: dict[str, Tensor] = {}
        if "stage2_local" in self.weights:
            rows = [self._local[i, layout[i]] for i in layout.replaced_layers]
            columns["stage2_local"] = torch.stack([torch.zeros(len(self.blocks)), *rows]).sum(0)
        if "kl" in self.weights or "stage2_cascade" in self.weights:
            columns |= self._score_assembled(layout)
        if "recall" in self.weights:
            columns["recall"] = self._recall_lost(layout)
        if "attention_layers" in self.weights:
            columns["attention_layers"] = self._constant(len(layout.attention_layers))
        if "cache" in self.weights:
            columns["cache"] = self._constant(self._cache_bytes(layout))
        asked = self.probe.tokens.numel() if self.probe and "recall" in self.weights else 0
        return Score(
            per_block={n: tuple(columns[n].tolist()) for n in FIGURES if n in self.weights},
            tokens=self.blocks.tokens.numel() + asked,
            seconds=time.perf_counter() - began,
        )

    def release(self) -> None:
        """Let go of what was kept, for whoever needs the memory; it is made again when needed."""
        for name in ("_made", "_runner", "_asked"):
            self.__dict__.pop(name, None)
        _collect(self.teacher.device)

    def stage2_losses(self) -> dict[tuple[int, str], float]:
        """Relative stage-2 distance of every (layer, candidate) on the search split."""
        # Strategies ask often, and each number taken alone would wait for the GPU.
        means = [distances.mean() for distances in self._local.values()]
        taken = torch.stack(means).tolist() if means else []
        return dict(zip(self._local, taken, strict=True))

    def _score_assembled(self, layout: Layout) -> dict[str, Tensor]:
        kl: list[Tensor] = []
        cascade: list[Tensor] = []
        targets = self._mixer_outputs if "stage2_cascade" in self.weights else None
        with fused_parts(self.teacher.model, self._runner.model):
            for number, (hidden, distance) in enumerate(self._runner.run(layout, targets)):
                cascade.append(distance)
                if "kl" in self.weights:
                    kl.append(self._kl(number, hidden))
        # Read once, at the end: each look waits for the GPU.
        found = {"kl": kl, "stage2_cascade": cascade}
        return {name: torch.cat(found[name]) for name in found if name in self.weights}

    def _recall_lost(self, layout: Layout) -> Tensor:
        """Share of the teacher's recall that is lost, dealt out to the blocks."""
        assert self.probe is not None
        model, shares = self._asked.model, []
        with fused_parts(self.teacher.model, model):
            for asked, (hidden, _) in zip(self._questions, self._asked.run(layout), strict=True):
                shares.append(asked.right(model, hidden))
        right = self.probe.by_block(torch.cat(shares), len(self.blocks))
        return 1 - right / self.probe.teacher_recall

    def _constant(self, cost: int) -> Tensor:
        # A cost is the same in every block; float32 would round large ones.
        return torch.full((len(self.blocks),), float(cost), dtype=torch.float64)

    def _cache_bytes(self, layout: Layout) -> int:
        """Bytes of keys, values and states that one sequence of a block's length leaves."""
        candidates = {ATTENTION: self._attention, **self.bank.candidates}
        return sum(
            candidates[name].state_bytes(
                view,
                batch=1,
                context=self.blocks.tokens.shape[1],
                bytes_per_element=self.teacher.model.dtype.itemsize,
            )
            for view, name in zip(self.teacher.views, layout.candidates, strict=True)
        )

    @cached_property
    def _attention(self) -> MixerConfig:
        return mixer_config({"mixer": ATTENTION})

    @cached_property
    def _runner(self) -> HybridRunner:
        share = self.kept_bytes["students"]
        return HybridRunner(self.teacher, self.bank, self._batches, max_bytes=share)

    @cached_property
    def _asked(self) -> HybridRunner:
        # Besides the text's: as much again, since the probe is a fraction of the text.
        share, batches = self.kept_bytes["students"], [asked.tokens for asked in self._questions]
        return HybridRunner(self.teacher, self.bank, batches, max_bytes=share)

    @cached_property
    def _questions(self) -> list[Questions]:
        assert self.probe is not None
        # In about as many tokens at once as the text, and no small batch at the end: on a GPU it
        # would take Python as long as a large one.
        asked = self.probe.tokens
        count = max(1, round(asked.numel() / self._batches[0].numel()))
        return list(self.probe.batches(math.ceil(len(asked) / count)))

    def _kl(self, number: int, hidden: Tensor) -> Tensor:
        student, tokens = self._runner.model, self._batches[number]
        target = self._once(
            ("logits", number),
            tokens.numel() * self.teacher.vocab_size * self.teacher.model.dtype.itemsize,
            lambda: self._logits(number),
        )
        if target is not None:
            return kl_to(target, student, hidden)
        return kl_of_hidden(self.teacher.model, self._teacher_hidden(number), student, hidden)

    def _logits(self, number: int) -> Tensor:
        hidden = self.teacher.run(self._batches[number].to(self.teacher.device))
        kept = None
        for part in row_chunks(hidden, self.teacher.model):
            logits = self.teacher.logits(hidden[part])
            if kept is None:
                kept = logits.new_empty(*hidden.shape[:2], logits.shape[-1])
            kept[part] = logits
        assert kept is not None
        return kept

    def _teacher_hidden(self, number: int) -> Tensor:
        def make() -> Tensor:
            return self.teacher.run(self._batches[number].to(self.teacher.device))

        width = self.teacher.views[0].d_model * self.teacher.model.dtype.itemsize
        kept = self._once(("hidden", number), self._batches[number].numel() * width, make)
        return make() if kept is None else kept

    def _mixer_outputs(self, number: int) -> dict[int, Tensor]:
        """The teacher's mixer output in every layer, for one batch."""

        def make() -> dict[int, Tensor]:
            captures: list[LayerCapture] = []
            tokens = self._batches[number].to(self.teacher.device)
            self.teacher.run(tokens, on_layer=captures.append)
            return {capture.view.layer_idx: capture.output for capture in captures}

        width = self.teacher.views[0].d_model * self.teacher.model.dtype.itemsize
        size = self._batches[number].numel() * width * self.num_layers
        kept = self._once(("outputs", number), size, make)
        return make() if kept is None else kept

    def _once(self, key: tuple[str, int], num_bytes: int, make: Callable[[], T]) -> T | None:
        """What was made of the teacher before, or is made now and kept; None if there is no room.

        All kinds share one budget.
        """
        if key not in self._made:
            held = sum(size for size, _ in self._made.values())
            if held + num_bytes > self.kept_bytes["teacher"]:
                return None
            self._made[key] = (num_bytes, make())
        found: T = self._made[key][1]
        return found

    @cached_property
    def _made(self) -> dict[tuple[str, int], tuple[int, Any]]:
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
                output = run_mixer(mixer, capture.hidden)
                distance = relative_distance(output, capture.output)
                parts.setdefault((layer, name), []).append(distance.cpu())

        with fused_parts(self.teacher.model):
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
        for runner in ("_runner", "_asked"):
            self.__dict__.pop(runner, None)
        if "stage2_local" in self.weights:
            self.stage2_losses()
        score = super().score(layout)
        return dataclasses.replace(score, seconds=time.perf_counter() - began)

    def stage2_losses(self) -> dict[tuple[int, str], float]:
        if "_local" not in self.__dict__:
            self.bank.train(self.pairs, reporter=SILENT, keep=False)
        return super().stage2_losses()


def _halved(kept: int) -> int:
    return kept // 2 if kept // 2 >= LEAST_KEPT_BYTES else 0


def _memory_for(device: torch.device) -> dict[str, int]:
    if device.type != "cuda":
        return dict(KEPT_BYTES)
    # What training has left is given back first.
    _collect(device)
    free, _ = torch.cuda.mem_get_info(device)
    return {name: int(share * free / gpu_sharers()) for name, share in KEPT_SHARES.items()}


def _collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
