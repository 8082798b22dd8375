"""Who is scoring what: leases that running trials carry in their attributes.

A running trial names its worker and carries a beat, which the worker renews while it scores.
Whoever looks at the study and finds that a worker has stopped marks its trial as failed, and the
layout is free again. A worker has stopped if it is a process of this machine that is no more, or
if its beat has not changed for some time. That time is measured by the observer's own clock from
when it first saw the beat, so clocks of several hosts need not agree.

Optuna's heartbeats are not used: journal files have none, and no other storage beats on its own
when trials are asked for one by one.
"""

from __future__ import annotations

import contextlib
import os
import platform
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

__all__ = ["DEFAULT_PACE", "Leases", "Pace", "Worker"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pace:
    """How often workers show that they are there, and how soon they are given up; seconds.

    All workers of a study must be given the same.
    """

    beat_every: float = 5.0
    patience: float = 60.0
    """A worker whose beat has not changed for so long has stopped."""
    look_every: float = 0.5
    """Between two looks at what others are scoring, for one that waits for them."""


DEFAULT_PACE = Pace()


def _place() -> str | None:
    """Where a process number means the same process: one boot of a machine, one container.

    None where the system does not say.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """A process that scores layouts."""

    number: int = 0
    """Among the workers of one command."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)
    place: str | None = field(default_factory=_place)

    def salt(self, *, alone: bool) -> str:
        """What its proposals depend on besides the study: nothing, for one that works alone.

        So a study of one worker is a function of its seed, and several do not propose the same.
        """
        return "" if alone and self.number == 0 else self.id

    def random(self) -> random.Random:
        """Chance of its own."""
        return random.Random(self.id)


class Leases:
    """The leases of one worker, and its view of those of others.

    Args:
        storage: Where the trials are.
        worker: Whose leases these are.
        pace: The study's.
        alone: No other process can be at this storage. A running trial is then a dead process's
            at once, and nobody needs to be shown a beat.
        clock: Seconds from any start, never set back.
    """

    def __init__(
        self,
        storage: BaseStorage,
        worker: Worker,
        *,
        pace: Pace = DEFAULT_PACE,
        alone: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.worker = worker
        self.pace = pace
        self.alone = alone
        self._storage = storage
        self._clock = clock
        # (Study, trial's number) -> its beat, and when it was first seen.
        self._watched: dict[tuple[int, int], tuple[Any, float]] = {}

    def attrs(self) -> dict[str, Any]:
        """User attributes of a trial that this worker begins now."""
        if self.alone:
            return {}
        worker = self.worker
        # Slots leave no __dict__ behind.
        owner = {key: getattr(worker, key) for key in ("id", "number", "host", "pid", "place")}
        return {"worker": owner, "beat": time.time()}

    def is_mine(self, frozen: FrozenTrial) -> bool:
        """Whether this worker began the trial."""
        return _owner(frozen).get("id") == self.worker.id

    def has_stopped(self, study: int, frozen: FrozenTrial) -> bool:
        """Whether a running trial's worker is no more."""
        if self.alone:
            return True
        owner = _owner(frozen)
        if owner.get("id") == self.worker.id:
            return False
        if owner.get("place") and owner["place"] == self.worker.place and _is_gone(owner["pid"]):
            return True
        key, beat, now = (study, frozen.number), frozen.user_attrs.get("beat"), self._clock()
        seen, since = self._watched.get(key, (None, now))
        if key not in self._watched or seen != beat:
            self._watched[key] = beat, now
            return False
        return now - since > self.pace.patience

    @contextmanager
    def beating(self, trial_id: int) -> Iterator[None]:
        """Renew a running trial's beat for the length of the block."""
        if self.alone:
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=self._beat, args=(trial_id, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _beat(self, trial_id: int, ended: threading.Event) -> None:
        while not ended.wait(self.pace.beat_every):
            try:
                self._storage.set_trial_user_attr(trial_id, "beat", time.time())
            except UpdateFinishedTrialError:
                # Others have given this worker up; it learns so when it has finished.
                break
            except (OptunaError, SQLAlchemyError, OSError):
                # A connection may come back in time. If it does not, finishing the trial says so.
                continue
        # A database session belongs to its thread.
        with contextlib.suppress(SQLAlchemyError):
            self._storage.remove_session()


def _owner(frozen: FrozenTrial) -> Mapping[str, Any]:
    owner: Mapping[str, Any] = frozen.user_attrs.get("worker", {})
    return owner


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
