"""Decoding with buffers of fixed size: one step is always the same work on the same memory.

transformers' own caches grow and are made anew with every token. Here keys and values stand in
buffers of a length that is said beforehand, states are changed in place, and the place of the next
token is counted on the device; so a step can be recorded as a CUDA graph and replayed without
Python. Teacher and student run by the same code, their own modules in their own order: only what
their attention does with queries, keys and values, and where mixers keep their states, is replaced.

B sequences, T tokens, S places in the buffers, V vocabulary, H heads, P head size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import (
    AttentionInterface,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.activations import NewGELUActivation

from mohawk_nas.distill.graph import RecordedStep
from mohawk_nas.errors import MixerError
from mohawk_nas.kernels.decode_attention import (
    AttentionBackend,
    decode_attention,
    pick_backend,
    seen_places,
)
from mohawk_nas.mixer import Mixer
from mohawk_nas.student import MixerSlot
from mohawk_nas.teacher import is_attention

__all__ = ["Decoder", "continue_tokens", "decode_obstacle", "sample"]

PREFILL_TOKENS = 16_384
"""Tokens, of all sequences together, that run through the model at a time."""

BUCKET = 256
"""Plain attention looks at multiples of so many places."""

LOOK_EVERY = 16
"""Tokens between two looks at whether all sequences have ended."""

DEFAULT_TOP_K = 50
"""What ``generate()`` samples from where a model's own settings say nothing."""

# Settings of generation that sample() knows, or that change no token.
_KNOWN_SETTINGS = """
    bos_token_id eos_token_id pad_token_id do_sample temperature top_k top_p max_length
    max_new_tokens use_cache output_attentions output_hidden_states _from_model_config
    transformers_version
"""

_NAME = "mohawk_nas_decoding"


def decode_obstacle(model: Any) -> str | None:
    """Why a model cannot be decoded here, or None; ``generate()`` can then.

    Args:
        model: A causal LM, as transformers or :func:`mohawk_nas.student.assemble` makes it.
    """
    model = getattr(model, "causal_lm", model)
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not use transformers' attention interface"
    config = model.config.get_text_config()
    for name in ("attn_logit_softcapping", "attention_chunk_size"):
        if getattr(config, name, None):
            return f"no support for `{name}`"
    layers = [module for module in model.modules() if is_attention(module)]
    if any(hasattr(module, "sinks") for module in layers):
        return "no support for attention sinks"
    layers += [module for module in model.modules() if isinstance(module, MixerSlot)]
    if len(layers) != config.num_hidden_layers:
        return f"{config.num_hidden_layers} layers hold {len(layers)} attention modules and mixers"
    return None


class Decoder:
    """A causal LM with buffers for ``batch`` sequences of ``max_length`` tokens.

    The model itself is left as it is: a copy that shares its tensors runs. Mixers that are held in
    another type than the model are cast once. Attention with a sliding window is right, but its
    buffers hold all tokens.

    Args:
        model: A causal LM, stock or a student.
        batch: Sequences; always so many.
        max_length: Places for tokens, padding included.
        backend: What computes the attention of a step: the Triton kernel, plain torch, or ``auto``,
            the kernel where it can run.
        prefill_tokens: Tokens that run through the model at a time before the first step.

    Raises:
        ValueError: :func:`decode_obstacle` names why.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch: int,
        max_length: int,
        backend: AttentionBackend = "auto",
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> None:
        if (obstacle := decode_obstacle(model)) is not None:
            raise ValueError(f"Decoder: cannot decode this model: {obstacle}; use generate()")
        if batch < 1 or max_length < 1:
            raise ValueError(
                f"`batch >= 1` and `max_length >= 1` must hold, but got {batch} and {max_length}"
            )
        model = getattr(model, "causal_lm", model)
        self.batch, self.max_length = batch, max_length
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        self.backend = pick_backend(backend, self.device, self.dtype)
        self._chunk = max(1, prefill_tokens // batch)
        self._filled = 0
        self._padded = False
        # Sequences that have a real token; None before the first.
        self._begun: Tensor | None = None
        self._stepped = False
        size: dict[str, Any] = {"dtype": torch.long, "device": self.device}
        self._place = torch.zeros((), **size)
        self._first = torch.zeros(batch, **size)
        self._tokens = torch.zeros((batch, 1), **size)
        self._logits: Tensor | None = None
        self._steps: dict[int, RecordedStep] = {}
        self._where = _Where(place=self._place, first=self._first)
        self._layers: list[_Attention | _Recurrent] = []
        self._model = self._prepared(model)
        # What forward() does with a cache may follow a count in Python, which a recording keeps.
        self._records = all(
            type(layer.mixer).step is not Mixer.step
            for layer in self._layers
            if isinstance(layer, _Recurrent)
        )

    @property
    def length(self) -> int:
        """Tokens that every sequence has now, padding included."""
        return self._filled

    @property
    def cache_bytes(self) -> int:
        """Bytes of all keys, values and states; they are allocated by the first prefill."""
        return sum(t.numel() * t.element_size() for layer in self._layers for t in layer.held())

    @property
    def recorded(self) -> bool:
        """Whether steps are replayed from a CUDA graph now."""
        return any(step.is_recorded for step in self._steps.values())

    def reset(self) -> None:
        """Forget all tokens and keep the buffers, and what was recorded."""
        self._filled = 0
        self._padded = False
        self._begun = None
        self._place.zero_()
        self._first.zero_()
        for layer in self._layers:
            layer.reset()

    @torch.no_grad()
    def prefill(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Take in any number of tokens of every sequence, after those that are there.

        Args:
            tokens: ``(B, T)``
            mask: True at real tokens, False at padding, which stands before a sequence's first real
                token, ``(B, T)``.

        Returns:
            Logits after the last of them, ``(B, V)``.

        Raises:
            ValueError: They do not fit, or padding stands elsewhere.
        """
        tokens = tokens.to(self.device)
        mask = self._checked(tokens, mask)
        self._stepped = False
        logits: Tensor | None = None
        for begin in range(0, tokens.shape[1], self._chunk):
            piece = slice(begin, min(begin + self._chunk, tokens.shape[1]))
            logits = self._prefill_chunk(tokens[:, piece], None if mask is None else mask[:, piece])
        assert logits is not None
        return logits

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Take in one token more of every sequence.

        Args:
            tokens: ``(B,)`` or ``(B, 1)``, on any device.

        Returns:
            Logits after it, ``(B, V)``; the next step overwrites them.

        Raises:
            ValueError: The buffers are full, or nothing has been filled in.
        """
        if not 0 < self._filled < self.max_length:
            raise ValueError(
                f"Decoder.step: some but not all of the {self.max_length} places must be filled, "
                f"but {self._filled} are; prefill first, or make a longer decoder"
            )
        self._tokens.copy_(tokens.reshape(self.batch, 1), non_blocking=True)
        reach = self._reach()
        if self._records:
            self._recorded_step(reach)()
        else:
            self._advance(reach)
        self._filled += 1
        if not self._stepped:
            self._stepped, self._begun = True, self._first >= 0
        assert self._logits is not None
        return self._logits

    @torch.no_grad()
    def pretend(self, length: int) -> None:
        """Stand as after ``length`` tokens of every sequence, with anything in the buffers.

        For measuring: what is held does not change how long a step takes. An empty decoder first
        runs as many tokens as go through the model at a time, and fills its buffers with random
        numbers.

        Args:
            length: From 1 to ``max_length``.
        """
        if not self._filled:
            tokens = torch.zeros((self.batch, min(self._chunk, length)), dtype=torch.long)
            self.prefill(tokens)
            generator = torch.Generator(self.device).manual_seed(0)
            for layer in self._layers:
                for tensor in layer.held():
                    tensor.normal_(generator=generator)
        self._filled = length
        self._place.fill_(length)

    def release(self) -> None:
        """Give back all memory; the decoder is not used again."""
        for step in self._steps.values():
            step.release()
        self._steps.clear()
        for layer in self._layers:
            layer.release()
        self._layers.clear()
        self._logits = None
        self._model = None

    def _prepared(self, model: Any) -> Any:
        tensors = [*model.parameters(), *model.buffers()]
        # What is in its memo, deepcopy takes for a finished copy: tensors are shared.
        memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
        cast: dict[int, nn.Module] = {}
        for module in model.modules():
            if isinstance(module, MixerSlot) and module.mixer.dtype != self.dtype:
                cast[module.layer_idx] = copy.deepcopy(module.mixer).to(self.dtype)
                memo[id(module.mixer)] = cast[module.layer_idx]
        copied = copy.deepcopy(model, memo).eval()
        for name, module in list(copied.named_modules()):
            if isinstance(module, MixerSlot):
                recurrent = _Recurrent(module.mixer, self._where)
                copied.set_submodule(name, recurrent)
                self._layers.append(recurrent)
            elif is_attention(module):
                held = _Attention(self._where, max_length=self.max_length, backend=self.backend)
                module.decoding = held
                module.config._attn_implementation = _NAME
                self._layers.append(held)
            elif isinstance(module, NewGELUActivation):
                # The same function; transformers spells it out in eight kernels.
                copied.set_submodule(name, nn.GELU(approximate="tanh"))
        # No mask function stands under this name, and then transformers makes no mask.
        copied.config.get_text_config()._attn_implementation = _NAME
        return copied

    def _checked(self, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask, or None where nothing is padded."""
        if tokens.dim() != 2 or tokens.shape[0] != self.batch or tokens.shape[1] < 1:
            raise ValueError(
                f"Decoder.prefill: tokens of shape ({self.batch}, 1 or more) are needed, but got "
                f"{tuple(tokens.shape)}"
            )
        if self._filled + tokens.shape[1] > self.max_length:
            raise ValueError(
                f"Decoder.prefill: {self._filled} + {tokens.shape[1]} tokens must fit into "
                f"{self.max_length} places, but do not; make a longer decoder"
            )
        if mask is None:
            self._begun = self._first >= 0
            return None
        if mask.shape != tokens.shape:
            raise ValueError(
                f"Decoder.prefill: the mask must have the tokens' shape {tuple(tokens.shape)}, but "
                f"has {tuple(mask.shape)}"
            )
        mask = mask.to(self.device).bool()
        begun = mask if self._begun is None else mask | self._begun[:, None]
        if bool(((begun.cumsum(1) > 0) & ~mask).any()):
            raise ValueError(
                "Decoder.prefill: padding must stand before a sequence's first real token, but "
                "stands behind it; pad on the left"
            )
        self._begun = begun[:, -1]
        return None if bool(mask.all()) else mask

    def _prefill_chunk(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        count = tokens.shape[1]
        if mask is not None:
            self._first += (~mask).sum(1)
            self._padded = True
        self._where.begin_chunk(self._filled, count, mask, padded=self._padded)
        places = torch.arange(self._filled, self._filled + count, device=self.device)
        logits = self._run(tokens, (places - self._first[:, None]).clamp_min(0))
        self._filled += count
        self._place.fill_(self._filled)
        return logits

    def _reach(self) -> int:
        # The kernel reads how much is filled on the device; plain torch must be told beforehand.
        if self.backend == "triton":
            return self.max_length
        return min(self.max_length, -(-(self._filled + 1) // BUCKET) * BUCKET)

    def _recorded_step(self, reach: int) -> RecordedStep:
        if reach not in self._steps:
            for step in self._steps.values():
                step.release()
            self._steps = {reach: RecordedStep(partial(self._advance, reach), self.device)}
        return self._steps[reach]

    @torch.no_grad()
    def _advance(self, reach: int) -> None:
        self._where.begin_step(reach)
        logits = self._run(self._tokens, self._place - self._first[:, None])
        if self._logits is None:
            self._logits = torch.empty_like(logits)
        self._logits.copy_(logits)
        self._place.add_(1)

    def _run(self, tokens: Tensor, positions: Tensor) -> Tensor:
        inputs = {"input_ids": tokens, "position_ids": positions}
        output = self._model(**inputs, use_cache=False, logits_to_keep=1)
        return output.logits[:, -1]  # type: ignore[no-any-return]


@torch.no_grad()
def sample(
    decoder: Decoder,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
) -> Tensor:
    """Continue a batch as transformers' ``generate()`` does, token by token.

    Args:
        decoder: It is reset first.
        tokens: ``(B, T)``
        mask: As :meth:`Decoder.prefill` takes it.
        max_new_tokens: At most so many are added.
        temperature: Of the sampling, by torch's global random state; 0 takes the likeliest token.
        top_k: Sample from so many tokens only.
        top_p: Sample from the likeliest tokens that together have this probability only.
        eos_token_id: What ends a sequence; nothing does if None.
        pad_token_id: Stands behind the end.

    Returns:
        ``(B, T + new tokens)``, no longer than the longest sequence.

    Raises:
        ValueError: ``max_new_tokens`` is below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"sample: `max_new_tokens` must be at least 1, but got {max_new_tokens}")
    decoder.reset()
    tokens = tokens.to(decoder.device)
    processors = LogitsProcessorList()
    if temperature not in (0.0, 1.0):
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    ends = [] if eos_token_id is None else torch.tensor(eos_token_id).flatten().tolist()
    ending = torch.tensor(ends, device=decoder.device, dtype=torch.long)
    done = torch.zeros(decoder.batch, dtype=torch.bool, device=decoder.device)
    found: list[Tensor] = []
    logits = decoder.prefill(tokens, mask)
    while True:
        if temperature:
            scores = processors(tokens, logits.float())
            new = torch.multinomial(scores.softmax(-1), 1)[:, 0]
        else:
            new = logits.argmax(-1)
        new = new.masked_fill(done, pad_token_id)
        found.append(new)
        if len(found) == max_new_tokens:
            break
        if ends:
            done = done | torch.isin(new, ending)
            # To look is to wait for the GPU.
            if len(found) % LOOK_EVERY == 0 and bool(done.all()):
                break
        logits = decoder.step(new)
    added = torch.stack(found, dim=1)
    if ends:
        is_end = torch.isin(added, ending)
        # Tokens up to a sequence's first end, which counts.
        lengths = (is_end.cumsum(1) - is_end.long() == 0).sum(1)
        added = added[:, : int(lengths.max())]
    return torch.cat([tokens, added], dim=1)


def continue_tokens(
    model: Any,
    tokens: Tensor,
    *,
    mask: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    pad_token_id: int = 0,
) -> Tensor:
    """What ``generate()`` makes of a batch: by :func:`sample` where it can, else by ``generate()``.

    The model's own generation settings hold.

    Args:
        model: A causal LM.
        tokens: ``(B, T)``, padded on the left.
        mask: True at real tokens, ``(B, T)``.
        max_new_tokens: At most so many are added.
        temperature: Of the sampling; 0 takes the likeliest token.
        pad_token_id: Stands behind the end of a sequence.

    Returns:
        ``(B, T + new tokens)``
    """
    settings = model.generation_config
    unknown = settings.to_diff_dict().keys() - set(_KNOWN_SETTINGS.split())
    if not unknown and decode_obstacle(model) is None:
        decoder = Decoder(model, batch=tokens.shape[0], max_length=tokens.shape[1] + max_new_tokens)
        try:
            return sample(
                decoder,
                tokens,
                mask=mask,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=DEFAULT_TOP_K if settings.top_k is None else settings.top_k,
                top_p=settings.top_p,
                eos_token_id=settings.eos_token_id,
                pad_token_id=pad_token_id,
            )
        except MixerError:
            # A state that grows with the text shows itself in the first step only.
            pass
        finally:
            decoder.release()
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature:
        sampling["temperature"] = temperature
    return model.generate(  # type: ignore[no-any-return]
        tokens,
        attention_mask=mask.long(),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id,
        **sampling,
    )


class _Where:
    """Which tokens are running, for every layer of one decoder.

    Args:
        place: The next token's place, ``()``.
        first: Each sequence's first place, ``(B,)``.
    """

    def __init__(self, *, place: Tensor, first: Tensor) -> None:
        self.place, self.first = place, first
        self.is_step = False
        self.begin = self.stop = 0
        self.mask: Tensor | None = None
        self.padded = False
        self._seen: dict[int | None, Tensor] = {}

    def begin_step(self, reach: int) -> None:
        """One token at ``place``; at most ``reach`` places are looked at."""
        self.is_step, self.stop, self.mask = True, reach, None
        self._seen.clear()

    def begin_chunk(self, begin: int, count: int, mask: Tensor | None, *, padded: bool) -> None:
        """``count`` tokens from place ``begin`` on."""
        self.is_step, self.begin, self.stop, self.mask = False, begin, begin + count, mask
        self.padded = padded
        self._seen.clear()

    def seen(self, window: int | None) -> Tensor:
        """What each running token sees, ``(B, 1, T, stop)``; made once for all layers."""
        if window not in self._seen:
            if self.is_step:
                made = seen_places(self.stop, last=self.place, first=self.first, window=window)
            else:
                made = self._seen_of_chunk(window)
            self._seen[window] = made
        return self._seen[window]

    def _seen_of_chunk(self, window: int | None) -> Tensor:
        i = torch.arange(self.begin, self.stop, device=self.place.device)[:, None]
        j = torch.arange(self.stop, device=self.place.device)
        seen = (j <= i) & (j >= self.first[:, None, None])
        if window is not None:
            seen &= j > i - window
        # A padded query sees itself: softmax over nothing is not defined.
        return (seen | (j == i))[:, None]


class _Attention:
    """Keys and values of one attention layer, and what is done with them."""

    def __init__(
        self, where: _Where, *, max_length: int, backend: Literal["torch", "triton"]
    ) -> None:
        self._where, self._max_length, self._backend = where, max_length, backend
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def held(self) -> list[Tensor]:
        return [tensor for tensor in (self._keys, self._values) if tensor is not None]

    def reset(self) -> None:
        """Nothing to do: what is not filled is not looked at."""

    def release(self) -> None:
        self._keys = self._values = None

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None
    ) -> Tensor:
        """Keep the new keys and values ``(B, K, T, P)``; the mixed values, ``(B, T, H, P)``."""
        keys, values = self._buffers(key, value)
        where = self._where
        if where.is_step:
            keys.index_copy_(2, where.place[None], key)
            values.index_copy_(2, where.place[None], value)
            mixed = decode_attention(
                query,
                keys[:, :, : where.stop],
                values[:, :, : where.stop],
                last=where.place,
                first=where.first,
                scaling=scaling,
                window=window,
                seen=where.seen(window) if self._backend == "torch" else None,
                backend=self._backend,
            )
        else:
            keys[:, :, where.begin : where.stop] = key
            values[:, :, where.begin : where.stop] = value
            filled = keys[:, :, : where.stop], values[:, :, : where.stop]
            mixed = self._attend_many(query, *filled, scaling=scaling, window=window)
        return mixed.transpose(1, 2).contiguous()

    def _attend_many(
        self, query: Tensor, keys: Tensor, values: Tensor, *, scaling: float, window: int | None
    ) -> Tensor:
        where, count = self._where, query.shape[2]
        groups = query.shape[1] // keys.shape[1]
        options: dict[str, Any] = {"scale": scaling, "enable_gqa": groups > 1}
        if where.padded or (window is not None and window < where.stop):
            options = {"scale": scaling, "attn_mask": where.seen(window)}
            # Kernels that take a mask know no groups, and what is left would keep all scores.
            if groups > 1:
                keys, values = (t.repeat_interleave(groups, 1) for t in (keys, values))
        elif count == where.stop:
            options["is_causal"] = True
        elif count > 1:
            # The triangle ends at the last key: for this the fast kernels need no mask either.
            options["attn_mask"] = causal_lower_right(count, where.stop)
        return F.scaled_dot_product_attention(query, keys, values, **options)

    def _buffers(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if self._keys is None or self._values is None:
            # Zeros: what a mask hides is still multiplied by zero.
            self._keys, self._values = (
                new.new_zeros(*new.shape[:2], self._max_length, new.shape[3])
                for new in (key, value)
            )
        return self._keys, self._values


class _Recurrent(nn.Module):
    """Stands in a layer's attention slot: a mixer, and its state in tensors that stay."""

    def __init__(self, mixer: Mixer, where: _Where) -> None:
        super().__init__()
        self.mixer = mixer
        self._where = where
        self._state = mixer.new_state()
        self._places: dict[str, Tensor] = {}

    def held(self) -> list[Tensor]:
        return list(self._places.values())

    def reset(self) -> None:
        self._state = self.mixer.new_state()

    def release(self) -> None:
        self._state, self._places = self.mixer.new_state(), {}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if self._where.is_step:
            return self.mixer.step(hidden_states, self._state), None
        mixed = self.mixer(hidden_states, mask=self._where.mask, cache=self._state)
        if self._places:
            self._state.keep_at(self._places)
        else:
            self._places = {n: t.contiguous() for n, t in self._state.tensors.items()}
            self._state.tensors.update(self._places)
        return mixed, None


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """What transformers' attention modules call."""
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"Decoder: {type(module).__name__} asks for `{name}`, which is not supported; use "
                "generate()"
            )
    scaling = kwargs.get("scaling")
    mixed: Tensor = module.decoding.attend(
        query,
        key,
        value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=kwargs.get("sliding_window"),
    )
    return mixed, None


AttentionInterface.register(_NAME, _attend)
