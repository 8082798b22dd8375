"""Kernels of other packages: imported when first needed, checked once, logged once.

Nothing here is needed to run a mixer. A package that is missing, broken or of another version than
the code below knows is passed over, unless a configuration asks for it by name.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from mohawk_nas.errors import MixerError

__all__ = ["Backend", "find", "fused_kernels", "require"]

log = logging.getLogger(__name__)

Backend = Literal["auto", "mamba_ssm", "torch"]

# What is called of mamba-ssm, and with which arguments, all by name. Most of it is private there,
# so it is compared with what is installed before anything runs.
_MAMBA_SSM = {
    "_bmm_chunk_fwd": "a b chunk_size output_dtype",
    "_bmm_chunk_bwd": "a dout residual out",
    "_chunk_state_fwd": "B x dt dA_cumsum states_in_fp32",
    "_chunk_state_bwd_db": "x dt dA_cumsum dstates B ngroups",
    "_state_passing_fwd": "states dA_chunk_cumsum initial_states out_dtype",
    "_state_passing_bwd": "states dA_chunk_cumsum dout dfinal_states has_initial_states "
    "dstates_dtype states_dtype",
    "_chunk_scan_fwd": "cb x dt dA_cumsum C states D",
    "_chunk_scan_bwd_dstates": "C dA_cumsum dout dtype",
    "_chunk_scan_bwd_dC": "prev_states dA_cumsum dout C ngroups",
    "_chunk_scan_bwd_dcb": "x dt dA_cumsum dout ngroups",
    "_chunk_scan_bwd_ddAcs_stable": "x dt dA_cumsum dout cb",
    "_chunk_scan_chunk_state_bwd_dx": "x dt dA_cumsum B CB dout dstates D",
    "selective_state_update": "state x dt A B C D dt_bias",
}


def find(package: str) -> SimpleNamespace | None:
    """Functions of an optional package, or None if it cannot be used."""
    return _load(package)[0]


def require(package: str) -> SimpleNamespace:
    """:func:`find` for what a configuration names.

    Raises:
        MixerError: It cannot be used.
    """
    functions, problem = _load(package)
    if functions is None:
        raise MixerError(
            f"backend {package}: {problem}; install it with `pip install 'mohawk-nas[gpu]'`, or "
            "use `backend: auto`"
        )
    return functions


@functools.cache
def _load(package: str) -> tuple[SimpleNamespace | None, str]:
    """The functions, or None and why not."""
    try:
        if importlib.util.find_spec(package) is None:
            log.info("%s is not installed: plain torch is used in its place", package)
            return None, f"{package} is not installed"
        makers = {"mamba_ssm": _mamba_ssm, "triton": _triton}
        functions = makers[package]()
    # What is built for another torch or CUDA may raise anything while it is imported.
    except Exception as e:
        reason = f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e) else ''}"
        log.warning("%s cannot be used (%s): plain torch is used in its place", package, reason)
        return None, f"{package} cannot be used ({reason})"
    version = getattr(sys.modules[package], "__version__", "")
    log.info("%s %s is used", package, version)
    return functions, ""


def fused_kernels(tensor: Tensor) -> SimpleNamespace | None:
    """Our own Triton kernels, or None where they cannot run on such a tensor."""
    # Triton's interpreter runs on the CPU, for tests.
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    if tensor.is_cuda and torch.cuda.get_device_capability(tensor.device) < (8, 0):
        return None
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return find("triton")


def _mamba_ssm() -> SimpleNamespace:
    combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    update = importlib.import_module("mamba_ssm.ops.triton.selective_state_update")
    functions = _checked([combined, update], _MAMBA_SSM)
    _keep_tuning("mamba_ssm.ops.triton.")
    return functions


def _triton() -> SimpleNamespace:
    """Our own kernels, which need no more than Triton."""
    # Such an import is seen by who cuts out what an export needs.
    from ._conv_triton import fused_conv
    from ._step_triton import fused_step

    return SimpleNamespace(fused_conv=fused_conv, fused_step=fused_step)


def _checked(modules: list[Any], wanted: dict[str, str]) -> SimpleNamespace:
    """The wanted functions, if they are there and take the wanted arguments."""
    found = {}
    for name, arguments in wanted.items():
        function = next((getattr(m, name) for m in modules if hasattr(m, name)), None)
        if function is None:
            raise ImportError(f"this version has no {name}")
        taken = inspect.signature(function).parameters
        if missing := [a for a in arguments.split() if a not in taken]:
            raise ImportError(f"in this version {name} does not take {missing}")
        found[name] = function
    return SimpleNamespace(**found)


def _keep_tuning(prefix: str) -> None:
    """Keep on disk what the autotuned Triton kernels of these modules measure.

    Otherwise every process measures anew, a minute or more. Triton can keep it
    (``TRITON_CACHE_AUTOTUNING``), but reads that when a kernel is defined, and skips kernels whose
    configurations have a hook: those of mamba-ssm's backward pass. A user who turned it off is
    obeyed.
    """
    knobs = getattr(importlib.import_module("triton"), "knobs", None)
    autotuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    if knobs is None or not hasattr(autotuner, "check_disk_cache"):
        return  # Before 3.4.
    refused = "TRITON_CACHE_AUTOTUNING" in os.environ and not knobs.autotuning.cache
    if refused or knobs.runtime.interpret:
        return
    modules = [module for name, module in sys.modules.items() if name.startswith(prefix)]
    tuners = {id(t): t for m in modules for t in vars(m).values() if isinstance(t, autotuner)}
    for tuner in tuners.values():
        tuner.cache_results = True
        tuner.check_disk_cache = functools.partial(_tuned, tuner, tuner.check_disk_cache)


def _tuned(
    tuner: Any,
    check: Callable[[tuple[Any, ...], list[Any], Callable[[], None]], bool],
    key: tuple[Any, ...],
    configs: list[Any],
    benchmark: Callable[[], None],
) -> bool:
    """Triton's ``Autotuner.check_disk_cache`` for configurations with hooks too.

    On disk they stand without their hooks. There the key also holds the sizes, by powers of two:
    what was best for one short sequence must not bind every later process.
    """
    sizes = tuple(v.bit_length() for v in tuner.nargs.values() if type(v) is int)
    bare = {_without_hook(config): config for config in configs}

    def measure() -> None:
        benchmark()
        tuner.configs_timings = {_without_hook(c): t for c, t in tuner.configs_timings.items()}

    stored = check((*key, *sizes), list(bare), measure)
    if stored:
        tuner.cache[key] = bare[tuner.cache.pop((*key, *sizes))]
    return stored


def _without_hook(config: Any) -> Any:
    bare = copy.copy(config)
    bare.pre_hook = None
    return bare
