"""A made-up study for the tests of the search: no model, exact values, known interactions."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

import numpy as np
from sqlalchemy import event
from sqlalchemy.engine import Engine

from mohawk_nas.config import BudgetConfig, SearchConfig, StudyConfig
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.mixer import AttentionView, Mixer, MixerConfig
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.scoring import Score
from mohawk_nas.search.space import SearchSpace


@event.listens_for(Engine, "connect")
def do_not_wait_for_the_disk(connection, record):
    # A killed process loses nothing that it has handed to the system; only a power cut would.
    if type(connection).__module__ == "sqlite3":
        connection.execute("PRAGMA synchronous=OFF")


@dataclass(frozen=True, kw_only=True)
class FakeAttention(MixerConfig):
    symbol = "A"
    keeps_attention = True

    def build(self, view: AttentionView) -> Mixer:
        raise NotImplementedError

    def num_params(self, view: AttentionView) -> int:
        return 0

    def flops_per_token(self, view: AttentionView, context: int) -> int:
        return 0

    def state_bytes(
        self, view: AttentionView, *, batch: int, context: int, bytes_per_element: int = 2
    ) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class FakeMixer(FakeAttention):
    symbol = "M"
    keeps_attention = False
    width: int = 4


def make_space(num_layers, *, replacements=("ssm",), pinned=None):
    candidates = {ATTENTION: FakeAttention()} | {name: FakeMixer() for name in replacements}
    return SearchSpace(num_layers=num_layers, candidates=candidates, pinned=pinned or {})


def make_config(num_attention, *, name="made-up", seed=0, **search):
    search = {"trials": 16, "baselines": [], "objective": {"kl": 1.0}, **search}
    return StudyConfig(
        name=name,
        seed=seed,
        budget=BudgetConfig(attention_layers=num_attention),
        search=SearchConfig(**search),
    )


def make(num_layers, num_attention, *, replacements=("ssm",), pinned=None, **search):
    space = make_space(num_layers, replacements=replacements, pinned=pinned)
    config = make_config(num_attention, **search)
    return config, space, Budget(attention_layers=num_attention)


class SyntheticScorer:
    """Each replaced layer costs something, and pairs of replaced layers interact.

    Args:
        num_layers: Layers of the teacher that is not there.
        pairs: Strength of the interactions; 0 makes the value a sum over layers.
        noise: Spread of what differs between blocks and layouts.
        pause: Seconds a score takes.
        replacements: Candidates; each later one costs a tenth more, and in odd layers less.
    """

    def __init__(self, num_layers, *, pairs=0.0, noise=0.0, pause=0.0, replacements=("ssm",)):
        rng = np.random.default_rng(7)
        self.num_layers = num_layers
        self.scored: list[Layout] = []
        self._costs = rng.permutation(np.linspace(0.1, 1.0, num_layers))
        self._pairs = pairs * rng.normal(size=(num_layers, num_layers)) / num_layers
        self._blocks = rng.normal(size=16)
        self._noise = noise
        self._pause = pause
        self._replacements = list(replacements)

    def cost(self, layer, candidate):
        if candidate == ATTENTION:
            return 0.0
        extra = 0.1 * self._replacements.index(candidate)
        return float(self._costs[layer]) * (1 - extra if layer % 2 else 1 + extra)

    def exact(self, layout):
        replaced = layout.replaced_layers
        value = sum(self.cost(layer, layout[layer]) for layer in replaced)
        return value + sum(self._pairs[i, j] for i in replaced for j in replaced if i < j)

    def score(self, layout):
        time.sleep(self._pause)
        self.scored.append(layout)
        rng = np.random.default_rng(int(hashlib.sha256(layout.key().encode()).hexdigest()[:8], 16))
        noise = self._noise * rng.normal(size=len(self._blocks))
        values = self.exact(layout) + self._blocks + noise - self._blocks.mean()
        local = sum(self.cost(layer, layout[layer]) for layer in layout.replaced_layers)
        per_block = {"kl": tuple(map(float, values)), "stage2_local": (local,) * len(values)}
        return Score(per_block=per_block, tokens=4096, seconds=self._pause)

    def stage2_losses(self):
        return {
            (layer, name): self.cost(layer, name)
            for layer in range(self.num_layers)
            for name in self._replacements
        }
