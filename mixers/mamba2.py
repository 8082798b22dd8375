"""Discrete Mamba-2, the student of MOHAWK (arXiv 2408.10189) as Phi-Mamba uses it.

The state-space duality form of Mamba-2 (arXiv 2405.21060) without a step size: per head, decay
``alpha_t = sigmoid(-a_t)`` is read from the input, and

    h_t = alpha_t h_{t-1} + B_t x_t^T,    y_t = C_t h_t + D x_t,    out = W_o (y * SiLU(z)).

B, C and x pass a short causal convolution first. There is one B and C a head, no norm, and the
expansion is the attention layer's own width.

B batch, T tokens, D model width, H heads, P head width, N state size, W convolution width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mohawk_nas.errors import MixerError
from mohawk_nas.mixer import (
    MIXERS,
    AttentionView,
    MatrixFactors,
    Mixer,
    MixerConfig,
    MixerState,
)

from ._backends import require
from ._conv import causal_conv, last_inputs
from ._scan import decay_mask, scan
from ._step import StepSizes, decode_step

# SiLU of this is 1: the gate starts open.
OPEN_GATE = 1.278464542761

# Smallest step. A floor of 1e-4 would already turn a decay of 0.91 over 2,048 tokens into 0.81.
MIN_STEP = 1e-6

# Columns of a product: of another number, GPUs read rows that begin anywhere, and take far longer.
ALIGNED = 8

# Range of -log(alpha) over the heads of a mixer that starts from attention.
MIN_START, MAX_START = 0.02, 1.0


@MIXERS.register("mamba2")
@dataclass(frozen=True, kw_only=True)
class Mamba2Config(MixerConfig):
    """Choices of a discrete Mamba-2 mixer."""

    symbol: ClassVar[str] = "M"
    elsewhere: ClassVar[Mapping[str, str]] = {"pattern": "M", "layer_type": "linear_attention"}

    d_state: int | None = None
    """State size a head; None takes the attention's head size. Larger recalls more and costs
    memory and time in proportion."""
    num_heads: int | None = None
    """None takes the attention's. Another number needs ``init: random``; stage 1 then pairs heads
    by the rule of :meth:`Mixer.head_pairs`."""
    d_conv: int = 4
    """Width of the causal convolution; 1 leaves it out in effect."""
    chunk_size: int = field(default=64, metadata={"identity": False})
    """Tokens a chunk of the plain scan: a matter of speed alone."""
    backend: Literal["auto", "mamba_ssm", "torch"] = field(
        default="auto", metadata={"identity": False}
    )
    """What computes: mamba-ssm's kernels, which need a GPU, or plain torch. ``auto`` takes the
    fastest that is installed and fits. The convolution goes by a Triton kernel on a GPU, unless
    this is ``torch``. A matter of speed and rounding alone."""

    def __post_init__(self) -> None:
        for name in ("d_state", "num_heads", "d_conv", "chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name} >= 1` must hold, but got {value}")

    def build(self, view: AttentionView) -> Mamba2Mixer:
        return Mamba2Mixer(self, view)

    def num_params(self, view: AttentionView) -> int:
        heads, width, state = self.sizes(view)
        channels = heads * (width + 2 * state)
        projected = channels + heads * width + heads
        count = (view.d_model + 1) * projected
        count += channels * (self.d_conv + 1)
        count += heads
        count += (heads * width + 1) * view.d_model
        return count + sum(
            p.numel() for norm in self.norms(view) if norm for p in norm.parameters()
        )

    def flops_per_token(self, view: AttentionView, context: int) -> int:
        heads, width, state = self.sizes(view)
        channels = heads * (width + 2 * state)
        projections = view.d_model * (channels + 2 * heads * width + heads)
        # Decay the state, add B x^T, read it with C.
        scan = 3 * heads * state * width
        return 2 * (projections + channels * self.d_conv + scan + 2 * heads * width)

    def state_bytes(
        self, view: AttentionView, *, batch: int, context: int, bytes_per_element: int = 2
    ) -> int:
        heads, width, state = self.sizes(view)
        conv = heads * (width + 2 * state) * (self.d_conv - 1) * bytes_per_element
        # The recurrent state is kept in float32 whatever the model's type is.
        return batch * (conv + heads * width * state * 4)

    def sizes(self, view: AttentionView) -> tuple[int, int, int]:
        """Heads, head width and state size in this layer."""
        heads = self.num_heads or view.num_heads
        inner = view.num_heads * view.head_dim
        if inner % heads:
            raise MixerError(
                f"layer {view.layer_idx}: `num_heads` must divide the attention's width {inner}, "
                f"but got {heads}"
            )
        return heads, inner // heads, self.d_state or view.head_dim

    def norms(self, view: AttentionView) -> tuple[nn.Module | None, nn.Module | None]:
        """Copies of the attention's query and key norms, for C and B."""
        if self.init != "attention":
            return None, None
        weights = view.projections()
        return _widened(weights.query_norm, view), _widened(weights.key_norm, view)


class Mamba2Mixer(Mixer):
    """One discrete Mamba-2 layer."""

    def __init__(self, config: Mamba2Config, view: AttentionView) -> None:
        super().__init__()
        if config.backend == "mamba_ssm":
            require("mamba_ssm")
        self.config = config
        self._scan = partial(scan, backend=config.backend, chunk_size=config.chunk_size)
        self.num_heads, self.head_width, self.d_state = config.sizes(view)
        heads, width, state = self.num_heads, self.head_width, self.d_state
        # x, B, C pass the convolution; z is the gate, a the decay.
        self.widths = [heads * width, heads * state, heads * state]
        self._sizes = StepSizes(heads=heads, width=width, state=state, min_step=MIN_STEP)
        channels = sum(self.widths)
        self.in_proj = nn.Linear(view.d_model, channels + heads * width + heads)
        self.conv_weight = nn.Parameter(torch.zeros(channels, config.d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(channels))
        self.D = nn.Parameter(torch.ones(heads))
        self.out_proj = nn.Linear(heads * width, view.d_model)
        self.c_norm, self.b_norm = config.norms(view)
        with torch.no_grad():
            self.conv_weight[:, -1] = 1.0
            nn.init.zeros_(self.in_proj.bias)
            nn.init.zeros_(self.out_proj.bias)
            gate = slice(channels, channels + heads * width)
            self.in_proj.weight[gate] = 0.0
            self.in_proj.bias[gate] = OPEN_GATE

    def forward(
        self, hidden: Tensor, *, mask: Tensor | None = None, cache: MixerState | None = None
    ) -> Tensor:
        x, b, c, log_decay, gate = self._inputs(hidden, mask, cache)
        state = cache.tensors.get("ssm") if cache is not None else None
        mixed, state = self._scan(c, b, x, log_decay, state, skip=self.D)
        if cache is not None:
            cache.tensors["ssm"] = state
            cache.num_tokens += hidden.shape[1]
        return self._project_out(mixed, gate)

    @torch.no_grad()
    def step(self, hidden: Tensor, cache: MixerState) -> Tensor:
        projected = self.in_proj(hidden[:, 0])
        if self.b_norm is not None or self.c_norm is not None:
            x, b, c, rest = projected.split(
                [*self.widths, projected.shape[1] - sum(self.widths)], -1
            )
            normed = self._normed(self.b_norm, b), self._normed(self.c_norm, c)
            projected = torch.cat([x, *normed, rest], dim=-1)
        y = decode_step(
            projected,
            cache.tensors["conv"],
            cache.tensors["ssm"],
            weight=self.conv_weight,
            bias=self.conv_bias,
            skip=self.D,
            sizes=self._sizes,
            backend=self.config.backend,
        )
        cache.num_tokens += 1
        return self.out_proj(y)[:, None]  # type: ignore[no-any-return]

    def values(self, hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self._inputs(hidden, mask)[0]

    def readout(self, mixed: Tensor, hidden: Tensor) -> Tensor:
        return self._project_out(mixed, self._inputs(hidden, None)[-1])

    def factors(self, hidden: Tensor, *, mask: Tensor | None = None) -> MatrixFactors:
        _, b, c, log_decay, _ = self._inputs(hidden, mask)
        return MatrixFactors(c=c, b=b, log_decay=log_decay, diagonal=self.D)

    def mixing_matrix(self, hidden: Tensor, *, mask: Tensor | None = None) -> Tensor:
        factors = self.factors(hidden, mask=mask)
        # Sums over the whole length are taken in float64: float32 would lose the difference of two
        # large sums.
        decay = decay_mask(factors.log_decay.double().cumsum(-1)).float()
        matrix = factors.c.float() @ factors.b.float().transpose(-1, -2) * decay
        return matrix + torch.diag_embed(self.D.float()[:, None].expand(-1, hidden.shape[1]))

    @torch.no_grad()
    def init_from_attention(self, view: AttentionView) -> None:
        """C from queries, B from keys, x from values, the output projection as it is.

        Raises:
            MixerError: The sizes differ from the attention's, so its weights do not fit.
        """
        wanted = (view.num_heads, view.head_dim, view.head_dim)
        have = (self.num_heads, self.head_width, self.d_state)
        if have != wanted:
            raise MixerError(
                f"layer {view.layer_idx}: starting mamba2 from attention needs its heads, head "
                f"size and state size {wanted}, but got {have}; use init: random"
            )
        weights = view.projections()
        groups = view.num_heads // view.num_kv_heads

        def widen(tensor: Tensor, repeats: int) -> Tensor:
            heads: Tensor = tensor.unflatten(0, (-1, view.head_dim))
            return heads.repeat_interleave(repeats, 0).flatten(0, 1).to(self.D)

        roles = [
            (weights.value, weights.value_bias, groups),
            (weights.key, weights.key_bias, groups),
            (weights.query, weights.query_bias, 1),
        ]
        start = 0
        for (weight, bias, repeats), width in zip(roles, self.widths, strict=True):
            rows = slice(start, start + width)
            self.in_proj.weight[rows] = widen(weight, repeats)
            if bias is not None:
                self.in_proj.bias[rows] = widen(bias, repeats)
            start += width
        self.out_proj.weight.copy_(weights.output)
        if weights.output_bias is not None:
            self.out_proj.bias.copy_(weights.output_bias)
        # The default decay forgets half at each token. Attention looks further: the heads start
        # with memories of 1 to 50 tokens.
        steps = torch.logspace(math.log10(MAX_START), math.log10(MIN_START), self.num_heads)
        self.in_proj.bias[-self.num_heads :] = torch.log(torch.expm1(steps)).to(self.D)
        self._scale_c(torch.full((self.num_heads,), view.scaling, device=self.D.device))

    @torch.no_grad()
    def calibrate(self, hidden: Tensor, target: Tensor, *, mask: Tensor | None = None) -> None:
        """Least squares over two numbers a head: the scale of C, and D.

        Softmax normalises its rows and this mixer does not, so with attention's weights it puts
        out hundreds of times too much.
        """
        if self.config.init != "attention":
            return
        x, b, c, log_decay, gate = self._inputs(hidden, mask)
        scanned, _ = self._scan(c, b, x, log_decay)
        parts = [self._gated(part, gate).float() for part in (scanned, x)]
        features = torch.cat(parts, dim=-1).flatten(0, 1)  # (B T, 2 H P)
        wanted = (target.float() - self.out_proj.bias).flatten(0, 1)
        if mask is not None:
            features, wanted = features[mask.flatten()], wanted[mask.flatten()]
        # Each of the 2 H unknowns multiplies one block of features sent through the output
        # projection, so the normal equations follow from second moments of the features alone.
        weight = torch.cat([self.out_proj.weight.float()] * 2, dim=1)  # (D, 2 H P)
        with torch.autocast(hidden.device.type, enabled=False):
            gram = (features.T @ features) * (weight.T @ weight)
            right = (features.T @ wanted) * weight.T
        blocks = 2 * self.num_heads
        gram = gram.unflatten(0, (blocks, -1)).unflatten(2, (blocks, -1)).sum((1, 3)).double()
        right_sum = right.unflatten(0, (blocks, -1)).sum((1, 2)).double()
        # Scaled to a unit diagonal, so that the small ridge treats both kinds of unknown alike.
        size = gram.diagonal().clamp_min(1e-30).rsqrt()
        gram = gram * size[:, None] * size
        gram += 1e-3 * torch.eye(blocks, dtype=gram.dtype, device=gram.device)
        solution = (size * torch.linalg.solve(gram, size * right_sum)).float()
        self._scale_c(solution[: self.num_heads])
        self.D.copy_(solution[self.num_heads :])

    def _inputs(
        self, hidden: Tensor, mask: Tensor | None, cache: MixerState | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x ``(B, H, T, P)``, B, C ``(B, H, T, N)``, log-decay ``(B, H, T)``, z ``(B, T, H P)``."""
        if mask is not None:
            hidden = hidden * mask[..., None].to(hidden.dtype)
        projected = self._projected(hidden)
        sizes = [sum(self.widths), self.widths[0], self.num_heads]
        mixed, gate, a, _ = projected.split([*sizes, projected.shape[-1] - sum(sizes)], dim=-1)
        if self.b_norm is not None or self.c_norm is not None:
            x, b, c = mixed.split(self.widths, dim=-1)
            mixed = torch.cat([x, self._normed(self.b_norm, b), self._normed(self.c_norm, c)], -1)
        # Under autocast no longer the type of the input.
        real = None if mask is None else mask[..., None].to(mixed.dtype)
        if real is not None:
            # Biases would reach the convolution's window from padded positions.
            mixed = mixed * real
        mixed = self._convolved(mixed, cache)
        if real is not None:
            mixed = mixed * real
        x, b, c = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in mixed.split(self.widths, dim=-1)
        )
        # alpha = sigmoid(-a) = exp(-softplus(a)), in float32 because alpha near 1 is the regime of
        # long memory.
        log_decay = -F.softplus(a.float()).clamp_min(MIN_STEP).transpose(1, 2)
        if mask is not None:
            log_decay = log_decay * mask[:, None]
        return x, b, c, log_decay, gate

    def _projected(self, hidden: Tensor) -> Tensor:
        """What the input projection puts out, in the first of its columns."""
        pad = -self.in_proj.out_features % ALIGNED
        if not hidden.is_cuda or not pad:
            return self.in_proj(hidden)  # type: ignore[no-any-return]
        weight, bias = self.in_proj.weight, self.in_proj.bias
        return F.linear(hidden, F.pad(weight, (0, 0, 0, pad)), F.pad(bias, (0, pad)))

    def _convolved(self, inputs: Tensor, cache: MixerState | None) -> Tensor:
        """Causal depthwise convolution of ``(B, T, channels)``, from the cached inputs on."""
        before = None if cache is None else cache.tensors.get("conv")
        if cache is not None:
            cache.tensors["conv"] = last_inputs(inputs, before, self.config.d_conv - 1)
        return causal_conv(
            inputs, before, self.conv_weight, self.conv_bias, backend=self.config.backend
        )

    def _normed(self, norm: nn.Module | None, flat: Tensor) -> Tensor:
        if norm is None:
            return flat
        weight = norm.weight
        assert isinstance(weight, Tensor)
        if weight.numel() == flat.shape[-1]:
            normed: Tensor = norm(flat)
        else:
            normed = norm(flat.unflatten(-1, (self.num_heads, -1))).flatten(-2)
        # Under autocast norms put out float32.
        return normed.to(flat.dtype)

    def _gated(self, mixed: Tensor, gate: Tensor) -> Tensor:
        return mixed.transpose(1, 2).flatten(2) * F.silu(gate)

    def _project_out(self, mixed: Tensor, gate: Tensor) -> Tensor:
        projected: Tensor = self.out_proj(self._gated(mixed, gate))
        return projected

    def _scale_c(self, factors: Tensor) -> None:
        # Into the convolution's taps: a norm between projection and convolution would undo a scale
        # on the projection.
        rows = slice(sum(self.widths[:2]), sum(self.widths))
        per_channel = factors.repeat_interleave(self.d_state)
        self.conv_weight[rows] *= per_channel[:, None]
        self.conv_bias[rows] *= per_channel


def _widened(norm: nn.Module | None, view: AttentionView) -> nn.Module | None:
    """A copy of a query or key norm that fits all of the mixer's heads."""
    if norm is None:
        return None
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        raise MixerError(
            f"layer {view.layer_idx}: starting mamba2 from attention needs query and key norms "
            f"with one weight a channel, but {type(norm).__name__} has none; use init: random"
        )
    norm = copy.deepcopy(norm)
    groups = view.num_heads // view.num_kv_heads
    if weight.numel() == view.num_kv_heads * view.head_dim and groups > 1 and view.num_kv_heads > 1:
        # One norm over all key heads: repeated heads have the same statistics.
        for name, parameter in list(norm.named_parameters(recurse=False)):
            heads = parameter.detach().unflatten(0, (view.num_kv_heads, -1))
            setattr(norm, name, nn.Parameter(heads.repeat_interleave(groups, 0).flatten()))
        if isinstance(norm, nn.LayerNorm):
            norm.normalized_shape = (view.num_heads * view.head_dim,)
    return norm.requires_grad_(True)
