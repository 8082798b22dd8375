"""Where a study is kept: SQLite, a journal file, a database server, or memory.

SQLite is for one process at a time. A journal file (``journal:PATH``) and a server (PostgreSQL,
MySQL) are shared by any number of processes and hosts.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import OptunaError, StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, JournalStorage, RDBStorage, get_storage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy.engine import create_engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from mohawk_nas.errors import ConfigError, RunError, TrainingError

__all__ = [
    "MEMORY",
    "Journal",
    "check_storage",
    "holds_study",
    "is_shared",
    "locate_study",
    "opened",
    "storage_errors",
]

MEMORY = "memory"
JOURNAL = "journal:"
LOCK_PATIENCE = 300.0
"""Seconds that a process waits for a journal's lock; a write takes milliseconds."""
NUM_TRIES = 6
"""How often the tables of a database are asked for while others are making them."""


def locate_study(named: str | None, *, run_dir: Path | None, workers: int = 1) -> str:
    """The address of a study's storage.

    Args:
        named: ``search.storage``.
        run_dir: Where the study is kept if nothing is named: in ``study.db`` if one worker began
            it, in ``study.journal`` if several did. None means memory.
        workers: Processes that will work on it.

    Raises:
        ConfigError: Several workers and SQLite.
        RunError: Several workers and a run that was begun in SQLite.
    """
    if named is not None:
        if workers > 1 and not is_shared(named):
            raise ConfigError(
                f"search.storage: several workers need a journal file or a database server, but "
                f"{named} is SQLite, which is for one process; name journal:PATH or "
                "postgresql+psycopg://..., or leave it out"
            )
        return named
    if run_dir is None:
        return MEMORY
    database, journal = run_dir / "study.db", run_dir / "study.journal"
    if workers == 1 and not journal.is_file():
        return f"sqlite:///{database}"
    if database.is_file() and not journal.is_file():
        raise RunError(
            f"{database}: holds what one worker has scored, and SQLite is for one process; go on "
            "with one worker, give the study another name, or use --force to set the run aside"
        )
    return f"{JOURNAL}{journal}"


def check_storage(named: str | None) -> list[str]:
    """Problems of ``search.storage`` that can be told without reaching it."""
    if named is None or named.startswith(JOURNAL):
        return []
    try:
        create_engine(named)
    except ImportError as e:
        return [
            f"search.storage: {_shown(named)} needs a driver that is not installed ({e}); for "
            "PostgreSQL, pip install 'mohawk-nas[postgres]' and write postgresql+psycopg://"
        ]
    except ArgumentError as e:
        return [f"search.storage: {_shown(named)} is no database's URL ({e})"]
    return []


def is_shared(url: str) -> bool:
    """Whether several processes may work at this storage."""
    return url != MEMORY and not url.startswith("sqlite")


@contextmanager
def opened(url: str, *, lock: bool) -> Iterator[BaseStorage]:
    """The storage at an address of :func:`locate_study`, for the length of the block.

    Args:
        url: The address.
        lock: Keep other processes that say so from the same SQLite file.

    Raises:
        RunError: Another process works at this SQLite file.
        TrainingError: The storage cannot be read or written.
    """
    with storage_errors(_shown(url)), ExitStack() as stack:
        if url == MEMORY:
            yield InMemoryStorage()
            return
        if url.startswith(JOURNAL):
            yield JournalStorage(Journal(Path(url.removeprefix(JOURNAL))))
            return
        if lock and url.startswith("sqlite"):
            _keep_to_one_process(url, stack)
        storage = _database(url)
        stack.callback(storage.remove_session)
        yield storage


def holds_study(url: str, name: str) -> bool:
    """Whether a storage has a study of this name.

    Raises:
        TrainingError: The storage cannot be read.
    """
    with opened(url, lock=False) as storage, suppress(KeyError):
        storage.get_study_id_from_name(name)
        return True
    return False


@contextmanager
def storage_errors(where: str) -> Iterator[None]:
    """Turn what a damaged, full or unreachable storage raises into one line; quieten Optuna."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    except (OptunaError, SQLAlchemyError) as e:
        cause = " ".join(str(e.__cause__ or e).split())
        # SQLAlchemy adds where its manual explains it.
        cause = cause.partition(" (Background on this error")[0]
        full = "make room and " if "disk is full" in cause else ""
        raise TrainingError(
            f"{where}: the study must be readable and writable, but the storage says: {cause}. "
            f"What was scored before is kept there; {full}run again to continue"
        ) from e
    finally:
        optuna.logging.set_verbosity(verbosity)


class Journal(JournalFileBackend):
    """Optuna's journal file, which survives processes that are killed while they write.

    Optuna's own lock is a file that a killed process leaves behind: others then wait for half a
    minute, and two of them may take it at once. Here the system holds the lock and releases it when
    the process ends, however it ends. A line that a killed process left unfinished is cut off
    before the next one is written, and whole lines at the end that are no JSON, as a power cut
    leaves them, when the file is opened.

    Args:
        path: The file; made with its folder if it is not there.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        lock = _SystemLock(path)
        super().__init__(str(path), lock_obj=lock)
        lock.acquire()
        try:
            _cut_no_json(path)
        finally:
            lock.release()

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Optuna's, with a damaged line as Optuna's error."""
        try:
            yield from super().read_logs(log_number_from)
        except ValueError as e:
            raise StorageInternalError(f"a line before the last is damaged ({e})") from None


class _SystemLock(JournalFileOpenLock):
    """Takes the place of Optuna's lock; whoever holds it finds whole lines alone."""

    def __init__(self, path: Path) -> None:
        self._journal = path
        self._system = FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_PATIENCE)

    def acquire(self) -> bool:
        try:
            self._system.acquire(poll_interval=0.003)
        except Timeout as e:
            raise StorageInternalError(
                f"{e.lock_file} has been held by another process for {LOCK_PATIENCE:.0f} s"
            ) from None
        _cut_unfinished(self._journal)
        return True

    def release(self) -> None:
        self._system.release()


def _cut_unfinished(path: Path) -> None:
    """Cut a journal back to its last end of a line."""
    with path.open("rb+") as f:
        _, start, end = _last_line(f)
        if start < end and not _ends_a_line(f, end):
            f.truncate(start)


def _cut_no_json(path: Path) -> None:
    """Cut lines off a journal's end until the last one is JSON."""
    with path.open("rb+") as f:
        while True:
            line, start, end = _last_line(f)
            if start == end:
                return
            try:
                if _ends_a_line(f, end):
                    json.loads(line)
                    return
            except ValueError:
                pass
            f.truncate(start)


def _ends_a_line(f: Any, end: int) -> bool:
    f.seek(end - 1)
    return bool(f.read(1) == b"\n")


def _last_line(f: Any) -> tuple[bytes, int, int]:
    """The last line, whole or not, where it starts, and where the file ends."""
    end = start = f.seek(0, os.SEEK_END)
    tail = b""
    while start > 0:
        step = min(start, 2**16)
        start -= step
        f.seek(start)
        tail = f.read(step) + tail
        # The last byte may be the end of this very line.
        if (cut := tail.rfind(b"\n", 0, len(tail) - 1)) >= 0:
            return tail[cut + 1 :], start + cut + 1, end
    return tail, 0, end


def _keep_to_one_process(url: str, stack: ExitStack) -> None:
    name = make_url(url).database
    # Without a file it is in this process's memory.
    if not name or name == ":memory:":
        return
    path = Path(name)
    if not path.parent.is_dir():
        # SQLite says so itself.
        return
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        stack.enter_context(lock)
    except Timeout as e:
        raise RunError(
            f"{path}: must be worked on by one process at a time, as SQLite is, but another is at "
            "it; name journal:PATH or a database server as search.storage to share a study"
        ) from e


def _database(url: str) -> BaseStorage:
    for left in reversed(range(NUM_TRIES)):
        try:
            # What has ended is then read once.
            return get_storage(RDBStorage(url))
        except DBAPIError as e:
            # Two processes make the tables at the same time: one of them is told so, in a way that
            # depends on the database and on which table it is.
            text = str(e).lower()
            if not left or not ("already exists" in text or "unique" in text or "duplic" in text):
                raise
            time.sleep(random.uniform(0.05, 0.3))
    raise AssertionError


def _shown(url: str) -> str:
    """An address for people: the path of a file, and no password."""
    if url.startswith(JOURNAL):
        return url.removeprefix(JOURNAL)
    if url == MEMORY:
        return url
    try:
        parsed = make_url(url)
    except ArgumentError:
        return url
    if parsed.drivername.startswith("sqlite") and parsed.database:
        return parsed.database
    return parsed.render_as_string(hide_password=True)
