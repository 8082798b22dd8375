"""What worker processes of the tests run; imports little, so that they start fast."""

import os
import signal
import time
from pathlib import Path

from synthetic_search import SyntheticScorer, make

from mohawk_nas.errors import RunError
from mohawk_nas.search.leases import Pace, Worker
from mohawk_nas.search.study import run_study

QUICK = Pace(beat_every=0.4, patience=2.5, look_every=0.05)
STUDY = {"trials": 28, "baselines": ["uniform", "swap_one"]}


def one_of_the_crew(number, storage, roles, gone):
    """A worker that is killed, or fails, or does its work.

    The one that works begins when there is a file named ``gone``: it could be at the end of the
    study before the others have come to theirs.
    """
    assert "RANK" not in os.environ
    if roles[number] == "works":
        until_there(gone)
    if roles[number] == "fails with many words":
        raise RunError("this one must fail " + 200_000 * ".")
    if roles[number] == "fails":
        raise RunError("this one must fail")
    config, space, budget = make(8, 2, storage=storage, **STUDY)
    scorer = SyntheticScorer(8, pause=0.02)
    if roles[number] == "is killed":
        scorer.score = lambda layout: os.kill(os.getpid(), signal.SIGKILL)
    run_study(config, space, budget, scorer, run_dir=None, worker=Worker(number=number), pace=QUICK)


def until_there(path):
    """Wait for a file, but not for ever; a process takes a minute to start on a busy machine."""
    until = time.monotonic() + 300
    while not path.is_file():
        assert time.monotonic() < until, path
        time.sleep(0.05)


def endless(number, folder):
    """A worker that leaves a trace of its coming and going."""
    (folder / "began").touch()
    try:
        time.sleep(600)
    finally:
        (folder / "left").touch()


if __name__ == "__main__":
    import sys

    import crew

    from mohawk_nas.search.workers import Crew

    # A shell's background jobs are started deaf to Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Crew(crew.endless, (Path(sys.argv[1]),), environments=[{}]) as members:
        while members.working:
            members.wait(1)
