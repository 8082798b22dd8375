"""Runs a study: its baselines, then its strategy, each distinct layout once.

Whatever decides what comes next is a function of the scores so far, and scores are kept before
anything else happens. So a study that is stopped at any moment and run again goes the way it would
have gone: the baselines are asked again (their probes are there already), and the strategy is
asked with a seed that follows from the study's seed and the number of finished trials.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mohawk_nas.config import SearchConfig, StudyConfig, flatten
from mohawk_nas.errors import ConfigError, LayoutError, RegistryError, RunError, did_you_mean
from mohawk_nas.layout import Layout
from mohawk_nas.reporting import SILENT, Reporter, Task
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.ledger import Ledger, open_storage, storage_errors
from mohawk_nas.search.result import StudyResult
from mohawk_nas.search.scoring import Score, Scorer
from mohawk_nas.search.space import SearchSpace
from mohawk_nas.search.strategy import (
    Proposal,
    SearchContext,
    Selector,
    Strategy,
    build_strategy,
    solve_local,
    strategy_names,
)

__all__ = ["SearchPlan", "check_search", "load_result", "plan_search", "run_study", "trial_seed"]

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


def check_search(
    config: SearchConfig, *, space: SearchSpace | None = None, budget: Budget | None = None
) -> list[str]:
    """Problems of the strategy, the baselines and the budget.

    Args:
        config: The study's search section; its plugins must have been loaded.
        space: None checks names only, before the teacher is known.
        budget: Goes with ``space``.
    """
    problems = []
    known = strategy_names()
    try:
        build_strategy(config.strategy, where="search.strategy")
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


def plan_search(config: SearchConfig, space: SearchSpace, budget: Budget) -> SearchPlan:
    """What :func:`run_study` will do, without scoring anything."""
    possible = budget.count(space)
    solved = _is_solved(config)
    probes = {}
    for label, selector in _baselines(config).items():
        if selector and (count := selector.num_probes(space, budget)):
            probes[label] = count
    return SearchPlan(
        possible=possible,
        trials=min(possible, config.trials),
        probes=probes,
        exhaustive=possible <= config.trials and not solved,
        solved=solved,
    )


def run_study(
    config: StudyConfig,
    space: SearchSpace,
    budget: Budget,
    scorer: Scorer,
    *,
    run_dir: Path | None,
    provenance: Provenance | None = None,
    reporter: Reporter = SILENT,
) -> StudyResult:
    """Run a study to its end, or continue one that was stopped.

    Args:
        config: The study. ``search.trials`` may be larger than in an earlier run.
        space: What may be chosen.
        budget: What every layout must meet.
        scorer: Scores a layout; must give the same numbers whenever it is asked.
        run_dir: Folder of ``study.db``, unless the config names a storage. None keeps everything in
            memory.
        provenance: Says where a layout's weights come from; kept with its trial as JSON.
        reporter: Told what happens.

    Raises:
        ConfigError: The budget, a baseline or the strategy is impossible.
        RunError: The storage holds this study with other settings.
        TrainingError: The storage cannot be read or written.
    """
    if problems := check_search(config.search, space=space, budget=budget):
        raise ConfigError(problems)
    with _open(config, space, run_dir=run_dir, begin=True) as ledger:
        study = _Study(config, space, budget, scorer, ledger, provenance, reporter)
        study.run_baselines()
        study.run_strategy()
        return _result(config, space, budget, ledger)


def load_result(
    config: StudyConfig, space: SearchSpace, budget: Budget, *, run_dir: Path
) -> StudyResult:
    """The result of a study as far as it has run, without scoring anything.

    Raises:
        RunError: There is no such study, or not one trial of it has finished.
    """
    path = run_dir / "study.db"
    if config.search.storage is None and not path.is_file():
        raise RunError(f"{path}: must hold a study, but there is none; run `search` first")
    with _open(config, space, run_dir=run_dir, begin=False) as ledger:
        if not ledger.trials:
            raise RunError(f"study {config.name!r}: no layout is scored yet; run `search` first")
        return _result(config, space, budget, ledger)


def trial_seed(seed: int, num_finished: int) -> int:
    """The seed of the next proposal, 32 bits."""
    digest = hashlib.sha256(f"{seed}:{num_finished}".encode()).digest()
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
    ) -> None:
        self._config = config
        self._space = space
        self._budget = budget
        self._scorer = scorer
        self._ledger = ledger
        self._provenance = provenance or (lambda layout: {})
        self._reporter = reporter

    def run_baselines(self) -> None:
        """Score every baseline's layouts, each label once."""
        trials, entries = self._ledger.trials, _baselines(self._config.search)
        if trials:
            self._reporter.say(f"continuing: {len(trials)} layouts are scored already")
        if not entries:
            return
        named: dict[str, list[str]] = {}
        asked: dict[str, int] = {}
        with self._reporter.stage("baselines", total=None, unit="layout") as task:
            for entry, selector in entries.items():
                looked: set[Layout] = set()
                for label, layout in self._baseline(entry, selector, looked, task):
                    self._space.check(layout)
                    self._budget.check(layout)
                    named[label] = list(layout.candidates)
                    if all(trial.layout != layout for trial in trials):
                        self._trial(Proposal(layout=layout, proposed_by=label), task)
                if looked:
                    asked[entry] = len(looked)
                self._ledger.note("baselines", named)
                self._ledger.note("asked", asked)
        if len(trials) > self._config.search.trials:
            self._reporter.say(
                f"the baselines alone name {len(trials)} layouts, more than search.trials = "
                f"{self._config.search.trials}; shorten search.baselines to score fewer"
            )

    def run_strategy(self) -> None:
        """Score layouts until the trials are used up or nothing is left to propose."""
        search, trials = self._config.search, self._ledger.trials
        possible = self._budget.count(self._space)
        if _is_solved(search):
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
            while len(trials) < total:
                proposal = self._propose(strategy, task)
                if proposal is None:
                    self._reporter.say(f"{strategy.label} has nothing left to propose")
                    break
                self._trial(proposal, task)

    def _solve(self) -> None:
        layout = solve_local(self._space, self._budget, self._scorer.stage2_losses())
        self._reporter.say(
            "stage2_local is a sum over single layers: solved exactly, nothing to search"
        )
        if all(trial.layout != layout for trial in self._ledger.trials):
            with self._reporter.stage("search", total=1, unit="layout") as task:
                self._trial(Proposal(layout=layout, proposed_by="exact"), task)

    def _baseline(
        self, entry: str, selector: Selector | None, looked: set[Layout], task: Task
    ) -> list[tuple[str, Layout]]:
        if selector is None:
            return [(entry, self._space.parse(entry))]
        return selector.layouts(self._context(entry, looked, task))

    def _propose(self, strategy: Strategy, task: Task) -> Proposal | None:
        proposal = strategy.propose(self._context(strategy.label, set(), task))
        if proposal is not None:
            self._space.check(proposal.layout)
            self._budget.check(proposal.layout)
            if any(trial.layout == proposal.layout for trial in self._ledger.trials):
                raise RegistryError(
                    f"strategy {strategy.label!r} proposed a layout that is scored already: "
                    f"{proposal.layout.strip(self._space.symbols)}"
                )
        return proposal

    def _context(self, name: str, looked: set[Layout], task: Task) -> SearchContext:
        def probe(layout: Layout) -> Score:
            looked.add(layout)
            score = self._ledger.score_of(layout)
            if score is None:
                self._space.check(layout)
                score = self._scorer.score(layout)
                self._ledger.add_probe(layout, score, charged_to=name)
                task.advance(1)
            return score

        return SearchContext(
            space=self._space,
            budget=self._budget,
            weights=self._config.search.objective,
            finished=[(trial.layout, trial.value) for trial in self._ledger.trials],
            pending=[],
            seed=self._seed(),
            probe=probe,
            stage2_losses=self._scorer.stage2_losses,
        )

    def _trial(self, proposal: Proposal, task: Task) -> None:
        self._ledger.run_trial(
            proposal.layout,
            self._scorer.score,
            proposed_by=proposal.proposed_by,
            seed=self._seed(),
            provenance=self._provenance(proposal.layout),
        )
        best = min(self._ledger.trials, key=lambda trial: (trial.value, trial.number))
        strip = best.layout.strip(self._space.symbols)
        task.advance(1, value=best.value, best=strip)

    def _seed(self) -> int:
        return trial_seed(self._config.seed, len(self._ledger.trials))


@contextmanager
def _open(
    config: StudyConfig, space: SearchSpace, *, run_dir: Path | None, begin: bool
) -> Iterator[Ledger]:
    search = config.search
    where = search.storage or (str(run_dir / "study.db") if run_dir else "memory")
    with storage_errors(where):
        storage = open_storage(search.storage, run_dir=run_dir)
        try:
            yield Ledger(
                config.name,
                space=space,
                weights=search.objective,
                storage=storage,
                settings=_settings(config, space),
                begin=begin,
            )
        finally:
            storage.remove_session()


def _settings(config: StudyConfig, space: SearchSpace) -> dict[str, Any]:
    # What decides which layouts are scored, and on what. Where the weights come from is the bank's
    # business, and each trial's provenance names it.
    flat = flatten(config)
    keys = ["seed", "budget.attention_layers"]
    keys += [f"search.{key}" for key in ("strategy", "objective", "baselines")]
    keys += [f"search.{key}" for key in ("tokens", "evaluation")]
    return {key: flat[key] for key in keys} | {
        "space.candidates": list(space.candidates),
        "space.pinned": {str(layer): name for layer, name in sorted(space.pinned.items())},
        "number of layers": space.num_layers,
    }


def _result(config: StudyConfig, space: SearchSpace, budget: Budget, ledger: Ledger) -> StudyResult:
    notes = ledger.notes()
    return StudyResult(
        name=config.name,
        space=space,
        budget=budget,
        weights=dict(config.search.objective),
        trials=tuple(ledger.trials),
        probes=tuple(ledger.probes),
        baselines={label: Layout(tuple(n)) for label, n in notes.get("baselines", {}).items()},
        asked=notes.get("asked", {}),
        solved=_is_solved(config.search),
    )


def _baselines(config: SearchConfig) -> dict[str, Selector | None]:
    # Label -> selector, each once; None where a layout is named.
    found: dict[str, Selector | None] = {}
    known = strategy_names()
    for entry in config.baselines:
        if isinstance(entry, str) and entry not in known:
            found[entry] = None
        else:
            selector = build_strategy(entry)
            assert isinstance(selector, Selector)
            found[selector.label] = selector
    return found


def _is_solved(config: SearchConfig) -> bool:
    return set(config.objective) == {"stage2_local"}


def _looks_like_layout(text: str) -> bool:
    words = text.split()
    strip = bool(words) and all(word[0].isupper() and len(word) <= 3 for word in words)
    return text.strip()[:1].isdigit() or strip or text.isupper()
