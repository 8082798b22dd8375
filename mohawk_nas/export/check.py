"""Checks an exported folder, in a process of its own that loads it as a user would.

    python check.py FOLDER REFERENCE [--alone] [PLUGIN]...

``REFERENCE`` is a safetensors file with tokens and the student's logits; what it says last on
stdout is what it found, as JSON. With ``--alone`` the package must not be there: nothing is
imported but torch, transformers and what the folder holds, so this file imports no more either.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["Differs", "compare"]

TOLERANCE = 1e-5
"""Largest difference of logits in float32, over their largest magnitude."""

NUM_PADDED = 3
NUM_NEW_TOKENS = 8


class Differs(Exception):
    """The folder's model does not do what it should."""


@torch.no_grad()
def compare(
    folder: str, tokens: Tensor, logits: Tensor, *, alone: bool = False
) -> dict[str, float]:
    """Compare a folder's model with the student's logits, its decoding with its own forward, and
    itself with what it saves.

    Args:
        folder: The export.
        tokens: ``(B, T)``
        logits: The student's, ``(B, T, V)``.
        alone: Run the folder's own code.

    Returns:
        Differences found, by name, all within :data:`TOLERANCE`.

    Raises:
        Differs: One is not.
    """
    from transformers import AutoModelForCausalLM

    def load(where: str | Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            where, dtype=torch.float32, trust_remote_code=alone
        ).eval()

    model = load(folder)
    scale = logits.abs().max().item()
    found: dict[str, float] = {}

    def note(name: str, one: Tensor, other: Tensor) -> None:
        found[name] = (one - other).abs().max().item() / scale
        if not found[name] <= TOLERANCE:
            raise Differs(f"{name}: logits differ by {found[name]:.2e}, allowed {TOLERANCE:.0e}")

    whole = model(input_ids=tokens, use_cache=False).logits
    note("reloaded logits", whole, logits)

    half = tokens.shape[1] // 2
    out = model(input_ids=tokens[:, :half], use_cache=True)
    steps = [out.logits]
    for t in range(half, tokens.shape[1]):
        # transformers 5.24 renamed it, and still takes the name from before.
        cache = out["cache"] if "cache" in out else out["past_key_values"]
        out = model(input_ids=tokens[:, t : t + 1], past_key_values=cache, use_cache=True)
        steps.append(out.logits)
    note("prefill and decode", torch.cat(steps, 1), whole)

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
        raise Differs("generate() gives other tokens with a cache than without")

    # Beside the export: a temporary folder may be held in memory.
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    parent = Path(folder).absolute().parent
    if shutil.disk_usage(parent).free > 1.1 * size:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".check-") as again:
            model.save_pretrained(again)
            del model
            note("saved and loaded again", load(again)(input_ids=tokens).logits, whole)
    return found


def main(arguments: list[str]) -> None:
    """Check one folder; exits with one line where something is wrong."""
    alone = "--alone" in arguments
    folder, reference, *plugins = [a for a in arguments if a != "--alone"]
    if alone:
        # From here on, importing the package fails as if it were not installed.
        sys.modules["mohawk_nas"] = None  # type: ignore[assignment]
    else:
        import mohawk_nas.export  # noqa: F401  (registers the model type)
        from mohawk_nas.registry import load_plugin

        for plugin in plugins:
            load_plugin(Path(plugin))
    tensors = load_file(reference)
    try:
        found = compare(folder, tensors["tokens"], tensors["logits"], alone=alone)
    except Differs as e:
        sys.exit(str(e))
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
