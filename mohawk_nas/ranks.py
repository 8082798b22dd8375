"""Several processes at one run, as torchrun starts them: one a GPU.

The bank's ranks share work by numbers alone and meet at two points. In stage 3 gradients go between
them as well, and whatever one of them notices by itself, a signal or a clock, all act on at once.
"""

from __future__ import annotations

import datetime
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from mohawk_nas.errors import MohawkError, RunError

__all__ = [
    "GPU_SHARERS",
    "StopRequest",
    "any_rank",
    "first_is_ready",
    "gpu_sharers",
    "joined",
    "local_rank",
    "my_share",
    "num_ranks",
    "of_every",
    "of_first",
    "rank",
    "started_again",
    "stop_request",
    "told_once",
    "wait_for_all",
]

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=7)
"""How long a rank waits for the slowest."""


GPU_SHARERS = "MOHAWK_NAS_GPU_SHARERS"
"""In a worker's environment: workers that share its GPU."""


def gpu_sharers() -> int:
    """Workers that share this one's GPU and its memory, itself included."""
    return int(os.environ.get(GPU_SHARERS, 1))


def num_ranks() -> int:
    """Processes of this run; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Number of this process in its run, from 0."""
    return int(os.environ.get("RANK", 0)) if num_ranks() > 1 else 0


def local_rank() -> int | None:
    """Number of this process on its machine; None without torchrun."""
    text = os.environ.get("LOCAL_RANK")
    return None if text is None else int(text)


def started_again() -> bool:
    """Whether torchrun has started this run before and starts it again after a failure."""
    return _starts_before() > 0


def _starts_before() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


_CUT_OFF = re.compile(r"gloo.*(closed by peer|reset by peer|Broken pipe)", re.DOTALL)
_ANOTHER_STOPPED = "another process of this run has stopped; see its message"

# Whether rank 0 has told the others how it goes on.
_told = False


@contextmanager
def joined(*, tensors: bool = False) -> Iterator[None]:
    """For the length of the block, be one of the processes that torchrun started.

    If the block fails on rank 0 before :func:`first_is_ready`, the others are told to leave.

    Args:
        tensors: Whether tensors will travel between GPUs.
    """
    global _told
    if num_ranks() == 1:
        yield
        return
    on_gpus = tensors and torch.cuda.is_available() and dist.is_nccl_available()
    store, number, count = next(rendezvous("env://", timeout=PATIENCE))
    # torchrun keeps its store when it starts processes again, and in it the addresses of those that
    # are gone.
    start = _starts_before()
    dist.init_process_group(
        # Numbers travel between CPUs either way: they wait for no GPU.
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        store=PrefixStore(f"start {start}", store),
        rank=number,
        world_size=count,
        timeout=PATIENCE,
    )
    _told = False
    try:
        yield
    except BaseException as e:
        if rank() == 0 and not _told:
            # Those that have ended already need not be told, and hide no error.
            with suppress(RuntimeError):
                _tell(False)
        if isinstance(e, RuntimeError) and _CUT_OFF.search(str(e)):
            raise RunError(_ANOTHER_STOPPED) from e
        if not (on_gpus and _told):
            # Else others may be in the midst of an exchange that never ends; the process does.
            dist.destroy_process_group()
        raise
    else:
        dist.destroy_process_group()


def first_is_ready() -> bool:
    """Rank 0 says that it goes on; the others wait for it, and are told if it does not."""
    if not dist.is_initialized():
        return True
    if rank() == 0:
        _tell(True)
        return True
    word = torch.zeros(1)
    dist.broadcast(word, src=0)
    return bool(word)


def my_share(items: Sequence[T]) -> list[T]:
    """Every rank's part of some work, the same however often it is asked."""
    if not dist.is_initialized():
        return list(items)
    return list(items[rank() :: num_ranks()])


def wait_for_all() -> None:
    """Go on when every rank has come here.

    Raises:
        RunError: One of them has stopped.
    """
    if dist.is_initialized():
        try:
            dist.barrier()
        except RuntimeError as e:
            raise RunError(_ANOTHER_STOPPED) from e


def any_rank(*flags: bool) -> list[bool]:
    """Whether each flag is set on any rank; all ranks get the same answer."""
    if not dist.is_initialized():
        return list(flags)
    votes = torch.tensor([float(flag) for flag in flags])
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return [bool(vote) for vote in votes]


def of_first(value: T) -> T:
    """Rank 0's value, on every rank; a plain Python object."""
    if not dist.is_initialized():
        return value
    held: list[Any] = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]  # type: ignore[no-any-return]


def of_every(value: T) -> list[T]:
    """Every rank's value in order, on every rank; plain Python objects."""
    if not dist.is_initialized():
        return [value]
    held: list[Any] = [None] * num_ranks()
    dist.all_gather_object(held, value)
    return held


def told_once(error: MohawkError) -> BaseException:
    """What to raise where every rank meets the same error: rank 0 tells it, the others leave."""
    return error if rank() == 0 else SystemExit(error.exit_code)


class StopRequest:
    """What a signal has asked for; see :func:`stop_request`."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def made(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """For the length of the block, SIGTERM and a first SIGINT only leave a note.

    A second SIGINT interrupts as ever. Outside the main thread, where Python takes no signals,
    there is never a note.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, before[signal.SIGINT] or signal.SIG_DFL)
        request.signal = signal.Signals(number)

    before = {name: signal.signal(name, note) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for name, handler in before.items():
            signal.signal(name, handler or signal.SIG_DFL)


def _tell(goes_on: bool) -> None:
    global _told
    _told = True
    dist.broadcast(torch.tensor([float(goes_on)]), src=0)
