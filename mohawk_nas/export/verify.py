"""Checks an exported folder in a process of its own: ``python -m mohawk_nas.export.verify FOLDER``.

The parent writes tokens and the student's logits beside; this process knows nothing else of the
student than what it loads from the folder, as a user would.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mohawk_nas.errors import ExportError, MohawkError
from mohawk_nas.files import load_tensors, save_tensors
from mohawk_nas.teacher import cache_name

__all__ = ["check_folder", "verify_export"]

TOLERANCE = 1e-5
"""Largest difference of logits in float32, over their largest magnitude."""

NUM_PADDED = 3
NUM_NEW_TOKENS = 8


def verify_export(folder: Path, student: Any, *, plugins: Sequence[str] = ()) -> dict[str, float]:
    """Reload an exported folder in a fresh process and compare it with the student.

    Args:
        folder: The export.
        student: What was exported, in float32.
        plugins: Files that register the mixers it uses.

    Returns:
        Differences found, by name, all within tolerance.

    Raises:
        ExportError: The folder does not load, or does not do what the student does.
    """
    generator = torch.Generator().manual_seed(0)
    vocab = student.config.get_text_config().vocab_size
    tokens = torch.randint(0, vocab, (2, 29), generator=generator)
    with torch.no_grad():
        device = next(student.parameters()).device
        logits = student(input_ids=tokens.to(device), use_cache=False).logits
    with tempfile.TemporaryDirectory() as temporary:
        reference = Path(temporary) / "reference.safetensors"
        save_tensors(reference, {"tokens": tokens, "logits": logits.float()})
        command = [sys.executable, "-m", "mohawk_nas.export.verify", str(folder), str(reference)]
        done = subprocess.run([*command, *plugins], capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
        raise ExportError(f"the exported checkpoint fails its check: {reason}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def check_folder(folder: str, tokens: Tensor, logits: Tensor) -> dict[str, float]:
    """Compare a folder's model with the student's logits, and its decoding with its own forward.

    Raises:
        ExportError: Something differs by more than :data:`TOLERANCE`.
    """
    from transformers import AutoModelForCausalLM

    import mohawk_nas.export  # noqa: F401  (registers the model type)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    scale = logits.abs().max().item()

    def difference(name: str, one: Tensor, other: Tensor) -> float:
        found = (one - other).abs().max().item() / scale
        if not found <= TOLERANCE:
            raise ExportError(f"{name}: logits differ by {found:.2e}, allowed {TOLERANCE:.0e}")
        return found

    whole = model(input_ids=tokens, use_cache=False).logits
    found = {"reloaded logits": difference("reloaded logits", whole, logits)}
    half = tokens.shape[1] // 2
    state, name = model(input_ids=tokens[:, :half], use_cache=True), cache_name(model)
    steps = [state.logits]
    for t in range(half, tokens.shape[1]):
        held = {name: getattr(state, name)}
        state = model(input_ids=tokens[:, t : t + 1], use_cache=True, **held)
        steps.append(state.logits)
    found["prefill and decode"] = difference("prefill and decode", torch.cat(steps, 1), whole)

    mask = torch.ones_like(tokens)
    mask[0, :NUM_PADDED] = 0
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": NUM_NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": 0,
    }
    cached = model.generate(tokens, use_cache=True, **options)
    plain = model.generate(tokens, use_cache=False, **options)
    if not torch.equal(cached, plain):
        raise ExportError("generate() gives other tokens with a cache than without")
    return found


def _main() -> None:
    from mohawk_nas.registry import load_plugin

    folder, reference, *plugins = sys.argv[1:]
    for plugin in plugins:
        load_plugin(Path(plugin))
    tensors = load_tensors(reference)
    print(json.dumps(check_folder(folder, tensors["tokens"], tensors["logits"])))


if __name__ == "__main__":
    try:
        _main()
    except MohawkError as e:
        sys.exit(str(e))
