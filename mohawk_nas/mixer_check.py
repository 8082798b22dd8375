"""A first look at a user's own mixer, in a second, before anything is trained with it.

What would otherwise end a search after its bank, or an export after a distillation, is told with
the candidate's name and the user's line. :class:`mohawk_nas.testing.MixerContract` asks for more:
gradients, padding, long sequences, two types.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from mohawk_nas.errors import MixerError
from mohawk_nas.mixer import MIXERS, AttentionView, Mixer, MixerConfig, MixerState
from mohawk_nas.precision import computing_in, run_mixer
from mohawk_nas.registry import in_one_line, is_users, line_of

__all__ = ["check_mixer", "tried"]

T = TypeVar("T")

BATCH, TOKENS = 2, 9

TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Type -> relative to the largest value, of what should be equal. Kernels round; mistakes are of
the size of the values."""


def check_mixer(
    config: MixerConfig,
    view: AttentionView,
    *,
    factors: bool,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Build a user's mixer for a layer and run it on a few tokens of noise.

    A mixer of the package itself is taken as tested. One whose kernels need a GPU is only built
    where there is none, as is one with parts of a teacher that is not loaded.

    Args:
        config: The candidate.
        view: The layer; it may stand on the meta device, since weights start at random here.
        factors: Whether stage 1 will ask for factors of the matrix, if it offers any.
        device: Where to run.
        dtype: Of the teacher's weights; None does not run it.

    Raises:
        MixerError: It does not keep the contract of :class:`mohawk_nas.mixer.Mixer`.
    """
    if not is_users(type(config)):
        return
    _check_costs(config, view)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = tried(config, "build", lambda: config.build(view))
        hidden = torch.randn(BATCH, TOKENS, view.d_model)
    if not isinstance(mixer, Mixer):
        raise _wrong(config, f"build must make a Mixer, but makes {_shown(mixer)}")
    count, told = sum(p.numel() for p in mixer.parameters()), config.num_params(view)
    if count != told:
        raise _wrong(config, f"num_params must be {count:,}, as many as are built, but is {told:,}")
    heads = getattr(mixer, "num_heads", None)
    if not isinstance(heads, int) or heads < 1:
        raise _wrong(config, f"its mixer's num_heads must be a number of heads, but is {heads!r}")
    if dtype is None or any(t.is_meta for t in [*mixer.parameters(), *mixer.buffers()]):
        return
    try:
        mixer, hidden = mixer.float().to(device), hidden.to(device, dtype)
        _check_training(config, mixer, hidden, view, factors=factors)
        with torch.no_grad():
            _check_decoding(config, mixer.to(dtype).eval(), hidden, view)
    except MixerError as e:
        why = str(e.__cause__ or "")
        needs_gpu = device.type == "cpu" and re.search(r"cuda|triton|\bgpu", why, re.IGNORECASE)
        if not needs_gpu and "meta tensor" not in why and "device meta" not in why:
            raise


def _check_costs(config: MixerConfig, view: AttentionView) -> None:
    context = 8
    for name, ask in {
        "num_params": lambda: config.num_params(view),
        "flops_per_token": lambda: config.flops_per_token(view, context),
        "state_bytes": lambda: config.state_bytes(
            view, batch=BATCH, context=context, bytes_per_element=2
        ),
    }.items():
        found = tried(config, name, ask)
        if not isinstance(found, int) or isinstance(found, bool) or found < 0:
            raise _wrong(config, f"{name} must be a whole number, at least 0, but is {found!r}")


def _check_training(
    config: MixerConfig, mixer: Mixer, hidden: Tensor, view: AttentionView, *, factors: bool
) -> None:
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool, device=hidden.device)
    mask[1, :4] = False
    shape = (BATCH, TOKENS, view.d_model)
    for what, given in (("forward", None), ("forward with a mask", mask)):
        output = tried(config, what, partial(run_mixer, mixer, hidden, mask=given))
        _check_tensor(config, what, output, shape, at=given, dtype=hidden.dtype)
        real = output if given is None else output[given]
        tried(config, "backward", real.float().square().sum().backward)
    if not factors or type(mixer).factors is Mixer.factors:
        return
    with torch.no_grad(), computing_in(hidden.dtype, hidden.device):
        found: Any = tried(config, "factors", lambda: mixer.factors(hidden, mask=mask))
        for name, width in (("c", (None,)), ("b", (None,)), ("log_decay", ())):
            parts = (BATCH, mixer.num_heads, TOKENS, *width)
            _check_tensor(config, f"factors().{name}", getattr(found, name, None), parts)


def _check_decoding(config: MixerConfig, mixer: Mixer, hidden: Tensor, view: AttentionView) -> None:
    shape, dtype = (BATCH, TOKENS, view.d_model), hidden.dtype
    whole = tried(config, "forward", lambda: mixer(hidden))
    _check_tensor(config, "forward", whole, shape, dtype=dtype)
    changed = hidden.clone()
    changed[:, -1] = -2 * changed[:, -1]
    _check_equal(
        config,
        "forward must be causal: the output of a token must not depend on later ones",
        tried(config, "forward", lambda: mixer(changed))[:, :-1],
        whole[:, :-1],
    )
    state, outputs = tried(config, "new_state", mixer.new_state), []
    for part in (hidden[:, :6], hidden[:, 6:7], hidden[:, 7:8], hidden[:, 8:]):
        call = partial(mixer, part.contiguous(), cache=state)
        outputs.append(tried(config, "forward with a cache", call))
        size = (BATCH, part.shape[1], view.d_model)
        _check_tensor(config, "forward with a cache", outputs[-1], size, dtype=dtype)
    _check_equal(
        config,
        "forward with a cache must continue where the state stands: a prompt and three tokens one "
        "by one must give what all of them give at once",
        torch.cat(outputs, dim=1),
        whole,
    )
    if (seen := tried(config, "get_seq_length", state.get_seq_length)) != TOKENS:
        raise _wrong(
            config, f"its state must have counted {TOKENS} tokens (num_tokens), but has {seen}"
        )
    if isinstance(state, MixerState):
        held = state.num_bytes()
        told = config.state_bytes(
            view, batch=BATCH, context=TOKENS, bytes_per_element=dtype.itemsize
        )
        if held != told:
            raise _wrong(
                config,
                f"state_bytes must be {held:,}, as many as are held after {TOKENS} tokens of "
                f"{BATCH} sequences in {dtype}, but is {told:,}",
            )


def _check_tensor(
    config: MixerConfig,
    what: str,
    found: object,
    shape: tuple[int | None, ...],
    *,
    at: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    fits = (
        isinstance(found, Tensor)
        and found.dim() == len(shape)
        and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
        and dtype in (None, found.dtype)
    )
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        of = "" if dtype is None else f" in {dtype}"
        raise _wrong(
            config, f"{what} must give a tensor ({wanted}){of} here, but gives {_shown(found)}"
        )
    assert isinstance(found, Tensor)
    if not bool(torch.isfinite(found if at is None else found[at]).all()):
        raise _wrong(config, f"{what} must be finite on finite input, but holds nan or inf")


def _check_equal(config: MixerConfig, what: str, found: Tensor, wanted: Tensor) -> None:
    error, most = (found - wanted).abs().max().item(), wanted.abs().max().item()
    # Written so that nan fails.
    if not error <= TOLERANCE[wanted.dtype] * most:
        raise _wrong(config, f"{what}, but it differs by {error:.2g} of {most:.2g}")


def _shown(found: object) -> str:
    if isinstance(found, Tensor):
        return f"({', '.join(map(str, found.shape))}) in {found.dtype}"
    return "nothing" if found is None else f"a {type(found).__name__}"


def tried(config: MixerConfig, what: str, call: Callable[[], T]) -> T:
    """What a call of a mixer's code gives.

    Raises:
        MixerError: It failed; says whose code, which line and why. One of its own passes.
    """
    try:
        return call()
    except (MixerError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        line = line_of(type(config), e)
        where = f" in line {line}" if line else ""
        raise _wrong(config, f"{what} failed{where}: {in_one_line(e)}") from e


def _wrong(config: MixerConfig, text: str) -> MixerError:
    name = MIXERS.name_of(type(config))
    file = MIXERS.origin(name).rpartition(":")[0] or type(config).__module__
    return MixerError(f"mixer {name} ({file}): {text}")
