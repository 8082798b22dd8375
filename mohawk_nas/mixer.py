"""The contract between the engine and a mixer.

A mixer is the part of a decoder layer that mixes tokens. Everything the engine asks of one stands
in this file: a configuration that knows its cost before anything is built, the module, the state
it keeps while decoding, and the view of the teacher's attention it may start from.

B batch, T tokens, D model width, H heads of the mixer, P head width, N state size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from mohawk_nas.config import read_options
from mohawk_nas.errors import ConfigError, MixerError
from mohawk_nas.registry import Registry

__all__ = [
    "MIXERS",
    "AttentionView",
    "MatrixFactors",
    "Mixer",
    "MixerConfig",
    "MixerState",
    "Projections",
    "build_mixer",
    "identity_of",
    "mixer_config",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Projections:
    """Weights of one attention layer, as ``nn.Linear`` stores them (out_features, in_features)."""

    query: Tensor
    """``(num_heads * head_dim, D)``"""
    key: Tensor
    """``(num_kv_heads * head_dim, D)``"""
    value: Tensor
    """``(num_kv_heads * head_dim, D)``"""
    output: Tensor
    """``(D, num_heads * head_dim)``"""
    query_bias: Tensor | None
    key_bias: Tensor | None
    value_bias: Tensor | None
    output_bias: Tensor | None
    query_norm: nn.Module | None
    """Norm between projection and rotary embedding, over a head or over all of them."""
    key_norm: nn.Module | None


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionView:
    """One attention layer of a stock Hugging Face model: its shape, and where to find the rest.

    It may stand on the meta device; then only the shape is to be read.
    """

    layer_idx: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    """Factor of the scores before softmax."""
    sliding_window: int | None
    module: nn.Module
    """The attention module itself."""
    rotary: nn.Module | None
    """The model's rotary embedding: ``rotary(hidden, position_ids) -> (cos, sin)``."""

    def projections(self) -> Projections:
        """The layer's weights by role.

        Raises:
            MixerError: The layer keeps its weights in another form (fused or gated projections).
        """
        linear = {name: m for name, m in self.module.named_children() if isinstance(m, nn.Linear)}
        roles = [linear.pop(f"{role}_proj", None) for role in "qkv"]
        if None in roles or len(linear) != 1:
            raise MixerError(
                f"layer {self.layer_idx}: starting a mixer from attention needs separate query, "
                f"key, value and output projections, but {type(self.module).__name__} has "
                f"{[name for name, _ in self.module.named_children()]}; use init: random"
            )
        query, key, value = (role for role in roles if role is not None)
        (output,) = linear.values()
        expected = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim)
        if (query.out_features, key.out_features) != expected:
            raise MixerError(
                f"layer {self.layer_idx}: query and key projections must have {expected} outputs, "
                f"but have {(query.out_features, key.out_features)}; use init: random"
            )
        norms = [self._norm(role) for role in "qk"]
        return Projections(
            query=query.weight,
            key=key.weight,
            value=value.weight,
            output=output.weight,
            query_bias=query.bias,
            key_bias=key.bias,
            value_bias=value.bias,
            output_bias=output.bias,
            query_norm=norms[0],
            key_norm=norms[1],
        )

    def _norm(self, role: str) -> nn.Module | None:
        for name in (f"{role}_norm", f"{role}_layernorm"):
            norm = getattr(self.module, name, None)
            if isinstance(norm, nn.Module):
                return norm
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixFactors:
    """Factors of a mixing matrix ``(C B^T) * decay mask + diagonal``, one a head.

    Entry (i, j), j <= i, is ``C_i . B_j * exp(sum of log_decay over j+1..i)``, plus ``diagonal``
    where i = j. Stage 1 is computed from these without the matrix.
    """

    c: Tensor
    """``(B, H, T, N)``"""
    b: Tensor
    """``(B, H, T, N)``"""
    log_decay: Tensor
    """``(B, H, T)``, float32, never positive."""
    diagonal: Tensor | None
    """``(H,)``"""


class MixerState(CacheLayerMixin):  # type: ignore[misc]
    """What one mixer keeps while decoding: named tensors and the number of tokens seen.

    It takes the place of the layer's key-value cache in a transformers ``Cache``, and counts the
    tokens because a student may have no attention layer that would. Every tensor has the batch as
    its first dimension, so that beams can be reordered whatever the mixer is.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, Tensor] = {}
        self.num_tokens = 0
        self.is_initialized = True

    def lazy_initialization(self, *args: object, **kwargs: object) -> None:
        """Nothing to do: the mixer makes its tensors when it first runs."""

    def update(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        raise TypeError("a mixer's state holds no keys and values")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask that an attention layer beside this one would need."""
        return self.num_tokens + int(query_length), 0

    def get_seq_length(self) -> int:
        return self.num_tokens

    def get_max_length(self) -> int:
        return -1

    # The name that transformers used before 5.20.
    def get_max_cache_shape(self) -> int:
        return -1

    def offload(self) -> None:
        """States are small and stay where they are."""

    def prefetch(self) -> None:
        """States are small and stay where they are."""

    def reset(self) -> None:
        self.tensors.clear()
        self.num_tokens = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        for name, tensor in self.tensors.items():
            self.tensors[name] = tensor.index_select(0, indices.to(tensor.device))

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("a recurrent state cannot be rolled back by some tokens")

    def keep_at(self, places: Mapping[str, Tensor]) -> None:
        """Move what is held to where it was held before.

        Args:
            places: The tensors of that time, which are overwritten.

        Raises:
            MixerError: Sizes have changed.
        """
        for name, tensor in self.tensors.items():
            place = places.get(name)
            if place is None or place.shape != tensor.shape:
                raise MixerError(
                    f"a state of fixed size is needed to decode in place, but `{name}` is now "
                    f"{tuple(tensor.shape)} and was {None if place is None else tuple(place.shape)}"
                )
            if place is not tensor:
                place.copy_(tensor)
                self.tensors[name] = place

    def num_bytes(self) -> int:
        """Bytes held now."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(frozen=True, kw_only=True)
class MixerConfig(ABC):
    """Choices that make a mixer, and what the mixer costs in a given layer.

    Subclasses are frozen dataclasses too. They add fields of types that YAML knows (numbers, truth
    values, text, literals, lists of these), all with defaults, and are registered with
    ``@MIXERS.register(name)``; in ``mixers/`` the name is the stem of their file. What depends on
    the model comes with the view. A field that decides speed alone is given
    ``metadata={"identity": False}``, see :func:`identity_of`.
    """

    symbol: ClassVar[str]
    """One upper-case letter, for printed layouts."""
    keeps_attention: ClassVar[bool] = False
    """Whether a layer with this candidate keeps the teacher's module untouched."""
    elsewhere: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """What others call a layer with this mixer: ``pattern`` is its symbol in Megatron-Core's hybrid
    patterns, ``layer_type`` its entry in transformers' ``layer_types``. A mixer that is unknown
    there leaves it out."""

    init: Literal["attention", "random"] = "attention"
    """Start from the layer's attention (fast to train), or as the mixer's paper starts it."""

    @abstractmethod
    def build(self, view: AttentionView) -> Mixer:
        """The mixer for this layer, randomly initialised on the default device.

        Raises:
            MixerError: The configuration does not fit the layer.
        """

    @abstractmethod
    def num_params(self, view: AttentionView) -> int:
        """Parameters of the built mixer."""

    @abstractmethod
    def flops_per_token(self, view: AttentionView, context: int) -> int:
        """Floating-point operations (two a multiply-add) to decode one token after ``context``."""

    @abstractmethod
    def state_bytes(
        self, view: AttentionView, *, batch: int, context: int, bytes_per_element: int = 2
    ) -> int:
        """Bytes kept between tokens after ``context`` tokens of ``batch`` sequences."""


class Mixer(nn.Module, ABC):
    """A causal token mixer: ``forward = readout(mixing_matrix @ values)``.

    Padding may stand on the left of a sequence; a padded position must change nothing at any other
    and its own output is ignored. A mixer that is given a state continues where the state stands,
    with one token or many, and leaves the state after the last one.
    :class:`mohawk_nas.testing.MixerContract` tests all of this.
    """

    num_heads: int

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters. A bank trains in float32 whatever the teacher is held in."""
        return next(self.parameters()).dtype

    @abstractmethod
    def forward(
        self, hidden: Tensor, *, mask: Tensor | None = None, cache: MixerState | None = None
    ) -> Tensor:
        """Mix tokens.

        In training, calls may be recorded and replayed as a CUDA graph: nothing may depend on what
        changes in Python from call to call, and nothing should wait for the GPU.

        Args:
            hidden: The layer's normalised input, ``(B, T, D)``.
            mask: True at real tokens, False at padding, ``(B, T)``; None where all are real.
            cache: State to continue from and to leave the new state in.

        Returns:
            What is added to the residual stream, ``(B, T, D)``.
        """

    @abstractmethod
    def values(self, hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """What the matrix mixes, ``(B, H, T, P)``."""

    @abstractmethod
    def readout(self, mixed: Tensor, hidden: Tensor) -> Tensor:
        """Output ``(B, T, D)`` from mixed values ``(B, H, T, P)`` and the layer's input."""

    @abstractmethod
    def mixing_matrix(self, hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Lower-triangular matrices ``(B, H, T, T)`` in float32; memory grows with T squared."""

    def factors(self, hidden: Tensor, *, mask: Tensor | None = None) -> MatrixFactors | None:
        """Factors of the mixing matrix, or None if it is not of that form."""
        return None

    def head_pairs(self, num_teacher_heads: int) -> Tensor:
        """Teacher head that each head of this mixer is oriented to in stage 1, ``(H,)``.

        Where the numbers differ, heads are spread evenly: head h is paired with teacher head
        floor(h * teacher heads / H), so 32 heads over 24 pair three one to one and the fourth
        twice.
        """
        heads = torch.arange(self.num_heads)
        return torch.div(heads * num_teacher_heads, self.num_heads, rounding_mode="floor")

    @torch.no_grad()
    def init_from_attention(self, view: AttentionView) -> None:
        """Start from the layer's attention weights instead of at random.

        Raises:
            MixerError: This mixer, or this configuration of it, cannot.
        """
        raise MixerError(f"{type(self).__name__} cannot start from attention; use init: random")

    @torch.no_grad()
    def calibrate(self, hidden: Tensor, target: Tensor, *, mask: Tensor | None = None) -> None:
        """Scale the fresh mixer once to the teacher's output on the first batch.

        Args:
            hidden: ``(B, T, D)``
            target: The teacher's output for it, ``(B, T, D)``.
            mask: As in :meth:`forward`.
        """

    def new_state(self) -> Any:
        """An empty state for decoding."""
        return MixerState()

    @torch.no_grad()
    def step(self, hidden: Tensor, cache: MixerState) -> Tensor:
        """One token more, without padding, by a state whose tensors stay where they are in memory.

        A mixer that can change its state in place overrides this. Its calls may then be recorded
        and replayed as a CUDA graph, so they must not depend on what changes in Python. Here the
        state is computed anew and copied, and nothing is recorded.

        Args:
            hidden: The layer's normalised input in the mixer's type, ``(B, 1, D)``.
            cache: A state that has seen a token; each of its tensors is contiguous.

        Returns:
            As :meth:`forward`, ``(B, 1, D)``.

        Raises:
            MixerError: The state grows with every token.
        """
        places = dict(cache.tensors)
        mixed = self(hidden, cache=cache)
        cache.keep_at(places)
        return mixed  # type: ignore[no-any-return]


MIXERS: Registry[MixerConfig] = Registry(
    "mixer", package="mohawk_nas.mixers", entry_points="mohawk_nas.mixers"
)


def mixer_config(choices: Mapping[str, Any], *, where: str = "candidate") -> MixerConfig:
    """The configuration that ``{"mixer": name, option: value, ...}`` describes.

    Args:
        choices: What stands in the YAML file for one candidate.
        where: Dotted path for messages.

    Raises:
        ConfigError: Every unknown option and impossible value of this candidate.
        RegistryError: No mixer has that name.
    """
    if not isinstance(choices, Mapping) or not isinstance(choices.get("mixer"), str):
        raise ConfigError(f"{where}: a candidate must be a mapping with `mixer: NAME`")
    name = choices["mixer"]
    options = {option: value for option, value in choices.items() if option != "mixer"}
    cls = MIXERS.get(name)
    if not (isinstance(cls, type) and issubclass(cls, MixerConfig)):
        raise ConfigError(
            f"{where}.mixer: what {MIXERS.origin(name)} registers as {name!r} must be a MixerConfig"
        )
    return read_options(cls, options, where=where, owner=name)


def identity_of(config: MixerConfig) -> dict[str, Any]:
    """The choices that a trained mixer's weights depend on.

    Left out are fields with ``metadata={"identity": False}``: back ends, chunk sizes and what else
    decides speed and rounding alone. Candidates that differ in nothing else share bank entries and
    initial weights.
    """
    left_out = {f.name for f in fields(config) if not f.metadata.get("identity", True)}
    return {name: value for name, value in asdict(config).items() if name not in left_out}


def build_mixer(config: MixerConfig, view: AttentionView, *, seed: int | None = None) -> Mixer:
    """Build and initialise one candidate for one layer.

    Args:
        config: The candidate.
        view: The layer.
        seed: With a seed the result depends on nothing else, and the global random state is left
            as it was. None skips the seed and the start from attention: for weights that will be
            loaded.
    """
    if seed is None:
        return config.build(view)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixer = config.build(view)
    if config.init == "attention":
        mixer.init_from_attention(view)
    return mixer
