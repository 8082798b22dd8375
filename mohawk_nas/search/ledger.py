"""What has been scored and what is being scored, kept in an Optuna storage.

Trials stand in the study that has the study's name: one for each distinct layout on the budget, so
that Optuna's own tools can open it. Probes, which may be off the budget, stand in a second study
called ``NAME.probes``; distilled scores, one for each layout, tokens and recipe, in a third called
``NAME.rungs``. Each is written as running before it is scored, and whole before it counts
as complete. What a process that is killed leaves running, others mark as failed (``leases.py``).

No layout is scored twice, whoever works at the study. A worker first writes down what it is about
to score, and then reads what others have written: of two running trials of one layout the lower
number keeps it, likewise of two probes. A probe gives way to a trial, and a trial waits for a
probe, which may have been at it before; so one of the two always scores, and the other takes the
result.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from optuna.distributions import CategoricalDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from mohawk_nas.errors import RunError
from mohawk_nas.layout import Layout
from mohawk_nas.search.leases import Leases
from mohawk_nas.search.result import Probe, Trial
from mohawk_nas.search.scoring import Score
from mohawk_nas.search.space import SearchSpace

__all__ = ["Ledger"]

FIRST_PATIENCE = 10.0
"""Seconds in which whoever made a study says what its scores depend on."""


class Ledger:
    """Trials and probes of one study, in memory and in the storage.

    Args:
        name: The study's name.
        space: Layouts are kept as one parameter a layer, ``layer_03.mixer``.
        weights: Objective -> weight; the sum is the value of an Optuna trial.
        storage: Where the studies are; made there if they are not.
        leases: This process's.
        settings: What the scores depend on. A storage that holds the study with other settings is
            refused.
        identity: What else they depend on, by name: the teacher, the text. None checks nothing.
        rungs: Whether the study has rungs above 0.
        begin: Make the study if there is none, and mark trials as failed whose workers have
            stopped. False only reads, so it does not disturb a search that is going on.

    Raises:
        RunError: The storage holds a study of this name with other settings or another identity,
            or none to read.
    """

    def __init__(
        self,
        name: str,
        *,
        space: SearchSpace,
        weights: Mapping[str, float],
        storage: BaseStorage,
        leases: Leases,
        settings: Mapping[str, Any],
        identity: Mapping[str, Any] | None = None,
        rungs: bool = False,
        begin: bool,
    ) -> None:
        self._space = space
        self._weights = weights
        self._storage = storage
        self._leases = leases
        self._begin = begin
        self._name = name
        self._trial_study, made = _open_study(storage, name, begin=begin)
        self._probe_study, _ = _open_study(storage, f"{name}.probes", begin=begin)
        self._rung_study: int | None = None
        if rungs:
            # Studies that are only read may have been searched without.
            with contextlib.suppress(RunError):
                self._rung_study, _ = _open_study(storage, f"{name}.rungs", begin=begin)
        self._check(name, settings, identity or {}, made=made)
        self.trials: list[Trial] = []
        """In the order in which they were begun."""
        self.probes: list[Probe] = []
        self.pending: dict[Layout, int] = {}
        """Layouts that others are scoring as trials -> the trials' numbers."""
        self.probing: dict[Layout, int] = {}
        """The same for probes."""
        self.distilling: set[tuple[Layout, int, int]] = set()
        """(layout, tokens, seed) that others are distilling."""
        self.num_distilled = 0
        """Distillations that are complete."""
        self._trial_numbers: list[int] = []
        self._probe_numbers: list[int] = []
        self._scores: dict[Layout, Score] = {}
        self._layouts: set[Layout] = set()
        self._read()

    @property
    def alone(self) -> bool:
        """Whether no other process can be at this study."""
        return self._leases.alone

    @property
    def symbols(self) -> Mapping[str, str]:
        """Candidate -> its letter in a layout's strip."""
        return self._space.symbols

    def refresh(self) -> None:
        """Take in what others have done since the last look."""
        if not self._leases.alone:
            self._read()

    def has_trial(self, layout: Layout) -> bool:
        """Whether the layout is scored as a trial."""
        return layout in self._layouts

    def is_busy(self, layout: Layout) -> bool:
        """Whether others are scoring the layout, as a trial or as a probe."""
        return layout in self.pending or layout in self.probing

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
        limit: int | None = None,
    ) -> bool:
        """Score a layout as a trial of the study, unless a probe has done so already.

        Whatever ``score`` raises marks the trial as failed and is raised again.

        Args:
            layout: What to score.
            score: Scores it.
            proposed_by: Kept with the trial, like the rest.
            seed: The proposal's.
            provenance: Where the weights come from.
            limit: Trials of the study; one too many is not begun.

        Returns:
            Whether the trial is complete. It is not if others have the layout or the study its
            trials, or if this process stood still so long that others took the layout over.
        """
        attrs = {"proposed_by": proposed_by, "seed": seed, "provenance": dict(provenance)}

        def claim(number: int) -> str | None:
            if layout in self._layouts or self.pending.get(layout, number) < number:
                return f"same layout as trial {self._number_of(layout)}"
            before = sum(other < number for other in self.pending.values())
            if limit is not None and len(self.trials) + before >= limit:
                return f"one more than {limit} trials"
            return None

        def scored() -> Score:
            while self.score_of(layout) is None and layout in self.probing:
                time.sleep(self._leases.pace.look_every)
                self.refresh()
            return self.score_of(layout) or score(layout)

        return self._run(self._trial_study, layout, attrs, claim=claim, score=scored)

    def run_probe(
        self, layout: Layout, score: Callable[[Layout], Score], *, charged_to: str
    ) -> bool:
        """Score a layout that is no trial; like :meth:`run_trial`."""

        def claim(number: int) -> str | None:
            if layout in self._layouts or layout in self.pending:
                return f"same layout as trial {self._number_of(layout)} of the study"
            if layout in self._scores or self.probing.get(layout, number) < number:
                return "same layout as an earlier probe"
            return None

        return self._run(
            self._probe_study,
            layout,
            {"charged_to": charged_to},
            claim=claim,
            score=lambda: score(layout),
        )

    def rung_scores(self, recipe: Mapping[str, Any]) -> dict[tuple[Layout, int, int], Score]:
        """(layout, tokens, seed) -> score, of what was distilled by a recipe."""
        return {
            self._distillation(frozen): Score.from_dict(frozen.user_attrs["score"])
            for frozen in self._rungs()
            if frozen.state == TrialState.COMPLETE and frozen.user_attrs["recipe"] == recipe
        }

    def run_rung(
        self,
        layouts: Sequence[Layout],
        distil: Callable[[Sequence[Layout], int, int], Sequence[Score]],
        *,
        tokens: int,
        seed: int,
        recipe: Mapping[str, Any],
        value: Callable[[Score], float],
    ) -> None:
        """Distil layouts side by side, those left out that others have taken in the meantime.

        Whatever ``distil`` raises marks them as failed and is raised again.

        Args:
            layouts: What to distil.
            distil: Given layouts, tokens and seed, gives a score each.
            tokens: The rung's.
            seed: Counted from 0, see :class:`~mohawk_nas.search.rungs.Distiller`.
            recipe: As of :meth:`rung_scores`.
            value: Of a score, for the Optuna trial.
        """
        assert self._rung_study is not None
        storage, leases, begun = self._storage, self._leases, dict[Layout, int]()
        with contextlib.ExitStack() as beats:
            try:
                for layout in layouts:
                    attrs = {
                        **self._named(layout),
                        "rung": tokens,
                        "seed": seed,
                        "recipe": dict(recipe),
                        **leases.attrs(),
                    }
                    begun[layout] = storage.create_new_trial(
                        self._rung_study, create_trial(state=TrialState.RUNNING, user_attrs=attrs)
                    )
                    beats.enter_context(leases.beating(begun[layout]))
                for layout in layouts:
                    number = storage.get_trial_number_from_id(begun[layout])
                    if self._is_taken((layout, tokens, seed), recipe, number):
                        self._fail(begun.pop(layout), "same layout as an earlier distillation")
                scores = distil(list(begun), tokens, seed) if begun else []
            except BaseException as e:
                for trial_id in begun.values():
                    self._fail(trial_id, f"interrupted: {type(e).__name__}: {e}".rstrip(": "))
                raise
        for trial_id, score in zip(begun.values(), scores, strict=True):
            # Others may have given this worker up, and one of them distils the layout.
            with contextlib.suppress(UpdateFinishedTrialError):
                storage.set_trial_user_attr(trial_id, "score", score.to_dict())
                storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [value(score)])

    def note(self, key: str, value: Any) -> None:
        """Keep something about the study as a whole; what a key held before is lost."""
        if self.notes().get(key) != value:
            self._storage.set_study_user_attr(self._trial_study, key, value)

    def notes(self) -> dict[str, Any]:
        """What :meth:`note` has kept."""
        return self._storage.get_study_user_attrs(self._trial_study)

    def note_once(self, key: str, make: Callable[[], Any]) -> bool:
        """Keep what ``make`` gives as a note, unless it is there; one worker makes it.

        Who is at it stands in a study of its own, ``NAME.notes``, which only shared storages have.
        Whatever ``make`` raises is raised again, and another may try.

        Returns:
            Whether the note is there. It is not if others are at it.
        """
        if key in self.notes():
            return True
        if self.alone:
            self.note(key, make())
            return True
        storage = self._storage
        study, _ = _open_study(storage, f"{self._name}.notes", begin=True)
        if self._makers(study, key):
            return False
        claim = create_trial(
            state=TrialState.RUNNING, user_attrs={"note": key, **self._leases.attrs()}
        )
        trial_id = storage.create_new_trial(study, claim)
        try:
            with self._leases.beating(trial_id):
                number = storage.get_trial_number_from_id(trial_id)
                if any(other < number for other in self._makers(study, key)):
                    self._fail(trial_id, "others are at it")
                    return False
                # Whoever was at it may have ended since the first look.
                made = None if key in self.notes() else make()
                if key not in self.notes():
                    self.note(key, made)
        except BaseException as e:
            self._fail(trial_id, f"interrupted: {type(e).__name__}: {e}".rstrip(": "))
            raise
        with contextlib.suppress(UpdateFinishedTrialError):
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [0.0])
        return True

    def _makers(self, study: int, key: str) -> list[int]:
        """Numbers of the others that are making a note; those that have stopped are marked."""
        found = []
        for frozen in self._storage.get_all_trials(study, deepcopy=False):
            if frozen.state != TrialState.RUNNING or frozen.user_attrs.get("note") != key:
                continue
            if self._leases.has_stopped(study, frozen):
                number = frozen.number
                trial_id = self._storage.get_trial_id_from_study_id_trial_number(study, number)
                self._fail(trial_id, "its worker stopped")
            elif not self._leases.is_mine(frozen):
                found.append(frozen.number)
        return found

    def _run(
        self,
        study: int,
        layout: Layout,
        attrs: dict[str, Any],
        *,
        claim: Callable[[int], str | None],
        score: Callable[[], Score],
    ) -> bool:
        storage, leases = self._storage, self._leases
        # A parameter a layer takes a database several times as long as all else of a trial. So only
        # trials have them, at which Optuna's own tools look.
        params = self._params(layout) if study == self._trial_study else {}
        template = create_trial(
            state=TrialState.RUNNING,
            params=params,
            distributions={
                name: CategoricalDistribution(tuple(self._space.candidates)) for name in params
            },
            user_attrs={**self._named(layout), **attrs, **leases.attrs()},
        )
        trial_id = storage.create_new_trial(study, template)
        try:
            with leases.beating(trial_id):
                self.refresh()
                reason = claim(storage.get_trial_number_from_id(trial_id))
                if reason is not None:
                    self._fail(trial_id, reason)
                    return False
                result = score()
        except BaseException as e:
            self._fail(trial_id, f"interrupted: {type(e).__name__}: {e}".rstrip(": "))
            raise
        try:
            storage.set_trial_user_attr(trial_id, "score", result.to_dict())
            value = result.value(self._weights)
            storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [value])
        except UpdateFinishedTrialError:
            # Others have given this worker up, and one of them scores the layout.
            self.refresh()
            return False
        self._enter(study, storage.get_trial(trial_id))
        return True

    def _read(self) -> None:
        self.pending = self._read_study(self._trial_study, self._trial_numbers)
        self.probing = self._read_study(self._probe_study, self._probe_numbers)
        self._read_rungs()

    def _read_study(self, study: int, entered: list[int]) -> dict[Layout, int]:
        """Enter what has been completed; what others are scoring -> its number."""
        known, running = set(entered), dict[Layout, int]()
        for frozen in self._storage.get_all_trials(study, deepcopy=False):
            if frozen.state == TrialState.COMPLETE and frozen.number not in known:
                self._enter(study, frozen)
            elif frozen.state == TrialState.RUNNING and self._begin:
                if self._leases.has_stopped(study, frozen):
                    self._fail(
                        self._storage.get_trial_id_from_study_id_trial_number(study, frozen.number),
                        "its worker stopped",
                    )
                elif not self._leases.is_mine(frozen):
                    # The first of several keeps it.
                    running.setdefault(self._layout(frozen), frozen.number)
        return running

    def _rungs(self) -> list[FrozenTrial]:
        if self._rung_study is None:
            return []
        return self._storage.get_all_trials(self._rung_study, deepcopy=False)

    def _distillation(self, frozen: FrozenTrial) -> tuple[Layout, int, int]:
        """Layout, tokens and seed."""
        attrs = frozen.user_attrs
        # Studies from before there were several seeds name none.
        return self._layout(frozen), attrs["rung"], attrs.get("seed", 0)

    def _is_taken(
        self, wanted: tuple[Layout, int, int], recipe: Mapping[str, Any], number: int
    ) -> bool:
        """Whether others have made this distillation or began to before trial ``number``."""
        for frozen in self._rungs():
            same = self._distillation(frozen) == wanted and frozen.user_attrs["recipe"] == recipe
            done = frozen.state == TrialState.COMPLETE
            running = frozen.state == TrialState.RUNNING and frozen.number < number
            if same and (done or running):
                return True
        return False

    def _read_rungs(self) -> None:
        study, frozens, running = self._rung_study, self._rungs(), set[tuple[Layout, int, int]]()
        for frozen in frozens:
            if frozen.state == TrialState.RUNNING and self._begin:
                assert study is not None
                if self._leases.has_stopped(study, frozen):
                    self._fail(
                        self._storage.get_trial_id_from_study_id_trial_number(study, frozen.number),
                        "its worker stopped",
                    )
                elif not self._leases.is_mine(frozen):
                    running.add(self._distillation(frozen))
        self.distilling = running
        self.num_distilled = sum(frozen.state == TrialState.COMPLETE for frozen in frozens)

    def _check(
        self, name: str, settings: Mapping[str, Any], identity: Mapping[str, Any], *, made: bool
    ) -> None:
        # As JSON gives them back, so that an integer key of a mapping is no change.
        settings = json.loads(json.dumps(settings))
        # Whoever made the study says what it depends on, unless it was killed before it could. With
        # one to say so, two processes with different settings cannot both go on.
        others_say = self._begin and not made and not self._leases.alone
        until = time.monotonic() + FIRST_PATIENCE
        while others_say and "settings" not in self.notes() and time.monotonic() < until:
            time.sleep(0.05)
        notes = self.notes()
        kept = notes.get("settings", settings)
        changed = [key for key in settings if kept.get(key) != settings[key]]
        if changed:
            listed = "; ".join(
                f"{key} was {kept.get(key)!r} and is now {settings[key]!r}" for key in changed
            )
            raise RunError(
                f"study {name!r} was begun with other settings: {listed}; give the study another "
                "name or restore the old values"
            )
        kept = notes.get("identity", identity)
        # What was not known then, such as a text that only rungs read, is no change.
        if changed := [key for key in identity if kept.get(key, identity[key]) != identity[key]]:
            raise RunError(
                f"study {name!r}: what it was begun with has changed ({'; '.join(changed)}); "
                "results of both would be mixed. Restore it, or give the study another name"
            )
        if self._begin:
            # The settings last: they tell others that all is there.
            if identity:
                self.note("identity", dict(identity))
            self.note("settings", settings)

    def _named(self, layout: Layout) -> dict[str, Any]:
        return {
            "layout": layout.strip(self._space.symbols),
            "attention_layers": list(layout.attention_layers),
            "candidates": list(layout.candidates),
        }

    def _params(self, layout: Layout) -> dict[str, str]:
        width = max(2, len(str(self._space.num_layers - 1)))
        names = enumerate(layout.candidates)
        return {f"layer_{layer:0{width}d}.mixer": candidate for layer, candidate in names}

    def _layout(self, frozen: FrozenTrial) -> Layout:
        params = frozen.params
        # Probes and distillations of before have parameters in place of names.
        names = [params[name] for name in sorted(params)] or frozen.user_attrs["candidates"]
        return Layout(tuple(names))

    def _enter(self, study: int, frozen: FrozenTrial) -> None:
        # Not always at the end: others finish some that were begun before those that are here.
        layout, attrs = self._layout(frozen), frozen.user_attrs
        score = Score.from_dict(attrs["score"])
        self._scores.setdefault(layout, score)
        if study == self._probe_study:
            place = bisect.bisect(self._probe_numbers, frozen.number)
            self._probe_numbers.insert(place, frozen.number)
            probe = Probe(layout=layout, score=score, charged_to=attrs["charged_to"])
            self.probes.insert(place, probe)
            return
        trial = Trial(
            number=frozen.number,
            layout=layout,
            score=score,
            value=score.value(self._weights),
            proposed_by=attrs["proposed_by"],
            provenance=attrs["provenance"],
        )
        self._layouts.add(layout)
        place = bisect.bisect(self._trial_numbers, frozen.number)
        self._trial_numbers.insert(place, frozen.number)
        self.trials.insert(place, trial)
        for number in range(place, len(self.trials)):
            self.trials[number] = replace(self.trials[number], number=number)

    def _number_of(self, layout: Layout) -> int:
        """The number in the storage of a trial that has the layout."""
        for number, trial in zip(self._trial_numbers, self.trials, strict=True):
            if trial.layout == layout:
                return number
        return self.pending[layout]

    def _fail(self, trial_id: int, reason: str) -> None:
        # It may have ended, or others were faster.
        with contextlib.suppress(UpdateFinishedTrialError):
            self._storage.set_trial_user_attr(trial_id, "reason", reason)
            self._storage.set_trial_state_values(trial_id, TrialState.FAIL)


def _open_study(storage: BaseStorage, name: str, *, begin: bool) -> tuple[int, bool]:
    """The study's number, and whether it was made just now."""
    try:
        return storage.get_study_id_from_name(name), False
    except KeyError as e:
        if not begin:
            raise RunError(
                f"there must be a study {name!r}, but there is none; search first"
            ) from e
    try:
        return storage.create_new_study([StudyDirection.MINIMIZE], name), True
    except DuplicatedStudyError:
        # Another process was faster.
        return storage.get_study_id_from_name(name), False
