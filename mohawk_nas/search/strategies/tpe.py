"""Optuna's tree-structured Parzen estimator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mohawk_nas.search.strategies._sampling import OptunaSampler
from mohawk_nas.search.strategy import STRATEGIES

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler


@STRATEGIES.register("tpe")
@dataclass(frozen=True, kw_only=True)
class TPE(OptunaSampler):
    """Optuna's tree-structured Parzen estimator, each parameter on its own."""

    def sampler(self, seed: int) -> BaseSampler:
        from optuna.samplers import TPESampler

        return TPESampler(seed=seed, n_startup_trials=0, multivariate=False)
