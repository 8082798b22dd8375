"""Stage 3's optimizer step, for one student or several on one device.

A student is trained with the teacher's products: beside a bfloat16 teacher in bfloat16, with
float32 masters of what moves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mohawk_nas.config import LogitsConfig
from mohawk_nas.data import TokenBlocks
from mohawk_nas.distill.graph import RecordedStep, side_by_side
from mohawk_nas.distill.losses import loss_of_hidden
from mohawk_nas.distill.optimizer import ClippedAdamW
from mohawk_nas.fusion import fused_parts
from mohawk_nas.layout import Layout
from mohawk_nas.metrics import BlockFigures, body, evaluate_blocks
from mohawk_nas.student import MixerSlot, MixerSource, assemble, decoder_layers, is_trained
from mohawk_nas.teacher import Teacher

__all__ = [
    "LogitsTrainer",
    "keeping_inputs_alone",
    "student_to_train",
    "trainable_parameters",
]

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What the optimizer keeps of each parameter."""


def student_to_train(
    teacher: Teacher, layout: Layout, bank: MixerSource, which: str, *, taught_in: torch.dtype
) -> Any:
    """A student for :class:`LogitsTrainer` that owns what is trained and shares the rest.

    Args:
        teacher: Whose layers the student has.
        layout: The student's.
        bank: Where its mixers come from.
        which: ``mixers``, ``all_but_mlp`` or ``all``.
        taught_in: Type of the weights of the teacher that it is trained by.
    """
    dtype = teacher.model.dtype
    if dtype == torch.float16 or dtype != taught_in:
        # Nothing is trained in float16, and what is shared cannot have two types.
        return assemble(teacher, layout, bank, share=False).float()
    return assemble(teacher, layout, bank, share=False, trained=which)


def trainable_parameters(student: nn.Module, which: str) -> dict[str, nn.Parameter]:
    """The student's parameters that ``mixers``, ``all_but_mlp`` or ``all`` names."""
    in_slots = {
        f"{prefix}.{name}"
        for prefix, module in student.named_modules()
        if isinstance(module, MixerSlot)
        for name, _ in module.named_parameters()
    }
    return {
        name: parameter
        for name, parameter in student.named_parameters()
        if is_trained(name, which, in_mixer=name in in_slots)
    }


def keeping_inputs_alone(student: nn.Module) -> Callable[[], None]:
    """Let each layer keep its input alone for backward, and be run again there.

    Returns:
        What undoes it.
    """
    layers = decoder_layers(student)
    for layer in layers:
        # Nothing in a layer is random: dropout is off. And a recorded step may not look at the
        # generator's state.
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )

    def undo() -> None:
        for layer in layers:
            del layer.forward

    return undo


class LogitsTrainer:
    """Stage 3's optimizer step for one or more students, side by side on the same batches.

    What the teacher says of a batch is computed once for all of them; else they have nothing to do
    with each other. Beside a bfloat16 teacher a student's own stock parts are held in bfloat16 as
    well, and what moves are float32 masters of them; mixers stay in float32.

    Args:
        teacher: Frozen; its type is what products are computed in.
        students: Sharing nothing that is trained with it or each other; trained in place. In
            float32, or as :func:`student_to_train` makes them.
        config: Stage 3.
    """

    def __init__(
        self, teacher: Teacher, students: Sequence[nn.Module], config: LogitsConfig
    ) -> None:
        self.teacher = teacher
        self.students = students
        self.config = config
        self.parameters: list[dict[str, nn.Parameter]] = []
        """A student each: what is trained, in float32."""
        self.optimizers: list[ClippedAdamW] = []
        # What the student computes with, and what it follows.
        self._followers: list[tuple[list[Tensor], list[Tensor]]] = []
        for student in students:
            student.requires_grad_(False)
            trained = trainable_parameters(student, config.trainable)
            for parameter in trained.values():
                parameter.requires_grad_(True)
            masters = trained
            if teacher.model.dtype == torch.bfloat16:
                masters = _lower_stock_parts(student, trained)
            for master in masters.values():
                # Gradients of a step's batches are added up here.
                master.grad = torch.zeros_like(master)
            apart = [name for name in trained if masters[name] is not trained[name]]
            self._followers.append(([trained[n] for n in apart], [masters[n] for n in apart]))
            self.parameters.append(masters)
            self.optimizers.append(ClippedAdamW(masters.values(), config))
        self._undo = [
            keeping_inputs_alone(student) for student in students if config.activation_checkpointing
        ]
        # A row a student: loss of the step that is under way, whether it was refused.
        self._figures = torch.zeros(len(students), 2, device=teacher.device)
        self._steps: list[Tensor] = []
        self._backward = RecordedStep(self._add_gradients, teacher.device)
        self._update = RecordedStep(self._move_weights, teacher.device)

    def load(self, number: int, weights: Mapping[str, Tensor]) -> None:
        """Give one student other weights, all or some, by the names of :attr:`parameters`."""
        with torch.no_grad():
            for name, tensor in weights.items():
                self.parameters[number][name].copy_(tensor)
            self._follow(number)

    def weights(self) -> dict[str, Tensor]:
        """The first student's trained weights, by the names of :attr:`parameters`."""
        return {name: p.detach() for name, p in self.parameters[0].items()}

    def state(self) -> dict[str, Tensor]:
        """All that moves in the first student's training, by ``SLOT/PARAMETER``.

        The tensors are those that are trained: who changes them calls :meth:`follow`.
        """
        (parameters, *_), (optimizer, *_) = self.parameters, self.optimizers
        found: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            found[f"weight/{name}"] = parameter.detach()
            kept = optimizer.state[parameter]
            if not kept:
                # What the optimizer makes in its first step.
                kept["step"] = torch.zeros((), device=parameter.device)
                for slot in MOMENTS[1:]:
                    kept[slot] = torch.zeros_like(parameter, requires_grad=False)
            found |= {f"{slot}/{name}": kept[slot] for slot in MOMENTS}
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take on what :meth:`state` told, each tensor whole."""
        with torch.no_grad():
            for key, tensor in self.state().items():
                tensor.copy_(state[key])
        self.follow()

    def follow(self) -> None:
        """Let the first student compute with what its masters now hold."""
        self._follow(0)

    def evaluate(self, blocks: TokenBlocks, *, batch_size: int) -> BlockFigures:
        """KL divergence to the teacher and cross-entropy of the first student on every block."""
        return evaluate_blocks(self.teacher, self.students[0], blocks, batch_size=batch_size)

    def release(self) -> None:
        """Hand the students back in float32, with the weights they were trained to.

        What a student shared with the teacher it then has for itself.
        """
        self._backward.release()
        self._update.release()
        for undo in self._undo:
            undo()
        for number, student in enumerate(self.students):
            followers, masters = self._followers[number]
            for follower, master in zip(followers, masters, strict=True):
                follower.data = master.data
            _make_float32(student)
            student.requires_grad_(False)

    def step(self, batches: Sequence[Tensor], rate: float) -> None:
        """Train on some batches as if they were one.

        Args:
            batches: ``(B, T)`` each, on the CPU, of the same shape each time.
            rate: Learning rate.
        """
        self._figures.zero_()
        for tokens in batches:
            self._backward(tokens)
        for optimizer in self.optimizers:
            optimizer.set_rate(rate)
        self._update()
        self._steps.append(self._figures.clone())

    def read(self) -> list[tuple[list[float], list[bool]]]:
        """Each student's loss, and whether its step was refused, for all steps since last asked."""
        steps = torch.stack(self._steps).tolist() if self._steps else []
        self._steps.clear()
        return [([row[0] for row in rows], [bool(row[1]) for row in rows]) for rows in steps]

    def _add_gradients(self, tokens: Tensor) -> None:
        teacher, config = self.teacher, self.config
        with fused_parts(teacher.model, *self.students):
            target = teacher.run(tokens)

            def add(number: int) -> None:
                student = self.students[number]
                for follower in self._followers[number][0]:
                    follower.grad = None
                hidden = body(student, tokens)
                loss = loss_of_hidden(teacher.model, target, student, hidden, tokens, config)
                loss = loss / config.accumulate
                loss.backward()
                self._figures[number, 0] += loss.detach()
                self._collect(number)

            parts = [functools.partial(add, number) for number in range(len(self.students))]
            side_by_side(parts, teacher.device)

    def _collect(self, number: int) -> None:
        """Hand gradients of what is held in bfloat16 to its masters."""
        pairs = [
            (master.grad, follower.grad)
            for follower, master in zip(*self._followers[number], strict=True)
            if follower.grad is not None and master.grad is not None
        ]
        if self.config.accumulate == 1 and pairs:
            # All in one kernel, which adding across types is not.
            torch._foreach_copy_([total for total, _ in pairs], [gradient for _, gradient in pairs])
        else:
            for total, gradient in pairs:
                total += gradient

    def _move_weights(self) -> None:
        def move(number: int) -> None:
            optimizer = self.optimizers[number]
            self._figures[number, 1] = optimizer.clipped_step(self._figures[number, 0])
            optimizer.zero_grad(set_to_none=False)
            self._follow(number)

        parts = [functools.partial(move, number) for number in range(len(self.students))]
        side_by_side(parts, self.teacher.device)

    def _follow(self, number: int) -> None:
        followers, masters = self._followers[number]
        if followers:
            with torch.no_grad():
                torch._foreach_copy_(followers, masters)


def _lower_stock_parts(
    student: nn.Module, trained: Mapping[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Hold all but a student's mixers in bfloat16; returns what is trained, in float32."""
    in_slots = {
        parameter
        for module in student.modules()
        if isinstance(module, MixerSlot)
        for parameter in module.parameters()
    }
    masters = {
        name: parameter
        if parameter in in_slots
        else nn.Parameter(parameter.detach().to(torch.float32, copy=True))
        for name, parameter in trained.items()
    }
    for parameter in student.parameters():
        # Buffers keep their type: frequencies of the rotary embedding need it.
        if parameter not in in_slots:
            parameter.data = parameter.data.to(torch.bfloat16)
    return masters


def _make_float32(student: nn.Module) -> None:
    """``student.float()`` that leaves alone whoever shares its parameters."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in student.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                if parameter not in made:
                    made[parameter] = nn.Parameter(parameter.detach().float())
                setattr(module, name, made[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.float())
