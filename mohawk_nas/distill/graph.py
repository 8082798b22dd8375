"""Training steps without Python: recorded once as a CUDA graph, then replayed.

A step of a small model is thousands of kernels of some microseconds each; started one by one they
keep Python busy and the GPU waiting.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["RecordedStep", "out_of_memory", "side_by_side"]

log = logging.getLogger(__name__)

PLAIN_STEPS = 3
"""Steps run plainly before the recording: kernels are compiled and tuned, optimizers made."""

MAX_AHEAD = 8
"""Steps that may wait on the GPU while Python prepares the next: data is there in time, and a
number that is read is not old."""


class RecordedStep:
    """A step whose inputs keep their shapes and whose results stay in tensors of its own.

    On a GPU its first calls run plainly, then it is recorded and replayed. A step that cannot be
    recorded, because something in it waits for the GPU, runs plainly for ever.

    Args:
        step: Takes the inputs and returns nothing. It must not depend on anything in Python that
            changes from call to call.
        device: Where it runs.
    """

    def __init__(self, step: Callable[..., None], device: torch.device) -> None:
        self._step = step
        self._device = device
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._can_record = device.type == "cuda"
        self._inputs: tuple[Tensor, ...] = ()
        self._under_way: deque[torch.cuda.Event] = deque()

    def __call__(self, *inputs: Tensor) -> None:
        """One step on CPU tensors; returns before the GPU has finished."""
        if self._device.type != "cuda":
            self._step(*inputs)
            return
        with torch.cuda.device(self._device):
            self._call(inputs)

    @property
    def is_recorded(self) -> bool:
        """Whether calls are replayed."""
        return self._graph is not None

    def release(self) -> None:
        """Give back what the recording holds; the step is not called again.

        Whoever owns a step is usually what it calls, so without this its memory would wait for the
        garbage collector.
        """
        self._graph = None
        self._inputs = ()
        self._step = _released

    def _call(self, inputs: tuple[Tensor, ...]) -> None:
        if self._calls == 0:
            self._inputs = tuple(tensor.to(self._device) for tensor in inputs)
        for static, tensor in zip(self._inputs, inputs, strict=True):
            static.copy_(tensor.pin_memory(), non_blocking=True)
        if self._can_record and self._calls == PLAIN_STEPS:
            self._record()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run_aside()
        self._calls += 1
        if len(self._under_way) == MAX_AHEAD:
            self._under_way.popleft().synchronize()
        self._under_way.append(torch.cuda.Event())
        self._under_way[-1].record()

    def _run_aside(self) -> None:
        current, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self._step(*self._inputs)
        current.wait_stream(side)

    def _record(self) -> None:
        self._can_record = False
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        stream = _side_stream(torch.cuda.current_device())
        # NCCL has a thread that looks at events at any time.
        mode = "thread_local" if dist.is_available() and dist.is_initialized() else "global"
        recording = torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode)
        try:
            # A recording that fails leaves its own stream the current one.
            with torch.cuda.stream(torch.cuda.current_stream()), recording:
                self._step(*self._inputs)
        except RuntimeError as e:
            torch.cuda.synchronize()
            _discard(graph, pool)
            if (ran_out := out_of_memory(e)) is not None:
                raise ran_out from None
            reason = str(e).splitlines()[0]
            log.warning("the step cannot be recorded as a CUDA graph and runs slowly: %s", reason)
        else:
            self._graph = graph


def out_of_memory(error: BaseException) -> torch.OutOfMemoryError | None:
    """The want of GPU memory that an error is, or that was met before it; None if it is another.

    Where memory runs out in a recording, the recording cannot be ended either, and that is the
    error that is raised.
    """
    found: BaseException | None = error
    while found is not None and not isinstance(found, torch.OutOfMemoryError):
        found = found.__cause__ or found.__context__
    return found


def _discard(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """Give back the memory of a recording that failed."""
    try:
        graph.pool()
    except RuntimeError:
        # It was not ended, so the allocator still keeps its memory for it, and gives back no other
        # memory when it runs out, either.
        device = torch.cuda.current_device()
        # Releases before torch 2.8 know it by another name.
        names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")
        end: Any = next(getattr(torch._C, name) for name in names if hasattr(torch._C, name))
        with suppress(RuntimeError):
            end(device, pool)
        with suppress(RuntimeError):
            torch._C._cuda_releasePool(device, pool)
    graph.reset()
    torch.cuda.empty_cache()


def side_by_side(parts: Sequence[Callable[[], None]], device: torch.device) -> None:
    """Run parts of a step that have nothing to do with each other, on a GPU at the same time.

    A small model's kernels leave most of a GPU idle. The parts' memory is alive at once, too.
    """
    if device.type != "cuda" or len(parts) < 2:
        for part in parts:
            part()
        return
    current = torch.cuda.current_stream(device)
    streams = [_side_stream(current.device_index, number + 1) for number in range(len(parts))]
    try:
        for stream, part in zip(streams, parts, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                part()
    finally:
        # Also where a part failed: a recording may not end before all it began on has joined.
        for stream in streams:
            current.wait_stream(stream)


@functools.cache
def _side_stream(device: int, number: int = 0) -> torch.cuda.Stream:
    """Where a GPU's plain steps run and recordings are made, one after the other.

    What autograd and the libraries set up on first use belongs to a stream: the plain steps do it
    for the recording. cuBLAS never gives its part back, so there is one stream for all, and one
    more for each part that runs beside others.
    """
    return torch.cuda.Stream(device)


def _released(*inputs: Tensor) -> None:
    raise RuntimeError("this step has been released")
