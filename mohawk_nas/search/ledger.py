"""What has been scored, kept in an Optuna storage.

Trials stand in the study that has the study's name: one for each distinct layout on the budget, so
that Optuna's own tools can open it. Probes, which may be off the budget, stand in a second study
called ``NAME.probes``. Each finished trial is written whole before it counts as complete, so a
process that is killed leaves at most one trial running, which the next one marks as failed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import OptunaError
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from mohawk_nas.errors import RunError, TrainingError
from mohawk_nas.layout import Layout
from mohawk_nas.search.result import Probe, Trial
from mohawk_nas.search.scoring import Score
from mohawk_nas.search.space import SearchSpace

__all__ = ["Ledger", "open_storage", "storage_errors"]


class Ledger:
    """Trials and probes of one study, in memory and in the storage.

    Args:
        name: The study's name.
        space: Layouts are kept as one parameter a layer, ``layer_03.mixer``.
        weights: Objective -> weight; the sum is the value of an Optuna trial.
        storage: Where the studies are; made there if they are not.
        settings: What the scores depend on. A storage that holds the study with other settings is
            refused.
        begin: Make the study if there is none, and mark trials as failed that a process left
            running. False only reads, so it does not disturb a search that is going on.

    Raises:
        RunError: The storage holds a study of this name with other settings, or none to read.
    """

    def __init__(
        self,
        name: str,
        *,
        space: SearchSpace,
        weights: Mapping[str, float],
        storage: BaseStorage,
        settings: Mapping[str, Any],
        begin: bool,
    ) -> None:
        self._space = space
        self._weights = weights
        self._storage = storage
        self._trial_study = _open_study(storage, name, begin=begin)
        self._probe_study = _open_study(storage, f"{name}.probes", begin=begin)
        self._check(name, settings)
        self.trials: list[Trial] = []
        self.probes: list[Probe] = []
        self._scores: dict[Layout, Score] = {}
        for frozen in storage.get_all_trials(self._trial_study, deepcopy=False):
            if frozen.state == TrialState.RUNNING and begin:
                number = frozen.number
                trial_id = storage.get_trial_id_from_study_id_trial_number(
                    self._trial_study, number
                )
                self._fail(trial_id, "interrupted")
            elif frozen.state == TrialState.COMPLETE:
                self._enter_trial(frozen)
        for frozen in storage.get_all_trials(self._probe_study, deepcopy=False):
            if frozen.state == TrialState.COMPLETE:
                score = Score.from_dict(frozen.user_attrs["score"])
                charged_to = frozen.user_attrs["charged_to"]
                self._enter_probe(
                    Probe(layout=self._layout(frozen), score=score, charged_to=charged_to)
                )

    def score_of(self, layout: Layout) -> Score | None:
        """The layout's score as a trial or as a probe, None if it has none yet."""
        return self._scores.get(layout)

    def run_trial(
        self,
        layout: Layout,
        score: Callable[[Layout], Score],
        *,
        proposed_by: str,
        seed: int,
        provenance: Mapping[str, Any],
    ) -> Trial:
        """Score a layout as a trial of the study, unless a probe has done so already.

        Whatever ``score`` raises marks the trial as failed and is raised again.
        """
        attrs = {
            "layout": layout.strip(self._space.symbols),
            "attention_layers": list(layout.attention_layers),
            "proposed_by": proposed_by,
            "seed": seed,
            "provenance": dict(provenance),
        }
        storage, state = self._storage, TrialState.RUNNING
        trial_id = storage.create_new_trial(
            self._trial_study, self._template(layout, attrs, state=state)
        )
        try:
            result = self.score_of(layout) or score(layout)
        except BaseException as e:
            self._fail(trial_id, f"interrupted: {type(e).__name__}: {e}".rstrip(": "))
            raise
        storage.set_trial_user_attr(trial_id, "score", result.to_dict())
        value = result.value(self._weights)
        storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [value])
        return self._enter_trial(storage.get_trial(trial_id))

    def add_probe(self, layout: Layout, score: Score, *, charged_to: str) -> None:
        """Keep the score of a layout that is no trial."""
        attrs = {
            "layout": layout.strip(self._space.symbols),
            "attention_layers": list(layout.attention_layers),
            "charged_to": charged_to,
            "score": score.to_dict(),
        }
        template = self._template(
            layout, attrs, state=TrialState.COMPLETE, value=score.value(self._weights)
        )
        self._storage.create_new_trial(self._probe_study, template)
        self._enter_probe(Probe(layout=layout, score=score, charged_to=charged_to))

    def note(self, key: str, value: Any) -> None:
        """Keep something about the study as a whole; what a key held before is lost."""
        if self.notes().get(key) != value:
            self._storage.set_study_user_attr(self._trial_study, key, value)

    def notes(self) -> dict[str, Any]:
        """What :meth:`note` has kept."""
        return self._storage.get_study_user_attrs(self._trial_study)

    def _check(self, name: str, settings: Mapping[str, Any]) -> None:
        # As JSON gives them back, so that an integer key of a mapping is no change.
        settings = json.loads(json.dumps(settings))
        kept = self.notes().get("settings", settings)
        changed = [key for key in settings if kept.get(key) != settings[key]]
        if changed:
            listed = "; ".join(
                f"{key} was {kept.get(key)!r} and is now {settings[key]!r}" for key in changed
            )
            raise RunError(
                f"study {name!r} was begun with other settings: {listed}. Only search.trials may "
                "change; give the study another name or restore the old values"
            )
        self.note("settings", settings)

    def _template(
        self,
        layout: Layout,
        attrs: dict[str, Any],
        *,
        state: TrialState,
        value: float | None = None,
    ) -> FrozenTrial:
        width = max(2, len(str(self._space.num_layers - 1)))
        params: dict[str, Any] = {}
        distributions: dict[str, BaseDistribution] = {}
        for layer, candidate in enumerate(layout.candidates):
            name = f"layer_{layer:0{width}d}.mixer"
            params[name] = candidate
            distributions[name] = CategoricalDistribution(tuple(self._space.candidates))
        return create_trial(
            state=state,
            value=value,
            params=params,
            distributions=distributions,
            user_attrs=attrs,
        )

    def _layout(self, frozen: FrozenTrial) -> Layout:
        return Layout(tuple(frozen.params[name] for name in sorted(frozen.params)))

    def _enter_trial(self, frozen: FrozenTrial) -> Trial:
        layout, score = self._layout(frozen), Score.from_dict(frozen.user_attrs["score"])
        trial = Trial(
            number=len(self.trials),
            layout=layout,
            score=score,
            value=score.value(self._weights),
            proposed_by=frozen.user_attrs["proposed_by"],
            provenance=frozen.user_attrs["provenance"],
        )
        self.trials.append(trial)
        self._scores.setdefault(layout, score)
        return trial

    def _enter_probe(self, probe: Probe) -> None:
        self.probes.append(probe)
        self._scores.setdefault(probe.layout, probe.score)

    def _fail(self, trial_id: int, reason: str) -> None:
        self._storage.set_trial_user_attr(trial_id, "reason", reason)
        self._storage.set_trial_state_values(trial_id, TrialState.FAIL)


def open_storage(url: str | None, *, run_dir: Path | None) -> BaseStorage:
    """The storage a study names; else SQLite in the run's folder; without a folder, memory."""
    if url is None:
        if run_dir is None:
            return InMemoryStorage()
        run_dir.mkdir(parents=True, exist_ok=True)
        url = f"sqlite:///{run_dir / 'study.db'}"
    return RDBStorage(url)


@contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Turn what a damaged, full or unreachable storage raises into one line; quieten Optuna."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    except (OptunaError, SQLAlchemyError) as e:
        cause = " ".join(str(e.__cause__ or e).split())
        raise TrainingError(
            f"{where}: the study must be readable and writable, but the storage says: {cause}. "
            "What was scored before is kept there; run again to continue"
        ) from e
    finally:
        optuna.logging.set_verbosity(verbosity)


def _open_study(storage: BaseStorage, name: str, *, begin: bool) -> int:
    try:
        return storage.get_study_id_from_name(name)
    except KeyError as e:
        if not begin:
            raise RunError(
                f"there must be a study {name!r}, but there is none; search first"
            ) from e
    return storage.create_new_study([StudyDirection.MINIMIZE], name)
