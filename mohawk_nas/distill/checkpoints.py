"""Where a stage 3 that was stopped goes on.

One process writes ``checkpoint.safetensors``; several write a folder ``checkpoint-STEP`` of
torch.distributed.checkpoint, each rank its parts. Either kind is read by any number of processes. A
folder gets its name when all of it is on disk, and the one before it goes after that, so what has a
name is whole at any moment.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mohawk_nas.distill.logits_trainer import LogitsTrainer
from mohawk_nas.errors import TrainingError
from mohawk_nas.files import (
    DamagedFile,
    flush,
    load_metadata,
    load_tensors,
    read_json,
    save_tensors,
    telling_write_errors,
    write_json,
)
from mohawk_nas.ranks import num_ranks, of_first, rank, wait_for_all

__all__ = ["Checkpoints"]

PROGRESS = "progress.json"

_UNREADABLE = (
    CheckpointException,
    DamagedFile,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    ValueError,
    pickle.UnpicklingError,
)


class Checkpoints:
    """The checkpoints of one distillation.

    Args:
        folder: Of the distillation; all ranks see it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._alone = folder / "checkpoint.safetensors"
        if rank() == 0:
            for path in folder.glob(".checkpoint-*"):
                shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> Path | None:
        """The checkpoint that is furthest, None if there is none; all ranks get the same answer.

        Raises:
            DamagedFile: ``checkpoint.safetensors`` is there but cannot be read.
        """
        steps = {_step_of(path): path for path in self.folder.glob("checkpoint-*")}
        if rank() == 0 and self._alone.is_file():
            progress = json.loads(load_metadata(self._alone)["progress"])
            steps[progress["step"]] = self._alone
        return of_first(steps[max(steps)] if steps else None)

    def save(self, trainer: LogitsTrainer, progress: Mapping[str, Any]) -> None:
        """Write down all that the next step depends on; every rank calls this at the same step.

        Args:
            trainer: Of one student.
            progress: Plain values; ``step`` are the steps done.

        Raises:
            TrainingError: The disk is full, or another rank could not write.
        """
        state = trainer.state() | _random_state(trainer.teacher.device)
        if num_ranks() == 1:
            save_tensors(self._alone, state, metadata={"progress": json.dumps(progress)})
            self._drop_all_but(self._alone)
            return
        path = self.folder / f"checkpoint-{progress['step']}"
        if path.exists():
            # Of the same step, which every run reaches with the same weights.
            return
        beside = self.folder / f".{path.name}"
        with telling_write_errors(path):
            try:
                save(state, checkpoint_id=beside)
            except CheckpointException as e:
                reasons = sorted({str(error[0]) for error in e.failures.values()})
                raise TrainingError(f"{path}: cannot be written: {'; '.join(reasons)}") from e
            if rank() == 0:
                write_json(beside / PROGRESS, dict(progress))
                for file in (*beside.iterdir(), beside):
                    flush(file)
                os.replace(beside, path)
                flush(self.folder)
                self._drop_all_but(path)
        # Whoever goes on finds the folder as it is.
        wait_for_all()

    def restore(self, path: Path, trainer: LogitsTrainer) -> dict[str, Any]:
        """Bring a fresh trainer to where a checkpoint was made.

        Returns:
            The progress that was saved with it.

        Raises:
            DamagedFile: It cannot be read, or is of other tensors.
        """
        device = trainer.teacher.device
        if path == self._alone:
            tensors = load_tensors(path)
            trainer.load_state(tensors)
            _set_random_state(tensors, device)
            progress: dict[str, Any] = json.loads(load_metadata(path)["progress"])
            return progress
        try:
            progress = read_json(path / PROGRESS)
            state: dict[str, Any] = trainer.state()
            known = FileSystemReader(path).read_metadata().state_dict_metadata
            # A rank that was not there has none.
            random = {k: v for k, v in _random_state(device).items() if k in known}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*single process.*")
                load(state | random, checkpoint_id=path, no_dist=num_ranks() == 1)
        except _UNREADABLE as e:
            reason = " ".join(f"{type(e).__name__}: {e}".split())[:200]
            raise DamagedFile(f"{path}: must hold a whole checkpoint, but: {reason}") from e
        trainer.follow()
        _set_random_state(random, device)
        return progress

    def _drop_all_but(self, kept: Path) -> None:
        for path in self.folder.glob("checkpoint-*"):
            if path != kept:
                # Under its own name it would be taken for whole.
                aside = path.with_name(f".{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                shutil.rmtree(aside, ignore_errors=True)
        if kept != self._alone:
            self._alone.unlink(missing_ok=True)


def _step_of(path: Path) -> int:
    found = re.fullmatch(r"checkpoint-(\d+)", path.name)
    if found is None:
        raise DamagedFile(f"{path}: must be named by its step, but is not; remove it")
    return int(found[1])


def _random_state(device: torch.device) -> dict[str, Tensor]:
    """This rank's generators: a mixer may draw numbers."""
    found = {f"random/cpu/{rank()}": torch.get_rng_state()}
    if device.type == "cuda":
        found[f"random/cuda/{rank()}"] = torch.cuda.get_rng_state(device)
    return found


def _set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    if (cpu := state.get(f"random/cpu/{rank()}")) is not None:
        torch.set_rng_state(cpu)
    if device.type == "cuda" and (cuda := state.get(f"random/cuda/{rank()}")) is not None:
        torch.cuda.set_rng_state(cuda, device)
