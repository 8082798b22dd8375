"""Triton kernels on the CPU: Triton reads whether it interprets when it is imported."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def ready():
    """To be called first where Triton interprets."""
    import torch
    import triton.runtime.interpreter as interpreter

    # numpy >= 2.4 makes no integer of an array with one element, which Triton 3.6 relies on.
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patched
    torch.set_num_threads(1)
    # Uninitialised memory then holds NaN.
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)


def errors_of(module):
    """What ``interpreted()`` of a test module prints as JSON, run where Triton interprets."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    tests = Path(__file__).parent
    paths = [str(tests), str(tests.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", f"import {module.split('.')[-1]} as t; t.interpreted()"],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
