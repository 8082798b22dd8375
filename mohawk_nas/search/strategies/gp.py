"""Optuna's Gaussian-process sampler."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from mohawk_nas.search.strategies._sampling import OptunaSampler
from mohawk_nas.search.strategy import STRATEGIES, Proposal, SearchContext

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


@STRATEGIES.register("gp")
@dataclass(frozen=True, kw_only=True)
class GP(OptunaSampler):
    """Optuna's Gaussian process with expected improvement; slower than TPE at every proposal."""

    # Optuna models only what all trials have in common.
    needs_all: ClassVar[bool] = True

    def propose(self, context: SearchContext) -> Proposal | None:
        import optuna

        # It remarks on an option that is experimental, on a library that would make it faster and
        # on scores that are not finite, which it takes as the worst finite one.
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            with warnings.catch_warnings(action="ignore"):
                return super().propose(context)
        finally:
            optuna.logging.set_verbosity(verbosity)

    def sampler(self, seed: int) -> BaseSampler:
        from optuna.samplers import GPSampler

        return GPSampler(seed=seed, n_startup_trials=0, deterministic_objective=True)
