"""Layouts a minute, scored by KL divergence on random text with untrained mixers."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, cast

from mohawk_nas.bank import Bank
from mohawk_nas.bench.results import Record
from mohawk_nas.bench.setup import Case, FreshBank, Setup
from mohawk_nas.bench.timing import Timing, peak_bytes
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.metrics import blocks_at_once
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.objectives import BankScorer

__all__ = ["cases", "neighbours"]

SEARCH_TOKENS = 49_152
LAYOUTS = 40
GROUPS = 5
ALL_UP_TO = 300
"""Layouts on the budget up to which all of them are scored too, as an exhaustive search does."""


def cases(setup: Setup) -> Iterator[Case]:
    """Streams of layouts as a search proposes them, each with and without kept prefixes."""
    count = setup.options.layouts or (6 if setup.options.quick else LAYOUTS)
    budget = Budget(attention_layers=setup.shape.keep)
    # One more each: the first of a stream pays for what is done once.
    drawn = setup.layouts(count + 1)
    streams = {
        "random layouts": drawn,
        "neighbours of one layout": neighbours(drawn[0], count, seed=setup.options.seed),
    }
    if budget.count(setup.space) <= ALL_UP_TO:
        streams["every layout in order"] = list(budget.enumerate(setup.space))
    blocks = setup.blocks("search", _search_tokens(setup))
    batch_size = setup.options.batch_size or blocks_at_once(blocks, setup.device)
    shapes = setup.step_shapes(min(batch_size, len(blocks))) | {
        "blocks": len(blocks),
        "attention_layers": setup.shape.keep,
    }
    for name, layouts in streams.items():
        for kept in (True, False):
            case = f"{name}, {'prefixes kept' if kept else 'nothing kept'}"
            run = partial(_measure, setup, layouts, kept)
            yield Case(blank=setup.blank("trials", case, **shapes), run=run)


def neighbours(layout: Layout, count: int, *, seed: int) -> list[Layout]:
    """A layout, then those that move one of its attention layers, in random order."""
    swaps = [
        layout.with_candidate(kept, layout[replaced]).with_candidate(replaced, ATTENTION)
        for kept in layout.attention_layers
        for replaced in layout.replaced_layers
    ]
    random.Random(seed).shuffle(swaps)
    return [layout, *swaps[:count]]


def _measure(
    setup: Setup, layouts: Sequence[Layout], kept: bool, blank: Record
) -> Iterable[Record]:
    teacher = setup.teacher
    bank = cast(Bank, FreshBank(setup, teacher))
    blocks = setup.blocks("search", _search_tokens(setup))
    pairs = [(layer, setup.candidate) for layer in range(teacher.num_layers)]

    def scorer(**options: Any) -> BankScorer:
        batch_size = setup.options.batch_size
        weights = {"kl": 1.0}
        return BankScorer(
            teacher, bank, blocks, pairs=pairs, weights=weights, batch_size=batch_size, **options
        )

    # Kernels are compiled here, by a scorer whose prefixes nobody will meet again.
    room = scorer().kept_bytes
    scorer(kept_bytes={"teacher": 0, "students": 0}).score(layouts[-1])
    scored = scorer(kept_bytes=room if kept else {**room, "students": 0})
    began = time.perf_counter()
    # What the teacher does once for all layouts; recorded as the warm-up.
    scored.score(layouts[0])
    first = time.perf_counter() - began
    run_before = scored._runner.layers_run
    rest = layouts[1:]
    seconds: list[float] = []
    size = -(-len(rest) // GROUPS)

    def run() -> None:
        for start in range(0, len(rest), size):
            group = rest[start : start + size]
            began = time.perf_counter()
            for layout in group:
                scored.score(layout)
            seconds.append((time.perf_counter() - began) / len(group))

    if (peak := peak_bytes(run, setup.device)) is None:
        run()
    layers = len(rest) * teacher.num_layers * len(scored._batches)
    timing = Timing(seconds=tuple(seconds), calls=size, warmup_seconds=first)
    whole = sum(s * min(size, len(rest) - size * i) for i, s in enumerate(seconds))
    yield blank.measured(
        timing,
        unit="layouts/min",
        figure=lambda seconds: 60 / seconds,
        layouts=float(len(rest)),
        took_seconds=whole,
        share_of_layers_run=(scored._runner.layers_run - run_before) / layers,
        kept_student_bytes=float(scored._runner.kept_bytes),
        peak_bytes=None if peak is None else float(peak[0]),
    )


def _search_tokens(setup: Setup) -> int:
    quick = 2 * setup.shape.block_size if setup.options.quick else SEARCH_TOKENS
    return setup.options.search_tokens or quick
