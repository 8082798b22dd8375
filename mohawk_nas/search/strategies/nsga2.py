"""Optuna's genetic algorithm for several figures at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from mohawk_nas.search.strategies._sampling import OptunaSampler
from mohawk_nas.search.strategy import STRATEGIES, at_least

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial


@STRATEGIES.register("nsga2")
@dataclass(frozen=True, kw_only=True)
class NSGA2(OptunaSampler):
    """Optuna's NSGA-II: layouts crossed and mutated, one generation after the other.

    Made for a Pareto set; with one objective it is a plain genetic algorithm.
    """

    # On made-up spaces these two found the set soonest in about a hundred trials.
    encoding: Literal["priority", "slots", "bits"] = "bits"
    population: int = 12
    """Layouts a generation."""

    # Optuna crosses only what all trials have in common.
    needs_all: ClassVar[bool] = True
    # Parents' parameters have few distinct values, so a child holds many layers equal.
    ties_by_chance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        at_least(2, population=self.population)

    def sampler(self, seed: int) -> BaseSampler:
        from optuna.samplers import NSGAIISampler
        from optuna.trial import TrialState

        def finished(study: Study) -> list[FrozenTrial]:
            return study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])

        # Optuna writes a trial's generation down when it begins the trial, and begins the next one
        # when enough trials of the last have finished. Here the study is built anew for each
        # proposal, so generations are counted off among the finished trials instead. That is the
        # same where one trial follows the other, and a resumed study finds the same generations.
        class CountedOff(NSGAIISampler):
            def get_trial_generation(self, study: Study, trial: FrozenTrial) -> int:
                return len(finished(study)) // size

            def get_population(self, study: Study, generation: int) -> list[FrozenTrial]:
                return finished(study)[generation * size : (generation + 1) * size]

        size = self.population
        return CountedOff(population_size=size, seed=seed)
