"""Zero-shot and few-shot tasks, asked by EleutherAI's lm-evaluation-harness (lm-eval).

Prompts, metrics and the way an answer is read are the harness's own. What this module adds is where
the items come from: where there is no network, a folder holds each task's rows, as the hub's data
set has them.

The harness is imported when tasks are asked for, so nothing else needs it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import logging
import math
import os
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from mohawk_nas.errors import InputError, did_you_mean
from mohawk_nas.metrics import Figure
from mohawk_nas.reporting import SILENT, Reporter

__all__ = ["TaskSuite"]

ENDINGS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""Ending of a file with rows -> what reads it."""

BATCH_ON_CPU, BATCH_ON_GPU = 8, 32
"""Sequences of a batch where nobody says."""

BOOTSTRAP = 1000
"""Resamples behind the standard error of a figure that is no mean, such as LAMBADA's perplexity."""


class TaskSuite:
    """Tasks with their items, to be asked of any number of models.

    Args:
        names: Tasks, groups and tags of the harness, or patterns such as ``blimp_*``.
        data: Folder with rows of local tasks, each in a folder named by its task:
            ``piqa/validation.jsonl``, ``gsm8k/train-00000-of-00001.parquet``. A file belongs to the
            split that its name begins with; a file of another name is the split that the task is
            scored on. Tasks that have no folder come from the hub. The folder may also hold tasks
            of one's own, as the harness's YAML files.
        limit: Items of each task, its first ones; None takes all.
        fewshot: Worked examples before each question; None takes what the task says.
        batch_size: Sequences run at once; None takes what suits the device.

    Raises:
        InputError: lm-eval is not installed, a task is unknown, or its items cannot be had.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        data: Path | None = None,
        limit: int | None = None,
        fewshot: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.names = tuple(dict.fromkeys(names))
        self.limit, self.fewshot, self.batch_size = limit, fewshot, batch_size
        self.data = data
        self.settings: dict[str, Any] = {}
        """What the harness says of the last run: versions of tasks, examples, seeds."""
        if data is not None and not data.is_dir():
            raise InputError(f"--task-data: must be a folder, but {data} is none")
        # The harness reads rows through its task files; this holds ours, and what was read.
        self._scratch = tempfile.TemporaryDirectory(prefix="mohawk-tasks-")
        with _by_itself():
            self._manager = _manager(data)
            self._check(self._manager.task_index)
            self._local = self._find_local(self._manager.task_index)
            self._tasks = self._load()

    def run(
        self, model: Any, tokenizer: Any, *, name: str, reporter: Reporter = SILENT
    ) -> tuple[Figure, ...]:
        """Every figure of every task.

        Args:
            model: A causal LM.
            tokenizer: Its tokenizer; left as it is.
            name: Of the model, for the progress.
            reporter: Shown how many sequences have been run.
        """
        import lm_eval

        on_cpu = next(model.parameters()).device.type == "cpu"
        batch_size = self.batch_size or (BATCH_ON_CPU if on_cpu else BATCH_ON_GPU)
        with (
            _by_itself(),
            reporter.stage(f"tasks, {name}", total=None, unit="sequence") as progress,
        ):
            asked = _counting_model()(
                progress,
                pretrained=model,
                backend="causal",
                # The harness gives it a token to pad with.
                tokenizer=copy.deepcopy(tokenizer),
                batch_size=batch_size,
                # Else the likelihoods of an answer's tokens are added in the model's type: bfloat16
                # cannot tell answers apart that are half a nat from each other.
                softmax_dtype="float32",
            )
            try:
                found = lm_eval.simple_evaluate(
                    asked,
                    tasks=list(self._tasks),
                    num_fewshot=self.fewshot,
                    limit=self.limit,
                    bootstrap_iters=BOOTSTRAP,
                    # It would make another one.
                    task_manager=self._manager,
                )
            except AssertionError as e:
                # So it says that a task does not fit a model, e.g. that answers may be too long.
                raise InputError(f"--tasks: {' '.join(str(e).split())}") from e
        assert found is not None
        self.settings = self._describe(found, batch_size)
        return tuple(_figures(found))

    def _describe(self, found: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
        seeds = ("random_seed", "numpy_seed", "torch_seed", "fewshot_seed")
        return {
            "asked": list(self.names),
            "lm_eval": version("lm-eval"),
            "limit": self.limit,
            "batch_size": batch_size,
            "versions": dict(found["versions"]),
            "examples": dict(found["n-shot"]),
            "items": {name: count["effective"] for name, count in found["n-samples"].items()},
            "local": sorted(self._local & set(found["n-samples"])),
            "bootstrap": BOOTSTRAP,
            "seeds": {name: found["config"].get(name) for name in seeds},
        }

    def _check(self, index: Mapping[str, Any]) -> None:
        for name in self.names:
            if name not in index and not _matching(name, index):
                hint = did_you_mean(name, index) or " `lm-eval ls tasks` lists them all."
                raise InputError(f"--tasks: unknown task {name!r}.{hint}")

    def _find_local(self, index: dict[str, Any]) -> set[str]:
        """Point the tasks that have a folder of rows to it; returns their names."""
        found: set[str] = set()
        asked = {task for name in self._asked(index) for task in _tasks_of(name, index)}
        for task in sorted(asked & set(index)) if self.data is not None else ():
            assert self.data is not None
            folder = self.data / task
            if not (files := sorted(p for p in folder.glob("*") if p.suffix in ENDINGS)):
                continue
            overlay = Path(self._scratch.name) / f"{task}.yaml"
            overlay.write_text(yaml.safe_dump(self._overlay(index[task], folder, files)), "utf-8")
            index[task] = dataclasses.replace(index[task], yaml_path=overlay)
            found.add(task)
        return found

    def _asked(self, index: Mapping[str, Any]) -> list[str]:
        """The names, with patterns written out."""
        return [
            one
            for name in self.names
            for one in ([name] if name in index else _matching(name, index))
        ]

    def _overlay(self, entry: Any, folder: Path, files: Sequence[Path]) -> dict[str, Any]:
        """The task's own file, with its rows from a folder."""
        config, name = entry.cfg, entry.name
        keys = ("training_split", "validation_split", "test_split", "fewshot_split")
        splits = {key: config.get(key) for key in keys}
        scored = splits["test_split"] or splits["validation_split"]
        if scored is None:
            raise InputError(f"{folder}: the task {name} names no split, so rows cannot be local")
        by_split: dict[str, list[str]] = {}
        for file in files:
            fits = [s for s in splits.values() if s and _begins_with(file.stem, s)]
            by_split.setdefault(max(fits, key=len, default=scored), []).append(str(file.resolve()))
        examples = config.get("num_fewshot") if self.fewshot is None else self.fewshot
        shown = splits["fewshot_split"] or splits["training_split"] or splits["validation_split"]
        needed = [scored, *([shown] if examples and shown else [])]
        for split in needed:
            if split not in by_split:
                raise InputError(
                    f"{folder}: must hold the split {split!r} of {name} ({split}.jsonl or "
                    f"{split}.parquet), but holds {', '.join(file.name for file in files)}"
                )
        readers = {ENDINGS[file.suffix] for file in files}
        if len(readers) > 1:
            raise InputError(f"{folder}: must hold files of one kind, but holds JSON and parquet")
        return {
            "include": str(Path(entry.yaml_path).resolve()),
            # Splits that are not here are not looked for.
            **{key: split for key, split in splits.items() if split in by_split},
            **{key: None for key, split in splits.items() if split not in by_split},
            "dataset_path": readers.pop(),
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": by_split,
                "cache_dir": str(Path(self._scratch.name) / "cache"),
            },
        }

    def _load(self) -> list[Any]:
        """The harness's objects of every task and group."""
        index, loaded = self._manager.task_index, []
        for name in dict.fromkeys(self._asked(index)):
            try:
                found = self._manager.load([name])
            except Exception as e:
                raise self._why_not(name, e) from e
            # A group brings its tasks along.
            inside = {child for children in found["group_map"].values() for child in children}
            loaded += [group for n, group in found["groups"].items() if n not in inside]
            loaded += [task for n, task in found["tasks"].items() if n not in inside]
        return loaded

    def _why_not(self, name: str, error: Exception) -> InputError:
        """What to tell the user; of a group's tasks the one that is at fault is named."""
        index = self._manager.task_index
        for task in _tasks_of(name, index):
            if task == name:
                break
            try:
                self._manager.load([task])
            except Exception as e:
                return self._why_not(task, e)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        config = getattr(index.get(name), "cfg", None) or {}
        source = config.get("dataset_path")
        if name in self._local and self.data is not None and source is not None:
            return InputError(
                f"{self.data / name}: the task {name} cannot be loaded with these rows, which must "
                f"have the fields of the data set {source} ({reason})"
            )
        if source is None:
            return InputError(f"--tasks: the task {name} cannot be loaded ({reason})")
        split = config.get("test_split") or config.get("validation_split") or "test"
        where = f"{self.data or 'DIR'}/{name}/{split}.jsonl (or .parquet)"
        option = "" if self.data else " and give --task-data DIR"
        return InputError(
            f"--tasks: the rows of {name} are the hub's data set {source}, which cannot be had "
            f"({reason}); put them into {where}{option}"
        )


def _matching(pattern: str, index: Mapping[str, Any]) -> list[str]:
    from lm_eval.utils import pattern_match

    return list(pattern_match([pattern], list(index)))


def _tasks_of(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    """The tasks that a task, tag or group stands for."""
    entry = index.get(name)
    members = (entry.cfg or {}).get("task") if entry is not None else None
    if entry is not None and entry.cfg is None:
        members = sorted(entry.tags)
    if not isinstance(members, list):
        yield name
        return
    for member in members:
        if isinstance(member, Mapping):
            member = member.get("task", member.get("group"))
        if isinstance(member, str) and member != name:
            yield from _tasks_of(member, index)


def _begins_with(stem: str, split: str) -> bool:
    return stem == split or stem.startswith((f"{split}-", f"{split}_", f"{split}."))


def _manager(own: Path | None) -> Any:
    """The harness's list of tasks, with those that a folder adds."""
    manager_class = _manager_class()
    # Its list is made here: it holds many thousand files, and making it takes a while.
    manager = manager_class(include_defaults=False, include_path=None if own is None else str(own))
    manager.task_index.update({**_stock_tasks(), **manager.task_index})
    return manager


@functools.cache
def _stock_tasks() -> Mapping[str, Any]:
    return dict(_manager_class()().task_index)


def _manager_class() -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        raise InputError(
            f"--tasks: needs lm-eval, which cannot be imported ({e}); "
            "pip install 'mohawk-nas[eval]'"
        ) from e
    return TaskManager


@functools.cache
def _counting_model() -> Any:
    """The harness's wrapper of a Hugging Face model, which says how far it is."""
    from lm_eval.models.huggingface import HFLM

    class Counting(HFLM):  # type: ignore[misc]
        def __init__(self, progress: Any, **options: Any) -> None:
            self._progress = progress
            super().__init__(**options)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, *args, **kwargs)
            self._progress.advance(len(inps), tokens=inps.numel())
            return logits

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            tokens = super()._model_generate(context, *args, **kwargs)
            self._progress.advance(len(context), tokens=tokens.numel())
            return tokens

    return Counting


def _figures(found: Mapping[str, Any]) -> Iterator[Figure]:
    for task, metrics in found["results"].items():
        filters = {key.partition(",")[2] for key in metrics if "," in key}
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{chosen}")
            name = f"{task} {metric}" + (f" ({chosen})" if len(filters) > 1 else "")
            items = _items(found["samples"].get(task, ()), metric, chosen)
            is_mean = bool(items) and math.isclose(sum(items) / len(items), value, abs_tol=1e-9)
            yield Figure(
                name=name,
                value=float(value),
                standard_error=float(error) if isinstance(error, int | float) else None,
                items=items if is_mean else (),
                higher_is_better=bool(found["higher_is_better"].get(task, {}).get(metric, True)),
            )


def _items(samples: Sequence[Mapping[str, Any]], metric: str, chosen: str) -> tuple[float, ...]:
    """What each question counts, in their order."""
    rows = [row for row in samples if row["filter"] == chosen and metric in row]
    values = [row[metric] for row in sorted(rows, key=lambda row: row["doc_id"])]
    if not all(isinstance(value, int | float) for value in values):
        return ()
    return tuple(map(float, values))


@contextmanager
def _by_itself() -> Iterator[None]:
    """Keep the harness from starting processes, its advice off the screen, its seeds to itself."""
    names = ("lm_eval", "datasets")
    levels = {name: logging.getLogger(name).level for name in names}
    before = os.environ.get("DISABLE_MULTIPROC")
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        os.environ["DISABLE_MULTIPROC"] = "1"
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        # It prints to stdout, which is for results.
        with torch.random.fork_rng(devices), redirect_stdout(io.StringIO()):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
