"""Several workers at one study: kills, leases, torn journals, hosts that join."""

import multiprocessing
import random
import signal
import time
from collections import Counter

import postgres
import pytest
from optuna.trial import TrialState
from synthetic_search import SyntheticScorer, make

from mohawk_nas.search.leases import Pace, Worker
from mohawk_nas.search.record import open_ledger
from mohawk_nas.search.storages import opened
from mohawk_nas.search.study import run_study

QUICK = Pace(beat_every=0.4, patience=2.5, look_every=0.05)


@pytest.fixture(scope="module")
def postgres_url():
    if reason := postgres.why_not():
        pytest.skip(reason)
    with postgres.server() as url:
        yield url


@pytest.fixture(params=["journal", "postgres"])
def storage(request, tmp_path):
    """An empty storage that several processes may share."""
    if request.param == "journal":
        return f"journal:{tmp_path / 'study.journal'}"
    return request.getfixturevalue("postgres_url")


# Kills

LAYERS, KEPT, TRIALS = 8, 3, 56
BASELINES = ["uniform", "swap_one"]


class Noted(SyntheticScorer):
    """Writes each layout down when it begins to score it."""

    def __init__(self, notes, **options):
        super().__init__(LAYERS, pairs=1.0, noise=0.1, **options)
        self.notes = notes

    def score(self, layout):
        with self.notes.open("a") as f:
            f.write(layout.key() + "\n")
        return super().score(layout)


def part_of_study(storage, notes, number, place):
    """What each worker runs."""
    name = f"killed-{notes.parent.name}"
    options = {"trials": TRIALS, "baselines": BASELINES, "storage": storage, "name": name}
    config, space, budget = make(LAYERS, KEPT, **options)
    worker = Worker(number=number, **place)
    scorer = Noted(notes, pause=0.3)
    run_study(config, space, budget, scorer, run_dir=None, worker=worker, pace=QUICK)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["one host", "many hosts"])
def test_no_trial_is_lost_or_doubled_by_20_kills(storage, tmp_path, elsewhere):
    if elsewhere != storage.startswith("postgres"):
        pytest.skip("one of the two ways to notice a dead worker is tried with each storage")
    # Children are forked from a server that has imported what they need, so that they start fast.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["synthetic_search", "mohawk_nas.search.study"])
    rng, notes, begun = random.Random(3), tmp_path / "notes", 0
    notes.touch()

    def start(number):
        nonlocal begun
        begun += 1
        # A worker of another machine cannot be seen to be gone; its beat stands still.
        place = {"place": f"machine {begun}"} if elsewhere else {}
        child = processes.Process(target=part_of_study, args=(storage, notes, number, place))
        child.start()
        return child

    workers = [start(number) for number in range(4)]
    while len(notes.read_text().splitlines()) < 4:
        time.sleep(0.02)
    for _ in range(20):
        time.sleep(rng.uniform(0.05, 0.25))
        number = rng.randrange(4)
        assert workers[number].is_alive(), "the study must last longer than the kills"
        workers[number].kill()
        workers[number].join()
        assert workers[number].exitcode == -signal.SIGKILL
        workers[number] = start(number)
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0

    options = {"trials": TRIALS, "baselines": BASELINES}
    config, space, budget = make(LAYERS, KEPT, **options)
    alone = run_study(
        config, space, budget, Noted(tmp_path / "alone"), run_dir=None, identity={"teacher": "x"}
    )
    name = f"killed-{tmp_path.name}"
    config, space, budget = make(LAYERS, KEPT, storage=storage, name=name, **options)
    with open_ledger(config, space, run_dir=None, begin=False) as ledger:
        trials = Counter(trial.layout for trial in ledger.trials)
        assert trials == Counter(budget.enumerate(space)), "each layout once"
        values = {trial.layout: trial.value for trial in ledger.trials}
        assert values == {trial.layout: trial.value for trial in alone.trials}
        probes = Counter(probe.layout for probe in ledger.probes)
        assert set(probes.values()) == {1}
        expected = {trial.layout for trial in [*alone.trials, *alone.probes]}
        assert set(trials) | set(probes) == expected
        notes_of_study = ledger.notes()
        assert set(notes_of_study["baselines"]) == set(alone.baselines)
        assert notes_of_study["asked"] == alone.asked
    with opened(storage, lock=False) as opened_storage:
        study = opened_storage.get_study_id_from_name(name)
        states = Counter(t.state for t in opened_storage.get_all_trials(study))
    assert set(states) <= {TrialState.COMPLETE, TrialState.FAIL}
    scored = Counter(notes.read_text().splitlines())
    assert len(scored) == len(expected)
    # A kill loses one score at most.
    assert scored.total() - len(scored) <= 20
