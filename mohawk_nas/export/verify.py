"""Has an exported folder checked in a fresh process.

This process writes tokens and the student's logits; the other one, :mod:`mohawk_nas.export.check`,
knows nothing of the student than what it loads from the folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mohawk_nas.errors import ExportError
from mohawk_nas.export import check
from mohawk_nas.files import save_tensors

__all__ = ["verify_export"]


def verify_export(
    folder: Path, student: Any, *, plugins: Sequence[str] = (), alone: bool = False
) -> dict[str, float]:
    """Reload an exported folder in a fresh process and compare it with the student.

    Args:
        folder: The export.
        student: What was exported, in float32.
        plugins: Files that register the mixers it uses.
        alone: The process finds neither this package nor the plugins, and runs the folder's code.

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
        if alone:
            # -P: this file's own folder is no place to import from. transformers copies the
            # folder's code into its cache of modules, which is to keep nothing of a check.
            command = [sys.executable, "-P", check.__file__, "--alone"]
            environment = {**os.environ, "HF_MODULES_CACHE": str(Path(temporary) / "modules")}
        else:
            command, environment = [sys.executable, "-m", check.__name__], None
        done = subprocess.run(
            [*command, str(folder), str(reference), *(() if alone else plugins)],
            capture_output=True,
            text=True,
            env=environment,
        )
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
        raise ExportError(f"the exported checkpoint fails its check: {reason}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found
