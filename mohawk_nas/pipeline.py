"""What the commands do, as functions: each takes a study and leaves its results in a folder.

A run's folder holds ``config.yaml`` (the resolved study), ``provenance.json``, ``study.db``,
``best.yaml`` and ``report.html``; ``distill/`` and ``export/`` follow.
"""

from __future__ import annotations

import dataclasses
import datetime
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from mohawk_nas.bank import Bank, versions
from mohawk_nas.config import BankConfig, StudyConfig, dump, flatten, plain, study_from_dict
from mohawk_nas.data import TokenBlocks, load_blocks
from mohawk_nas.distill.logits import LogitsResult, distill_logits
from mohawk_nas.errors import ConfigError, LayoutError, RunError, TeacherError
from mohawk_nas.export.hf import describe_candidates, save_hybrid
from mohawk_nas.files import DamagedFile, atomic_folder, atomic_write, read_json, write_json
from mohawk_nas.layout import ATTENTION, Layout
from mohawk_nas.plan import find_problems
from mohawk_nas.registry import load_plugin
from mohawk_nas.reporting import SILENT, Reporter
from mohawk_nas.search.budget import Budget
from mohawk_nas.search.objectives import BankScorer, PerTrialScorer
from mohawk_nas.search.result import Placement, StudyResult
from mohawk_nas.search.scoring import Score
from mohawk_nas.search.space import SearchSpace, load_space
from mohawk_nas.search.study import load_result, run_study
from mohawk_nas.student import assemble
from mohawk_nas.teacher import Teacher, load_teacher

__all__ = ["BestLayout", "Workbench", "distill", "load_best", "score", "search", "set_aside"]

# What may change between two runs of one study: it decides how long the study goes on and where it
# runs, not what any layout scores. Distillation has a folder of its own.
CHANGEABLE = (
    "search.trials",
    "search.batch_size",
    "search.storage",
    "teacher.device",
    "data.cache",
    "bank.path",
    "bank.checkpoint_steps",
    "output",
)
CHANGEABLE_SECTIONS = ("distill.",)


RUN_RECORDS = ("config.yaml", "provenance.json")
"""What a run's folder holds before anything has been run."""
DISTILL_RECORD = "settings.json"
"""What a distillation's folder holds before anything has been run."""


@dataclass
class Workbench:
    """A study with everything it names loaded, each part when it is first used."""

    config: StudyConfig
    reporter: Reporter = SILENT

    def __post_init__(self) -> None:
        for plugin in self.config.plugins:
            load_plugin(Path(plugin))

    @cached_property
    def teacher(self) -> Teacher:
        self.reporter.say(f"loading the teacher from {self.config.teacher.source}")
        teacher = load_teacher(self.config.teacher, seed=self.config.seed)
        if teacher.tokenizer is None:
            raise TeacherError(
                f"teacher.tokenizer: {teacher.source} has no tokenizer; name a folder or a hub "
                "name that has one"
            )
        return teacher

    @cached_property
    def space(self) -> SearchSpace:
        return load_space(self.config.space, num_layers=self.teacher.num_layers)

    @cached_property
    def budget(self) -> Budget:
        return Budget(attention_layers=self.config.budget.attention_layers)

    @cached_property
    def blocks(self) -> dict[str, TokenBlocks]:
        """Every split, as long as the study needs it."""
        bank, data = self.config.bank, self.config.data
        needed = {
            "bank": max(bank.matrix.tokens, bank.hidden.tokens),
            "search": self.config.search.tokens,
            "validation": data.validation_tokens,
            "test": data.test_tokens,
        }
        return load_blocks(data, self.teacher.tokenizer, needed=needed)

    @cached_property
    def bank(self) -> Bank:
        return Bank(
            self.config.bank.path,
            teacher=self.teacher,
            candidates=self.space.candidates,
            recipe=self.config.bank,
            blocks=self.blocks["bank"],
            seed=self.config.seed,
        )

    @property
    def bank_pairs(self) -> list[tuple[int, str]]:
        """Every (layer, candidate) that some layout of the space may need."""
        allowed = {
            i: [self.space.pinned[i]] if i in self.space.pinned else self.space.replacements
            for i in range(self.space.num_layers)
        }
        return [
            (i, name)
            for i, names in allowed.items()
            for name in names
            if name in self.bank.candidates
        ]

    def scorer(self) -> BankScorer:
        """Scores layouts as ``search.evaluation`` says."""
        search = self.config.search
        kind = PerTrialScorer if search.evaluation == "per_trial" else BankScorer
        return kind(
            self.teacher,
            self.bank,
            self.blocks["search"],
            weights=search.objective,
            batch_size=search.batch_size,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class BestLayout:
    """What ``best.yaml`` holds: all that distillation needs."""

    path: Path
    study: StudyConfig
    layout: Layout
    candidates: dict[str, dict[str, Any]]
    teacher_fingerprint: str
    scores: dict[str, Any]


def search(
    config: StudyConfig, *, reporter: Reporter = SILENT, force: bool = False
) -> tuple[StudyResult, Path]:
    """Train the bank, run the study, write ``best.yaml``.

    Args:
        config: The study.
        reporter: Told what happens.
        force: Set an earlier run of this name aside and start anew. The bank is kept.

    Returns:
        The result, and the path of ``best.yaml``.

    Raises:
        ConfigError: Every problem of the study, before anything is run.
        RunError: The run's folder holds something else.
    """
    if problems := find_problems(config):
        raise ConfigError(problems)
    with only_one(config.run_dir):
        claim_run_dir(config, force=force)
        return _search(Workbench(config, reporter))


def _search(bench: Workbench) -> tuple[StudyResult, Path]:
    config, reporter = bench.config, bench.reporter
    if config.search.evaluation == "bank":
        bench.bank.train(bench.bank_pairs, reporter=reporter)

    def provenance(layout: Layout) -> Mapping[str, Any]:
        return {"bank": {str(i): bench.bank.key(i, layout[i]) for i in layout.replaced_layers}}

    result = run_study(
        config,
        bench.space,
        bench.budget,
        bench.scorer(),
        run_dir=config.run_dir,
        provenance=provenance,
        reporter=reporter,
    )
    path = config.run_dir / "best.yaml"
    _write_best(path, bench, result)
    return result, path


def score(
    config: StudyConfig, text: str, *, reporter: Reporter = SILENT
) -> tuple[Layout, Score, Placement, StudyResult]:
    """Score a layout of the user's own and place it among a study's trials.

    Args:
        config: A study that has been searched.
        text: The layout, as :meth:`SearchSpace.parse` reads it.
        reporter: Told what happens.

    Raises:
        LayoutError: The text is no layout of the space.
        RunError: The study has no trials yet.
    """
    if problems := find_problems(config):
        raise ConfigError(problems)
    if not (config.run_dir / "config.yaml").is_file():
        raise RunError(
            f"{config.run_dir}: must hold a finished search, but holds none; run `search`"
        )
    _check_run_dir(config)
    bench = Workbench(config, reporter)
    try:
        layout = bench.space.parse(text)
    except LayoutError as e:
        raise LayoutError(f"layout {text!r}: {e}") from e
    result = load_result(config, bench.space, bench.budget, run_dir=config.run_dir)
    if layout in result.by_layout:
        scored = result.by_layout[layout].score
    else:
        scored = bench.scorer().score(layout)
    return layout, scored, result.place(layout, scored), result


def load_best(path: str | Path, overrides: Sequence[str] = ()) -> BestLayout:
    """Read ``best.yaml``.

    Args:
        path: The file, or the run's folder.
        overrides: Changes to the study, e.g. ``distill.logits.tokens=1000000``.

    Raises:
        RunError: It is not there, or is not one.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "best.yaml"
    if not path.is_file():
        raise RunError(f"{path}: no such file; `mohawk-nas search` writes it")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        study, layout = raw["study"], Layout(tuple(raw["layout"]))
        candidates, fingerprint = raw["candidates"], raw["teacher"]["fingerprint"]
        layout.check([ATTENTION, *candidates], num_layers=len(layout))
    except (ValueError, yaml.YAMLError, KeyError, TypeError) as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise RunError(f"{path}: must be what `search` wrote, but is not ({reason})") from e
    except LayoutError as e:
        raise LayoutError(f"{path}: {e}") from e
    return BestLayout(
        path=path,
        study=study_from_dict(study, overrides=overrides, source=str(path)),
        layout=layout,
        candidates=candidates,
        teacher_fingerprint=fingerprint,
        scores=raw.get("scores", {}),
    )


def distill(
    best: BestLayout, *, reporter: Reporter = SILENT, force: bool = False
) -> tuple[LogitsResult, Path]:
    """Distil a layout in full, into ``distill/`` beside its ``best.yaml``.

    A run that was interrupted goes on. The result in ``distill/model`` is a Hugging Face folder.

    Raises:
        RunError: The folder holds another distillation, or the teacher is another one.
    """
    folder = best.path.parent / "distill"
    with only_one(folder):
        return _distill(best, folder, reporter=reporter, force=force)


def _distill(
    best: BestLayout, folder: Path, *, reporter: Reporter, force: bool
) -> tuple[LogitsResult, Path]:
    config = best.study.distill
    if not best.layout.replaced_layers:
        raise RunError(
            f"{best.path}: its layout keeps attention in every layer, so there is nothing to "
            "distil; lower budget.attention_layers and search again"
        )
    settings = {"layout": list(best.layout.candidates), "distill": plain(config)}
    if not force:
        _check_distill_dir(folder, settings)
    bench = Workbench(best.study, reporter)
    if bench.teacher.fingerprint != best.teacher_fingerprint:
        raise RunError(
            f"{best.path}: was made for another teacher (fingerprint {best.teacher_fingerprint}, "
            f"but {best.study.teacher.source} has {bench.teacher.fingerprint}); run `search` again"
        )
    try:
        bench.space.check(best.layout)
    except LayoutError as e:
        raise LayoutError(f"{best.path}: {e}") from e
    if force and folder.exists():
        set_aside(folder)
    write_json(folder / DISTILL_RECORD, settings)
    train = _distill_blocks(bench)
    bank = _layer_bank(bench, best, folder / "bank", train)
    pairs = [(i, best.layout[i]) for i in best.layout.replaced_layers]
    student = assemble(bench.teacher, best.layout, bank, share=False).float()
    undistilled = None
    if bank is not bench.bank and config.start == "bank":
        undistilled = assemble(bench.teacher, best.layout, bench.bank)
    try:
        result = distill_logits(
            bench.teacher,
            student,
            undistilled=undistilled,
            train=train,
            validation=bench.blocks["validation"],
            config=config.logits,
            folder=folder,
            seed=best.study.seed,
            reporter=reporter,
        )
    except DamagedFile as e:
        raise RunError(f"{e}; use --force to set {folder} aside and start anew") from e
    with atomic_folder(folder / "model") as beside:
        save_hybrid(
            student,
            beside,
            layout=best.layout,
            candidates=best.candidates,
            tokenizer=bench.teacher.tokenizer,
        )
    write_json(
        folder / "result.json",
        {
            "layout": list(best.layout.candidates),
            "validation_kl": {"before": result.before.mean_kl, "after": result.after.mean_kl},
            "best_step": result.best_step,
            "tokens": {"hidden": config.hidden.tokens, "logits": result.tokens},
            "bank": {str(i): bank.key(i, name) for i, name in pairs},
            "provenance": provenance(),
        },
    )
    return result, folder


def _distill_blocks(bench: Workbench) -> TokenBlocks:
    """The bank split once more, as much of it as the distillation reads."""
    config, data = bench.config.distill, bench.config.data
    tokens = max(config.matrix.tokens, config.hidden.tokens, config.logits.tokens, data.block_size)
    return load_blocks(data, bench.teacher.tokenizer, needed={"bank": tokens})["bank"]


def _layer_bank(bench: Workbench, best: BestLayout, path: Path, train: TokenBlocks) -> Bank:
    """The bank that the student is assembled from, trained for its layers alone."""
    config = best.study.distill
    scratch = config.start == "scratch"
    pairs = [(i, best.layout[i]) for i in best.layout.replaced_layers]
    if not scratch:
        # Usually all there; a bank that was deleted is made again.
        bench.bank.train(pairs, reporter=bench.reporter)
        if not config.hidden.tokens:
            return bench.bank
    bank = Bank(
        path,
        teacher=bench.teacher,
        candidates=bench.space.candidates,
        recipe=BankConfig(
            path=str(path),
            matrix=config.matrix if scratch else dataclasses.replace(config.matrix, tokens=0),
            hidden=config.hidden,
            checkpoint_steps=best.study.bank.checkpoint_steps,
        ),
        blocks=train,
        seed=best.study.seed + 1,
        start=None if scratch else bench.bank,
    )
    bank.train(pairs, reporter=bench.reporter)
    return bank


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep a second process out of a run's folder while one works in it.

    The system releases the lock when the process ends, however it ends.

    Raises:
        RunError: Another process works there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as e:
        raise RunError(
            f"{folder}: must be worked on by one process at a time, but another is at it; wait for "
            "it, or give this study another name"
        ) from e
    try:
        yield
    finally:
        lock.release()


def claim_run_dir(config: StudyConfig, *, force: bool) -> None:
    """Make the run's folder this study's, or make sure that it is.

    Raises:
        RunError: It holds something else, or the study has changed in a way that would mix results.
    """
    folder = config.run_dir
    if not force:
        _check_run_dir(config)
    elif folder.exists():
        set_aside(folder)
    with atomic_write(folder / RUN_RECORDS[0]) as beside:
        beside.write_text(dump(config), encoding="utf-8")
    write_json(folder / RUN_RECORDS[1], provenance())


def _check_run_dir(config: StudyConfig) -> None:
    folder, record = config.run_dir, config.run_dir / RUN_RECORDS[0]
    if _holds_nothing_but(folder, RUN_RECORDS):
        # Nothing was run with the settings that are there, so any may change.
        return
    if record.is_file():
        try:
            raw = yaml.safe_load(record.read_text(encoding="utf-8"))
            old = flatten(study_from_dict(raw if isinstance(raw, dict) else {}))
        except (ConfigError, ValueError, yaml.YAMLError) as e:
            reason = " ".join(str(e).split())
            raise RunError(
                f"{record}: cannot be read back ({reason}); use --force to set the run aside and "
                "start anew"
            ) from e
        new = flatten(config)
        changed = [
            name
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name)
            and name not in CHANGEABLE
            and not name.startswith(CHANGEABLE_SECTIONS)
        ]
        if changed:
            shown = "; ".join(f"{n}: {old.get(n)!r} -> {new.get(n)!r}" for n in changed)
            raise RunError(
                f"{folder}: was begun with other settings ({shown}). Only "
                f"{', '.join(CHANGEABLE)} and distill may change; give the study another name, or "
                "use --force to set the old run aside"
            )
    else:
        raise RunError(
            f"{folder}: must be empty or hold an earlier run of this study, but holds "
            f"{_some_names(folder)}; choose another `name` or `output`"
        )


def _check_distill_dir(folder: Path, settings: dict[str, Any]) -> None:
    record = folder / DISTILL_RECORD
    if _holds_nothing_but(folder, [DISTILL_RECORD]):
        return
    if record.is_file():
        try:
            old = read_json(record)
        except DamagedFile as e:
            raise RunError(f"{e}; use --force to set {folder} aside and start anew") from e
        if old != settings:
            changed = _changed_keys(old, settings)
            raise RunError(
                f"{folder}: holds a distillation with other settings ({', '.join(changed)}); use "
                "--force to set it aside and start anew"
            )
    else:
        raise RunError(
            f"{folder}: must be empty or hold an earlier distillation, but holds "
            f"{_some_names(folder)}; use --force to set it aside"
        )


def _holds_nothing_but(folder: Path, names: Collection[str]) -> bool:
    # A write that was killed leaves its temporary file.
    return not folder.exists() or all(
        path.name in names or path.name.endswith(".tmp") for path in folder.iterdir()
    )


def _some_names(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _changed_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [prefix.rstrip(".")]
    keys = sorted({*old, *new})
    return [k for key in keys for k in _changed_keys(old.get(key), new.get(key), f"{prefix}{key}.")]


def set_aside(folder: Path) -> None:
    """Rename a folder to a free name beside it, so that nothing in it is lost."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    folder.rename(aside)


def provenance() -> dict[str, Any]:
    """What a result was made with: command, versions, commit, device, time."""
    return {
        "command": " ".join(sys.argv),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": _git_commit(),
        "versions": versions() | {"python": sys.version.split()[0]},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }


def _git_commit() -> str | None:
    """Commit of this package's checkout, with ``+changes`` if files differ from it."""
    here, git = Path(__file__).parent, shutil.which("git")
    if git is None:
        return None

    def ask(*arguments: str) -> str | None:
        done = subprocess.run([git, "-C", str(here), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    return commit and commit + ("+changes" if ask("status", "--porcelain", "-uno") else "")


def _write_best(path: Path, bench: Workbench, result: StudyResult) -> None:
    best, symbols = result.best, bench.space.symbols
    content = {
        "strip": best.layout.strip(symbols),
        "attention_layers": list(best.layout.attention_layers),
        "layout": list(best.layout.candidates),
        "candidates": describe_candidates(
            {name: bench.space.candidates[name] for name in sorted(set(best.layout.candidates))}
        ),
        "scores": {
            "value": best.value,
            "objectives": {name: best.score.mean(name) for name in best.score.per_block},
            "tokens": best.score.tokens,
            "layouts_scored": len(result.trials),
            "layouts_possible": result.num_possible,
            "tied_with": [trial.layout.strip(symbols) for trial in result.ties],
        },
        "teacher": {
            "source": bench.config.teacher.source,
            "fingerprint": bench.teacher.fingerprint,
        },
        "bank": best.provenance.get("bank", {}),
        "provenance": provenance(),
        "study": plain(bench.config),
    }
    text = "# Written by `mohawk-nas search`; `mohawk-nas distill` takes it from here.\n"
    with atomic_write(path) as beside:
        beside.write_text(text + yaml.safe_dump(content, sort_keys=False, width=100), "utf-8")
