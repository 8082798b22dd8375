"""Stage 3, end-to-end distillation of the assembled student, resumable at any step.

The folder holds ``best.safetensors``, the trained weights with the lowest validation KL so far,
``checkpoint.safetensors``, where to go on, and ``log.jsonl``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mohawk_nas.config import LogitsConfig
from mohawk_nas.data import BlockOrder, TokenBlocks
from mohawk_nas.distill.losses import logits_loss
from mohawk_nas.distill.trainer import MAX_BAD_STEPS, learning_rate, make_optimizer, num_steps
from mohawk_nas.errors import TrainingError
from mohawk_nas.files import DamagedFile, atomic_write, load_metadata, load_tensors, save_tensors
from mohawk_nas.metrics import BlockFigures, body, evaluate_blocks
from mohawk_nas.reporting import Reporter
from mohawk_nas.student import MixerSlot
from mohawk_nas.teacher import Teacher, logits_from_hidden

__all__ = ["LogitsResult", "distill_logits", "trainable_parameters"]


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
    train: TokenBlocks,
    validation: TokenBlocks,
    config: LogitsConfig,
    folder: Path,
    seed: int,
    reporter: Reporter,
) -> LogitsResult:
    """Train the student end to end; it holds the best weights when this returns.

    The weights that are kept are never worse on the validation split than the undistilled ones. A
    run that was interrupted goes on from its last checkpoint and ends with the same weights as an
    unbroken one. Dropout stays off.

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
    student.requires_grad_(False)
    parameters = trainable_parameters(student, config.trainable)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = make_optimizer(list(parameters.values()), config)
    block_size = train.tokens.shape[1]
    steps = num_steps(config, block_size) // config.accumulate
    order = BlockOrder(len(train), batch_size=config.batch_size, seed=seed * 16 + 2)
    before = start = evaluate_blocks(teacher, student, validation, batch_size=config.batch_size)
    if undistilled is not None:
        before = evaluate_blocks(teacher, undistilled, validation, batch_size=config.batch_size)
        if before.mean_kl < start.mean_kl:
            student.load_state_dict(undistilled.state_dict())
            start = before

    progress = _Progress(best_kl=start.mean_kl)
    checkpoint, best = folder / "checkpoint.safetensors", folder / "best.safetensors"
    if checkpoint.is_file():
        if not best.is_file():
            raise DamagedFile(f"{best}: must hold the best weights so far, but is not there")
        # Told now, rather than when training has ended.
        load_tensors(best)
        progress = _restore(checkpoint, parameters, optimizer)
        reporter.say(f"continuing after step {progress.step} of {steps}")
    else:
        save_tensors(best, {name: p.detach() for name, p in parameters.items()})

    _trim_log(folder / "log.jsonl", progress.step)
    size = config.batch_size * config.accumulate * block_size
    with (
        (folder / "log.jsonl").open("a", encoding="utf-8") as log,
        reporter.stage("stage 3 (logits)", total=steps, unit="step", done=progress.step) as task,
    ):
        while progress.step < steps:
            rate = learning_rate(config, progress.step, steps)
            loss = _train_step(
                teacher, student, train, order, parameters, optimizer, config, rate, progress
            )
            progress.step += 1
            task.advance(1, tokens=size, loss=loss)
            entry: dict[str, float] = {"step": progress.step, "loss": loss, "lr": rate}
            last = progress.step == steps
            if last or progress.step % config.validate_steps == 0:
                now = evaluate_blocks(teacher, student, validation, batch_size=config.batch_size)
                entry["validation_kl"] = now.mean_kl
                if now.mean_kl < progress.best_kl:
                    progress.best_kl, progress.best_step = now.mean_kl, progress.step
                    save_tensors(best, {name: p.detach() for name, p in parameters.items()})
            log.write(json.dumps(entry) + "\n")
            log.flush()
            if last or progress.step % config.checkpoint_steps == 0:
                _save(checkpoint, parameters, optimizer, progress)

    weights = load_tensors(best)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    student.requires_grad_(False)
    return LogitsResult(
        before=before,
        after=evaluate_blocks(teacher, student, validation, batch_size=config.batch_size),
        best_step=progress.best_step,
        tokens=progress.step * size,
    )


def _trim_log(path: Path, step: int) -> None:
    """Forget what was logged after the checkpoint: those steps are done again."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        with atomic_write(path) as beside:
            beside.write_text("".join(kept), encoding="utf-8")


def _train_step(
    teacher: Teacher,
    student: Any,
    train: TokenBlocks,
    order: BlockOrder,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    config: LogitsConfig,
    rate: float,
    progress: _Progress,
) -> float:
    total = 0.0
    for part in range(config.accumulate):
        batch = order.indices(progress.step * config.accumulate + part)
        tokens = train.batch(batch).to(teacher.device)
        with torch.no_grad():
            target = teacher.logits(teacher.run(tokens))
        logits = logits_from_hidden(student, body(student, tokens))
        loss = logits_loss(target, logits, tokens, config) / config.accumulate
        loss.backward()
        total += loss.item()
    norm = nn.utils.clip_grad_norm_(parameters.values(), config.grad_clip)
    if torch.isfinite(norm) and math.isfinite(total):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    else:
        # Such a gradient never reaches the weights.
        progress.bad_steps += 1
        if progress.bad_steps > MAX_BAD_STEPS:
            raise TrainingError(
                f"stage 3: loss or gradient was not finite in {progress.bad_steps} steps; lower "
                f"distill.logits.lr (now {config.lr})"
            )
    optimizer.zero_grad(set_to_none=True)
    return total


def _save(
    path: Path,
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.AdamW,
    progress: _Progress,
) -> None:
    tensors: dict[str, Tensor] = {f"weight/{name}": p.detach() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        for slot, value in optimizer.state[parameter].items():
            tensors[f"{slot}/{name}"] = value
    save_tensors(path, tensors, metadata={"progress": json.dumps(vars(progress))})


def _restore(
    path: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.AdamW
) -> _Progress:
    tensors, metadata = load_tensors(path), load_metadata(path)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors.pop(f"weight/{name}"))
    for key, value in tensors.items():
        slot, _, name = key.partition("/")
        # AdamW keeps its step count on the CPU.
        device = "cpu" if slot == "step" else parameters[name].device
        optimizer.state[parameters[name]][slot] = value.to(device)
    return _Progress(**json.loads(metadata["progress"]))
