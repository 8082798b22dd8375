"""Prefill and decoding, teacher and student by the same decoder, over contexts and batches.

Each model stands alone on the device while it is measured. Weights are random, positions reach as
far as the longest context, and a decode step ends with the choice of the likeliest tokens, which
the next step takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal

import torch

from mohawk_nas.bench.results import Record
from mohawk_nas.bench.setup import RECORDED, Case, Setup
from mohawk_nas.bench.timing import Effort, peak_bytes, release, stopwatch, time_calls
from mohawk_nas.decoding import Decoder
from mohawk_nas.kernels.decode_attention import pick_backend
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.mixer import AttentionView, Mixer
from mohawk_nas.student import assemble
from mohawk_nas.teacher import Teacher

__all__ = ["cases", "evenly"]

CONTEXTS = (512, 2048, 8192, 32_768)
BATCHES = (1, 8, 32, 128, 256)
QUICK_CONTEXTS, QUICK_BATCHES = (16, 48), (1, 3)

LAST = 64
"""Steps over the last so many tokens of the context are timed."""
CALLS = 5
"""Prefills that a measurement takes at least."""
LARGEST_BATCH = 4096
"""Sequences beyond which no largest batch is looked for."""
RESERVE = 2 * 2**30
"""Bytes left to all but weights and caches when the largest batch is looked for."""
SMALLER = 0.96
"""What a batch that does not fit is multiplied by."""

Who = Literal["teacher", "student"]


def cases(setup: Setup) -> Iterator[Case]:
    """Both models, each context and batch; on a GPU also the largest batch of each context."""
    contexts = setup.options.contexts or (QUICK_CONTEXTS if setup.options.quick else CONTEXTS)
    batches = setup.options.batches or (QUICK_BATCHES if setup.options.quick else BATCHES)
    models = _Models(setup, max(contexts))
    whos: tuple[Who, ...] = ("teacher", "student")
    for who in whos:
        # Tokens a second of the last prefill: foretells how long the next takes.
        rate: list[float] = []
        for context in contexts:
            for batch in batches:
                for phase in ("prefill", "decode"):
                    blank = _blank(setup, f"{who}, {phase}", context, batch)
                    run = (
                        partial(_prefill, setup, models, who, context, batch, rate)
                        if phase == "prefill"
                        else partial(_decode, setup, models, who, context, batch)
                    )
                    yield Case(blank=blank, run=run, may_run_out=True)
            if setup.device.type == "cuda":
                blank = _blank(setup, f"{who}, largest batch", context, "largest")
                run = partial(_largest, setup, models, who, context)
                yield Case(blank=blank, run=run, may_run_out=True)
    models.clear()


class _Models:
    """The teacher or the student, one at a time."""

    def __init__(self, setup: Setup, longest: int) -> None:
        self._setup, self._longest = setup, longest
        num_layers = int(setup.shape.config["num_hidden_layers"])
        self.layouts: dict[Who, Layout] = {
            "teacher": Layout((ATTENTION,) * num_layers),
            "student": evenly(num_layers, setup.shape.keep, setup.candidate),
        }
        self._who: Who | None = None
        self._model: Any = None
        self.views: list[AttentionView] = []

    def get(self, who: Who) -> Any:
        """The model, in the teacher's type throughout."""
        if who != self._who:
            self.clear()
            teacher = self._setup.load_teacher(max_position_embeddings=self._longest)
            bank = _CastMixers(self._setup, teacher)
            self._model = assemble(teacher, self.layouts[who], bank)
            # Without their modules, which would keep the weights of replaced layers in memory.
            empty = torch.nn.Module()
            self.views = [dataclasses.replace(v, module=empty, rotary=None) for v in teacher.views]
            self._who = who
            del teacher, bank
            release(self._setup.device)
        return self._model

    def clear(self) -> None:
        """Give the memory back."""
        self._who = self._model = None
        release(self._setup.device)

    def cache_bytes(self, who: Who, context: int, batch: int) -> int:
        """What a budget counts for keys, values and states."""
        candidates, size = self._setup.space.candidates, self._setup.dtype.itemsize
        return sum(
            candidates[name].state_bytes(view, batch=batch, context=context, bytes_per_element=size)
            for view, name in zip(self.views, self.layouts[who].candidates, strict=True)
        )


class _CastMixers:
    """Untrained mixers in the type they decode in."""

    def __init__(self, setup: Setup, teacher: Teacher) -> None:
        self._setup, self._teacher = setup, teacher

    def mixer(self, layer: int, candidate: str) -> Mixer:
        """A new one."""
        mixer = self._setup.mixer(self._teacher, layer).to(self._setup.dtype)
        return mixer.eval().requires_grad_(False)


def evenly(num_layers: int, keep: int, replacement: str) -> Layout:
    """The layout whose attention layers stand in the middles of equal parts."""
    kept = [(2 * i + 1) * num_layers // (2 * keep) for i in range(keep)]
    return Layout.keeping(kept, num_layers=num_layers, replacement=replacement)


def _blank(setup: Setup, case: str, context: int, batch: int | str) -> Record:
    shapes = setup.step_shapes(0) | {
        "attention": pick_backend("auto", setup.device, setup.dtype),
        "attention_layers": setup.shape.keep,
        "context": context,
        "batch": batch,
    }
    del shapes["tokens"]
    return setup.blank("inference", case, **shapes)


def _prefill(
    setup: Setup, models: _Models, who: Who, context: int, batch: int, rate: list[float],
    blank: Record,
) -> Iterable[Record]:  # fmt: skip
    limit, tokens = setup.options.cell_seconds, context * batch
    if rate and (expected := CALLS * tokens / rate[-1]) > limit:
        reason = f"would take about {expected:,.0f} s, more than --cell-seconds {limit:g}"
        yield dataclasses.replace(blank, left_out=reason)
        return
    decoder = Decoder(models.get(who), batch=batch, max_length=context)
    text = setup.tokens(batch, context).to(setup.device)

    def call(_: int) -> None:
        decoder.reset()
        decoder.prefill(text)

    try:
        record = _timed(setup, call, warmup=1, tokens=tokens, blank=blank)
    finally:
        decoder.release()
    assert record.median is not None
    rate[:] = [record.median]
    yield record


def _decode(
    setup: Setup, models: _Models, who: Who, context: int, batch: int, blank: Record
) -> Iterable[Record]:
    model = models.get(who)
    counted = models.cache_bytes(who, context, batch)
    decoder = Decoder(model, batch=batch, max_length=context)
    begin = context - min(LAST, context // 2)
    tokens = torch.zeros(batch, dtype=torch.long, device=setup.device)

    def call(_: int) -> None:
        if not begin <= decoder.length < context:
            decoder.pretend(begin)
        tokens.copy_(decoder.step(tokens).argmax(-1))

    try:
        record = _timed(setup, call, warmup=RECORDED, tokens=batch, blank=blank)
        held, recorded = decoder.cache_bytes, decoder.recorded
    finally:
        decoder.release()
    if held != counted:
        raise RuntimeError(f"the cache holds {held:,} bytes, but a budget counts {counted:,}")
    assert record.median is not None
    figures = {
        **record.figures,
        "ms_a_step": 1e3 * batch / record.median,
        "cache_bytes": float(held),
        "budget_bytes": float(counted),
        "recorded": float(recorded),
    }
    yield dataclasses.replace(record, figures=figures)


def _largest(
    setup: Setup, models: _Models, who: Who, context: int, blank: Record
) -> Iterable[Record]:
    """The largest batch whose caches, and prefill in pieces, fit beside the weights."""
    models.get(who)
    release(setup.device)
    free = torch.cuda.mem_get_info(setup.device)[0]
    each = models.cache_bytes(who, context, 1)
    batch = min(LARGEST_BATCH, max(1, (free - RESERVE) // each))
    while True:
        blank = dataclasses.replace(blank, shapes={**blank.shapes, "batch": batch})
        try:
            found = list(_decode(setup, models, who, context, batch, blank))
        except RuntimeError as e:
            # What is allocated by others than torch fails with another error.
            if batch == 1 or "out of memory" not in str(e):
                raise
        else:
            yield from found
            return
        # Only here is the exception gone, and with it what it held on to.
        release(setup.device)
        batch = max(1, min(batch - 1, int(SMALLER * batch)))


def _timed(setup: Setup, call: Any, *, warmup: int, tokens: int, blank: Record) -> Record:
    """Tokens a second, and the most memory."""
    effort: Effort = dataclasses.replace(
        setup.effort, max_seconds=min(setup.effort.max_seconds, setup.options.cell_seconds)
    )
    found = []

    def run() -> None:
        watch = stopwatch(setup.device)
        found.append(time_calls(call, stopwatch=watch, effort=effort, warmup=warmup))

    if (peak := peak_bytes(run, setup.device)) is None:
        run()
    return blank.measured(
        found[0],
        unit="tokens/s",
        figure=lambda seconds: tokens / seconds,
        peak_bytes=None if peak is None else float(peak[0]),
    )
