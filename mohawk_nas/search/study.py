"""Runs a study: its baselines, then its strategy, each distinct layout once.

Whatever decides what comes next is a function of the scores so far, and scores are kept before
anything else happens. So a study that is stopped at any moment and run again goes the way it would
have gone: the baselines are asked again (their probes are there already), and the strategy is
asked with a seed that follows from the study's seed and the number of finished trials.

Any number of workers may go through a study at the same time, each as if it were alone: what others
have scored is there, and what they are scoring is left to them. What the next step needs of it is
waited for, and taken over if they stop.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mohawk_nas.config import SearchConfig, StudyConfig, short_recipe
from mohawk_nas.errors import ConfigError, LayoutError, RegistryError, did_you_mean
from mohawk_nas.layout import Layout
from mohawk_nas.registry import in_one_line, is_users, line_of
from mohawk_nas.reporting import SILENT, Reporter, Task
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.leases import DEFAULT_PACE, Pace, Worker
from mohawk_nas.search.ledger import Ledger
from mohawk_nas.search.record import (
    RECIPE,
    is_solved,
    load_result,
    open_ledger,
    study_result,
    study_rungs,
)
from mohawk_nas.search.result import StudyResult
from mohawk_nas.search.rungs import (
    Distiller,
    Rung,
    build_pruner,
    most_in_run_off,
    rung_recipe,
    rung_weights,
)
from mohawk_nas.search.scoring import Learnt, Score, Scorer
from mohawk_nas.search.space import SearchSpace
from mohawk_nas.search.storages import check_storage
from mohawk_nas.search.strategy import (
    Proposal,
    SearchContext,
    Selector,
    Strategy,
    build_strategy,
    named_baselines,
    solve_local,
    strategy_names,
)

__all__ = [
    "SearchPlan",
    "check_needs",
    "check_search",
    "load_result",
    "plan_search",
    "run_study",
    "trial_seed",
]

T = TypeVar("T")

# Of a program. What a storage, a disk or a GPU raises while a strategy has a layout scored is not
# among them.
_MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
    ValueError,
)

Provenance = Callable[[Layout], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchPlan:
    """How many layouts a study will score."""

    possible: int
    """Distinct layouts on the budget."""
    trials: int
    """Distinct layouts that will be scored; more if the baselines alone name more."""
    probes: Mapping[str, int]
    """Selector -> layouts it looks at besides; those that two look at are scored once."""
    exhaustive: bool
    """Whether every possible layout will be scored."""
    solved: bool
    """Whether the optimum is computed, so that only it and the baselines are scored."""
    rungs: Mapping[int, int]
    """Stage-3 tokens of a rung -> layouts that climb to it at most."""
    run_off: int
    """Distillations with further seeds, at most, of those that the last rung leaves tied."""
    learning: Mapping[str, int]
    """Selector -> tokens it learns from, for those that learn."""


def check_search(
    config: SearchConfig, *, space: SearchSpace | None = None, budget: Budget | None = None
) -> list[str]:
    """Problems of the strategy, the baselines, the storage and the budget.

    Args:
        config: The study's search section; its plugins must have been loaded.
        space: None checks names only, before the teacher is known.
        budget: Goes with ``space``.
    """
    problems = check_storage(config.storage)
    known = strategy_names()
    try:
        build_strategy(config.strategy, where="search.strategy")
    except ConfigError as e:
        problems += e.problems
    try:
        build_pruner(config.rungs.pruner)
    except ConfigError as e:
        problems += e.problems
    if space and budget:
        problems += budget.problems(space)
    for i, entry in enumerate(config.baselines):
        where = f"search.baselines[{i}]"
        if not isinstance(entry, str) or entry in known:
            try:
                selector = build_strategy(entry, where=where)
            except ConfigError as e:
                problems += e.problems
            else:
                if not isinstance(selector, Selector):
                    problems.append(
                        f"{where}: {selector.label!r} proposes layouts one by one and has none of "
                        "its own to compare with; name it as search.strategy instead"
                    )
        elif not _looks_like_layout(entry):
            problems.append(
                f"{where}: {entry!r} must be a selector ({', '.join(known)}) or a layout like "
                f"'1,5' or 'M A M M M A M M'.{did_you_mean(entry, known)}"
            )
        elif space and budget:
            try:
                budget.check(space.parse(entry))
            except LayoutError as e:
                problems.append(f"{where}: {entry!r}: {e}")
    return problems


def check_needs(config: StudyConfig) -> list[str]:
    """What strategy and baselines need of the rest of the study and do not find there.

    What cannot be built is left to :func:`check_search`.
    """
    problems = []
    entries = {f"search.baselines[{i}]": x for i, x in enumerate(config.search.baselines)}
    for where, entry in {"search.strategy": config.search.strategy, **entries}.items():
        if isinstance(entry, str) and entry not in strategy_names():
            continue
        try:
            strategy = build_strategy(entry, where=where)
        except ConfigError:
            continue
        problems += [f"{text} ({where}: {strategy.label})" for text in strategy.problems(config)]
    return problems


def plan_search(config: SearchConfig, space: SearchSpace, budget: Budget) -> SearchPlan:
    """What :func:`run_study` will do, without scoring anything."""
    possible = budget.count(space)
    solved = is_solved(config)
    probes = {}
    selectors = {k: one for k, one in named_baselines(config.baselines).items() if one}
    strategy = build_strategy(config.strategy)
    if isinstance(strategy, Selector) and possible > config.trials and not solved:
        selectors[strategy.label] = strategy
    for label, selector in selectors.items():
        if count := selector.num_probes(space, budget):
            probes[label] = count
    rungs: dict[int, int] = {}
    climbers = min(possible, config.trials)
    for tokens in config.rungs.tokens:
        most = build_pruner(config.rungs.pruner).limit(climbers)
        # Baselines climb to the first rung in any case.
        named = 0 if rungs else len(named_baselines(config.baselines))
        rungs[tokens] = climbers = min(climbers, most + named)
    learning = {label: one.num_tokens(space, budget) for label, one in selectors.items()}
    return SearchPlan(
        possible=possible,
        trials=min(possible, config.trials),
        probes=probes,
        exhaustive=possible <= config.trials and not solved,
        solved=solved,
        rungs=rungs,
        run_off=most_in_run_off(climbers, config.rungs.seeds) if rungs else 0,
        learning={label: tokens for label, tokens in learning.items() if tokens},
    )


def run_study(
    config: StudyConfig,
    space: SearchSpace,
    budget: Budget,
    scorer: Scorer,
    *,
    run_dir: Path | None,
    distiller: Distiller | None = None,
    provenance: Provenance | None = None,
    reporter: Reporter = SILENT,
    identity: Mapping[str, Any] | None = None,
    worker: Worker | None = None,
    pace: Pace = DEFAULT_PACE,
    stage1_losses: Callable[[], Mapping[tuple[int, str], float]] | None = None,
    learn_gates: Callable[..., Learnt] | None = None,
) -> StudyResult:
    """Run a study to its end, or continue one that was stopped, or join others that run it.

    Args:
        config: The study. ``search.trials`` may be larger than in an earlier run.
        space: What may be chosen.
        budget: What every layout must meet.
        scorer: Scores a layout; must give the same numbers whenever it is asked.
        run_dir: Folder of ``study.db`` or ``study.journal``, unless the config names a storage.
            None keeps everything in memory.
        distiller: Distils layouts, if ``search.rungs`` asks for it.
        provenance: Says where a layout's weights come from; kept with its trial as JSON.
        reporter: Told what happens.
        identity: What the scores depend on besides the settings, by name. A storage in which the
            study has another is refused.
        worker: Who this process is among those of the study.
        pace: When workers give each other up.
        stage1_losses: As of :class:`SearchContext`, for a ranking that asks for them.
        learn_gates: Learns one restart of strategy ``gates``, see ``Workbench.learn_gates``. None
            if there is no teacher to learn from.

    Raises:
        ConfigError: The budget, a baseline or the strategy is impossible.
        RunError: The storage holds this study with other settings or another identity, or another
            process is at it and it is SQLite.
        TrainingError: The storage cannot be read or written.
    """
    problems = check_search(config.search, space=space, budget=budget)
    if problems := problems + check_needs(config):
        raise ConfigError(problems)
    worker = worker or Worker()
    with open_ledger(
        config, space, run_dir=run_dir, begin=True, identity=identity, worker=worker, pace=pace
    ) as ledger:
        study = _Study(config, space, budget, scorer, ledger, provenance, reporter, worker, pace)
        study.stage1_losses, study.learn_gates = stage1_losses, learn_gates
        study.run_baselines()
        study.run_strategy()
        if config.search.rungs.tokens:
            assert distiller is not None, "rungs need a distiller"
            study.run_rungs(distiller)
        return study_result(config, space, budget, ledger)


def trial_seed(seed: int, num_finished: int, salt: str = "") -> int:
    """The seed of the next proposal, 32 bits; with a salt, of one worker among several."""
    text = f"{seed}:{num_finished}:{salt}" if salt else f"{seed}:{num_finished}"
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big")


class _Study:
    def __init__(
        self,
        config: StudyConfig,
        space: SearchSpace,
        budget: Budget,
        scorer: Scorer,
        ledger: Ledger,
        provenance: Provenance | None,
        reporter: Reporter,
        worker: Worker,
        pace: Pace,
    ) -> None:
        self._config = config
        self._space = space
        self._budget = budget
        self._scorer = scorer
        self._ledger = ledger
        self._provenance = provenance or (lambda layout: {})
        self._reporter = reporter
        self._worker = worker
        self._pace = pace
        self._chance = worker.random()
        self._shown = len(ledger.trials)
        self.stage1_losses: Callable[[], Mapping[tuple[int, str], float]] | None = None
        self.learn_gates: Callable[..., Learnt] | None = None

    def run_baselines(self) -> None:
        """Score every baseline's layouts, each label once."""
        trials, entries = self._ledger.trials, named_baselines(self._config.search.baselines)
        if trials:
            self._reporter.say(f"continuing: {len(trials)} layouts are scored already")
        if not entries:
            return
        proposals: list[Proposal] = []
        with self._reporter.stage("baselines", total=None, unit="layout") as task:
            for entry, selector in entries.items():
                looked: set[Layout] = set()
                named: dict[str, list[str]] = {}
                for label, layout in self._baseline(entry, selector, looked, task):
                    named[label] = list(layout.candidates)
                    proposals.append(Proposal(layout=layout, proposed_by=label))
                    self._score_free(proposals[-1:], task)
                # One note a baseline, so that workers at different ones do not undo each other's.
                self._ledger.note(f"baseline {entry}", {"layouts": named, "asked": len(looked)})
            while self._score_free(proposals, task):
                self._wait(task)
        if len(trials) > self._config.search.trials:
            self._reporter.say(
                f"the baselines alone name {len(trials)} layouts, more than search.trials = "
                f"{self._config.search.trials}; shorten search.baselines to score fewer"
            )

    def run_strategy(self) -> None:
        """Score layouts until the trials are used up or nothing is left to propose."""
        search, trials = self._config.search, self._ledger.trials
        possible = self._budget.count(self._space)
        if is_solved(search):
            self._solve()
            return
        strategy = build_strategy(search.strategy)
        if possible <= search.trials:
            self._reporter.say(
                f"{possible} layouts meet the budget, no more than search.trials = "
                f"{search.trials}: every one of them is scored"
            )
            strategy = build_strategy("exhaustive")
        total = min(possible, search.trials)
        if len(trials) >= total:
            return
        with self._reporter.stage("search", total=total, unit="layout", done=len(trials)) as task:
            while True:
                self._look(task)
                if len(trials) >= total:
                    break
                pending = self._ledger.pending
                proposal = None
                if len(trials) + len(pending) < total:
                    proposal = self._propose(strategy, task)
                    pending = pending or self._ledger.pending
                if proposal is not None:
                    self._trial(proposal, task, limit=total)
                elif pending:
                    # One of them may stop, and its layout is free again.
                    self._wait(task)
                else:
                    self._reporter.say(f"{strategy.label} has nothing left to propose")
                    break

    def run_rungs(self, distiller: Distiller) -> None:
        """Distil layouts, rung by rung, until nobody is left to climb."""
        recipe = rung_recipe(short_recipe(self._config, 0), self._config.search.objective)
        told = (0, 0)
        if not all(trial.layout.replaced_layers for trial in self._ledger.trials):
            self._reporter.say(
                "the layout that keeps attention in every layer is left out of the rungs: it is "
                "the teacher, and there is nothing to distil"
            )
        self._ledger.note(RECIPE, recipe)
        while True:
            self._ledger.refresh()
            rungs = study_rungs(self._config, self._ledger, recipe)
            if not rungs:
                self._reporter.say("every layer keeps attention: there is nothing to distil")
                return
            rung = rungs[-1]
            if not rung.left:
                return
            seed = len(rung.run_off)
            if (rung.tokens, seed) > told:
                told = rung.tokens, seed
                self._reporter.say(_begins(rung))
            taken = self._ledger.distilling
            free = [x for x in rung.left if (x, rung.tokens, seed) not in taken]
            if not free:
                # One of those at it may stop, and its layouts are free again.
                time.sleep(self._pace.look_every)
                continue
            if self._ledger.alone:
                group = free[: distiller.at_once]
            else:
                # Side by side they share the teacher's work, but one alone keeps more workers busy.
                group = [self._chance.choice(free) if self._ledger.distilling else free[0]]
            self._ledger.run_rung(
                group,
                distiller,
                tokens=rung.tokens,
                seed=seed,
                recipe=recipe,
                value=self._rung_value,
            )

    def _rung_value(self, score: Score) -> float:
        return score.value(rung_weights(self._config.search.objective, [score]))

    def _solve(self) -> None:
        layout = solve_local(self._space, self._budget, self._scorer.stage2_losses())
        self._reporter.say(
            "stage2_local is a sum over single layers: solved exactly, nothing to search"
        )
        if not self._ledger.has_trial(layout):
            with self._reporter.stage("search", total=1, unit="layout") as task:
                while self._score_free([Proposal(layout=layout, proposed_by="exact")], task):
                    self._wait(task)

    def _baseline(
        self, entry: str, selector: Selector | None, looked: set[Layout], task: Task
    ) -> list[tuple[str, Layout]]:
        if selector is None:
            layout = self._space.parse(entry)
            self._budget.check(layout)
            return [(entry, layout)]
        context = self._context(entry, looked, task)
        named = _answer(selector, lambda: list(selector.layouts(context)))
        for pair in named:
            if not (
                isinstance(pair, Sequence)
                and len(pair) == 2
                and isinstance(pair[0], str)
                and isinstance(pair[1], Layout)
            ):
                raise RegistryError(
                    f"strategy {selector.label!r} must name pairs of a label and a Layout, but "
                    f"names {pair!r}"
                )
            label, layout = pair
            if not label.startswith(selector.label):
                raise RegistryError(
                    f"strategy {selector.label!r}: its labels must begin with its own, but one is "
                    f"{label!r}"
                )
            self._check(layout, selector)
        return named

    def _check(self, layout: Layout, strategy: Strategy) -> None:
        try:
            self._space.check(layout)
            self._budget.check(layout)
        except LayoutError as e:
            raise RegistryError(
                f"strategy {strategy.label!r} proposed a layout that cannot be: {e}"
            ) from e

    def _propose(self, strategy: Strategy, task: Task) -> Proposal | None:
        context = self._context(strategy.label, set(), task)
        proposal = _answer(strategy, lambda: strategy.propose(context))
        if proposal is not None:
            if not isinstance(proposal, Proposal):
                raise RegistryError(
                    f"strategy {strategy.label!r} must give a Proposal or None, but gives "
                    f"{proposal!r}"
                )
            self._check(proposal.layout, strategy)
            if proposal.layout in context.seen:
                raise RegistryError(
                    f"strategy {strategy.label!r} proposed a layout that is scored already: "
                    f"{proposal.layout.strip(self._space.symbols)}"
                )
        return proposal

    def _context(self, name: str, looked: set[Layout], task: Task) -> SearchContext:
        ledger = self._ledger

        def score(layout: Layout) -> None:
            self._space.check(layout)
            if ledger.run_probe(layout, self._scorer.score, charged_to=name):
                task.advance(1)

        def probe(layout: Layout) -> Score:
            looked.add(layout)
            while (found := ledger.score_of(layout)) is None:
                if ledger.is_busy(layout):
                    self._wait(task)
                else:
                    score(layout)
            return found

        def prepare(layouts: Sequence[Layout]) -> None:
            if ledger.alone:
                return
            self._look(task)
            while free := [x for x in layouts if not ledger.score_of(x) and not ledger.is_busy(x)]:
                # All workers are here at the same time, so they do not all take the first.
                score(self._chance.choice(free) if self._salt() else free[0])
                self._look(task)

        if_there: dict[str, Any] = {}
        if self.stage1_losses is not None:
            if_there["stage1_losses"] = self.stage1_losses
        if self.learn_gates is not None:
            if_there["learn_gates"] = partial(self._learn, name, task, self.learn_gates)
        return SearchContext(
            space=self._space,
            budget=self._budget,
            weights=self._config.search.objective,
            finished=[(trial.layout, trial.value) for trial in ledger.trials],
            figures=self._figures(),
            pending=list(ledger.pending),
            seed=self._seed(),
            probe=probe,
            prepare=prepare,
            stage2_losses=self._scorer.stage2_losses,
            **if_there,
        )

    def _learn(
        self, name: str, task: Task, learn: Callable[..., Learnt], *, restarts: int, **choices: Any
    ) -> list[Mapping[int, float]]:
        """What each restart learns, each by one worker."""
        keys = {f"learnt {name}:{number}": number for number in range(1, restarts + 1)}

        def make(number: int) -> dict[str, Any]:
            learnt = learn(seed=trial_seed(self._config.seed, number, "gates"), **choices)
            return {"by": name, **learnt.to_dict()}

        left = list(keys)
        while left := [x for x in left if not self._ledger.note_once(x, partial(make, keys[x]))]:
            self._wait(task)
        notes = self._ledger.notes()
        return [Learnt.from_dict(notes[key]).worth for key in keys]

    def _figures(self) -> list[tuple[float, ...]]:
        names = self._config.search.pareto
        scores = (trial.score for trial in self._ledger.trials) if names else ()
        return [tuple(map(score.mean, names)) for score in scores]

    def _score_free(self, proposals: Sequence[Proposal], task: Task) -> bool:
        """Score layouts that have no trial and that nobody is scoring; are some left to others?"""
        for proposal in proposals:
            layout = proposal.layout
            if not self._ledger.has_trial(layout) and layout not in self._ledger.pending:
                self._trial(proposal, task)
        return not all(self._ledger.has_trial(proposal.layout) for proposal in proposals)

    def _trial(self, proposal: Proposal, task: Task, *, limit: int | None = None) -> None:
        self._ledger.run_trial(
            proposal.layout,
            self._scorer.score,
            proposed_by=proposal.proposed_by,
            seed=self._seed(),
            provenance=self._provenance(proposal.layout),
            limit=limit,
        )
        self._show(task)

    def _wait(self, task: Task) -> None:
        time.sleep(self._pace.look_every)
        self._look(task)

    def _look(self, task: Task) -> None:
        self._ledger.refresh()
        self._show(task)

    def _show(self, task: Task) -> None:
        trials = self._ledger.trials
        if more := len(trials) - self._shown:
            self._shown = len(trials)
            best = min(trials, key=lambda trial: (trial.value, trial.number))
            task.advance(more, value=best.value, best=best.layout.strip(self._space.symbols))

    def _seed(self) -> int:
        return trial_seed(self._config.seed, len(self._ledger.trials), self._salt())

    def _salt(self) -> str:
        return self._worker.salt(alone=not self._ledger.pending and not self._ledger.probing)


def _answer(strategy: Strategy, ask: Callable[[], T]) -> T:
    """What a strategy answers; where a user's own fails, its name and line are told."""
    try:
        return ask()
    except _MISTAKES as e:
        if not is_users(cls := type(strategy)):
            raise
        file, line = getattr(inspect.getmodule(cls), "__file__", cls.__module__), line_of(cls, e)
        where = f"{file}, line {line}" if line else file
        raise RegistryError(
            f"strategy {strategy.label!r} failed ({where}): {in_one_line(e)}"
        ) from e


def _begins(rung: Rung) -> str:
    """What is distilled next, for people."""
    standing = rung.run_off[-1] if rung.run_off else rung.climbers
    count, done = len(standing), len(standing) - len(rung.left)
    if rung.run_off:
        return (
            f"{count} layouts are tied after {rung.tokens:,} tokens and distilled with another "
            f"seed; {done} done"
        )
    are = " is" if count == 1 else "s are"
    return f"{count} layout{are} distilled on {rung.tokens:,} tokens; {done} done"


def _looks_like_layout(text: str) -> bool:
    words = text.split()
    strip = bool(words) and all(word[0].isupper() and len(word) <= 3 for word in words)
    return text.strip()[:1].isdigit() or strip or text.isupper()
