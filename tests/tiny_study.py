"""A study so small that a whole search takes seconds: random teacher, made-up text."""

import json
import random
from pathlib import Path

import torch
from transformers import PhiConfig, PhiForCausalLM

from mohawk_nas.config import study_from_dict

ASSETS = Path(__file__).parents[1] / "studies" / "assets"
PARTS = {"text": 3, "more": 1}
"""Texts of a mixture and their weights."""
WORDS = (ASSETS / "text" / "SOURCES.md").read_text(encoding="utf-8").split()


def make_teacher(folder, *, num_layers=4, num_heads=4, hidden_size=32, seed=0):
    """A random Phi with the quickstart's tokenizer."""
    config = PhiConfig(
        vocab_size=4096,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        # Large enough for attention to matter.
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    PhiForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((ASSETS / "phi-tiny" / name).read_bytes())
    return folder


def make_text(path, *, documents=150):
    """Documents of random words."""
    rng = random.Random(0)
    lines = [
        json.dumps({"text": " ".join(rng.choices(WORDS, k=60)), "source": str(i)})
        for i in range(documents)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def make_study(folder, *overrides, **settings):
    """A study over a teacher and text in ``folder``, which are made if they are not there."""
    folder.mkdir(exist_ok=True)
    teacher, text = folder / "teacher", folder / "text.jsonl"
    if not teacher.exists():
        make_teacher(teacher)
        make_text(text)
    raw = {
        "name": "tiny",
        "output": str(folder / "runs"),
        "teacher": {"source": str(teacher), "device": "cpu"},
        "data": {
            "source": str(text),
            "block_size": 16,
            "validation_tokens": 128,
            "test_tokens": 128,
            "cache": str(folder / "cache"),
        },
        "space": {"candidates": {"mamba2": {"mixer": "mamba2", "chunk_size": 8}}},
        "budget": {"attention_layers": 2},
        "bank": {
            "path": str(folder / "bank"),
            "hidden": {"tokens": 512, "batch_size": 4, "lr": 3e-3},
            "checkpoint_steps": 2,
        },
        "search": {"trials": 6, "tokens": 128, "objective": "kl"},
        "distill": {
            "logits": {
                "tokens": 640,
                "batch_size": 4,
                "lr": 3e-4,
                "validate_steps": 3,
                "checkpoint_steps": 2,
            }
        },
        **settings,
    }
    return study_from_dict(raw, overrides=overrides)


def make_streamed_study(folder, *overrides):
    """One that gives its layout and streams ``text.jsonl`` and ``more.jsonl``, with a worker."""
    mixture = [f"{{source: {folder}/{name}.jsonl, weight: {w}}}" for name, w in PARTS.items()]
    return make_study(
        folder,
        f"data.mixture=[{', '.join(mixture)}]",
        "data.source=[]",
        "data.streaming=true",
        "data.shuffle_blocks=16",
        "data.workers=1",
        "search.tokens=64",
        "layout=[0, 2]",
        "distill.start=scratch",
        *overrides,
    )
