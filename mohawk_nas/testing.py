"""What every mixer must hold, as a test class to subclass.

    from mohawk_nas.testing import MixerContract

    class TestMyMixer(MixerContract):
        config = MyConfig(width=8, init="random")

A mixer either overrides ``init_from_attention`` or is given ``init="random"``, here and, as
``init: random``, in the study.

For readable failures register this module with ``pytest.register_assert_rewrite`` in a conftest.

B batch, T tokens, H heads, P head width, D model width.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
import yaml
from safetensors.torch import load, save
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mohawk_nas.config import read_options
from mohawk_nas.errors import MixerError
from mohawk_nas.mixer import AttentionView, Mixer, MixerConfig, MixerState, build_mixer
from mohawk_nas.teacher import find_attention

__all__ = ["SIZES", "MixerContract", "perturb", "tiny_model", "tiny_view"]

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 61,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Of a tiny model: grouped heads, and few powers of two."""


def tiny_model(
    arch: str = "llama", *, attention: str = "sdpa", seed: int = 0, meta: bool = False, **sizes: Any
) -> Any:
    """A stock Hugging Face causal LM with random weights, biases and norms included.

    Args:
        arch: Its ``model_type``.
        attention: Its attention implementation.
        seed: Of the weights.
        meta: Build it on the meta device.
        sizes: Settings of its configuration beside :data:`SIZES`.
    """
    config = AutoConfig.for_model(arch, **(SIZES | sizes))
    with torch.random.fork_rng(devices=[]), torch.device("meta") if meta else nullcontext():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
        if not meta:
            perturb(model, scale=0.2)
    return model.eval()


def tiny_view(
    arch: str = "llama", *, layer: int = 1, meta: bool = False, **sizes: Any
) -> AttentionView:
    """The attention layer of a tiny random model; the arguments are :func:`tiny_model`'s."""
    return find_attention(tiny_model(arch, meta=meta, **sizes))[layer].view


class MixerContract:
    """Tests of one mixer's configuration in one kind of layer.

    Subclass it and set :attr:`config`; pytest does the rest. The tests build the mixer for a tiny
    random layer, by default one of a Llama with grouped heads, and move all of its parameters, so
    that nothing is hidden by values they start from.
    """

    config: ClassVar[MixerConfig]
    """The candidate under test."""
    arch: ClassVar[str] = "llama"
    """``model_type`` of the model that the layer stands in."""
    sizes: ClassVar[dict[str, Any]] = {}
    """Settings of that model, over those of :data:`SIZES`."""
    tolerance: ClassVar[float] = 2e-5
    """Largest error in float32, relative to the largest value."""
    long_length: ClassVar[int] = 1537
    """Tokens of the long sequence, on which a mixer's errors add up if they can."""

    def long_memory(self, mixer: Mixer) -> None:
        """Bring a mixer into the regime where it forgets least, for the long sequence.

        A mixer that forgets quickly after :func:`perturb` does on a long sequence only what it
        does on a short one. Where decays decide how long it remembers, move them close to 1. Not
        overridden, nothing is done, and the long sequence is tested once.
        """

    def view(self, *, meta: bool = False, **sizes: Any) -> AttentionView:
        """The layer under test."""
        return tiny_view(self.arch, meta=meta, **(self.sizes | sizes))

    def mixer(self, *, trained: bool = True) -> Mixer:
        """The mixer as built, or as some training might have left it."""
        mixer = self._build(self.view(), seed=0)
        if trained:
            perturb(mixer, scale=0.2)
        return mixer

    def _build(self, view: AttentionView, *, seed: int) -> Mixer:
        try:
            return build_mixer(self.config, view, seed=seed)
        except MixerError:
            if self.config.init != "attention":
                raise
            # One test tells that it cannot start so; the others are about the mixer.
            config = dataclasses.replace(self.config, init="random")
            return build_mixer(config, view, seed=seed)

    def hidden(self, batch: int = 3, length: int = 17, *, seed: int = 0) -> Tensor:
        """Input of a layer, ``(batch, length, D)``."""
        d_model = self.view(meta=True).d_model
        return torch.randn(batch, length, d_model, generator=_generator(seed))

    def close(self, actual: Tensor, expected: Tensor, *, tolerance: float | None = None) -> None:
        """Fail unless two results agree."""
        assert actual.shape == expected.shape
        assert bool(torch.isfinite(actual).all())
        if not expected.numel():
            return
        error = (actual - expected).abs().max().item()
        allowed = (self.tolerance if tolerance is None else tolerance) * expected.abs().max().item()
        assert error <= allowed, f"they differ by {error:.3g}, and {allowed:.3g} is allowed"

    @pytest.mark.parametrize("length", [1, 2, 17])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @torch.no_grad()
    def test_shapes_and_dtypes(self, dtype: torch.dtype, length: int) -> None:
        mixer = self.mixer().to(dtype)
        hidden = self.hidden(length=length).to(dtype)
        output, values = mixer(hidden), mixer.values(hidden)
        matrix = mixer.mixing_matrix(hidden)
        assert output.shape == hidden.shape
        assert output.dtype == dtype
        assert values.shape[:3] == (3, mixer.num_heads, length)
        assert values.dtype == dtype
        assert matrix.shape == (3, mixer.num_heads, length, length)
        assert matrix.dtype == torch.float32
        assert mixer.readout(values, hidden).dtype == dtype
        exact = mixer.float()(hidden.float())
        # bfloat16 holds 8 bits, and errors add up along the sequence.
        rough = 1e-6 if dtype == torch.float32 else 0.1
        self.close(output.float(), exact, tolerance=rough)

    @pytest.mark.parametrize("trained", [False, True])
    @torch.no_grad()
    def test_causality(self, trained: bool) -> None:
        mixer, hidden = self.mixer(trained=trained), self.hidden()
        before = mixer(hidden)
        for token in (1, 8, 16):
            changed = hidden.clone()
            changed[:, token] = 10 * self.hidden(seed=1)[:, token]
            after = mixer(changed)
            self.close(after[:, :token], before[:, :token])
            assert not torch.allclose(after[:, token], before[:, token]), "a token is not seen"

    @torch.no_grad()
    def test_forward_is_readout_of_mixed_values(self) -> None:
        mixer, hidden, mask = self.mixer(), self.hidden(), _left_padding([17, 12, 3], 17)
        for given in (None, mask):
            mixed = mixer.mixing_matrix(hidden, mask=given) @ mixer.values(hidden, mask=given)
            real = slice(None) if given is None else given
            output = mixer.readout(mixed, hidden)[real]
            self.close(output, mixer(hidden, mask=given)[real])

    @torch.no_grad()
    def test_matrix_is_lower_triangular(self) -> None:
        matrix = self.mixer().mixing_matrix(self.hidden())
        assert not matrix.triu(1).any()
        assert bool(torch.isfinite(matrix).all())

    @torch.no_grad()
    def test_factors_rebuild_the_matrix(self) -> None:
        mixer, hidden, mask = self.mixer(), self.hidden(), _left_padding([17, 12, 3], 17)
        for given in (None, mask):
            factors = mixer.factors(hidden, mask=given)
            if factors is None:
                pytest.skip("this mixer offers no factors")
            assert factors.log_decay.dtype == torch.float32
            assert bool((factors.log_decay <= 0).all())
            total = factors.log_decay.double().cumsum(-1)
            decay = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
            matrix = factors.c.double() @ factors.b.double().transpose(-1, -2) * decay
            if factors.diagonal is not None:
                matrix += torch.diag_embed(factors.diagonal.double()[:, None].expand(-1, 17))
            self.close(matrix.float(), mixer.mixing_matrix(hidden, mask=given))

    @pytest.mark.parametrize("trained", [False, True])
    @torch.no_grad()
    def test_left_padding_changes_nothing(self, trained: bool) -> None:
        mixer, lengths = self.mixer(trained=trained), [17, 12, 3, 1]
        hidden, mask = self.hidden(4), _left_padding(lengths, 17)
        # What stands at padded positions is finite, and anything.
        hidden = torch.where(mask[..., None], hidden, 100 * self.hidden(4, seed=1))
        together = mixer(hidden, mask=mask)
        matrices = mixer.mixing_matrix(hidden, mask=mask)
        values = mixer.values(hidden, mask=mask)
        for row, length in enumerate(lengths):
            alone = hidden[row : row + 1, 17 - length :].contiguous()
            self.close(together[row : row + 1, 17 - length :], mixer(alone))
            matrix = matrices[row : row + 1, :, 17 - length :, 17 - length :]
            self.close(matrix, mixer.mixing_matrix(alone))
            self.close(values[row : row + 1, :, 17 - length :], mixer.values(alone))
        self.close(mixer(hidden, mask=torch.ones_like(mask)), mixer(hidden))

    @pytest.mark.parametrize("lengths", [None, [17, 12, 3]], ids=["whole", "padded"])
    @pytest.mark.parametrize("chunks", [[17], [1] * 17, [5, 1, 8, 3], [16, 1]], ids=str)
    @torch.no_grad()
    def test_state_continues_where_it_stands(
        self, chunks: list[int], lengths: list[int] | None
    ) -> None:
        mixer, hidden = self.mixer(), self.hidden()
        mask = None if lengths is None else _left_padding(lengths, 17)
        expected = mixer(hidden, mask=mask)
        state, outputs, start = mixer.new_state(), [], 0
        for size in chunks:
            piece = slice(start, start + size)
            given = None if mask is None else mask[:, piece]
            if given is not None and bool(given.all()):
                given = None
            outputs.append(mixer(hidden[:, piece].contiguous(), mask=given, cache=state))
            start += size
            assert state.get_seq_length() == start
        real = torch.ones(3, 17, dtype=torch.bool) if mask is None else mask
        self.close(torch.cat(outputs, dim=1)[real], expected[real])
        state.reset()
        assert state.get_seq_length() == 0
        again = mixer(hidden, mask=mask, cache=state)
        self.close(again[real], expected[real])

    @torch.no_grad()
    def test_steps_are_forward_and_stay_in_place(self) -> None:
        mixer, hidden, mask = self.mixer(), self.hidden(), _left_padding([17, 12, 3], 17)
        expected = mixer(hidden, mask=mask)[:, 14:]
        state = mixer.new_state()
        mixer(hidden[:, :14].contiguous(), mask=mask[:, :14], cache=state)
        if not isinstance(state, MixerState):
            pytest.skip("the state is of a kind of its own")
        state.tensors = {name: tensor.contiguous() for name, tensor in state.tensors.items()}
        places = dict(state.tensors)
        try:
            steps = [mixer.step(hidden[:, t : t + 1], state) for t in range(14, 17)]
        except MixerError:
            assert state.num_bytes() > sum(t.nbytes for t in places.values())
            pytest.skip("the state grows")
        self.close(torch.cat(steps, dim=1), expected)
        assert all(state.tensors[name] is tensor for name, tensor in places.items())
        assert state.get_seq_length() == 17

    @torch.no_grad()
    def test_state_follows_its_sequences(self) -> None:
        mixer, hidden, mask = self.mixer(), self.hidden(), _left_padding([17, 12, 9], 17)
        expected = mixer(hidden, mask=mask)[:, 14:]
        order = torch.tensor([2, 0, 0])
        ways = {
            "reorder_cache": (order, order),
            "batch_select_indices": (order[:2], order[:2]),
            "batch_repeat_interleave": (2, torch.tensor([0, 0, 1, 1, 2, 2])),
        }
        for name, (argument, rows) in ways.items():
            state = mixer.new_state()
            if not hasattr(state, name):
                continue
            mixer(hidden[:, :14].contiguous(), mask=mask[:, :14], cache=state)
            getattr(state, name)(argument)
            steps = [mixer(hidden[rows, t : t + 1], cache=state) for t in range(14, 17)]
            self.close(torch.cat(steps, dim=1), expected[rows])

    @pytest.mark.parametrize("lengths", [None, [17, 12, 3]], ids=["whole", "padded"])
    def test_gradients_reach_everything(self, lengths: list[int] | None) -> None:
        mixer, hidden = self.mixer(), self.hidden().requires_grad_()
        mask = None if lengths is None else _left_padding(lengths, 17)
        real = torch.ones(3, 17, dtype=torch.bool) if mask is None else mask
        direction = torch.randn(hidden.shape, generator=_generator(2))
        (mixer(hidden, mask=mask) * direction)[real].sum().backward()
        for name, parameter in mixer.named_parameters():
            assert parameter.grad is not None, f"{name} has no gradient"
            assert bool(torch.isfinite(parameter.grad).all()), f"{name}'s gradient is not finite"
            assert bool(parameter.grad.any()), f"{name}'s gradient is zero"
        assert hidden.grad is not None
        assert bool(torch.isfinite(hidden.grad).all())
        assert bool(hidden.grad[real].any(-1).all()), "a token's input has no gradient"
        assert not hidden.grad[~real].any(), "padding has a gradient"

    @pytest.mark.parametrize(
        "lengths", [[1, 1], [17, 17, 17], [17, 12, 3], [67, 67], [67, 30]], ids=str
    )
    def test_gradients_are_those_of_the_matrix(self, lengths: list[int]) -> None:
        mixer, total = self.mixer(), max(lengths)
        mask = _left_padding(lengths, total)
        given = None if bool(mask.all()) else mask
        hidden = self.hidden(len(lengths), total).requires_grad_()
        direction = torch.randn(hidden.shape, generator=_generator(2))
        wanted = {"the input": hidden, **dict(mixer.named_parameters())}

        def gradients(output: Tensor) -> dict[str, Tensor]:
            loss = (output * direction)[mask].sum()
            found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
            # What has no influence may have no gradient, or zero.
            return {
                name: torch.zeros_like(tensor) if gradient is None else gradient
                for (name, tensor), gradient in zip(wanted.items(), found, strict=True)
            }

        actual = gradients(mixer(hidden, mask=given))
        matrix = mixer.mixing_matrix(hidden, mask=given)
        expected = gradients(mixer.readout(matrix @ mixer.values(hidden, mask=given), hidden))
        # Gradients that cancel, as those of a key's bias do, are left with the others' noise.
        noise = 1e-6 * max(gradient.abs().max().item() for gradient in expected.values())
        for name, gradient in actual.items():
            error = (gradient - expected[name]).abs().max().item()
            allowed = 1e-4 * expected[name].abs().max().item() + noise
            assert error <= allowed, (
                f"{name}: gradients differ by {error:.3g}, and {allowed:.3g} is allowed"
            )

    def test_gradients_are_slopes(self) -> None:
        # Forward and matrix may share code, and with it a wrong gradient.
        mixer, hidden = self.mixer(), self.hidden(2, 9).requires_grad_()
        direction = torch.randn(hidden.shape, generator=_generator(2))
        wanted = {"the input": hidden, **dict(mixer.named_parameters())}

        def loss() -> Tensor:
            output: Tensor = mixer(hidden)
            return (output.double() * direction).sum()

        found = torch.autograd.grad(loss(), list(wanted.values()), allow_unused=True)
        lengths = [0.0 if gradient is None else gradient.norm().item() for gradient in found]
        for (name, tensor), gradient, length in zip(wanted.items(), found, lengths, strict=True):
            # A slope this small is lost in float32.
            if gradient is None or length < 1e-3 * max(lengths):
                continue
            step, losses = 3e-3, []
            with torch.no_grad():
                before = tensor.clone()
                for sign in (1, -1):
                    tensor.copy_(before + sign * step * gradient / length)
                    losses.append(loss().item())
                tensor.copy_(before)
            slope = (losses[0] - losses[1]) / (2 * step)
            assert abs(slope - length) <= 0.01 * length, (
                f"{name}: the output rises by {slope:.3g} where the gradient says {length:.3g}"
            )

    @pytest.mark.parametrize("far", [False, True], ids=["as it is", "long memory"])
    @torch.no_grad()
    def test_a_long_sequence(self, far: bool) -> None:
        mixer, hidden = self.mixer(), self.hidden(1, self.long_length)
        if far:
            if type(self).long_memory is MixerContract.long_memory:
                pytest.skip("long_memory is not overridden, so there is no such regime")
            self.long_memory(mixer)
        expected = mixer(hidden)
        assert bool(torch.isfinite(expected).all())
        # Odd pieces: the mixer's own chunks begin and end within them.
        state, outputs, start = mixer.new_state(), [], 0
        for size in itertools.cycle([1, 101, 7, 37, 211, 3, 65]):
            piece = hidden[:, start : start + size].contiguous()
            outputs.append(mixer(piece, cache=state))
            start += piece.shape[1]
            if start == self.long_length:
                break
        assert state.get_seq_length() == self.long_length
        self.close(torch.cat(outputs, dim=1), expected)
        mixed = mixer.mixing_matrix(hidden) @ mixer.values(hidden)
        self.close(mixer.readout(mixed, hidden), expected)

    def test_num_params_is_what_is_built(self) -> None:
        view = self.view(meta=True)
        with torch.device("meta"):
            mixer = self.config.build(view)
        assert self.config.num_params(view) == sum(p.numel() for p in mixer.parameters())
        assert self.config.num_params(self.view()) == self.config.num_params(view)

    def test_flops_are_positive_and_never_fall_with_context(self) -> None:
        view = self.view(meta=True)
        flops = [self.config.flops_per_token(view, context) for context in (0, 1, 64, 4096)]
        assert flops[0] > 0
        assert flops == sorted(flops)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("chunks", [[1], [3], [17], [16, 1], [4, 9, 4]], ids=str)
    @torch.no_grad()
    def test_state_bytes_are_what_is_held(self, chunks: list[int], dtype: torch.dtype) -> None:
        view, mixer = self.view(meta=True), self.mixer().to(dtype)
        state = mixer.new_state()
        for size in chunks:
            mixer(self.hidden(length=size).to(dtype), cache=state)
        expected = self.config.state_bytes(
            view, batch=3, context=sum(chunks), bytes_per_element=dtype.itemsize
        )
        assert state.num_bytes() == expected
        # A slice holds on to all that it was cut from.
        held = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors(state)}
        assert sum(storage.nbytes() for storage in held.values()) == expected

    @torch.no_grad()
    def test_state_dict_round_trip(self) -> None:
        mixer, hidden = self.mixer(), self.hidden()
        other = build_mixer(self.config, self.view(), seed=None)
        other.load_state_dict(load(save(mixer.state_dict())), strict=True)
        assert torch.equal(other(hidden), mixer(hidden))

    @torch.no_grad()
    def test_deepcopy_is_independent(self) -> None:
        mixer, hidden = self.mixer(), self.hidden()
        before = mixer(hidden)
        other = copy.deepcopy(mixer)
        assert torch.equal(other(hidden), before)
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal(mixer(hidden), before)

    def test_the_teacher_is_left_alone(self) -> None:
        view = self.view()
        before = copy.deepcopy(view.module.state_dict())
        frozen = {name: p.requires_grad for name, p in view.module.named_parameters()}
        mixer = self._build(view, seed=0)
        assert all(p.requires_grad for p in mixer.parameters())
        perturb(mixer, scale=0.2)
        after = view.module.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert frozen == {name: p.requires_grad for name, p in view.module.named_parameters()}

    def test_seed_decides(self) -> None:
        view, around = self.view(), torch.get_rng_state()
        first = self._build(view, seed=3).state_dict()
        torch.rand(5)
        again = self._build(view, seed=3).state_dict()
        assert first.keys() == again.keys()
        assert all(torch.equal(first[name], again[name]) for name in first)
        torch.set_rng_state(around)
        self._build(view, seed=3)
        assert torch.equal(torch.get_rng_state(), around), "the global random state has moved"

    def test_init_can_be(self) -> None:
        mixer = type(self.mixer(trained=False))
        never = mixer.init_from_attention is Mixer.init_from_attention
        assert not never or self.config.init != "attention", (
            f"{mixer.__name__} cannot start from attention: override init_from_attention, or test "
            'it with init="random" and give its candidate `init: random` in the study'
        )

    @pytest.mark.parametrize("kv_heads", [1, 2, 3, 6])
    @torch.no_grad()
    def test_starts_from_grouped_attention(self, kv_heads: int) -> None:
        view = self.view(num_key_value_heads=kv_heads)
        mixer = build_mixer(self.config, view, seed=None)
        random = copy.deepcopy(mixer)
        try:
            mixer.init_from_attention(view)
        except MixerError:
            # One that never starts so is told of once, above.
            never = type(mixer).init_from_attention is Mixer.init_from_attention
            assert never or self.config.init != "attention", "`init: attention` is not supported"
            pytest.skip("this mixer does not start from attention")
        hidden = self.hidden()
        assert bool(torch.isfinite(mixer(hidden)).all())
        if not self.config.keeps_attention:
            assert not torch.equal(mixer(hidden), random(hidden))

    @torch.no_grad()
    def test_calibration(self) -> None:
        mixer, hidden, mask = self.mixer(), self.hidden(), _left_padding([17, 12, 3], 17)
        target = self.hidden(seed=1)

        def distance() -> float:
            return float((mixer(hidden, mask=mask) - target)[mask].square().mean())

        before = distance()
        mixer.calibrate(hidden, target, mask=mask)
        assert all(bool(torch.isfinite(p).all()) for p in mixer.parameters())
        assert distance() <= before * (1 + 1e-5)

    @pytest.mark.parametrize("teacher_heads", [1, 4, 6, 7, 32])
    def test_head_pairs(self, teacher_heads: int) -> None:
        mixer = self.mixer(trained=False)
        pairs = mixer.head_pairs(teacher_heads)
        assert pairs.shape == (mixer.num_heads,)
        assert not pairs.is_floating_point()
        assert 0 <= int(pairs.min()) <= int(pairs.max()) < teacher_heads

    def test_symbol_is_one_upper_case_letter(self) -> None:
        assert len(self.config.symbol) == 1
        assert self.config.symbol.isupper()

    def test_a_study_can_give_its_options(self) -> None:
        config = self.config
        chosen = {
            f.name: getattr(config, f.name)
            for f in dataclasses.fields(config)
            if getattr(config, f.name) != f.default
        }
        options = yaml.safe_load(yaml.safe_dump(chosen))
        assert read_options(type(config), options, where="candidate", owner="mixer") == config


@torch.no_grad()
def perturb(module: torch.nn.Module, *, scale: float) -> None:
    """Move every parameter a little, those that start at zero or one too; always the same way."""
    generator = _generator(5)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(scale * noise.to(parameter))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _left_padding(lengths: list[int], total: int) -> Tensor:
    """True at the last ``lengths[row]`` positions of each row."""
    return torch.arange(total)[None] >= total - torch.tensor(lengths)[:, None]


def _tensors(state: Any) -> Iterable[Tensor]:
    """Every tensor a state holds, however deep in lists and dictionaries."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict):
        for item in state.values():
            yield from _tensors(item)
    elif isinstance(state, list | tuple):
        for item in state:
            yield from _tensors(item)
    elif hasattr(state, "__dict__"):
        yield from _tensors(vars(state))
