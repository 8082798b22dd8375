"""The mixer bank: every candidate of every layer, trained once and shared by all trials.

An entry is two files named by its key: ``KEY.safetensors`` with the weights and ``KEY.json`` with
what made it. The key is a hash of everything the weights depend on, so an entry made for another
teacher, by another recipe or on other text is never found. An unfinished entry is one file,
``KEY.partial.safetensors``, that also holds the optimizer's state.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mohawk_nas.config import BankConfig
from mohawk_nas.data import TrainingText
from mohawk_nas.distill.optimizer import ClippedAdamW
from mohawk_nas.distill.trainer import LayerJob, Stage, num_steps, train_layers
from mohawk_nas.errors import BankError
from mohawk_nas.files import (
    DamagedFile,
    load_metadata,
    load_tensors,
    read_json,
    save_tensors,
    write_json,
)
from mohawk_nas.mixer import Mixer, MixerConfig, build_mixer, identity_of
from mohawk_nas.ranks import rank
from mohawk_nas.registry import is_users, text_digest
from mohawk_nas.reporting import Reporter
from mohawk_nas.teacher import Teacher

__all__ = ["Bank", "candidate_seed"]

log = logging.getLogger(__name__)

FORMAT = 4
"""Raised when a change to the code makes old entries differ from what it would train."""


class Bank:
    """Trained candidates of one teacher, made by one recipe.

    Args:
        path: Folder of the entries; several studies may share it.
        teacher: Whose layers the candidates replace.
        candidates: Name -> configuration. Those that keep attention have no entries.
        recipe: Stages and their budgets.
        blocks: The text they are trained on.
        seed: Of initial weights and of the order of the text.
        start: Bank whose entries the candidates start from, instead of anew.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        teacher: Teacher,
        candidates: Mapping[str, MixerConfig],
        recipe: BankConfig,
        blocks: TrainingText,
        seed: int,
        start: Bank | None = None,
    ) -> None:
        self.path = Path(path)
        self.teacher = teacher
        self.candidates = {n: c for n, c in candidates.items() if not c.keeps_attention}
        self.recipe = recipe
        self.blocks = blocks
        self.seed = seed
        self.start = start
        self._loaded: dict[tuple[int, str], Mixer] = {}

    @property
    def stages(self) -> list[Stage]:
        """The recipe's stages that have tokens, in order."""
        stages = [
            Stage(name="matrix", config=self.recipe.matrix),
            Stage(name="hidden", config=self.recipe.hidden),
        ]
        return [stage for stage in stages if stage.config.tokens]

    def key(self, layer: int, candidate: str) -> str:
        """Content address of one entry."""
        return _digest(self._identity(layer, candidate))

    def has(self, layer: int, candidate: str) -> bool:
        """Whether the entry is finished and whole; a damaged one is named and set aside."""
        key = self.key(layer, candidate)
        weights, record = self._weights(key), self._record(key)
        if not record.is_file():
            return False
        try:
            made = read_json(record)
            if not weights.is_file() or _file_hash(weights) != made["sha256"]:
                raise DamagedFile(f"{weights} does not hold what {record.name} says")
        except (DamagedFile, KeyError, TypeError) as e:
            log.warning(
                "bank entry of layer %d, %s is damaged (%s); it is trained again",
                layer,
                candidate,
                e,
            )
            # Another rank may have seen it, too.
            record.unlink(missing_ok=True)
            return False
        return True

    def missing(self, wanted: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
        """Those of the wanted (layer, candidate) pairs that have no finished entry."""
        return [pair for pair in wanted if not self.has(*pair)]

    def train(
        self, wanted: Sequence[tuple[int, str]], *, reporter: Reporter, keep: bool = True
    ) -> None:
        """Train what is missing of the wanted (layer, candidate) pairs.

        Candidates that stand at the same step go through the teacher together; those that an
        interrupted run left at another step go on from there.

        Args:
            wanted: Pairs.
            reporter: Shown the progress.
            keep: Store entries and unfinished states. False trains in memory only and ignores what
                is stored: the reference for what a stored entry must equal.
        """
        missing = self.missing(wanted) if keep else list(wanted)
        jobs = [self._job(layer, candidate, resume=keep) for layer, candidate in missing]
        groups: dict[int, list[LayerJob]] = {}
        for job in jobs:
            groups.setdefault(job.step, []).append(job)
        for _, group in sorted(groups.items(), reverse=True):
            train_layers(
                self.teacher,
                group,
                self.blocks,
                self.stages,
                seed=self.seed,
                reporter=reporter,
                save=self._save_partial if keep else None,
                save_every=self.recipe.checkpoint_steps,
            )
            for job in group:
                job.mixer.eval().requires_grad_(False)
                self._loaded[job.layer, job.candidate] = job.mixer
                if keep:
                    self._save(job)

    def mixer(self, layer: int, candidate: str) -> Mixer:
        """The trained mixer of one entry, frozen; every caller gets the same object.

        Raises:
            BankError: There is no such entry.
        """
        pair = (layer, candidate)
        if pair not in self._loaded:
            if not self.has(*pair):
                raise BankError(
                    f"{self.path}: no bank entry for layer {layer}, {candidate}, made by this "
                    "teacher, recipe, text and seed; run the search first"
                )
            # Parts copied from the teacher come in its type.
            mixer = build_mixer(self.candidates[candidate], self.teacher.views[layer]).float()
            mixer.load_state_dict(load_tensors(self._weights(self.key(*pair))))
            mixer.to(self.teacher.device).eval().requires_grad_(False)
            self._loaded[pair] = mixer
        return self._loaded[pair]

    def release(self) -> None:
        """Let go of the mixers; those that are asked for again are read from the bank's folder."""
        self._loaded.clear()

    def record(self, layer: int, candidate: str) -> dict[str, Any]:
        """What is known of a finished entry: losses by tokens, seconds, versions."""
        record: dict[str, Any] = read_json(self._record(self.key(layer, candidate)))
        return record

    def final_loss(self, layer: int, candidate: str, stage: str) -> float:
        """Mean loss of a finished entry at the end of one of its stages.

        Args:
            layer: With ``candidate``, the entry.
            candidate: Its name.
            stage: ``matrix`` or ``hidden``.

        Raises:
            BankError: The entry was trained without that stage.
        """
        losses = [x for x in self.record(layer, candidate)["losses"] if x["stage"] == stage]
        if not losses:
            raise BankError(
                f"{self.path}: the bank entry for layer {layer}, {candidate} has no stage {stage}; "
                f"set bank.{stage}.tokens"
            )
        return float(losses[-1]["loss"])

    def _identity(self, layer: int, candidate: str) -> dict[str, Any]:
        config = self.candidates[candidate]
        return {
            "format": FORMAT,
            "teacher": self.teacher.fingerprint,
            "layer": layer,
            "mixer": _source_of(config),
            "config": identity_of(config),
            "stages": [[stage.name, dataclasses.asdict(stage.config)] for stage in self.stages],
            "block_size": self.blocks.block_size,
            "dtype": str(self.teacher.model.dtype),
            "data": self.blocks.fingerprint,
            "seed": self.seed,
            "start": None if self.start is None else self.start.key(layer, candidate),
        }

    def _job(self, layer: int, candidate: str, *, resume: bool) -> LayerJob:
        job = LayerJob(layer=layer, candidate=candidate, mixer=self._initial(layer, candidate))
        # What comes from another bank has been scaled to its teacher already.
        job.calibrated = self.start is not None
        partial = self._partial(self.key(layer, candidate))
        if resume and partial.is_file():
            try:
                self._restore(job, partial)
            except DamagedFile as e:
                log.warning("%s: %s; it starts anew", job.name, e)
        return job

    def _initial(self, layer: int, candidate: str) -> Mixer:
        if self.start is not None:
            return copy.deepcopy(self.start.mixer(layer, candidate)).requires_grad_(True)
        config = self.candidates[candidate]
        seed = candidate_seed(self.seed, layer, config)
        # Built on the CPU, so that every device starts from the same numbers.
        mixer = build_mixer(config, self.teacher.views[layer], seed=seed)
        return mixer.float().to(self.teacher.device)

    def _save_partial(self, job: LayerJob) -> None:
        assert job.optimizer is not None
        tensors = {f"mixer.{name}": t for name, t in job.mixer.state_dict().items()}
        names: dict[Tensor, str] = {
            parameter: name for name, parameter in job.mixer.named_parameters()
        }
        for parameter, state in job.optimizer.state.items():
            for slot, value in state.items():
                tensors[f"optimizer.{slot}.{names[parameter]}"] = value
        facts = {
            "step": job.step,
            "bad_steps": job.bad_steps,
            "seconds": job.seconds,
            "losses": job.losses,
            "loss_sum": job.loss_sum,
            "loss_count": job.loss_count,
            "text": job.text,
        }
        path = self._partial(self.key(job.layer, job.candidate))
        save_tensors(path, tensors, metadata={"job": json.dumps(facts)})

    def _restore(self, job: LayerJob, path: Path) -> None:
        tensors, metadata = load_tensors(path), load_metadata(path)
        facts = json.loads(metadata["job"])
        parts: dict[str, dict[str, Tensor]] = {"mixer": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        job.mixer.load_state_dict(parts["mixer"])
        job.calibrated = True
        for name in ("step", "bad_steps", "seconds", "loss_sum", "loss_count"):
            setattr(job, name, facts[name])
        job.losses = [tuple(entry) for entry in facts["losses"]]
        stage, inside = _position(self.stages, job.step, self.blocks.block_size)
        if inside == 0:
            # Between two stages: the next one starts with a new optimizer.
            return
        # Earlier versions kept no position of text that is all there: it follows from the step.
        position = inside * stage.config.batch_size
        text = {"text": self.blocks.fingerprint, "position": position}
        job.text = facts.get("text") or text
        parameters = dict(job.mixer.named_parameters())
        job.optimizer = ClippedAdamW(parameters.values(), stage.config)
        for name, parameter in parameters.items():
            state = {
                slot.partition(".")[0]: tensor.to(parameter.device)
                for slot, tensor in parts["optimizer"].items()
                if slot.partition(".")[2] == name
            }
            # Stage 1 gives no gradient to what lies outside the matrix.
            if state:
                job.optimizer.state[parameter] = state

    def _save(self, job: LayerJob) -> None:
        key = self.key(job.layer, job.candidate)
        weights = self._weights(key)
        save_tensors(weights, dict(job.mixer.state_dict()))
        # The record is written last: an entry without one is not there.
        write_json(
            self._record(key),
            {
                "identity": self._identity(job.layer, job.candidate),
                "candidate": job.candidate,
                "sha256": _file_hash(weights),
                "losses": [
                    {"stage": stage, "tokens": tokens, "loss": loss}
                    for stage, tokens, loss in job.losses
                ],
                "seconds": round(job.seconds, 3),
                "bad_steps": job.bad_steps,
                "device": device_name(self.teacher.device),
                "rank": rank(),
                "versions": versions(),
            },
        )
        self._partial(key).unlink(missing_ok=True)

    def _weights(self, key: str) -> Path:
        return self.path / f"{key}.safetensors"

    def _record(self, key: str) -> Path:
        return self.path / f"{key}.json"

    def _partial(self, key: str) -> Path:
        return self.path / f"{key}.partial.safetensors"


def candidate_seed(seed: int, layer: int, config: MixerConfig) -> int:
    """Seed of a candidate's initial weights: of itself alone, whatever is trained beside it."""
    identity = [seed, layer, type(config).__name__, identity_of(config)]
    return int(_digest(identity)[:15], 16)


def device_name(device: torch.device) -> str:
    """What a computation ran on, e.g. ``NVIDIA H100 80GB HBM3`` or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def versions() -> dict[str, str]:
    """Versions of what a result may depend on."""
    names = ("mohawk-nas", "torch", "transformers", "optuna", "datasets", "safetensors")
    return {name: importlib.metadata.version(name) for name in names}


def _source_of(config: MixerConfig) -> str:
    """What tells two mixers apart beyond their options.

    A built-in is told by its name and :data:`FORMAT`; a user's file changes while it is written,
    so its text is part of what an entry depends on.
    """
    cls = type(config)
    if not is_users(cls):
        return f"{cls.__module__}.{cls.__name__}"
    return f"{cls.__name__}:{text_digest(cls)}"


def _position(stages: Sequence[Stage], step: int, block_size: int) -> tuple[Stage, int]:
    """The stage that step number ``step`` belongs to, and its number inside it."""
    for stage in stages:
        steps = num_steps(stage.config, block_size)
        if step < steps:
            return stage, step
        step -= steps
    return stages[-1], 0


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
