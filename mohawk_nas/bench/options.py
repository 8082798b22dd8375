"""What a benchmark is asked for, and the models it can be asked for; nothing heavy is imported."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mohawk_nas.errors import InputError, did_you_mean

__all__ = ["DEFAULT_SUITES", "MODELS", "SUITES", "ModelShape", "Options"]

SUITES: Mapping[str, str] = {
    "scan": "back ends of the state-space scan",
    "matrix": "stage-1 distance of one layer: fused kernel, twin, whole matrices",
    "bank": "training steps of stages 1 and 2, all layers at once",
    "trials": "scoring layouts, with and without kept prefixes",
    "distill": "training steps of stage 3: one student, several, on several processes, and stock",
    "search": "a whole search by phase, resumed across commands",
    "inference": "prefill and decoding of teacher and student, over contexts and batches",
}
"""Suite -> what it measures."""

DEFAULT_SUITES = ("scan", "matrix", "bank", "trials", "distill")
"""Run if none is named; the others take too long to be run unasked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A model as far as time depends on it; its weights are random."""

    config: Mapping[str, Any]
    """What ``AutoConfig.for_model`` is given."""
    batch_size: int
    """Blocks a step of stages 1 and 2."""
    block_size: int
    """Tokens a block."""
    distill_batch_size: int
    """Blocks a step of stage 3, which keeps the activations of the whole student."""
    keep: int
    """Attention layers of a layout."""


MODELS: Mapping[str, ModelShape] = {
    "phi-1.5": ModelShape(
        config={
            "model_type": "phi",
            "num_hidden_layers": 24,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 8192,
            "vocab_size": 51200,
            "max_position_embeddings": 2048,
            "partial_rotary_factor": 0.5,
        },
        batch_size=8,
        block_size=2048,
        distill_batch_size=1,
        keep=4,
    ),
    "llama-3.2-1b": ModelShape(
        config={
            "model_type": "llama",
            "num_hidden_layers": 16,
            "hidden_size": 2048,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "intermediate_size": 8192,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
        batch_size=8,
        block_size=2048,
        distill_batch_size=1,
        keep=4,
    ),
    "smollm2-135m": ModelShape(
        config={
            "model_type": "llama",
            "num_hidden_layers": 30,
            "hidden_size": 576,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        batch_size=16,
        block_size=1024,
        distill_batch_size=16,
        keep=6,
    ),
    "phi-24m": ModelShape(
        config={
            "model_type": "phi",
            "num_hidden_layers": 12,
            "hidden_size": 384,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "intermediate_size": 1536,
            "vocab_size": 4096,
            "max_position_embeddings": 2048,
            "partial_rotary_factor": 0.5,
        },
        batch_size=16,
        block_size=1024,
        distill_batch_size=16,
        keep=3,
    ),
}

# Of a first look and of tests: the family and whether heads are grouped stay, sizes do not.
_TINY = {
    "num_hidden_layers": 5,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 128,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the user asks for; None takes the model's or the suite's own."""

    suites: tuple[str, ...] = DEFAULT_SUITES
    model: str = "phi-24m"
    quick: bool = False
    batch_size: int | None = None
    block_size: int | None = None
    layers: int | None = None
    keep: int | None = None
    device: str = "auto"
    seed: int = 0
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """How processes share a step of suite ``distill``."""
    layouts: int | None = None
    """Layouts that suite ``trials`` scores in each case."""
    search_tokens: int | None = None
    trials: int | None = None
    stage1_tokens: int | None = None
    stage2_tokens: int | None = None
    checkpoint_steps: int | None = None
    work: Path | None = None
    contexts: tuple[int, ...] | None = None
    """Tokens a sequence of suite ``inference``."""
    batches: tuple[int, ...] | None = None
    """Sequences of suite ``inference``."""
    cell_seconds: float = 20.0
    """Suite ``inference`` times one context and batch no longer than about this."""

    def __post_init__(self) -> None:
        for where, name, known in (
            *(("SUITE", suite, SUITES) for suite in self.suites),
            ("--model", self.model, MODELS),
            ("--parallel", self.parallel, ("auto", "ddp", "fsdp")),
        ):
            if name not in known:
                raise InputError(
                    f"{where}: must be one of {', '.join(known)}, but got {name!r}."
                    f"{did_you_mean(name, known)}"
                )
        for where, numbers, least in (
            ("--contexts", self.contexts, 8),
            ("--batches", self.batches, 1),
        ):
            if numbers is not None and (not numbers or min(numbers) < least):
                raise InputError(
                    f"{where}: must be numbers from {least} on with commas between them, but got "
                    f"{','.join(map(str, numbers))!r}"
                )
        layers = self.shape.config["num_hidden_layers"]
        if not 0 < self.shape.keep < layers:
            raise InputError(
                f"--keep: must lie within 1 and {layers - 1}, less than all layers, but got "
                f"{self.shape.keep}"
            )
        context = self.shape.config["max_position_embeddings"]
        if not 8 <= self.shape.block_size <= context:
            raise InputError(
                f"--block-size: must lie within 8 and {context}, the context of {self.model}, but "
                f"got {self.shape.block_size}"
            )

    @property
    def shape(self) -> ModelShape:
        """The model with what the user changed in it."""
        shape = MODELS[self.model]
        config, sizes = dict(shape.config), dataclasses.asdict(shape)
        if self.quick:
            grouped = config["num_key_value_heads"] < config["num_attention_heads"]
            config |= {name: value for name, value in _TINY.items() if name in config}
            config["num_key_value_heads"] = 2 if grouped else 4
            sizes |= {"batch_size": 2, "block_size": 32, "distill_batch_size": 2, "keep": 2}
        if self.layers is not None:
            config["num_hidden_layers"] = self.layers
            sizes["keep"] = min(sizes["keep"], self.layers - 1)
        if self.batch_size is not None:
            sizes["batch_size"] = sizes["distill_batch_size"] = self.batch_size
        for name in ("block_size", "keep"):
            if (value := getattr(self, name)) is not None:
                sizes[name] = value
        return ModelShape(**sizes | {"config": config})

    def command(self) -> str:
        """The command line that asks for this."""
        words = ["mohawk-nas", "bench", *self.suites]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "suites" or (field.name != "model" and value == field.default):
                continue
            words.append("--" + field.name.replace("_", "-"))
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [] if value is True else [text]
        return shlex.join(words)
