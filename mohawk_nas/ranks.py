"""Several processes at one run, as torchrun starts them: one a GPU.

Ranks share work by numbers alone and meet at two points; nothing else goes between them.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

from mohawk_nas.errors import RunError

__all__ = [
    "first_is_ready",
    "joined",
    "local_rank",
    "my_share",
    "num_ranks",
    "rank",
    "wait_for_all",
]

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=7)
"""How long a rank waits for the slowest."""


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


# Whether rank 0 has told the others how it goes on.
_told = False


@contextmanager
def joined() -> Iterator[None]:
    """For the length of the block, be one of the processes that torchrun started.

    If the block fails on rank 0 before :func:`first_is_ready`, the others are told to leave.
    """
    global _told
    if num_ranks() == 1:
        yield
        return
    # No tensors travel, so the back end need not know GPUs.
    dist.init_process_group("gloo", timeout=PATIENCE)
    _told = False
    try:
        yield
    except BaseException:
        if rank() == 0 and not _told:
            _tell(False)
        raise
    finally:
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
            raise RunError("another process of this run has stopped; see its message") from e


def _tell(goes_on: bool) -> None:
    global _told
    _told = True
    dist.broadcast(torch.tensor([float(goes_on)]), src=0)
