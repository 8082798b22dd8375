"""Folders of runs: whose they are, what may continue in them, and what made them."""

from __future__ import annotations

import datetime
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from mohawk_nas.bank import versions
from mohawk_nas.config import StudyConfig, dump, flatten, study_from_dict
from mohawk_nas.errors import ConfigError, RunError
from mohawk_nas.files import DamagedFile, atomic_write, read_json, write_json

__all__ = [
    "check_distill_dir",
    "check_identity",
    "check_run_dir",
    "claim_identity",
    "claim_run_dir",
    "no_search",
    "only_one",
    "provenance",
    "set_aside",
]

# What may change between two runs of one study: it decides how long the study goes on and where it
# runs, not what any layout scores. Distillation has a folder of its own.
CHANGEABLE = (
    "search.trials",
    "search.batch_size",
    "search.storage",
    "teacher.device",
    "data.cache",
    "data.streaming",
    "data.shuffle_blocks",
    "data.workers",
    "bank.path",
    "bank.checkpoint_steps",
    "output",
)
# So have rungs a study of their own, which tells recipes apart.
CHANGEABLE_SECTIONS = ("search.rungs.", "distill.")


IDENTITY = "identity.json"
DECODE_TIMES = "decode.json"
RUN_RECORDS = ("config.yaml", "provenance.json", IDENTITY, DECODE_TIMES)
"""What a run's folder holds before anything has been run."""
DISTILL_RECORD = "settings.json"
"""What a distillation's folder holds before anything has been run."""


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
        check_run_dir(config)
    elif folder.exists():
        set_aside(folder)
    with atomic_write(folder / RUN_RECORDS[0]) as beside:
        beside.write_text(dump(config), encoding="utf-8")
    history = folder / RUN_RECORDS[1]
    write_json(history, [*(read_json(history) if history.is_file() else []), provenance()])


def no_search(config: StudyConfig) -> RunError:
    """What to say where a study's search is not in its folder."""
    where = "" if Path(config.output).is_absolute() else " (`output` starts at the working folder)"
    return RunError(
        f"{config.run_dir.absolute()}: must hold a finished search, but holds none; run "
        f"`search`{where}"
    )


def check_run_dir(config: StudyConfig) -> None:
    """The check of :func:`claim_run_dir` alone."""
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
            if changed == ["name"]:
                raise RunError(
                    f"{folder}: was begun with other settings ({shown}); a run's folder is called "
                    "as its study, so rename both back, or use --force to set the old run aside"
                )
            raise RunError(
                f"{folder}: was begun with other settings ({shown}). Only "
                f"{', '.join(CHANGEABLE)}, search.rungs and distill may change; give the study "
                "another name, or use --force to set the old run aside"
            )
    else:
        raise RunError(
            f"{folder}: must be empty or hold an earlier run of this study, but holds "
            f"{_some_names(folder)}; choose another `name` or `output`"
        )


def check_distill_dir(folder: Path, settings: dict[str, Any]) -> None:
    """Make sure that a distillation with these settings may start or go on in a folder.

    Raises:
        RunError: It holds something else, or a distillation with other settings.
    """
    record = folder / DISTILL_RECORD
    if _holds_nothing_but(folder, (DISTILL_RECORD, IDENTITY)):
        return
    if record.is_file():
        try:
            old = read_json(record)
        except DamagedFile as e:
            raise RunError(f"{e}; use --force to set {folder} aside and start anew") from e
        if old != settings:
            raise RunError(
                f"{folder}: holds a distillation with other settings "
                f"({'; '.join(_changes(old, settings))}). Without the "
                "change it goes on; for another one beside it give the study another name, or use "
                "--force to set this one aside"
            )
    else:
        raise RunError(
            f"{folder}: must be empty or hold an earlier distillation, but holds "
            f"{_some_names(folder)}; use --force to set it aside"
        )


def claim_identity(folder: Path, identity: Mapping[str, Any]) -> None:
    """Write down what the results in a folder depend on, or make sure that it is still so.

    Raises:
        RunError: Something of it has changed since the first run.
    """
    check_identity(folder, identity)
    write_json(folder / IDENTITY, dict(identity))


def check_identity(
    folder: Path,
    identity: Mapping[str, Any],
    *,
    instead: str = "give the study another name, or use --force to set the old run aside",
) -> None:
    """The check of :func:`claim_identity` alone; ``instead`` is what else can be done."""
    record = folder / IDENTITY
    if not record.is_file() or _holds_nothing_but(folder, (*RUN_RECORDS, DISTILL_RECORD)):
        return
    try:
        old = read_json(record)
    except DamagedFile as e:
        raise RunError(f"{e}; use --force to set {folder} aside and start anew") from e
    # What was not known then, such as a text that only rungs read, is no change.
    changed = [name for name in identity if old.get(name, identity[name]) != identity[name]]
    if changed:
        raise RunError(
            f"{folder}: what it was begun with has changed ({'; '.join(changed)}), and results of "
            f"both would be mixed. Restore it, {instead}"
        )


def _holds_nothing_but(folder: Path, names: Collection[str]) -> bool:
    # A write that was killed leaves its temporary file.
    return not folder.exists() or all(
        path.name in names or path.name.endswith(".tmp") for path in folder.iterdir()
    )


def _some_names(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _changes(old: Any, new: Any, prefix: str = "") -> list[str]:
    """``setting: old -> new`` of all that differs."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [f"{prefix.rstrip('.')}: {old!r} -> {new!r}"]
    keys = sorted({*old, *new})
    return [k for key in keys for k in _changes(old.get(key), new.get(key), f"{prefix}{key}.")]


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
