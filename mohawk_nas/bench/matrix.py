"""Stage 1's distance of one layer, forward and backward, by three ways to compute it.

B batch, H heads, T tokens, P head size, N state size.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from mohawk_nas.bench.results import Record
from mohawk_nas.bench.setup import Case, Setup
from mohawk_nas.bench.timing import peak_bytes
from mohawk_nas.kernels.matrix_orientation import matrix_distance
from mohawk_nas.mixer import MatrixFactors

__all__ = ["cases", "count_flops", "plain_distance"]

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LENGTHS_OF_CPU = (512, 1024)
LENGTHS_OF_QUICK = (16, 33)

Distance = Callable[..., Tensor]

WAYS: dict[str, Distance] = {
    "kernel": partial(matrix_distance, backend="triton"),
    "twin": partial(matrix_distance, backend="torch"),
    "plain": lambda *args, **options: plain_distance(*args, **options),
}


def cases(setup: Setup) -> Iterator[Case]:
    """One sequence of each length by the fused kernel, block by block, and by whole matrices."""
    lengths = LENGTHS if setup.device.type == "cuda" else LENGTHS_OF_CPU
    view = setup.view
    for length in LENGTHS_OF_QUICK if setup.options.quick else lengths:
        sizes = {
            "batch": 1,
            "tokens": length,
            "heads": view.num_heads,
            "key_value_heads": view.num_kv_heads,
            "head": view.head_dim,
            "state": view.head_dim,
        }
        for way in WAYS:
            run = partial(_measure, setup, way, length)
            blank = setup.blank("matrix", way, **sizes)
            yield Case(blank=blank, run=run, may_run_out=way == "plain")
            if way == "kernel" and setup.device.type == "cuda":
                run = partial(_measure, setup, way, length, recorded=True)
                yield Case(blank=dataclasses.replace(blank, case="kernel, CUDA graph"), run=run)


def count_flops(*, batch: int, heads: int, tokens: int, head: int, state: int) -> int:
    """Operations of the distance's products, forward and backward, over the causal half.

    Forward there are two, ``q k^T`` and ``C B^T``. Backward has six: both of them once more for
    the rows, whose gradient is C's, and once more for the columns, whose gradient is B's, and the
    two products with ``dS/dM``. Each counts two operations a multiply-add over T (T + 1) / 2
    entries. What a way does beyond that (whole squares, the normalisation of the softmax) does not
    count.
    """
    pairs = batch * heads * tokens * (tokens + 1) // 2
    return 2 * pairs * (3 * head + 3 * state + 2 * state)


def plain_distance(
    query: Tensor, key: Tensor, factors: MatrixFactors, *, scaling: float, heads: Tensor
) -> Tensor:
    """:func:`matrix_distance` as one writes it down: whole matrices, ``(B, H)``."""
    kv_heads = torch.div(heads * key.shape[1], query.shape[1], rounding_mode="floor")
    query, key = query[:, heads.to(query.device)], key[:, kv_heads.to(key.device)]
    length = query.shape[2]
    above = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    teacher = scores.masked_fill(above, -torch.inf).softmax(-1)
    total = factors.log_decay.cumsum(-1)
    difference = total[..., :, None] - total[..., None, :]
    decay = difference.masked_fill(above, -torch.inf).exp()
    student = (factors.c @ factors.b.transpose(-1, -2)).float() * decay
    if factors.diagonal is not None:
        student = student + torch.diag_embed(factors.diagonal[:, None].expand(-1, length))
    return (teacher - student).square().sum((-1, -2))


def _measure(
    setup: Setup, way: str, length: int, blank: Record, *, recorded: bool = False
) -> Iterable[Record]:
    # Some ten matrices a head, in float32.
    needed = 40 * setup.view.num_heads * length**2
    if way == "plain" and setup.device.type == "cpu" and needed > (free := _free_bytes()):
        reason = f"needs about {needed / 2**30:.1f} GiB of the {free / 2**30:.1f} GiB that are free"
        return [dataclasses.replace(blank, left_out=reason)]
    distance, sets = WAYS[way], [operands(setup, length, number) for number in range(3)]

    def both(number: int) -> tuple[Tensor, ...]:
        query, key, factors, heads = sets[number % len(sets)]
        squared = distance(query, key, factors, scaling=setup.view.scaling, heads=heads)
        leaves = [factors.c, factors.b, factors.log_decay, factors.diagonal]
        return torch.autograd.grad(squared.sum(), [leaf for leaf in leaves if leaf is not None])

    call: Callable[[int], object] = both
    try:
        returned = both(0)
    except ValueError as e:
        # Where the kernel cannot run.
        return [dataclasses.replace(blank, left_out=str(e).partition("cannot run: ")[2] or str(e))]
    kept = sum(tensor.numel() * tensor.element_size() for tensor in returned)
    del returned
    peak = None if recorded else peak_bytes(lambda: both(0), setup.device)
    if recorded:
        call = _graphs(both, len(sets))
    view = setup.view
    flops = count_flops(
        batch=1, heads=view.num_heads, tokens=length, head=view.head_dim, state=view.head_dim
    )
    timing = setup.time(call)
    record = blank.measured(
        timing,
        tflops=flops / timing.median / 1e12,
        extra_bytes=None if peak is None else float(peak[1] - kept),
    )
    return [record]


def _graphs(both: Callable[[int], object], count: int) -> Callable[[int], object]:
    """The same without the gaps between launches, as a recorded training step has it."""
    graphs = []
    for number in range(count):
        both(number)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            both(number)
        graphs.append(graph)
    return lambda number: graphs[number % count].replay()


def operands(
    setup: Setup, length: int, number: int
) -> tuple[Tensor, Tensor, MatrixFactors, Tensor]:
    """Query, key, factors and head pairs of one sequence; decays so slow that no tile is dead."""
    view, device, dtype = setup.view, setup.device, setup.dtype
    heads, size = view.num_heads, view.head_dim
    generator = torch.Generator(device).manual_seed(number)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    query = normal(1, heads, length, size).to(dtype)
    key = normal(1, view.num_kv_heads, length, size).to(dtype)
    c = (normal(1, length, heads, size) / size**0.5).to(dtype).transpose(1, 2)
    b = (normal(1, length, heads, size) * 0.3).to(dtype).transpose(1, 2)
    uniform = torch.rand(1, length, heads, generator=generator, device=device)
    factors = MatrixFactors(
        c=c.requires_grad_(),
        b=b.requires_grad_(),
        log_decay=(-1e-4 * uniform).transpose(1, 2).requires_grad_(),
        diagonal=normal(heads).requires_grad_(),
    )
    return query, key, factors, torch.arange(heads)


def _free_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
