"""Runs the suites that were asked for, one case after the other, and keeps what each says."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mohawk_nas.bench import search
from mohawk_nas.bench.options import Options
from mohawk_nas.bench.results import Record, Results, environment
from mohawk_nas.bench.setup import Case, Setup
from mohawk_nas.bench.timing import release
from mohawk_nas.distill.graph import out_of_memory
from mohawk_nas.errors import InputError
from mohawk_nas.files import DamagedFile, read_json
from mohawk_nas.ranks import num_ranks
from mohawk_nas.reporting import SILENT, Reporter

__all__ = ["results_path", "run_benchmarks"]


def results_path(out: Path, options: Options, *, force: bool) -> Path:
    """The file that ``--out`` means: itself if it ends in .json, else one in that folder.

    Raises:
        InputError: It is there already, or these suites are not for several processes.
    """
    if num_ranks() > 1 and set(options.suites) != {"distill"}:
        raise InputError(
            "SUITE: must be distill with several processes, but got "
            f"{', '.join(options.suites)}; start the others without torchrun"
        )
    words = [options.model, *options.suites, *(["quick"] if options.quick else [])]
    if num_ranks() > 1:
        words += [options.parallel, f"{num_ranks()}ranks"]
    name = "_".join(words)
    path = out if out.suffix == ".json" else out / f"{name}.json"
    if path.exists() and not force and _holds_records(path):
        raise InputError(f"--out: {path} is there already; use --force to overwrite it")
    return path


def _holds_records(path: Path) -> bool:
    # A search that was stopped leaves a file without any, and the same command goes on.
    try:
        return bool(read_json(path)["results"])
    except (DamagedFile, KeyError, TypeError):
        return True


def run_benchmarks(
    options: Options,
    path: Path,
    *,
    reporter: Reporter = SILENT,
    show: Callable[[str, Sequence[Record]], None] = lambda suite, records: None,
) -> Results:
    """Measure all that was asked for; what fails is recorded, and the rest goes on.

    Args:
        options: What the user asks for.
        path: Where the results go, as they come.
        reporter: Shown the work.
        show: Given each suite's records once it has ended.

    Raises:
        InputError: What was asked for is impossible; nothing has been run.
    """
    setup = Setup(options=options, reporter=reporter)
    if "search" in options.suites:
        search.check(setup)
    if setup.device.type == "cpu" and not options.quick:
        reporter.say("no GPU: this may take long; --quick takes seconds")
    command = options.command()
    if num_ranks() > 1:
        launcher = f"torchrun --nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', num_ranks())}"
        command = command.replace("mohawk-nas", f"{launcher} -m mohawk_nas", 1)
    results = Results(path, environment(setup.device, command=command))
    for suite in options.suites:
        before = len(results.records)
        with reporter.stage(f"bench {suite}", total=None, unit="case") as task:
            for case in _cases(suite, setup, results):
                results.add(_records(case))
                if not options.quick:
                    # Looking for garbage takes longer than a tiny case.
                    release(setup.device)
                task.advance(1, last=case.blank.case)
        show(suite, results.records[before:])
    results.finish()
    return results


def _cases(suite: str, setup: Setup, results: Results) -> Iterator[Case]:
    try:
        yield from importlib.import_module(f"mohawk_nas.bench.{suite}").cases(setup)
    except Exception as e:
        results.add([dataclasses.replace(setup.blank(suite, "setup"), error=_line(e))])


def _records(case: Case) -> list[Record]:
    # Whole records before a failure are kept.
    found: list[Record] = []
    try:
        for record in case.run(case.blank):
            found.append(record)
    except Exception as e:
        if num_ranks() > 1:
            # The others may be in the midst of an exchange, so nothing can follow.
            raise
        if case.may_run_out and (out_of_memory(e) or "can't allocate" in str(e)):
            found.append(dataclasses.replace(case.blank, left_out="out of memory"))
        else:
            found.append(dataclasses.replace(case.blank, error=_line(e)))
    return found


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
