"""The state-space scan's back ends at the model's shape, forward and with backward."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mohawk_nas.bench.results import Record
from mohawk_nas.bench.setup import Case, Setup
from mohawk_nas.bench.timing import peak_bytes
from mohawk_nas.errors import MixerError

__all__ = ["cases"]

BACKENDS = {"plain": "torch", "mamba_ssm": "mamba_ssm"}
"""Case -> ``backend`` of the scan."""


def cases(setup: Setup) -> Iterator[Case]:
    """Each back end forward and forward with backward, peak memory beyond inputs and gradients."""
    view, batch, tokens = setup.view, setup.shape.batch_size, setup.shape.block_size
    sizes = {
        "batch": batch,
        "tokens": tokens,
        "heads": view.num_heads,
        "head": view.head_dim,
        "state": view.head_dim,
    }
    for name, backend in BACKENDS.items():
        blank = setup.blank("scan", name, **sizes)
        yield Case(blank=blank, run=partial(_measure, setup, backend))


def _measure(setup: Setup, backend: str, blank: Record) -> Iterable[Record]:
    scan = _scan_of(setup)
    sets = [_operands(setup, number) for number in range(3)]

    def both(number: int) -> tuple[Tensor, ...]:
        leaves, skip, dy = sets[number % len(sets)]
        y, _ = scan(*leaves, skip=skip, backend=backend)
        return torch.autograd.grad(y, [*leaves, skip], dy)

    def forward(number: int) -> None:
        leaves, skip, _ = sets[number % len(sets)]
        with torch.no_grad():
            scan(*leaves, skip=skip, backend=backend)

    try:
        forward(0)
    except MixerError as e:
        yield dataclasses.replace(blank, left_out=str(e))
        return
    for label, call in (("forward", forward), ("forward and backward", both)):
        record = dataclasses.replace(blank, case=f"{blank.case}, {label}")
        timing = setup.time(call)
        yield record.measured(timing, extra_bytes=_extra(call, setup))


def _extra(call: Callable[[int], Any], setup: Setup) -> float | None:
    """Bytes beyond the inputs and the gradients that are handed back."""
    returned: list[Tensor] = []
    peak = peak_bytes(lambda: returned.extend(call(0) or ()), setup.device)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in returned)
    return None if peak is None else float(peak[1] - kept)


def _scan_of(setup: Setup) -> Callable[..., Any]:
    # Mixers are found by their registered names alone, so the scan is asked of the module that the
    # space's mixer comes from.
    module = inspect.getmodule(type(setup.mixer_config))
    scan = getattr(module, "scan", None)
    if scan is None:
        raise MixerError(f"{setup.candidate}: its module has no `scan` to measure")
    return scan  # type: ignore[no-any-return]


def _operands(setup: Setup, number: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """C, B, x and log-decay as a mixer makes them, skip, and the gradient of the output."""
    view, device = setup.view, setup.device
    batch, tokens, heads = setup.shape.batch_size, setup.shape.block_size, view.num_heads
    generator = torch.Generator(device).manual_seed(number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    # Slices of one projection, head by head: not contiguous, as in the mixer.
    flat = normal(batch, tokens, 3 * heads * view.head_dim).to(setup.dtype)
    parts = [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in flat.chunk(3, dim=-1)]
    log_decay = -F.softplus(normal(batch, tokens, heads) - 1.0).transpose(1, 2)
    leaves = [tensor.detach().requires_grad_() for tensor in (*parts, log_decay)]
    return leaves, normal(heads).requires_grad_(), torch.randn_like(parts[2])
