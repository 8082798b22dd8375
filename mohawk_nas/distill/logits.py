"""Stage 3, end-to-end distillation of the assembled student, resumable at any step.

The folder holds ``best.safetensors``, the trained weights with the lowest validation KL so far,
``checkpoint.safetensors``, where to go on, and ``log.jsonl``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mohawk_nas.config import LogitsConfig
from mohawk_nas.data import TokenBlocks, TrainingBatches, TrainingText
from mohawk_nas.distill.graph import RecordedStep
from mohawk_nas.distill.losses import loss_of_hidden
from mohawk_nas.distill.optimizer import MAX_BAD_STEPS, ClippedAdamW, learning_rate
from mohawk_nas.distill.trainer import READ_EVERY, num_steps
from mohawk_nas.errors import TrainingError
from mohawk_nas.files import DamagedFile, atomic_write, load_metadata, load_tensors, save_tensors
from mohawk_nas.fusion import fused_activations
from mohawk_nas.metrics import BlockFigures, body, evaluate_blocks
from mohawk_nas.reporting import Reporter
from mohawk_nas.student import MixerSlot
from mohawk_nas.teacher import Teacher

__all__ = ["LogitsResult", "LogitsTrainer", "distill_logits", "trainable_parameters"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitsResult:
    """Where a distillation ended."""

    before: BlockFigures
    """The undistilled student on the validation split."""
    after: BlockFigures
    """The best weights on the same blocks."""
    best_step: int
    """Optimizer step of the best weights; 0 if none was better than the undistilled student."""
    tokens: int
    """Tokens trained on."""


def trainable_parameters(student: nn.Module, which: str) -> dict[str, nn.Parameter]:
    """The student's parameters that ``mixers``, ``all_but_mlp`` or ``all`` names."""
    in_slots = {
        f"{prefix}.{name}"
        for prefix, module in student.named_modules()
        if isinstance(module, MixerSlot)
        for name, _ in module.named_parameters()
    }
    chosen = {}
    for name, parameter in student.named_parameters():
        is_mlp = any(word in part for part in name.split(".") for word in ("mlp", "feed_forward"))
        if which == "all" or name in in_slots or (which == "all_but_mlp" and not is_mlp):
            chosen[name] = parameter
    return chosen


class LogitsTrainer:
    """Stage 3's optimizer step for one or more students, side by side on the same batches.

    What the teacher says of a batch is computed once for all of them; else they have nothing to do
    with each other. Beside a bfloat16 teacher a student's own stock parts are held in bfloat16 as
    well, and what moves are float32 masters of them; mixers stay in float32.

    Args:
        teacher: Frozen; its type is what products are computed in.
        students: In float32, sharing no weights with it or each other; trained in place.
        config: Stage 3.
    """

    def __init__(
        self, teacher: Teacher, students: Sequence[nn.Module], config: LogitsConfig
    ) -> None:
        self.teacher = teacher
        self.students = students
        self.config = config
        self.parameters: list[dict[str, nn.Parameter]] = []
        """A student each: what is trained, in float32."""
        self.optimizers: list[ClippedAdamW] = []
        # What the student computes with, and what it follows.
        self._followers: list[tuple[list[Tensor], list[Tensor]]] = []
        for student in students:
            student.requires_grad_(False)
            trained = trainable_parameters(student, config.trainable)
            for parameter in trained.values():
                parameter.requires_grad_(True)
            masters = trained
            if teacher.model.dtype == torch.bfloat16:
                masters = _lower_stock_parts(student, trained)
            for master in masters.values():
                # Gradients of a step's batches are added up here.
                master.grad = torch.zeros_like(master)
            apart = [name for name in trained if masters[name] is not trained[name]]
            self._followers.append(([trained[n] for n in apart], [masters[n] for n in apart]))
            self.parameters.append(masters)
            self.optimizers.append(ClippedAdamW(masters.values(), config))
        # A row a student: loss of the step that is under way, whether it was refused.
        self._figures = torch.zeros(len(students), 2, device=teacher.device)
        self._steps: list[Tensor] = []
        self._backward = RecordedStep(self._add_gradients, teacher.device)
        self._update = RecordedStep(self._move_weights, teacher.device)

    def load(self, number: int, weights: Mapping[str, Tensor]) -> None:
        """Give one student other weights, by the names of :attr:`parameters`."""
        with torch.no_grad():
            for name, master in self.parameters[number].items():
                master.copy_(weights[name])
            self._follow(number)

    def release(self) -> None:
        """Hand the students back in float32, with the weights they were trained to."""
        self._backward.release()
        self._update.release()
        for number, student in enumerate(self.students):
            student.float()
            followers, masters = self._followers[number]
            for follower, master in zip(followers, masters, strict=True):
                follower.data = master.data
            student.requires_grad_(False)

    def step(self, batches: Sequence[Tensor], rate: float) -> None:
        """Train on some batches as if they were one.

        Args:
            batches: ``(B, T)`` each, on the CPU, of the same shape each time.
            rate: Learning rate.
        """
        self._figures.zero_()
        for tokens in batches:
            self._backward(tokens)
        for optimizer in self.optimizers:
            optimizer.set_rate(rate)
        self._update()
        self._steps.append(self._figures.clone())

    def read(self) -> list[tuple[list[float], list[bool]]]:
        """Each student's loss, and whether its step was refused, for all steps since last asked."""
        steps = torch.stack(self._steps).tolist() if self._steps else []
        self._steps.clear()
        return [([row[0] for row in rows], [bool(row[1]) for row in rows]) for rows in steps]

    def _add_gradients(self, tokens: Tensor) -> None:
        teacher, config = self.teacher, self.config
        with fused_activations(teacher.model, *self.students):
            target = teacher.run(tokens)
            for number, student in enumerate(self.students):
                for follower in self._followers[number][0]:
                    follower.grad = None
                hidden = body(student, tokens)
                loss = loss_of_hidden(teacher.model, target, student, hidden, tokens, config)
                loss = loss / config.accumulate
                loss.backward()
                self._figures[number, 0] += loss.detach()
                self._collect(number)

    def _collect(self, number: int) -> None:
        """Hand gradients of what is held in bfloat16 to its masters."""
        pairs = [
            (master.grad, follower.grad)
            for follower, master in zip(*self._followers[number], strict=True)
            if follower.grad is not None and master.grad is not None
        ]
        if self.config.accumulate == 1 and pairs:
            # All in one kernel, which adding across types is not.
            torch._foreach_copy_([total for total, _ in pairs], [gradient for _, gradient in pairs])
        else:
            for total, gradient in pairs:
                total += gradient

    def _move_weights(self) -> None:
        for number, optimizer in enumerate(self.optimizers):
            self._figures[number, 1] = optimizer.clipped_step(self._figures[number, 0])
            optimizer.zero_grad(set_to_none=False)
            self._follow(number)

    def _follow(self, number: int) -> None:
        followers, masters = self._followers[number]
        if followers:
            with torch.no_grad():
                torch._foreach_copy_(followers, masters)


def _lower_stock_parts(
    student: nn.Module, trained: Mapping[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Hold all but a student's mixers in bfloat16; returns what is trained, in float32."""
    in_slots = {
        parameter
        for module in student.modules()
        if isinstance(module, MixerSlot)
        for parameter in module.parameters()
    }
    masters = {
        name: parameter if parameter in in_slots else nn.Parameter(parameter.detach().clone())
        for name, parameter in trained.items()
    }
    for parameter in student.parameters():
        # Buffers keep their type: frequencies of the rotary embedding need it.
        if parameter not in in_slots:
            parameter.data = parameter.data.to(torch.bfloat16)
    return masters


@dataclass
class _Progress:
    step: int = 0
    best_step: int = 0
    best_kl: float = math.inf
    bad_steps: int = 0


def distill_logits(
    teacher: Teacher,
    student: Any,
    *,
    undistilled: Any = None,
    train: TrainingText,
    validation: TokenBlocks,
    config: LogitsConfig,
    folder: Path,
    seed: int,
    reporter: Reporter,
) -> LogitsResult:
    """Train the student end to end; it holds the best weights when this returns.

    The weights that are kept are never worse on the validation split than the undistilled ones. A
    run that was interrupted goes on from its last checkpoint and ends with the same weights as an
    unbroken one (bitwise on a CPU). Dropout stays off.

    Args:
        teacher: The teacher.
        student: Shares no weights with it; trained in place.
        undistilled: What the result is compared with, where more of stage 2 has already changed
            the student. If that made it worse on the validation split, this is where to start.
        train: Text to train on.
        validation: Text to watch.
        config: Stage 3.
        folder: Of checkpoints and the log.
        seed: Of the order of the text.
        reporter: Shown the loss and the validation KL.

    Raises:
        TrainingError: Gradients were not finite too often.
        DamagedFile: What an interrupted run left cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    block_size = train.block_size
    steps = num_steps(config, block_size) // config.accumulate
    text = train.batches(batch_size=config.batch_size, seed=seed * 16 + 2)
    trainer = LogitsTrainer(teacher, [student], config)
    (parameters,), (optimizer,) = trainer.parameters, trainer.optimizers

    def evaluate(model: Any) -> BlockFigures:
        return evaluate_blocks(teacher, model, validation, batch_size=config.batch_size)

    try:
        before = start = evaluate(student)
        if undistilled is not None:
            before = evaluate(undistilled)
            if before.mean_kl < start.mean_kl:
                trainer.load(0, dict(undistilled.named_parameters()))
                start = before

        progress = _Progress(best_kl=start.mean_kl)
        checkpoint, best = folder / "checkpoint.safetensors", folder / "best.safetensors"
        if checkpoint.is_file():
            if not best.is_file():
                raise DamagedFile(f"{best}: must hold the best weights so far, but is not there")
            # Told now, rather than when training has ended.
            load_tensors(best)
            progress = _restore(checkpoint, trainer, text)
            reporter.say(f"continuing after step {progress.step} of {steps}")
        else:
            save_tensors(best, {name: p.detach() for name, p in parameters.items()})

        _trim_log(folder / "log.jsonl", progress.step)
        size = config.batch_size * config.accumulate * block_size
        with (
            (folder / "log.jsonl").open("a", encoding="utf-8") as log,
            reporter.stage(
                "stage 3 (logits)", total=steps, unit="step", done=progress.step
            ) as task,
        ):
            looked, rates = time.perf_counter(), []
            while progress.step < steps:
                rates.append(learning_rate(config, progress.step, steps))
                trainer.step([text.next() for _ in range(config.accumulate)], rates[-1])
                progress.step += 1
                last = progress.step == steps
                validates = last or progress.step % config.validate_steps == 0
                saves = last or progress.step % config.checkpoint_steps == 0
                if not (validates or saves or time.perf_counter() - looked >= READ_EVERY):
                    task.advance(1, tokens=size)
                    continue
                entries = _read(trainer, progress, rates)
                looked, rates = time.perf_counter(), []
                task.advance(1, tokens=size, loss=entries[-1]["loss"])
                if validates:
                    now = evaluate(student)
                    entries[-1]["validation_kl"] = now.mean_kl
                    if now.mean_kl < progress.best_kl:
                        progress.best_kl, progress.best_step = now.mean_kl, progress.step
                        save_tensors(best, {name: p.detach() for name, p in parameters.items()})
                log.write("".join(json.dumps(entry) + "\n" for entry in entries))
                log.flush()
                if saves:
                    _save(checkpoint, parameters, optimizer, progress, text)

        trainer.load(0, load_tensors(best))
        after = evaluate(student)
        return LogitsResult(
            before=before, after=after, best_step=progress.best_step, tokens=progress.step * size
        )
    finally:
        text.close()
        trainer.release()


def _trim_log(path: Path, step: int) -> None:
    """Forget what was logged after the checkpoint: those steps are done again."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        with atomic_write(path) as beside:
            beside.write_text("".join(kept), encoding="utf-8")


def _read(
    trainer: LogitsTrainer, progress: _Progress, rates: Sequence[float]
) -> list[dict[str, float]]:
    """Log entries of the steps since last asked, the newest last."""
    entries = []
    first = progress.step - len(rates) + 1
    for number, ((loss,), (refused,)) in enumerate(trainer.read()):
        entries.append({"step": first + number, "loss": loss, "lr": rates[number]})
        progress.bad_steps += refused
    if progress.bad_steps > MAX_BAD_STEPS:
        raise TrainingError(
            f"stage 3: loss or gradient was not finite in {progress.bad_steps} steps; lower "
            f"distill.logits.lr (now {trainer.config.lr})"
        )
    return entries


def _save(
    path: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: ClippedAdamW,
    progress: _Progress,
    text: TrainingBatches,
) -> None:
    tensors: dict[str, Tensor] = {f"weight/{name}": p.detach() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for slot, value in optimizer.state[parameter].items():
            tensors[f"{slot}/{name}"] = value
    facts = {"progress": json.dumps(vars(progress)), "text": json.dumps(text.state_dict())}
    save_tensors(path, tensors, metadata=facts)


def _restore(path: Path, trainer: LogitsTrainer, text: TrainingBatches) -> _Progress:
    tensors, metadata = load_tensors(path), load_metadata(path)
    (parameters,), (optimizer,) = trainer.parameters, trainer.optimizers
    trainer.load(0, {name: tensors.pop(f"weight/{name}") for name in parameters})
    for key, value in tensors.items():
        slot, _, name = key.partition("/")
        optimizer.state[parameters[name]][slot] = value.to(parameters[name].device)
    progress = _Progress(**json.loads(metadata["progress"]))
    text.load_state_dict(json.loads(metadata["text"]))
    return progress
