"""Several workers at one study: kills, leases, torn journals, hosts that join."""

import contextlib
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import crew
import optuna
import postgres
import pytest
import torch
import yaml
from optuna.trial import TrialState
from synthetic_search import SyntheticScorer, make
from tiny_study import make_study, make_teacher

from mohawk_nas import pipeline
from mohawk_nas.errors import ConfigError, RunError, TrainingError
from mohawk_nas.ranks import GPU_SHARERS
from mohawk_nas.reporting import Silent
from mohawk_nas.search.leases import DEFAULT_PACE, Leases, Pace, Worker
from mohawk_nas.search.ledger import Ledger
from mohawk_nas.search.record import open_ledger, study_result
from mohawk_nas.search.storages import Journal, locate_study, opened
from mohawk_nas.search.study import run_study
from mohawk_nas.search.workers import environments, run_crew

QUICK = crew.QUICK


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


# Each storage with one of the two ways to notice that a worker is gone.
@pytest.mark.parametrize(
    ("storage", "elsewhere"),
    [("journal", False), ("postgres", True)],
    indirect=["storage"],
    ids=["journal, one host", "PostgreSQL, many hosts"],
)
def test_no_trial_is_lost_or_doubled_by_20_kills(storage, tmp_path, elsewhere):
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
        worker.join(300)
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
        result = study_result(config, space, budget, ledger)
        assert (result.baselines, result.asked) == (alone.baselines, alone.asked)
    with opened(storage, lock=False) as opened_storage:
        study = opened_storage.get_study_id_from_name(name)
        states = Counter(t.state for t in opened_storage.get_all_trials(study))
    assert set(states) <= {TrialState.COMPLETE, TrialState.FAIL}
    scored = Counter(notes.read_text().splitlines())
    assert len(scored) == len(expected)
    # A kill loses one score at most.
    assert scored.total() - len(scored) <= 20


# One layout, one owner


def two_ledgers(stack, storage, *, clock=time.monotonic, beat_every=0.05, **options):
    """Two workers' views of one study, as if on two machines."""
    config, space, budget = make(6, 2, storage=storage, **options)
    found = []
    for number in range(2):
        kept_in = stack.enter_context(opened(storage, lock=False))
        leases = Leases(
            kept_in,
            Worker(number=number, place=f"machine {number}"),
            pace=Pace(beat_every=beat_every, patience=30, look_every=0.01),
            alone=False,
            clock=clock,
        )
        found.append(
            Ledger(
                config.name,
                space=space,
                weights={"kl": 1.0},
                storage=kept_in,
                leases=leases,
                settings={},
                begin=True,
            )
        )
    return found, list(budget.enumerate(space)), kept_in


def meet_after_writing(ledgers):
    """Both have written down what they are about to score before either reads."""
    barrier = threading.Barrier(len(ledgers))

    def wrap(refresh):
        calls = []

        def met():
            if not calls:
                calls.append(1)
                barrier.wait(20)
            refresh()

        return met

    for ledger in ledgers:
        ledger.refresh = wrap(ledger.refresh)


def at_once(*calls):
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(60) for future in [pool.submit(call) for call in calls]]


def as_trial(ledger, layout, score, **options):
    return ledger.run_trial(layout, score, proposed_by="x", seed=0, provenance={}, **options)


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


def test_two_workers_that_begin_the_same_layout_score_it_once(storage, stack):
    ledgers, layouts, kept_in = two_ledgers(stack, storage, name="same layout")
    scorers = [SyntheticScorer(6), SyntheticScorer(6)]
    pairs = list(zip(ledgers, scorers, strict=True))
    meet_after_writing(ledgers)
    done = at_once(*(partial(as_trial, x, layouts[0], s.score) for x, s in pairs))
    assert sorted(done) == [False, True]
    assert [len(s.scored) for s in scorers] == [int(d) for d in done]
    for ledger in ledgers:
        ledger.refresh()
        assert [t.layout for t in ledger.trials] == [layouts[0]]
    study = kept_in.get_study_id_from_name("same layout")
    first, second = kept_in.get_all_trials(study)
    assert (first.state, second.state) == (TrialState.COMPLETE, TrialState.FAIL)
    assert second.user_attrs["reason"] == "same layout as trial 0"
    # Nor later.
    assert not any(as_trial(x, layouts[0], s.score) for x, s in pairs)
    assert sum(len(s.scored) for s in scorers) == 1


def test_the_last_trial_is_not_begun_by_two(storage, stack):
    ledgers, layouts, _ = two_ledgers(stack, storage, name="last trial")
    scorer = SyntheticScorer(6)
    meet_after_writing(ledgers)
    calls = (partial(as_trial, x, layouts[i], scorer.score, limit=1) for i, x in enumerate(ledgers))
    assert sorted(at_once(*calls)) == [False, True]
    assert len(scorer.scored) == 1


def test_a_probe_and_a_trial_of_one_layout_are_one_score(storage, stack):
    ledgers, layouts, _ = two_ledgers(stack, storage, name="probe and trial")
    scorer = SyntheticScorer(6, pause=0.1)
    meet_after_writing(ledgers)
    trial, probe = at_once(
        lambda: as_trial(ledgers[0], layouts[0], scorer.score),
        lambda: ledgers[1].run_probe(layouts[0], scorer.score, charged_to="x"),
    )
    assert trial and not probe and len(scorer.scored) == 1
    # A probe that was there before is waited for.
    begun = threading.Event()

    def slow(layout):
        begun.set()
        return scorer.score(layout)

    def later():
        assert begun.wait(20)
        return as_trial(ledgers[0], layouts[1], scorer.score)

    probe = lambda: ledgers[1].run_probe(layouts[1], slow, charged_to="x")  # noqa: E731
    assert at_once(probe, later) == [True, True]
    assert len(scorer.scored) == 2
    assert ledgers[0].has_trial(layouts[1])


def test_a_probe_is_not_scored_by_two(storage, stack):
    ledgers, layouts, _ = two_ledgers(stack, storage, name="same probe")
    scorer = SyntheticScorer(6)
    meet_after_writing(ledgers)
    probes = (partial(x.run_probe, layouts[0], scorer.score, charged_to="x") for x in ledgers)
    assert sorted(at_once(*probes)) == [False, True]
    assert len(scorer.scored) == 1


def test_a_note_is_made_by_one(storage, stack):
    ledgers, _, kept_in = two_ledgers(stack, storage, name="one note")
    barrier, made = threading.Barrier(2), []
    for ledger in ledgers:
        looks = []

        def look(*args, makers=ledger._makers, looks=looks):
            looks.append(1)
            if len(looks) == 2:
                # Both have written down what they are about to make.
                barrier.wait(60)
            found = makers(*args)
            if len(looks) == 1:
                # Both have looked before either has written.
                barrier.wait(60)
            return found

        ledger._makers = look

    def make(number):
        made.append(number)
        time.sleep(0.2)
        return {"by": number}

    calls = (partial(x.note_once, "key", partial(make, i)) for i, x in enumerate(ledgers))
    assert sorted(at_once(*calls)) == [False, True] and len(made) == 1
    for ledger in ledgers:
        assert ledger.note_once("key", partial(make, 9))
        assert ledger.notes()["key"] == {"by": made[0]}
    study = kept_in.get_study_id_from_name("one note.notes")
    first, second = kept_in.get_all_trials(study)
    assert (first.state, second.state) == (TrialState.COMPLETE, TrialState.FAIL)
    assert second.user_attrs["reason"] == "others are at it"


# Leases


def running(beat, **worker):
    worker = {"id": "another", "place": "its machine", "pid": 1, **worker}
    attrs = {"worker": worker, "beat": beat}
    return optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attrs)


def test_a_worker_is_given_up_by_the_observers_clock():
    now = [50.0]
    storage, pace = optuna.storages.InMemoryStorage(), Pace(patience=60)
    leases = Leases(storage, Worker(), pace=pace, alone=False, clock=lambda: now[0])
    # What its own clock shows does not matter, only that it goes on.
    for beat in (-1e9, 1e12, 7.0):
        assert not leases.has_stopped(0, running(beat))
        now[0] += 59
        assert not leases.has_stopped(0, running(beat))
    now[0] += 2
    assert leases.has_stopped(0, running(7.0))
    assert not leases.has_stopped(1, running(7.0)), "another study's trial"
    assert not leases.has_stopped(0, running(8.0)), "it was only slow"
    # A trial that an earlier version began carries no lease.
    bare = optuna.trial.create_trial(state=TrialState.RUNNING)
    assert not leases.has_stopped(2, bare)
    now[0] += 61
    assert leases.has_stopped(2, bare)


def test_a_process_of_this_machine_that_is_gone_is_given_up_at_once():
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    worker = Worker()
    if worker.place is None:
        pytest.skip("this system does not say which processes are its own")
    leases = Leases(optuna.storages.InMemoryStorage(), worker, alone=False)
    here = running(1.0, place=worker.place, pid=child.pid)
    assert not leases.has_stopped(0, here)
    child.kill()
    child.join()
    assert leases.has_stopped(0, here)
    assert not leases.has_stopped(1, running(1.0, place="another", pid=child.pid))
    mine = running(1.0, id=worker.id, place=worker.place, pid=child.pid)
    assert not leases.has_stopped(2, mine)


def test_a_beat_is_renewed_while_a_layout_is_scored(storage, stack):
    ledgers, layouts, kept_in = two_ledgers(stack, storage, name="beats")
    study, seen = kept_in.get_study_id_from_name("beats"), set()

    def score(layout):
        until = time.monotonic() + 20
        while len(seen) < 3 and time.monotonic() < until:
            (trial,) = kept_in.get_all_trials(study)
            seen.add(trial.user_attrs["beat"])
        return SyntheticScorer(6).score(layout)

    assert as_trial(ledgers[0], layouts[0], score)
    assert len(seen) == 3


def test_a_worker_that_stood_still_loses_its_layout(storage, stack):
    now = [0.0]
    ledgers, layouts, kept_in = two_ledgers(
        stack, storage, name="stood still", clock=lambda: now[0], beat_every=1000
    )
    owner, observer = ledgers

    def score(layout):
        observer.refresh()
        assert observer.pending == {layout: 0}
        now[0] += 31
        observer.refresh()
        assert not observer.pending
        assert as_trial(observer, layout, SyntheticScorer(6).score)
        return SyntheticScorer(6).score(layout)

    assert not as_trial(owner, layouts[0], score)
    for ledger in ledgers:
        assert [trial.layout for trial in ledger.trials] == layouts[:1]
    first, second = kept_in.get_all_trials(kept_in.get_study_id_from_name("stood still"))
    assert (first.state, second.state) == (TrialState.FAIL, TrialState.COMPLETE)
    assert first.user_attrs["reason"] == "its worker stopped"


# One worker


def essence(result):
    trials = [(t.number, t.layout, t.score, t.proposed_by) for t in result.trials]
    probes = [(p.layout, p.score, p.charged_to) for p in result.probes]
    return trials, probes, result.baselines, result.asked


def study_of_one(storage, after=0, name="of one"):
    class Killed(SyntheticScorer):
        def score(self, layout):
            if after and len(self.scored) == after:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().score(layout)

    search = {"strategy": "tpe", "baselines": BASELINES, "storage": storage}
    config, space, budget = make(8, 3, trials=20, name=name, **search)
    return run_study(config, space, budget, Killed(8, pairs=1.0), run_dir=None)


def test_one_worker_at_a_shared_storage_is_a_function_of_the_seed(storage):
    whole = study_of_one(None)
    assert "tpe" in {trial.proposed_by for trial in whole.trials}
    for after in (3, 12, 9):
        # In a trial of a baseline, in a probe, in the search.
        fork = multiprocessing.get_context("fork")
        child = fork.Process(target=study_of_one, args=(storage, after))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    began = time.monotonic()
    assert essence(study_of_one(storage)) == essence(whole)
    # It was seen at once that the process was gone.
    assert time.monotonic() - began < DEFAULT_PACE.patience / 2


def test_two_workers_share_a_selectors_probes(tmp_path):
    url = f"journal:{tmp_path / 'study.journal'}"
    baselines = ["uniform", "swap_one", "greedy"]
    options = {"trials": 24, "baselines": baselines, "storage": url}
    scorers = [SyntheticScorer(8, pairs=1.0, pause=0.03) for _ in range(2)]
    pace = Pace(look_every=0.005)

    def work(number):
        config, space, budget = make(8, 3, **options)
        worker = Worker(number=number)
        return run_study(
            config, space, budget, scorers[number], run_dir=None, worker=worker, pace=pace
        )

    one, two = at_once(*(partial(work, number) for number in range(2)))
    assert essence(one) == essence(two) and len(one.trials) == 24
    scored = [set(s.scored) for s in scorers]
    assert scored[0].isdisjoint(scored[1])
    assert sum(len(s.scored) for s in scorers) == len(scored[0] | scored[1])
    for part in scored:
        assert len(part) > 0.4 * len(scored[0] | scored[1])
        assert len(part & {probe.layout for probe in one.probes}) > 5


# Journals


def journal_study(path, trials=20, storage=None, **options):
    options = {"trials": trials, "strategy": "random", **options}
    config, space, budget = make(8, 2, storage=storage or f"journal:{path}", **options)
    return run_study(config, space, budget, SyntheticScorer(8), run_dir=None)


@pytest.mark.parametrize(
    "torn",
    [b'{"op_code":4,"study', b"\0" * 300 + b"\n", b"\0\0\n{}}\n" + b"x" * 200_000, b"\n", b"{"],
    ids=["half a line", "zeros", "several", "empty line", "one byte"],
)
def test_a_torn_end_of_a_journal_is_mended(tmp_path, torn):
    path = tmp_path / "new" / "study.journal"
    journal_study(path, trials=8)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    result = journal_study(path)
    assert path.read_bytes().startswith(whole)
    assert all(json.loads(line) for line in path.read_bytes().splitlines())
    assert essence(result) == essence(journal_study(tmp_path / "other"))


def test_nothing_but_a_torn_line_is_an_empty_journal(tmp_path):
    path = tmp_path / "study.journal"
    path.write_bytes(b'{"op_co')
    assert len(journal_study(path, trials=3).trials) == 3
    assert path.read_bytes().startswith(b'{"op_code":0')


def test_damage_inside_a_journal_is_one_line(tmp_path):
    path = tmp_path / "study.journal"
    journal_study(path, trials=4)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:5], b"{garbage\n", *lines[5:]]))
    with pytest.raises(TrainingError, match=r"study\.journal: .* line before the last") as e:
        journal_study(path)
    assert "\n" not in str(e.value)


def die_while_writing(path):
    journal = Journal(path)
    journal._lock.acquire()
    with path.open("ab") as f:
        f.write(b'{"op_code":8,"half')
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_killed_while_it_writes_holds_nobody_up(tmp_path):
    path = tmp_path / "study.journal"
    # What Optuna's own lock would have left.
    (tmp_path / "study.journal.lock").symlink_to(path)
    journal = Journal(path)
    journal.append_logs([{"number": 1}])
    assert list(journal.read_logs(0)) == [{"number": 1}]
    child = multiprocessing.get_context("fork").Process(target=die_while_writing, args=(path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and path.read_bytes().endswith(b"half")
    assert list(journal.read_logs(1)) == []
    began = time.monotonic()
    journal.append_logs([{"number": 2}])
    assert time.monotonic() - began < 5
    assert list(journal.read_logs(1)) == list(journal.read_logs(0))[1:] == [{"number": 2}]


def append_many(path, number):
    journal = Journal(path)
    for i in range(100):
        journal.append_logs([{"number": number, "i": i, "long": "x" * 5000}])


def test_a_journals_lock_keeps_writers_apart(tmp_path):
    path, fork = tmp_path / "study.journal", multiprocessing.get_context("fork")
    children = [fork.Process(target=append_many, args=(path, number)) for number in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    found = Counter((line["number"], line["i"]) for line in Journal(path).read_logs(0))
    assert found == {(number, i): 1 for number in range(3) for i in range(100)}


# Who may share what


def test_a_host_with_another_teacher_or_other_settings_is_refused(storage, tmp_path):
    def join(identity, **options):
        options = {"trials": 4, "name": "hosts", "storage": storage, **options}
        config, space, budget = make(8, 2, **options)
        run_dir = tmp_path / "of its own"
        return run_study(
            config, space, budget, SyntheticScorer(8), run_dir=run_dir, identity=identity
        )

    identity = {"teacher": "abc", "text of the bank split": "def"}
    assert len(join(identity).trials) == 4
    with pytest.raises(RunError, match=r"begun with has changed \(teacher\); results of both") as e:
        join(identity | {"teacher": "xyz"})
    assert "\n" not in str(e.value)
    with pytest.raises(RunError, match=r"search\.tokens was 16384 and is now 64"):
        join(identity, tokens=64)
    assert len(join(identity, trials=6).trials) == 6


def test_sqlite_is_for_one_process(tmp_path):
    url = f"sqlite:///{tmp_path}/shared.db"
    with pytest.raises(ConfigError, match="several workers need a journal file or a data") as e:
        locate_study(url, run_dir=tmp_path, workers=2)
    assert e.value.exit_code == 2
    first = make(8, 2, trials=4, storage=url)

    class Second(SyntheticScorer):
        def score(self, layout):
            with pytest.raises(RunError, match=r"shared\.db: must be worked on by one process"):
                run_study(*first, SyntheticScorer(8), run_dir=None)
            return super().score(layout)

    assert len(run_study(*first, Second(8), run_dir=None).trials) == 4
    assert len(run_study(*first, SyntheticScorer(8), run_dir=None).trials) == 4


def test_where_a_study_is_kept(tmp_path):
    database, journal = tmp_path / "study.db", tmp_path / "study.journal"
    assert locate_study(None, run_dir=None) == "memory"
    assert locate_study(None, run_dir=tmp_path) == f"sqlite:///{database}"
    assert locate_study(None, run_dir=tmp_path, workers=2) == f"journal:{journal}"
    database.touch()
    with pytest.raises(RunError, match=r"study\.db: holds what one worker has scored"):
        locate_study(None, run_dir=tmp_path, workers=2)
    # What several began one may finish.
    journal.touch()
    assert locate_study(None, run_dir=tmp_path) == f"journal:{journal}"
    assert locate_study("journal:x", run_dir=tmp_path, workers=2) == "journal:x"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql+pymysql://me:secret@there/db", r"\*\*\*@there/db needs a driver .*pymysql"),
        ("nonsense://there/db", "nonsense://there/db is no database's URL"),
    ],
)
def test_a_storage_that_cannot_be_used_is_told_before_anything_runs(url, message):
    config, space, budget = make(8, 2, storage=url)
    scorer = SyntheticScorer(8)
    with pytest.raises(ConfigError, match=message) as e:
        run_study(config, space, budget, scorer, run_dir=None)
    assert "secret" not in str(e.value) and not scorer.scored


def test_each_worker_gets_its_share_of_the_machine(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert environments(3, "cpu") == [{"OMP_NUM_THREADS": "2"}] * 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = [e["CUDA_VISIBLE_DEVICES"] for e in environments(3, "auto")]
    assert seen == ["0", "1", "0"]
    assert [e[GPU_SHARERS] for e in environments(3, "auto")] == ["2"] * 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    seen = [e["CUDA_VISIBLE_DEVICES"] for e in environments(3, "cuda")]
    assert seen == ["5", "GPU-7", "5"]
    assert environments(2, "cuda:1") == [{GPU_SHARERS: "2"}] * 2


# Processes of one command


class Listener(Silent):
    def __init__(self, roles, gone):
        self.said, self.roles, self.gone = [], roles, gone

    def say(self, text):
        self.said.append(text)
        # The first line tells how many there are, then each tells of one that has stopped.
        if len(self.said) == 1 + len(self.roles) - self.roles.count("works"):
            self.gone.touch()


def run_roles(tmp_path, *roles):
    gone = tmp_path / "gone"
    storage, listener = f"journal:{tmp_path / 'study.journal'}", Listener(roles, gone)
    config, space, budget = make(8, 2, storage=storage, **crew.STUDY)
    result = None
    try:
        result = run_crew(
            config,
            space,
            budget,
            run_dir=tmp_path,
            target=crew.one_of_the_crew,
            arguments=(storage, roles, gone),
            environments=environments(len(roles), "cpu"),
            reporter=listener,
            pace=QUICK,
        )
    except TrainingError as e:
        listener.said.append(str(e))
    return result, listener.said


def test_the_search_goes_on_without_workers_that_stop(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    result, said = run_roles(tmp_path, "is killed", "fails", "works")
    assert os.environ["RANK"] == "0"
    assert result.exhaustive and len(result.trials) == 28
    assert said[0] == "3 workers score layouts"
    told = sorted(said[1:])
    assert re.fullmatch(
        r"worker 0 \(process \d+\) was stopped by SIGKILL; the others go on", told[0]
    )
    assert re.fullmatch(
        r"worker 1 \(process \d+\) ended with exit code 1: this one must fail; the others go on",
        told[1],
    )
    assert len(told) == 2


def test_a_search_without_a_worker_left_has_failed(tmp_path):
    result, said = run_roles(tmp_path, "is killed")
    assert result is None
    assert re.search(r"SIGKILL$", said[1])
    assert re.search(r"no worker came to its end; .*SIGKILL.* run again to continue", said[2])


def test_a_worker_that_fails_with_many_words_ends(tmp_path):
    result, said = run_roles(tmp_path, "fails with many words", "works")
    assert len(result.trials) == 28
    assert "this one must fail ..." in said[1] and len(said[1]) < 10_000


def test_no_worker_outlives_its_parent(tmp_path):
    with contextlib.ExitStack() as stack:
        parents = {}
        for how in (signal.SIGINT, signal.SIGKILL):
            folder = tmp_path / how.name
            folder.mkdir()
            command = [sys.executable, crew.__file__, str(folder)]
            parent = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            stack.callback(parent.kill)
            parents[how] = folder, parent
        for how, (folder, parent) in parents.items():
            crew.until_there(folder / "began")
            parent.send_signal(how)
            assert parent.wait(300) != 0
            # It had the time to tidy up.
            crew.until_there(folder / "left")


def test_two_workers_find_what_one_finds(tmp_path):
    rung = "search.rungs.tokens=[256]"
    one, _ = pipeline.search(make_study(tmp_path, rung, f"output={tmp_path / 'one'}"))
    config = make_study(tmp_path, rung, f"output={tmp_path / 'two'}")
    two, best = pipeline.search(config, workers=2)
    assert two.exhaustive
    scores = [{t.layout: t.score.per_block for t in r.trials} for r in (one, two)]
    assert scores[0] == scores[1]
    # Side by side or each alone, layouts are distilled to the same numbers: two, and a baseline's.
    distilled = [{x: s.per_block for x, s in r.rungs[0].scores.items()} for r in (one, two)]
    assert distilled[0] == distilled[1] and len(distilled[0]) == 3
    assert two.best.layout == one.best.layout and two.baselines == one.baselines
    written = yaml.safe_load(best.read_text(encoding="utf-8"))
    assert written["layout"] == list(one.best.layout.candidates)
    assert written["bank"] == dict(one.best.provenance["bank"])
    assert (config.run_dir / "study.journal").is_file()
    assert not (config.run_dir / "study.db").exists()
    # The run goes on with one worker, too, and answers questions.
    assert pipeline.score(config, "0,1")[2].trial is not None
    again, _ = pipeline.search(config)
    assert [t.layout for t in again.trials] == [t.layout for t in two.trials]
    # Another host that names the same storage finds all of it scored.
    joined = make_study(
        tmp_path,
        f"output={tmp_path / 'host'}",
        f"search.storage=journal:{config.run_dir / 'study.journal'}",
    )
    result, _ = pipeline.search(joined)
    assert [t.layout for t in result.trials] == [t.layout for t in two.trials]
    make_teacher(tmp_path / "teacher", seed=1)
    other = make_study(
        tmp_path, f"output={tmp_path / 'x'}", f"search.storage={joined.search.storage}"
    )
    with pytest.raises(RunError, match=r"'tiny': what it was begun with has changed \(teacher; "):
        pipeline.search(other)
    with pytest.raises(ConfigError, match="several workers need a journal file"):
        pipeline.search(make_study(tmp_path, "search.storage=sqlite:///x.db"), workers=2)
