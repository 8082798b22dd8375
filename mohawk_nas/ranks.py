"""Several processes at one run, as torchrun starts them: one a GPU.

Ranks share work by numbers alone and meet at barriers; nothing but those goes between them.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch.distributed as dist

__all__ = ["joined", "local_rank", "my_share", "rank", "wait_for_all"]

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=7)
"""How long a rank waits for the slowest."""


def rank() -> int:
    """Number of this process in its run, from 0; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int | None:
    """Number of this process on its machine; None without torchrun."""
    text = os.environ.get("LOCAL_RANK")
    return None if text is None else int(text)


@contextmanager
def joined() -> Iterator[None]:
    """For the length of the block, be one of the processes that torchrun started."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    # Barriers only, so the back end need not know GPUs.
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def my_share(items: Sequence[T]) -> list[T]:
    """Every rank's part of some work, the same however often it is asked."""
    if not dist.is_initialized():
        return list(items)
    return list(items[dist.get_rank() :: dist.get_world_size()])


def wait_for_all() -> None:
    """Go on when every rank has come here."""
    if dist.is_initialized():
        dist.barrier()
