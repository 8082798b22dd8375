"""Scans shared by mixers whose matrix is ``(C B^T) * decay mask``: plain torch, and mamba-ssm.

B batch, H heads, T tokens, N state size, P head width, K chunks, Q tokens a chunk.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mohawk_nas.errors import MixerError

from ._backends import Backend, find, require

# Tokens a chunk of mamba-ssm's kernels: a power of two from 16 on.
KERNEL_CHUNK = 64

# Heads times sequences that one launch of the decoding kernel can index.
MAX_GRID = 65_535

# Type in which those kernels hand on C B^T of a chunk.
SCORES = torch.float32


def naive_scan(
    c: Tensor, b: Tensor, x: Tensor, log_decay: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence itself, one token at a time; the reference for :func:`chunked_scan`.

    ``h_t = exp(log_decay_t) h_{t-1} + B_t x_t^T`` and ``y_t = C_t h_t``.

    Args:
        c: ``(B, H, T, N)``
        b: ``(B, H, T, N)``
        x: ``(B, H, T, P)``
        log_decay: ``(B, H, T)``
        state: State before the first token, ``(B, H, N, P)``; zeros if None.

    Returns:
        ``y``, ``(B, H, T, P)``, and the state after the last token.
    """
    h = x.new_zeros(*x.shape[:2], b.shape[-1], x.shape[-1]) if state is None else state
    outputs = []
    for t in range(x.shape[2]):
        h = h * log_decay[:, :, t, None, None].exp() + b[:, :, t, :, None] * x[:, :, t, None, :]
        outputs.append(torch.einsum("bhn,bhnp->bhp", c[:, :, t], h))
    return torch.stack(outputs, dim=2), h


def chunked_scan(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    *,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """:func:`naive_scan` as matrix products over chunks (Mamba-2, arXiv 2405.21060).

    Decay sums are taken in float32 inside a chunk, so a decay close to 1 over thousands of tokens
    keeps its small logarithm, and the state travels between chunks in float32.
    """
    length, dtype = x.shape[2], x.dtype
    chunk = min(chunk_size, length)
    if pad := -length % chunk:
        # Zeros add nothing to the state, and a log-decay of zero keeps it.
        c, b, x = (F.pad(tensor, (0, 0, 0, pad)) for tensor in (c, b, x))
        log_decay = F.pad(log_decay, (0, pad))
    c, b, x = (tensor.unflatten(2, (-1, chunk)) for tensor in (c, b, x))  # (B, H, K, Q, ·)
    total = log_decay.float().unflatten(2, (-1, chunk)).cumsum(-1)  # (B, H, K, Q)

    # 1. Inside a chunk: the mixing matrix of the chunk.
    matrix = (c @ b.transpose(-1, -2)) * decay_mask(total).to(dtype)  # (B, H, K, Q, Q)
    y = matrix @ x

    # 2. What each chunk adds to the state at its end.
    to_end = (total[..., -1:] - total).exp().to(dtype)
    added = (b * to_end[..., None]).transpose(-1, -2) @ x  # (B, H, K, N, P)

    # 3. The state at each chunk's start, from chunk to chunk.
    h = torch.zeros_like(added[:, :, 0], dtype=torch.float32) if state is None else state.float()
    # One product takes a GPU less time than a launch or more a chunk; on a CPU it is no faster.
    passed = pass_by_product if x.is_cuda and added.shape[2] <= 64 else pass_one_by_one
    starts, h = passed(h, added.float(), total[..., -1])

    # 4. What that state gives to the chunk's outputs.
    from_start = total.exp().to(dtype)
    y = y + (c * from_start[..., None]) @ starts.to(dtype)
    return y.flatten(2, 3)[:, :, :length], h


def pass_one_by_one(h: Tensor, added: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """The state at each chunk's start, and after the last one.

    Args:
        h: State before the first chunk, ``(B, H, N, P)``.
        added: What each chunk adds to it, ``(B, H, K, N, P)``.
        total: Each chunk's sum of log-decays, ``(B, H, K)``.
    """
    across = total.exp()[..., None, None]  # (B, H, K, 1, 1)
    starts = []
    for k in range(added.shape[2]):
        starts.append(h)
        h = across[:, :, k] * h + added[:, :, k]
    return torch.stack(starts, dim=2), h


def pass_by_product(h: Tensor, added: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`pass_one_by_one` as one product with the decays from chunk to chunk."""
    # In float64, for the same reason as sums over a whole sequence elsewhere: a decay close to 1 is
    # the difference of two sums that may be large.
    sums = F.pad(total.double().cumsum(-1), (1, 0))  # (B, H, K + 1)
    parts = torch.cat([h[:, :, None], added], dim=2)  # (B, H, K + 1, N, P)
    with torch.autocast(h.device.type, enabled=False):
        states = decay_mask(sums).float() @ parts.flatten(3)
    states = states.unflatten(3, h.shape[2:])
    return states[:, :, :-1], states[:, :, -1]


def decay_mask(total: Tensor) -> Tensor:
    """``exp(total_i - total_j)`` for j <= i and 0 above, from cumulative log-decays.

    Args:
        total: ``(..., T)``

    Returns:
        ``(..., T, T)``
    """
    above = torch.ones(total.shape[-1], total.shape[-1], dtype=torch.bool, device=total.device)
    difference = total[..., :, None] - total[..., None, :]
    # Masked before exp: above the diagonal the difference is positive and may overflow, and
    # 0 * inf would reach the gradients.
    return difference.masked_fill(above.triu(1), -torch.inf).exp()


def scan(
    c: Tensor,
    b: Tensor,
    x: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    *,
    skip: Tensor | None = None,
    backend: Backend = "auto",
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """:func:`chunked_scan` plus ``skip_h x_t``, by the fastest back end that fits.

    Args:
        c: ``(B, H, T, N)``
        b: ``(B, H, T, N)``
        x: ``(B, H, T, P)``
        log_decay: ``(B, H, T)``, never positive.
        state: State before the first token, ``(B, H, N, P)``. Where no gradient is asked for, a
            single token may be added in place.
        skip: ``(H,)``
        backend: ``auto`` takes mamba-ssm where it is installed, the tensors are on a GPU and its
            float32, which is TF32, is as exact as torch's matrix products are set to be.
        chunk_size: Of the plain scan.

    Returns:
        ``y``, ``(B, H, T, P)``, in x's type, and the state after the last token in float32.

    Raises:
        MixerError: The back end was asked for by name and cannot be used.
    """
    one = x.shape[2] == 1 and state is not None and not torch.is_grad_enabled()
    kernels = _kernels(backend, x, products=not one)
    if kernels is None:
        y, state = chunked_scan(c, b, x, log_decay, state, chunk_size=chunk_size)
        return (y if skip is None else y + skip.to(x.dtype)[:, None, None] * x), state
    run = _kernel_step if one and x.shape[0] * x.shape[1] <= MAX_GRID else _kernel_scan
    # Some of the kernels are launched on the current device, whatever device the tensors are on.
    with torch.cuda.device(x.device):
        return run(kernels, c, b, x, log_decay, state, skip)


def _kernels(backend: Backend, x: Tensor, *, products: bool) -> SimpleNamespace | None:
    """mamba-ssm's functions, or None for the plain scan."""
    if backend == "torch":
        return None
    if backend == "mamba_ssm":
        if not x.is_cuda:
            raise MixerError(
                f"backend mamba_ssm: needs a CUDA device, but the mixer runs on {x.device}; use "
                "`backend: auto`"
            )
        return require("mamba_ssm")
    if not x.is_cuda or x.dtype == torch.float64:
        return None
    # The kernels multiply float32 as TF32.
    if products and x.dtype == torch.float32 and not _tf32_allowed():
        return None
    return find("mamba_ssm")


def _tf32_allowed() -> bool:
    matmul = torch.backends.cuda.matmul
    # From torch 2.9 on the older name raises once the newer one was written to.
    if hasattr(matmul, "fp32_precision"):
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


def _kernel_step(
    kernels: SimpleNamespace,
    c: Tensor,
    b: Tensor,
    x: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    skip: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """One token by mamba-ssm's decoding kernel; the state is changed in place where it can be.

    The kernel computes ``exp(dt A) h + dt B x^T`` with one A for all sequences. Sequences are
    passed as further heads, with A the log-decay and dt = 1.
    """
    assert state is not None
    batch, heads, _, width = x.shape
    rows = batch * heads
    c, b, x = (tensor.reshape(1, rows, -1) for tensor in (c, b, x))
    h = state.float().transpose(-1, -2).flatten(0, 1)[None]  # (1, B H, P, N)
    one, none = x.new_ones((), dtype=torch.float32), x.new_zeros((), dtype=torch.float32)
    skips = none.expand(rows) if skip is None else skip.float().expand(batch, heads).reshape(rows)
    y = kernels.selective_state_update(
        state=h,
        x=x,
        dt=one.expand(1, rows, width),
        A=log_decay.float().reshape(rows, 1, 1).expand(rows, width, h.shape[-1]),
        B=b,
        C=c,
        D=skips[:, None].expand(rows, width),
        # Version 2.3 cannot do without.
        dt_bias=none.expand(rows, width),
    )
    return y.view(batch, heads, 1, width), h.view(batch, heads, width, -1).transpose(-1, -2)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _kernel_scan(
    kernels: SimpleNamespace,
    c: Tensor,
    b: Tensor,
    x: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    skip: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Any number of tokens by mamba-ssm's kernels."""
    c, b = c.to(x.dtype), b.to(x.dtype)
    h = None if state is None else state.float().transpose(-1, -2)
    y, final = _KernelScan.apply(  # type: ignore[no-untyped-call]
        kernels, *(tensor.transpose(1, 2) for tensor in (c, b, x)), log_decay, h, skip
    )
    return y.transpose(1, 2), final.transpose(-1, -2)


class _KernelScan(torch.autograd.Function):
    """mamba-ssm's ``mamba_chunk_scan_combined`` with the decay apart from the step.

    The public function computes ``h_t = exp(dt A) h_{t-1} + dt B x^T`` and would need x / dt. Then
    the gradients of x / dt and dt cancel in terms of size 1 / dt, which in bfloat16 leaves noise
    where the decay is close to 1. Its parts take sums of the log-decay and dt apart: here dt is 1,
    nothing is divided, and the log-decay's gradient is the part that the public function sends
    through dt A. The order of calls is that of mamba_ssm/ops/triton/ssd_combined.py,
    ``_mamba_chunk_scan_combined_{fwd,bwd}``, 2.3.2.

    Tensors as there: ``(B, T, H, ·)``, states ``(B, H, P, N)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernels: SimpleNamespace,
        c: Tensor,
        b: Tensor,
        x: Tensor,
        log_decay: Tensor,
        state: Tensor | None,
        skip: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        c, b, x = (t if t.stride(-1) == 1 else t.contiguous() for t in (c, b, x))
        skip = None if skip is None else skip.float().contiguous()
        pad = -x.shape[1] % KERNEL_CHUNK
        total = F.pad(log_decay.float(), (0, pad)).unflatten(2, (-1, KERNEL_CHUNK)).cumsum(-1)
        total = total.contiguous()  # (B, H, K, Q)
        one = total.new_ones(()).expand_as(total)
        added = kernels._chunk_state_fwd(B=b, x=x, dt=one, dA_cumsum=total, states_in_fp32=True)
        starts, final = kernels._state_passing_fwd(
            states=added.flatten(3),
            dA_chunk_cumsum=total[..., -1],
            initial_states=None if state is None else state.flatten(2),
            out_dtype=c.dtype,
        )
        scores = kernels._bmm_chunk_fwd(a=c, b=b, chunk_size=KERNEL_CHUNK, output_dtype=SCORES)
        y, _ = kernels._chunk_scan_fwd(
            cb=scores, x=x, dt=one, dA_cumsum=total, C=c, states=starts.view_as(added), D=skip
        )
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(c, b, x, total, state, skip)
        return y, final.view(*final.shape[:2], *added.shape[3:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        kernels: SimpleNamespace = ctx.kernels
        c, b, x, total, state, skip = ctx.saved_tensors
        heads, length = x.shape[2], x.shape[1]
        dy = torch.zeros_like(x) if dy is None else dy
        dy = dy if dy.stride(-1) == 1 else dy.contiguous()
        one = total.new_ones(()).expand_as(total)
        # The states are computed again rather than kept: they are larger than all inputs.
        added = kernels._chunk_state_fwd(B=b, x=x, dt=one, dA_cumsum=total, states_in_fp32=True)
        sizes = added.shape[3:]
        starts, _ = kernels._state_passing_fwd(
            states=added.flatten(3),
            dA_chunk_cumsum=total[..., -1],
            initial_states=None if state is None else state.flatten(2),
            out_dtype=torch.float32,
        )
        del added
        scores = kernels._bmm_chunk_fwd(a=c, b=b, chunk_size=KERNEL_CHUNK, output_dtype=SCORES)
        dstarts = kernels._chunk_scan_bwd_dstates(
            C=c, dA_cumsum=total, dout=dy, dtype=torch.float32
        )
        dadded, dacross, dstate, starts = kernels._state_passing_bwd(
            states=starts,
            dA_chunk_cumsum=total[..., -1],
            dout=dstarts.flatten(3),
            dfinal_states=None if dfinal is None else dfinal.float().flatten(2),
            has_initial_states=state is not None,
            dstates_dtype=x.dtype,
            states_dtype=x.dtype,
        )
        del dstarts
        dadded, starts = dadded.unflatten(3, sizes), starts.unflatten(3, sizes)
        dx, _, dskip = kernels._chunk_scan_chunk_state_bwd_dx(
            x=x, dt=one, dA_cumsum=total, B=b, CB=scores, dout=dy, dstates=dadded, D=skip
        )
        # Gradients of the log-decays come in three parts: on the way to the chunk's end, from its
        # start, and inside it.
        db, dlog_decay = kernels._chunk_state_bwd_db(
            x=x, dt=one, dA_cumsum=total, dstates=dadded, B=b, ngroups=heads
        )
        dc, dtotal = kernels._chunk_scan_bwd_dC(
            prev_states=starts.to(x.dtype), dA_cumsum=total, dout=dy, C=c, ngroups=heads
        )
        dtotal[..., -1] += dacross
        dlog_decay += dtotal.flip(-1).cumsum(-1).flip(-1)
        dlog_decay += kernels._chunk_scan_bwd_ddAcs_stable(
            x=x, dt=one, dA_cumsum=total, dout=dy, cb=scores
        )
        dscores = kernels._chunk_scan_bwd_dcb(
            x=x, dt=one, dA_cumsum=total, dout=dy, ngroups=heads
        ).to(SCORES)
        db = kernels._bmm_chunk_bwd(a=c, dout=dscores, residual=db, out=torch.empty_like(b))
        dc = kernels._bmm_chunk_bwd(a=b, dout=dscores.mT, residual=dc, out=torch.empty_like(c))
        if dstate is not None:
            dstate = dstate.unflatten(2, sizes)
        dlog_decay = dlog_decay.flatten(2)[..., :length]
        return None, dc, db, dx, dlog_decay, dstate, dskip
