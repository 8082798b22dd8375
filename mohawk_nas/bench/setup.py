"""What the suites share: a model of random weights, random tokens, untrained mixers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mohawk_nas.bench.options import Options
from mohawk_nas.bench.results import Record
from mohawk_nas.bench.timing import Effort, Timing, stopwatch, time_calls
from mohawk_nas.config import SpaceConfig
from mohawk_nas.data import TokenBlocks
from mohawk_nas.errors import InputError, TeacherError
from mohawk_nas.layout import Layout
from mohawk_nas.mixer import AttentionView, Mixer, MixerConfig, build_mixer
from mohawk_nas.ranks import of_first
from mohawk_nas.reporting import SILENT, Reporter
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.space import SearchSpace, load_space
from mohawk_nas.teacher import Teacher, pick_device

__all__ = ["Case", "FreshBank", "Setup"]

SPACE = "hybrid_phi_mamba"
"""The search space whose mixers are measured."""

RECORDED = 6
"""Warm-up of a training step: it runs plainly three times and is then recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One thing to measure; what it needs in memory it makes when it is run."""

    blank: Record
    """What is measured, without the measurement."""
    run: Callable[[Record], Iterable[Record]]
    may_run_out: bool = False
    """Whether running out of memory is an answer and no failure."""


@dataclass(kw_only=True)
class Setup:
    """What the user's choices mean on this machine."""

    options: Options
    reporter: Reporter = SILENT
    effort: Effort = field(default_factory=Effort)

    def __post_init__(self) -> None:
        self.shape = self.options.shape
        try:
            self.device = pick_device(self.options.device)
        except TeacherError as e:
            raise InputError(str(e).replace("teacher.device", "--device")) from e
        if self.device.type == "cuda" and self.device.index is not None:
            # Events and some kernels go to the current device.
            torch.cuda.set_device(self.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        if self.options.quick:
            self.effort = Effort(groups=3, group_seconds=0.0)

    @property
    def device_name(self) -> str:
        """The GPU's name, or cpu."""
        on_gpu = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if on_gpu else "cpu"

    def time(self, call: Callable[[int], object], *, warmup: int = 3) -> Timing:
        """Seconds of a call on this device."""
        alone = stopwatch(self.device)

        def watch(work: Callable[[], object]) -> float:
            # How often something is done follows from its time, and all do it as often.
            return of_first(alone(work))

        return time_calls(call, stopwatch=watch, effort=self.effort, warmup=warmup)

    def blank(self, suite: str, case: str, **shapes: int | str) -> Record:
        """A record to fill; its type is that of the products."""
        dtype = str(self.dtype).removeprefix("torch.")
        return Record(suite=suite, case=case, shapes=shapes, dtype=dtype)

    def step_shapes(self, batch_size: int) -> dict[str, int | str]:
        """Shapes of a step over whole models."""
        return {
            "model": f"{self.options.model}{', tiny' if self.options.quick else ''}",
            "layers": int(self.shape.config["num_hidden_layers"]),
            "batch": batch_size,
            "tokens": self.shape.block_size,
        }

    @cached_property
    def view(self) -> AttentionView:
        """A layer of the model, without weights."""
        with torch.device("meta"):
            return Teacher(self._build()).views[0]

    @cached_property
    def teacher(self) -> Teacher:
        return self.load_teacher()

    def load_teacher(self, **settings: Any) -> Teacher:
        """The model; its weights follow from the seed and the device.

        Args:
            settings: Changes to its configuration.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        # Where it will stand: on a CPU a billion random numbers take long.
        with torch.random.fork_rng(devices=devices), torch.device(self.device):
            torch.manual_seed(self.options.seed)
            model = self._build(**settings)
        return Teacher(model.to(self.device), source=f"{self.options.model}, random weights")

    def _build(self, **settings: Any) -> Any:
        config = AutoConfig.for_model(**(dict(self.shape.config) | settings))
        return AutoModelForCausalLM.from_config(
            config, dtype=self.dtype, attn_implementation="sdpa"
        )

    @cached_property
    def space(self) -> SearchSpace:
        return load_space(
            SpaceConfig(name=SPACE), num_layers=self.shape.config["num_hidden_layers"]
        )

    @property
    def candidate(self) -> str:
        """The space's first mixer besides attention."""
        return self.space.replacements[0]

    @property
    def mixer_config(self) -> MixerConfig:
        return self.space.candidates[self.candidate]

    def mixer(self, teacher: Teacher, layer: int) -> Mixer:
        """An untrained mixer for one layer, in float32 as a bank holds it."""
        mixer = build_mixer(self.mixer_config, teacher.views[layer], seed=layer)
        return mixer.float().to(self.device)

    def tokens(self, *shape: int) -> Tensor:
        """Random tokens on the CPU; other shapes give others."""
        generator = torch.Generator().manual_seed(self.options.seed + sum(shape))
        return torch.randint(0, self.shape.config["vocab_size"], shape, generator=generator)

    def batches(self, batch_size: int, count: int = 4) -> list[Tensor]:
        """Batches of random tokens ``(B, T)``, to take in turn."""
        return list(self.tokens(count, batch_size, self.shape.block_size))

    def blocks(self, split: str, num_tokens: int) -> TokenBlocks:
        """Random text of one split."""
        size = self.shape.block_size
        count = max(1, num_tokens // size)
        # The splits of one length would be the same text.
        offset = {"bank": 0, "search": 1}[split]
        tokens = self.tokens(count + offset, size)[offset:].int()
        made_of = (split, count, size, self.shape.config["vocab_size"], self.options.seed)
        return TokenBlocks(
            split=split, tokens=tokens, fingerprint="random " + " ".join(map(str, made_of))
        )

    def layouts(self, count: int) -> list[Layout]:
        """Random layouts on the budget, all different; fewer if there are fewer."""
        budget = Budget(attention_layers=self.shape.keep)
        rng = random.Random(self.options.seed)
        count = min(count, budget.count(self.space))
        found: dict[Layout, None] = {}
        while len(found) < count:
            found[budget.random(self.space, rng)] = None
        return list(found)


class FreshBank:
    """Untrained mixers, each made once: speed does not depend on what they have learnt."""

    def __init__(self, setup: Setup, teacher: Teacher) -> None:
        self._setup, self._teacher = setup, teacher
        self._made: dict[int, Mixer] = {}

    def mixer(self, layer: int, candidate: str) -> Mixer:
        """As a :class:`mohawk_nas.bank.Bank` hands it out."""
        assert candidate == self._setup.candidate
        if layer not in self._made:
            mixer = self._setup.mixer(self._teacher, layer)
            self._made[layer] = mixer.eval().requires_grad_(False)
        return self._made[layer]
