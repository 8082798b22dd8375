"""Stage 3 on several processes, by PyTorch's own DistributedDataParallel and FSDP2.

A step's blocks are divided over the ranks, and a gradient is the mean over all of them, so curves
do not depend on the number of ranks beyond rounding. Products are computed in the teacher's type,
gradients are added and weights are moved in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mohawk_nas.config import LogitsConfig
from mohawk_nas.data import TokenBlocks
from mohawk_nas.distill.graph import MAX_AHEAD, RecordedStep
from mohawk_nas.distill.logits_trainer import (
    LogitsTrainer,
    keeping_inputs_alone,
    trainable_parameters,
)
from mohawk_nas.distill.losses import loss_of_hidden
from mohawk_nas.distill.optimizer import ClippedAdamW
from mohawk_nas.fusion import fused_parts
from mohawk_nas.metrics import BlockFigures, body, evaluate_blocks
from mohawk_nas.ranks import num_ranks, of_every, rank
from mohawk_nas.student import MixerSlot, decoder_layers
from mohawk_nas.teacher import Teacher

__all__ = [
    "DataParallelTrainer",
    "Mode",
    "ShardedTrainer",
    "bytes_of_parts",
    "evaluate_shares",
    "make_trainer",
    "parallel_mode",
]

T = TypeVar("T")

Mode = Literal["one", "ddp", "fsdp"]

MOST_LAYERS_AT_ONCE = 4
"""Layers of FSDP2 that are gathered together; with more of them exchanges have nothing to run
beside."""
PARAMETERS_AT_ONCE = 2**28
"""Most parameters of these layers."""
BYTES_A_PARAMETER = 20
"""A weight, its master, both gradients and two moments."""


def parallel_mode(config: LogitsConfig, teacher: Teacher) -> Mode:
    """How the processes of this run share stage 3; ``one`` if there is one.

    Args:
        config: Its ``parallel``.
        teacher: Whose layers the student has.
    """
    if num_ranks() == 1:
        return "one"
    if config.parallel != "auto":
        return config.parallel
    if teacher.device.type != "cuda":
        return "ddp"
    needed: int = BYTES_A_PARAMETER * sum(p.numel() for p in teacher.model.parameters())
    return "ddp" if needed <= _room(teacher.device) else "fsdp"


def bytes_of_parts(trained: int, frozen: int, ranks: int) -> int:
    """What each rank holds of a student that FSDP2 divides, all of it in float32.

    Args:
        trained: Parameters with gradient and two moments.
        frozen: Parameters without.
        ranks: Among which they are divided.
    """
    return -(-(16 * trained + 4 * frozen) // ranks)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    """What every rank holds whole under FSDP2 because it fits, and so need not be gathered."""

    teacher: bool
    """For all of training."""
    layers: bool
    """Those of the student from a batch's forward pass to its backward pass."""

    @classmethod
    def by_memory(cls, teacher: Teacher, student: nn.Module, config: LogitsConfig) -> _Held:
        """The teacher first, then the student's layers, in half of the memory: rest is for text."""
        in_mixers = {
            parameter
            for module in student.modules()
            if isinstance(module, MixerSlot)
            for parameter in module.parameters()
        }
        lowered = 2 if teacher.model.dtype == torch.bfloat16 else 4
        counts = {True: 0, False: 0}
        gathered = 0
        for parameter in student.parameters():
            counts[parameter.requires_grad] += parameter.numel()
            gathered += parameter.numel() * (4 if parameter in in_mixers else lowered)
        taken = bytes_of_parts(counts[True], counts[False], num_ranks())
        if config.accumulate > 1:
            # Gradients are whole until the last batch of a step.
            taken += 4 * counts[True]
        whole = sum(p.numel() * p.element_size() for p in teacher.model.parameters())
        room = _room(teacher.device)
        holds_teacher = taken + whole <= room
        taken += whole if holds_teacher else whole // num_ranks()
        return cls(teacher=holds_teacher, layers=taken + gathered <= room)


def _room(device: torch.device) -> float:
    """Half of the smallest rank's memory, in bytes; on a CPU nobody counts."""
    if device.type != "cuda":
        return float("inf")
    return min(of_every(torch.cuda.get_device_properties(device).total_memory)) / 2


def make_trainer(
    teacher: Teacher, student: nn.Module, config: LogitsConfig, mode: Mode
) -> LogitsTrainer:
    """The trainer of a mode, for one student."""
    if mode == "one":
        return LogitsTrainer(teacher, [student], config)
    kind = DataParallelTrainer if mode == "ddp" else ShardedTrainer
    return kind(teacher, student, config)


def evaluate_shares(
    teacher: Teacher,
    blocks: TokenBlocks,
    run: Callable[[Callable[[Any], BlockFigures]], BlockFigures],
    *,
    batch_size: int,
) -> BlockFigures:
    """Figures of a student on all blocks, each computed by one rank.

    Args:
        teacher: What its KL divergence is to.
        blocks: Of which each rank takes its share.
        run: Does something with the student.
        batch_size: Blocks at once over all ranks.
    """
    ranks = num_ranks()
    each = -(-len(blocks) // ranks)
    # As many for every rank, since the parts of a sharded model meet in every layer.
    mine = [min(i, len(blocks) - 1) for i in range(rank() * each, (rank() + 1) * each)]
    share = TokenBlocks(split=blocks.split, tokens=blocks.batch(mine).int(), fingerprint="")
    size = max(1, batch_size // ranks)
    parts = of_every(run(lambda student: evaluate_blocks(teacher, student, share, batch_size=size)))
    return BlockFigures(
        kl=tuple(x for part in parts for x in part.kl)[: len(blocks)],
        cross_entropy=tuple(x for part in parts for x in part.cross_entropy)[: len(blocks)],
    )


class _Whole(nn.Module):
    """A student as one module that runs whatever needs its weights: what is wrapped.

    The engines act where a module's forward pass begins and ends, and a student's loss is made
    from parts of it.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student

    def forward(self, work: Callable[[Any], T]) -> T:
        return work(self.student)


class _RecordedTeacher:
    """A teacher that a rank holds whole, run without Python: see :class:`RecordedStep`.

    Python then prepares the student's step while the GPU still runs the teacher, which makes up for
    what the engines' hooks take.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher
        self._said: Tensor | None = None
        self._run = RecordedStep(self._say, teacher.device)

    def __call__(self, tokens: Tensor) -> Tensor:
        """:meth:`Teacher.run` of tokens on the CPU, all of one shape; valid until the next call."""
        fits = True
        try:
            self._run(tokens)
        except torch.OutOfMemoryError:
            fits = False
        if not fits:
            # What does not fit once more as a recording runs plainly from now on. Not in the block
            # above, where the error would hold on to what it was computing.
            self._run(tokens)
        assert self._said is not None and self._said.shape[:2] == tokens.shape
        return self._said

    def release(self) -> None:
        self._run.release()
        self._said = None

    def _say(self, tokens: Tensor) -> None:
        hidden = self._teacher.run(tokens)
        if self._said is None:
            self._said = torch.empty_like(hidden)
        self._said.copy_(hidden)


class _RanksTrainer(LogitsTrainer):
    """What both ways have in common: one student, a share of each batch, agreement on each step."""

    _whole: Callable[..., Any]
    _under_way: list[torch.cuda.Event]
    _recorded: _RecordedTeacher | None = None

    def step(self, batches: Sequence[Tensor], rate: float) -> None:
        """Train on this rank's shares of some batches as if they were one.

        Args:
            batches: ``(B / ranks, T)`` each, on the CPU.
            rate: Learning rate.
        """
        self._figures.zero_()
        with fused_parts(self.teacher.model, *self.students):
            for number, tokens in enumerate(batches):
                exchanges = number + 1 == len(batches)
                self._add_share(tokens, exchanges=exchanges)
        for optimizer in self.optimizers:
            optimizer.set_rate(rate)
        # A number that is not finite on one rank is not finite in the sum.
        dist.all_reduce(self._figures[:, 0])
        self._figures[:, 0] /= num_ranks()
        self._move_weights()
        self._steps.append(self._figures.clone())
        self._keep_pace()

    def evaluate(self, blocks: TokenBlocks, *, batch_size: int) -> BlockFigures:
        """Figures of all blocks, each computed by one rank; so many at once over all ranks."""
        return evaluate_shares(self.teacher, blocks, self._run, batch_size=batch_size)

    def _run(self, work: Callable[[Any], T]) -> T:
        """Do something with the student that is trained, without gradients."""
        return work(self.students[0])

    def _add_share(self, tokens: Tensor, *, exchanges: bool) -> None:
        raise NotImplementedError

    def _loss(self, tokens: Tensor) -> Tensor:
        teacher, config = self.teacher, self.config
        on_cpu, tokens = tokens, _sent(tokens, teacher.device)
        target = teacher.run(tokens) if self._recorded is None else self._recorded(on_cpu)

        def work(student: Any) -> Tensor:
            hidden = body(student, tokens)
            return loss_of_hidden(teacher.model, target, student, hidden, tokens, config)

        loss: Tensor = self._whole(work) / config.accumulate
        self._figures[0, 0] += loss.detach()
        return loss

    def _keep_pace(self) -> None:
        """Let Python run ahead of the GPU by some steps, as :class:`RecordedStep` does."""
        if self.teacher.device.type != "cuda":
            return
        if len(self._under_way) == MAX_AHEAD:
            self._under_way.pop(0).synchronize()
        self._under_way.append(torch.cuda.Event())
        self._under_way[-1].record()


class DataParallelTrainer(_RanksTrainer):
    """Every rank holds the whole student; gradients are exchanged while backward runs.

    What is held in bfloat16 is added up over batches and ranks in the masters' float32, and only
    the last of a step's batches is followed by an exchange.

    Args:
        teacher: Frozen, on every rank.
        student: As for :class:`LogitsTrainer`, the same on every rank.
        config: Stage 3.
    """

    def __init__(self, teacher: Teacher, student: nn.Module, config: LogitsConfig) -> None:
        super().__init__(teacher, [student], config)
        self._under_way = []
        followers, masters = self._followers[0]
        self._master_of = dict(zip(followers, masters, strict=True))
        with warnings.catch_warnings():
            # The new name of this setting is not known to older releases.
            warnings.filterwarnings("ignore", message="`broadcast_buffers`")
            wrapped = DistributedDataParallel(
                _Whole(student), broadcast_buffers=False, gradient_as_bucket_view=True
            )
        # Annotations of a hook must be classes, not their names.
        wrapped.register_comm_hook(
            self._master_of, lambda state, bucket: _mean_in_float32(state, bucket)
        )
        self._whole = self._wrapped = wrapped
        self._settle_buckets()
        # Whose inputs keep their shape from now on.
        self._recorded = _RecordedTeacher(teacher)

    def release(self) -> None:
        super().release()
        if self._recorded is not None:
            self._recorded.release()
        self._whole = self._wrapped = None  # type: ignore[assignment]

    def _settle_buckets(self) -> None:
        """Have gradients put into buckets in the order they come, before the first step.

        DDP does so after its first backward pass, and sums over three ranks or more depend on
        where in a bucket a number stands: a run that goes on must not begin with other buckets.
        """
        tokens = torch.zeros(1, 8, dtype=torch.long)
        for _ in range(2):
            self._add_share(tokens, exchanges=True)
        self.optimizers[0].zero_grad(set_to_none=False)

    def _add_share(self, tokens: Tensor, *, exchanges: bool) -> None:
        for follower in self._followers[0][0]:
            follower.grad = None
        with nullcontext() if exchanges else self._wrapped.no_sync():
            self._loss(tokens).backward()
        if not exchanges:
            self._collect(0)


def _mean_in_float32(
    master_of: Mapping[Tensor, Tensor], bucket: Any
) -> torch.futures.Future[Tensor]:
    """Communication hook: the mean over ranks of what all batches of a step have given.

    A follower's gradient is the last batch's; those before have been added to its master's, which
    is where the mean goes.
    """
    flat: Tensor = bucket.buffer()
    masters = [master_of[p] for p in bucket.parameters() if p in master_of]
    if not masters:
        return _summed(flat.div_(num_ranks()))
    # Buckets are of one type.
    assert len(masters) == len(bucket.parameters())
    totals = [master.grad for master in masters if master.grad is not None]
    total = (torch.cat([t.flatten() for t in totals]) + flat).div_(num_ranks())

    def hand_out(done: torch.futures.Future[Tensor]) -> Tensor:
        parts = done.value().split([total.numel() for total in totals])
        views = [part.view_as(total) for part, total in zip(parts, totals, strict=True)]
        torch._foreach_copy_(totals, views)
        return flat

    return _summed(total).then(hand_out)


def _summed(flat: Tensor) -> torch.futures.Future[Tensor]:
    work: Any = dist.all_reduce(flat, async_op=True)
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return future


class ShardedTrainer(_RanksTrainer):
    """Every rank holds a part of each of the student's tensors.

    Weights of a layer are gathered before it runs, in the teacher's type; those of mixers in
    float32. Where half of a GPU has room, every rank holds the teacher whole and keeps what was
    gathered for a forward pass, some layers at once, until its backward pass; else the teacher's
    layers are divided, too, and everything is gathered whenever it runs. What the optimizer sees
    are this rank's parts, as plain tensors.

    Args:
        teacher: Frozen. If it does not fit, its layers are sharded in place: it can then only be
            run by all ranks together.
        student: In float32, sharing no weights; sharded in place. It may stand on the CPU.
        config: Stage 3.
    """

    def __init__(self, teacher: Teacher, student: nn.Module, config: LogitsConfig) -> None:
        device = teacher.device
        self.teacher = teacher
        self.students = [student]
        self.config = config
        student.requires_grad_(False)
        trained = trainable_parameters(student, config.trainable)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        self._held = _Held.by_memory(teacher, student, config)
        self.mesh = init_device_mesh(device.type, (num_ranks(),))
        if self._held.teacher:
            self._recorded = _RecordedTeacher(teacher)
        else:
            _shard_teacher(teacher, self.mesh)
        lowered = teacher.model.dtype == torch.bfloat16
        # What a layer makes of it is never written in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        at_once = self._layers_at_once(student)
        self._whole = self._root = _shard_student(
            student, self.mesh, lowered=lowered, keeps=self._held.layers, at_once=at_once
        )
        self._groups = _groups(self._root)
        first = [g for layer in decoder_layers(student)[:at_once] for g in _groups(layer)]
        self._begins_with = [self._root, *first]
        self._exchanges = True
        # The first run of all puts tensors that do not divide evenly into other memory.
        self._run(lambda student: None)
        self._restore = keeping_inputs_alone(student) if config.activation_checkpointing else None
        # By name, since sharding has put other objects in their places.
        self._sharded: dict[str, nn.Parameter] = trainable_parameters(student, config.trainable)
        self.parameters = [
            {name: nn.Parameter(_local(p.detach())) for name, p in self._sharded.items()}
        ]
        self._pairs = [(part, self._sharded[name]) for name, part in self.parameters[0].items()]
        # Of a small tensor some ranks have no part.
        parts = [part for part in self.parameters[0].values() if part.numel()]
        self.optimizers = [ClippedAdamW(parts, config, whole_norm=self._norm_of_parts)]
        self._followers = [([], [])]
        self._figures = torch.zeros(1, 2, device=device)
        self._steps = []
        self._under_way = []

    def _layers_at_once(self, student: nn.Module) -> int:
        """Small layers are gathered together: Python's part of an exchange does not shrink."""
        if not self._held.layers or self.config.activation_checkpointing:
            # What is run again is run layer by layer.
            return 1
        largest = max(
            sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(student)
        )
        return max(1, min(MOST_LAYERS_AT_ONCE, PARAMETERS_AT_ONCE // largest))

    def weights(self) -> dict[str, Tensor]:
        """The trained weights as a whole, on the CPU; empty on other ranks than the first."""
        found: dict[str, Tensor] = {}
        for name, parameter in self._sharded.items():
            whole = _gathered(parameter.detach())
            if rank() == 0:
                found[name] = whole.cpu()
        return found

    def load(self, number: int, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, whole in weights.items():
                self._put(self._sharded[name].detach(), whole)

    def state(self) -> dict[str, Tensor]:
        parts = super().state()
        found: dict[str, Tensor] = {}
        steps = next(parts[f"step/{n}"] for n, p in self.parameters[0].items() if p.numel())
        for key, part in parts.items():
            name = key.partition("/")[2]
            sharded = self._sharded[name]
            if key.startswith("step/") and not self.parameters[0][name].numel():
                # Counted where there is a part, and stored by any of the ranks.
                part.copy_(steps)
            # A count of steps is no part of anything.
            found[key] = part if part.dim() == 0 else _as_part_of(sharded, part)
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for key, tensor in self.state().items():
                self._put(tensor, state[key])

    def release(self) -> None:
        """The parts stay where they are, and the student is no use to a single rank."""
        if self._recorded is not None:
            self._recorded.release()
        if self._restore is not None:
            self._restore()

    def follow(self) -> None:
        """Nothing: what is computed with is gathered from the parts."""

    def _run(self, work: Callable[[Any], T]) -> T:
        with torch.no_grad():
            found: T = self._root(work)
        # What is still gathered would be taken for new when weights have moved.
        for group in self._groups:
            group.reshard()
        return found

    def _add_share(self, tokens: Tensor, *, exchanges: bool) -> None:
        if exchanges != self._exchanges:
            self._exchanges = exchanges
            self._root.set_requires_gradient_sync(exchanges)
            if self._held.layers:
                # Between two batches of a step no weight moves.
                self._root.set_reshard_after_backward(exchanges)
        # What the student begins with, while the teacher runs.
        for group in self._begins_with:
            group.unshard(async_op=True)
        self._loss(tokens).backward()

    # Without gradients a part is had without a node of autograd.
    @torch.no_grad()
    def _move_weights(self) -> None:
        for part, sharded in self._pairs:
            gradient = sharded.grad
            part.grad = torch.zeros_like(part) if gradient is None else _local(gradient)
        self._figures[0, 1] = self.optimizers[0].clipped_step(self._figures[0, 0])
        for part, sharded in self._pairs:
            part.grad = sharded.grad = None

    def _norm_of_parts(self, norm: Tensor) -> Tensor:
        squared = norm.square()
        dist.all_reduce(squared)
        return squared.sqrt()

    def _put(self, tensor: Tensor, whole: Tensor) -> None:
        """Copy a whole tensor, or this rank's part of it, into one of this trainer's."""
        if isinstance(tensor, DTensor):
            whole = whole.to(self.teacher.device, tensor.dtype)
            _local(tensor).copy_(_local(distribute_tensor(whole, self.mesh, tensor.placements)))
        else:
            tensor.copy_(whole)


def _shard_student(
    student: nn.Module, mesh: DeviceMesh, *, lowered: bool, keeps: bool, at_once: int
) -> Any:
    """The student as one sharded module: mixers, then layers, then what remains.

    Args:
        student: Sharded in place.
        mesh: Of all ranks.
        lowered: Whether stock parts are computed in bfloat16.
        keeps: Whether what is gathered for a forward pass stays until the backward pass.
        at_once: Layers that are gathered together, and mixers.
    """
    stock = MixedPrecisionPolicy()
    if lowered:
        stock = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layers: list[Any] = decoder_layers(student)
    starts = range(0, len(layers), at_once)
    for start in starts:
        together = layers[start : start + at_once]
        slots = [m for layer in together for m in layer.modules() if isinstance(m, MixerSlot)]
        mixers: list[nn.Module] = [slot.mixer for slot in slots]
        if mixers:
            fully_shard(mixers, mesh=mesh, reshard_after_forward=not keeps)
        fully_shard(together, mesh=mesh, mp_policy=stock, reshard_after_forward=not keeps)
    root: Any = _Whole(student)
    fully_shard(root, mesh=mesh, mp_policy=stock)
    # What runs next must be under way before Python comes to it, where Python is the slower one.
    # Mixers ask for nothing: they are run again where layers are checkpointed.
    before = root
    for start in starts:
        together = layers[start : start + at_once]
        before.set_modules_to_forward_prefetch([g for layer in together for g in _groups(layer)])
        before = together[0]
    if mesh.device_type == "cpu":
        for group in _groups(root):
            # gloo knows no mean.
            group.set_force_sum_reduction_for_comms(True)
    return root


def _groups(module: nn.Module) -> list[Any]:
    """All in a sharded module that is gathered by itself or with others, in the order it runs."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def _shard_teacher(teacher: Teacher, mesh: DeviceMesh) -> None:
    for layer in decoder_layers(teacher.model):
        fully_shard(layer, mesh=mesh)
    # The head stays whole: it is used outside of the body.
    fully_shard(teacher.model.base_model, mesh=mesh)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gathered(tensor: Tensor) -> Tensor:
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def _as_part_of(sharded: Tensor, part: Tensor) -> Tensor:
    """A rank's part of a tensor that is divided as another one is."""
    assert isinstance(sharded, DTensor)
    return DTensor.from_local(
        part.detach(),
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=sharded.shape,
        stride=sharded.stride(),
    )


def _sent(tokens: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tokens
    return tokens.pin_memory().to(device, non_blocking=True)
