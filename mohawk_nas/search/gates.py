"""Layer worths learnt by gradient: attention and its replacement both run, and a gate weighs them.

After DASH (arXiv 2605.20936) and FlashMorph (arXiv 2606.30562): all weights are frozen, every free
layer has one learnable number, and the mixture must imitate the teacher. Here the open gates always
sum to the number of layers that may keep attention, so there is no penalty to weigh; a temperature
falls until the gates are nearly open or shut.

B batch, T tokens, L free layers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mohawk_nas.config import LogitsConfig
from mohawk_nas.distill.graph import RecordedStep
from mohawk_nas.distill.losses import loss_of_hidden
from mohawk_nas.errors import TrainingError
from mohawk_nas.fusion import fused_parts
from mohawk_nas.metrics import body
from mohawk_nas.recall import Questions, RecallProbe
from mohawk_nas.reporting import SILENT, Reporter
from mohawk_nas.student import MixerSlot, MixerSource, Padding
from mohawk_nas.teacher import Teacher

__all__ = ["learn_gates", "soft_top_k"]

HOTTEST, COLDEST = 1.0, 0.1
"""Temperature of the gates at the start and at the end."""
HALVINGS = 40
"""Of the interval in which the gates' threshold lies."""


def soft_top_k(worth: Tensor, kept: int, temperature: Tensor | float) -> Tensor:
    """Gates ``sigmoid((worth - t) / temperature)`` whose threshold t makes them sum to ``kept``.

    Args:
        worth: ``(L,)``
        kept: Between 0 and L, both left out.
        temperature: Towards 0 the ``kept`` largest become 1 and the others 0.

    Returns:
        ``(L,)``; gradients go through the threshold too, so they sum to 0.
    """
    with torch.no_grad():
        reach = 40 * temperature
        low, high = worth.min() - reach, worth.max() + reach
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            too_many = torch.sigmoid((worth - middle) / temperature).sum() > kept
            low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
        threshold = (low + high) / 2
        gates = torch.sigmoid((worth - threshold) / temperature)
        slope = gates * (1 - gates)
        # The threshold moves with the worths as implicit differentiation of the sum says.
        share = slope / slope.sum().clamp_min(1e-12)
    moving = threshold + (share * (worth - worth.detach())).sum()
    return torch.sigmoid((worth - moving) / temperature)


class _GatedSlot(nn.Module):
    """A layer's attention and its replacement, weighed by a gate."""

    def __init__(
        self, attention: nn.Module, replacement: MixerSlot, gates: Sequence[Tensor], place: int
    ) -> None:
        super().__init__()
        self.attention = attention
        self.replacement = replacement
        # Made anew in each step.
        self._gates = gates
        self._place = place

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        kept = self.attention(hidden_states, *args, **kwargs)[0]
        replaced = self.replacement(hidden_states, *args, **kwargs)[0]
        gate = self._gates[self._place].to(kept.dtype)
        return gate * kept + (1 - gate) * replaced, None


def learn_gates(
    teacher: Teacher,
    bank: MixerSource,
    replacements: Mapping[int, str],
    batches: Sequence[Tensor],
    *,
    kept: int,
    pinned: Mapping[int, str] | None = None,
    probe: RecallProbe | None = None,
    recall_weight: float = 1.0,
    lr: float = 0.1,
    seed: int = 0,
    reporter: Reporter = SILENT,
) -> dict[int, float]:
    """What each free layer's attention is worth, learnt on some text.

    The loss is the forward KL divergence to the teacher, in nats a token, plus the weighted
    cross-entropy of the probe's answers.

    Args:
        teacher: The teacher; its weights stay as they are.
        bank: Where mixers come from.
        replacements: Free layer -> the candidate that may take its place.
        batches: Tokens ``(B, T)`` of the steps, one step each.
        kept: Free layers that may keep attention, at least 1 and less than all.
        pinned: Layer -> the candidate it is pinned to, for those that are not attention.
        probe: Asked in each step, or None; other sequences of it than those a search scores.
        recall_weight: Of the probe's cross-entropy.
        lr: Of Adam.
        seed: Of the worths at the start and of the probe's order.
        reporter: Shown the progress.

    Returns:
        Free layer -> worth; the ``kept`` highest are the choice.

    Raises:
        TrainingError: The loss was not finite.
    """
    layers = sorted(replacements)
    generator = torch.Generator().manual_seed(seed)
    start = 0.1 * torch.randn(len(layers), generator=generator)
    worth = nn.Parameter(start.to(teacher.device))
    # A tensor, so that a recorded step reads what it holds at each replay.
    temperature = torch.tensor(HOTTEST, device=teacher.device)
    gates: list[Tensor] = []
    student = _gated(teacher, bank, replacements, pinned or {}, gates)
    optimizer = torch.optim.Adam([worth], lr=lr, capturable=teacher.device.type == "cuda")
    worth.grad = torch.zeros_like(worth)
    last = torch.zeros((), device=teacher.device)
    config = LogitsConfig()

    def step(tokens: Tensor, *asked: Tensor) -> None:
        """``asked``: a probe's tokens and positions, if it has a say."""
        gates[:] = soft_top_k(worth, kept, temperature).unbind()
        with fused_parts(teacher.model, student):
            target = teacher.run(tokens)
            hidden = body(student, tokens)
            loss = loss_of_hidden(teacher.model, target, student, hidden, tokens, config)
            if asked:
                questions = Questions(tokens=asked[0], positions=asked[1])
                loss = loss + recall_weight * _answers_loss(student, questions)
            loss.backward()
        last.copy_(loss.detach())
        gates.clear()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    recorded = RecordedStep(step, teacher.device)
    try:
        with reporter.stage("gates", total=len(batches), unit="step") as task:
            for number, tokens in enumerate(batches):
                done = number / max(1, len(batches) - 1)
                temperature.fill_(HOTTEST * (COLDEST / HOTTEST) ** done)
                asked: tuple[Tensor, ...] = ()
                if probe is not None:
                    some = torch.randint(len(probe.tokens), (len(tokens),), generator=generator)
                    asked = (probe.tokens[some], probe.positions[some])
                recorded(tokens, *asked)
                task.advance(1, tokens=tokens.numel())
        if not math.isfinite(last.item()):
            raise TrainingError("gates: the loss is not finite; use a lower lr")
    finally:
        recorded.release()
    return dict(zip(layers, worth.detach().tolist(), strict=True))


def _gated(
    teacher: Teacher,
    bank: MixerSource,
    replacements: Mapping[int, str],
    pinned: Mapping[int, str],
    gates: Sequence[Tensor],
) -> Any:
    tensors = [*teacher.model.parameters(), *teacher.model.buffers()]
    student = copy.deepcopy(teacher.model, {id(t): t for t in tensors}).eval()
    padding = Padding()
    for slot in teacher.slots:
        layer = slot.view.layer_idx
        name = replacements.get(layer, pinned.get(layer))
        if name is None:
            continue
        replacement = MixerSlot(bank.mixer(layer, name), layer_idx=layer, padding=padding)
        if layer in pinned:
            slot.put(student, replacement)
            continue
        place = sorted(replacements).index(layer)
        slot.put(student, _GatedSlot(slot.get(student), replacement, gates, place))
    return student


def _answers_loss(student: Any, asked: Questions) -> Tensor:
    logits, answers = asked.logits(student, body(student, asked.tokens))
    return F.cross_entropy(logits.float().flatten(0, 1), answers.flatten())
