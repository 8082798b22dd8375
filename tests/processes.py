"""Processes that share a run as torchrun's do, forked so that imports cost nothing.

Run as a script by torchrun, this is ``python -m mohawk_nas`` whose processes are killed as the
variable DEATHS says: one step for each start, see :func:`die_in`.
"""

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback

from mohawk_nas import ranks
from mohawk_nas.cli import main
from mohawk_nas.distill.logits_trainer import LogitsTrainer
from mohawk_nas.distill.parallel import DataParallelTrainer, ShardedTrainer

PATIENCE = 120.0


def die_in(step, *, rank=0, seconds=0.0, number=signal.SIGKILL):
    """Send this process a signal some seconds after it has begun so many steps of stage 3."""
    if int(os.environ.get("RANK", 0)) != rank:
        return
    for kind in (LogitsTrainer, DataParallelTrainer, ShardedTrainer):
        before = kind.step

        def counted(self, *args, before=before):
            counted.left -= 1
            if counted.left == 0:
                if seconds:
                    threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
                else:
                    os.kill(os.getpid(), number)
            return before(self, *args)

        counted.left = step
        kind.step = counted


def run(count, arguments, *, before=None, log=None):
    """Run a command in so many processes; when one fails the others are stopped, as torchrun does.

    Args:
        count: Processes.
        arguments: Of ``mohawk-nas``, or a function to call instead, joined to the others.
        before: Called in each process first.
        log: File that takes what they print.

    Returns:
        Exit codes by rank; those that were stopped for another's failure have None.
    """
    # A forked child skips the seconds that imports take.
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank):
        if log is not None:
            target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(target, 1)
            os.dup2(target, 2)
        if count > 1:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
            os.environ.update({k: str(v) for k, v in world.items()}, MASTER_ADDR="127.0.0.1")
        if before is not None:
            before()
        # pytest's own streams are not for a child to flush.
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        code = 0
        try:
            if callable(arguments):
                with ranks.joined(tensors=True):
                    arguments()
            else:
                main(arguments)
        except SystemExit as e:
            code = e.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stderr.flush()
            os._exit(code)

    children = [context.Process(target=work, args=(rank,)) for rank in range(count)]
    for child in children:
        child.start()
    codes = [None] * count
    until = time.monotonic() + PATIENCE
    while any(child.is_alive() for child in children) and time.monotonic() < until:
        for rank, child in enumerate(children):
            child.join(0.02)
            codes[rank] = child.exitcode
        if any(code not in (None, 0, 75) for code in codes):
            break
    for rank, child in enumerate(children):
        # What has failed by itself has had its time to say so.
        child.join(1.0 if codes[rank] is None else None)
        codes[rank] = child.exitcode
        if child.is_alive():
            child.kill()
            child.join()
    return codes


if __name__ == "__main__":
    deaths = [int(step) for step in os.environ["DEATHS"].split(",") if step]
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if start < len(deaths):
        die_in(deaths[start], rank=start % 2)
    main()
