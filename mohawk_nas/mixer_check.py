"""A first look at a user's own mixer, in a second, before anything is trained with it.

What would otherwise end a search after its bank, or an export after a distillation, is told with
the candidate's name and the user's line. :class:`mohawk_nas.testing.MixerContract` asks for more:
gradients, padding, long sequences, two types.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from mohawk_nas.errors import MixerError
from mohawk_nas.mixer import MIXERS, AttentionView, Mixer, MixerConfig, MixerState
from mohawk_nas.registry import is_users, line_of

__all__ = ["check_mixer", "tried"]

T = TypeVar("T")

BATCH, TOKENS = 2, 9

TOLERANCE = 1e-2
"""Relative to the largest value, of what should be equal. Kernels round; mistakes are larger."""


def _check_costs(config: MixerConfig, view: AttentionView) -> None:
    context = 8
    for name, ask in {
        "num_params": lambda: config.num_params(view),
        "flops_per_token": lambda: config.flops_per_token(view, context),
        "state_bytes": lambda: config.state_bytes(view, batch=BATCH, context=context),
    }.items():
        found = tried(config, name, ask)
        if not isinstance(found, int) or isinstance(found, bool) or found < 0:
            raise _wrong(config, f"{name} must be a whole number, at least 0, but is {found!r}")


def check_mixer(
    config: MixerConfig, view: AttentionView, *, factors: bool, device: torch.device
) -> None:
    """Build a user's mixer for a layer and run it on a few tokens of noise.

    A mixer of the package itself is taken as tested.

    Args:
        config: The candidate.
        view: The layer; it may stand on the meta device, since weights start at random here.
        factors: Whether stage 1 will ask for factors of the matrix, if it offers any.
        device: Where to run.

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
    if (count := sum(p.numel() for p in mixer.parameters())) != config.num_params(view):
        raise _wrong(
            config,
            f"num_params must be {count:,}, as many as are built, but is "
            f"{config.num_params(view):,}",
        )
    heads = getattr(mixer, "num_heads", None)
    if not isinstance(heads, int) or heads < 1:
        raise _wrong(config, f"its mixer's num_heads must be a number of heads, but is {heads!r}")
    if any(t.is_meta for t in mixer.state_dict().values()):
        # Parts of the teacher's that are not loaded cannot be run.
        return
    mixer, hidden = mixer.float().to(device).eval(), hidden.to(device)
    _check_training(config, mixer, hidden, view, factors=factors)
    with torch.no_grad():
        whole = mixer(hidden)
        _check_causality(config, mixer, hidden, whole)
        _check_states(config, mixer, hidden, whole, view)


def _check_training(
    config: MixerConfig, mixer: Mixer, hidden: Tensor, view: AttentionView, *, factors: bool
) -> None:
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool, device=hidden.device)
    mask[1, :4] = False
    output = tried(config, "forward", lambda: mixer(hidden))
    _check_tensor(config, "forward", output, (BATCH, TOKENS, view.d_model), dtype=torch.float32)
    padded = tried(config, "forward with a mask", lambda: mixer(hidden, mask=mask))
    _check_tensor(config, "forward with a mask", padded[mask], (int(mask.sum()), view.d_model))
    tried(config, "backward", output.square().sum().backward)
    with torch.no_grad():
        values = tried(config, "values", lambda: mixer.values(hidden))
        _check_tensor(config, "values", values, (BATCH, mixer.num_heads, TOKENS, None))
        read = tried(config, "readout", lambda: mixer.readout(values, hidden))
        _check_tensor(config, "readout", read, (BATCH, TOKENS, view.d_model))
        if factors and type(mixer).factors is not Mixer.factors:
            found: Any = tried(config, "factors", lambda: mixer.factors(hidden))
            for name, width in (("c", (None,)), ("b", (None,)), ("log_decay", ())):
                tensor = getattr(found, name, None)
                where, shape = f"factors().{name}", (BATCH, mixer.num_heads, TOKENS, *width)
                _check_tensor(config, where, tensor, shape)


def _check_causality(config: MixerConfig, mixer: Mixer, hidden: Tensor, whole: Tensor) -> None:
    changed = hidden.clone()
    changed[:, -1] = -2 * changed[:, -1]
    _check_equal(
        config,
        "forward must be causal: the output of a token must not depend on later ones",
        mixer(changed)[:, :-1],
        whole[:, :-1],
    )


def _check_states(
    config: MixerConfig, mixer: Mixer, hidden: Tensor, whole: Tensor, view: AttentionView
) -> None:
    state = tried(config, "new_state", mixer.new_state)
    parts = [hidden[:, :6], hidden[:, 6:7], hidden[:, 7:8], hidden[:, 8:]]
    outputs = [
        tried(config, "forward with a cache", partial(mixer, part.contiguous(), cache=state))
        for part in parts
    ]
    _check_equal(
        config,
        "forward with a cache must continue where the state stands: a prompt and three tokens one "
        "by one must give what all of them give at once",
        torch.cat(outputs, dim=1),
        whole,
    )
    if (seen := state.get_seq_length()) != TOKENS:
        raise _wrong(
            config, f"its state must have counted {TOKENS} tokens (num_tokens), but has {seen}"
        )
    if isinstance(state, MixerState):
        held = state.num_bytes()
        told = config.state_bytes(view, batch=BATCH, context=TOKENS, bytes_per_element=4)
        if held != told:
            raise _wrong(
                config,
                f"state_bytes must be {held:,}, as many as are held after {TOKENS} tokens of "
                f"{BATCH} sequences in float32, but is {told:,}",
            )


def _check_tensor(
    config: MixerConfig,
    what: str,
    found: object,
    shape: tuple[int | None, ...],
    *,
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
    if not bool(torch.isfinite(found).all()):
        raise _wrong(config, f"{what} must be finite on finite input, but holds nan or inf")


def _check_equal(config: MixerConfig, what: str, found: Tensor, wanted: Tensor) -> None:
    error, most = (found - wanted).abs().max().item(), wanted.abs().max().item()
    # Written so that nan fails.
    if not error <= TOLERANCE * most:
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
    except MixerError:
        raise
    except Exception as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        line = line_of(type(config), e)
        where = f" in line {line}" if line else ""
        raise _wrong(config, f"{what} failed{where}: {reason}") from e


def _wrong(config: MixerConfig, text: str) -> MixerError:
    name = MIXERS.name_of(type(config))
    return MixerError(f"mixer {name} ({MIXERS.origin(name).rpartition(':')[0]}): {text}")
