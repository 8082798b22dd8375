"""A study's record: its ledger opened where the study is kept, and what it holds as a result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mohawk_nas.config import SearchConfig, StudyConfig, flatten, short_recipe
from mohawk_nas.errors import RunError
from mohawk_nas.layout import Layout
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.leases import DEFAULT_PACE, Leases, Pace, Worker
from mohawk_nas.search.ledger import Ledger
from mohawk_nas.search.result import LearningCost, StudyResult
from mohawk_nas.search.rungs import Rung, build_pruner, climb, rung_recipe
from mohawk_nas.search.space import SearchSpace
from mohawk_nas.search.storages import is_shared, locate_study, opened
from mohawk_nas.search.strategy import named_baselines

__all__ = ["RECIPE", "is_solved", "load_result", "open_ledger", "study_result", "study_rungs"]

RECIPE = "recipe of the rungs"
"""Note that says by which recipe the rungs were last distilled."""


def load_result(
    config: StudyConfig, space: SearchSpace, budget: Budget, *, run_dir: Path
) -> StudyResult:
    """The result of a study as far as it has run, without scoring anything.

    Raises:
        RunError: There is no such study, or not one trial of it has finished.
    """
    paths = [run_dir / "study.db", run_dir / "study.journal"]
    if config.search.storage is None and not any(path.is_file() for path in paths):
        raise RunError(f"{paths[0]}: must hold a study, but there is none; run `search` first")
    with open_ledger(config, space, run_dir=run_dir, begin=False) as ledger:
        if not ledger.trials:
            raise RunError(f"study {config.name!r}: no layout is scored yet; run `search` first")
        return study_result(config, space, budget, ledger)


@contextmanager
def open_ledger(
    config: StudyConfig,
    space: SearchSpace,
    *,
    run_dir: Path | None,
    begin: bool,
    identity: Mapping[str, Any] | None = None,
    worker: Worker | None = None,
    pace: Pace = DEFAULT_PACE,
) -> Iterator[Ledger]:
    """A study's ledger, for the length of the block; arguments as of ``run_study``."""
    search = config.search
    url = locate_study(search.storage, run_dir=run_dir)
    if begin and run_dir is not None and search.storage is None:
        run_dir.mkdir(parents=True, exist_ok=True)
    # The run's own folder is locked by whoever works in it.
    with opened(url, lock=begin and search.storage is not None) as storage:
        leases = Leases(storage, worker or Worker(), pace=pace, alone=not is_shared(url))
        yield Ledger(
            config.name,
            space=space,
            weights=search.objective,
            storage=storage,
            leases=leases,
            settings=_settings(config, space),
            identity=identity,
            rungs=bool(search.rungs.tokens),
            begin=begin,
        )


def study_result(
    config: StudyConfig, space: SearchSpace, budget: Budget, ledger: Ledger
) -> StudyResult:
    """What a ledger holds, as a result."""
    notes = ledger.notes()
    recipe = rung_recipe(short_recipe(config, 0), config.search.objective)
    if not ledger.rung_scores(recipe):
        # What a study is read for, an audit say, may have a recipe of its own.
        recipe = notes.get(RECIPE, recipe)
    baselines: dict[str, Layout] = {}
    asked: dict[str, int] = {}
    for label, (layouts, count) in _baselines(config, notes).items():
        baselines |= layouts
        if count:
            asked[label] = count
    # A selector that is the study's strategy leaves no note; what it had to score is known.
    for label, count in Counter(probe.charged_to for probe in ledger.probes).items():
        asked.setdefault(label, count)
    learnt: dict[str, LearningCost] = {}
    for key, note in sorted(notes.items()):
        if key.startswith("learnt "):
            before = learnt.get(note["by"], LearningCost(tokens=0, seconds=0.0))
            learnt[note["by"]] = LearningCost(
                tokens=before.tokens + note["tokens"], seconds=before.seconds + note["seconds"]
            )
    return StudyResult(
        name=config.name,
        space=space,
        budget=budget,
        weights=dict(config.search.objective),
        pareto=tuple(config.search.pareto),
        trials=tuple(ledger.trials),
        probes=tuple(ledger.probes),
        baselines=baselines,
        asked=asked,
        solved=is_solved(config.search),
        rungs=study_rungs(config, ledger, recipe),
        learnt=learnt,
    )


def study_rungs(config: StudyConfig, ledger: Ledger, recipe: Mapping[str, Any]) -> tuple[Rung, ...]:
    """A study's rungs above 0 by a recipe, as far as they are known, the lowest first."""
    search = config.search
    ranked = sorted(ledger.trials, key=lambda trial: (trial.value, trial.number))
    layouts = [trial.layout for trial in ranked]
    baselines = [set(named.values()) for named, _ in _baselines(config, ledger.notes()).values()]
    return climb(
        [(trial.layout, trial.score) for trial in ranked],
        weights=search.objective,
        tokens=search.rungs.tokens,
        pruner=build_pruner(search.rungs.pruner),
        found=ledger.rung_scores(recipe),
        # Some name several layouts, such as every phase of uniform spacing.
        named={x for named in baselines for x in [y for y in layouts if y in named][:1]},
        seeds=search.rungs.seeds,
    )


def _baselines(
    config: StudyConfig, notes: Mapping[str, Any]
) -> dict[str, tuple[dict[str, Layout], int]]:
    """Baseline -> its layouts by label, and how many it has looked at."""
    found = {}
    for label in named_baselines(config.search.baselines):
        note = notes.get(f"baseline {label}", {"layouts": {}, "asked": 0})
        layouts = {name: Layout(tuple(names)) for name, names in note["layouts"].items()}
        found[label] = layouts, int(note["asked"])
    return found


def is_solved(config: SearchConfig) -> bool:
    """Whether the optimum is computed instead of searched."""
    return set(config.objective) == {"stage2_local"} and not config.pareto


def _settings(config: StudyConfig, space: SearchSpace) -> dict[str, Any]:
    # What decides which layouts are scored, and on what. Where the weights come from is the bank's
    # business, and each trial's provenance names it.
    flat = flatten(config)
    keys = ["seed", "budget.attention_layers"]
    keys += [f"search.{key}" for key in ("strategy", "objective", "baselines")]
    keys += [f"search.{key}" for key in ("tokens", "evaluation")]
    limits: dict[str, Any] = {}
    for limit in ("budget.cache.mib", "budget.decode.milliseconds"):
        section = limit.rpartition(".")[0]
        for key in (limit, f"{section}.context", f"{section}.batch"):
            # Studies from before there were these limits hold none.
            limits[key] = None if flat[limit] is None else flat[key]
    return (
        {key: flat[key] for key in keys}
        | limits
        | {
            # Studies from before it could be set hold none.
            "search.pareto": flat["search.pareto"] or None,
            "space.candidates": list(space.candidates),
            "space.pinned": {str(layer): name for layer, name in sorted(space.pinned.items())},
            "number of layers": space.num_layers,
        }
    )
