"""The optimizer of every stage, and its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mohawk_nas.config import LogitsConfig, StageConfig

__all__ = ["MAX_BAD_STEPS", "ClippedAdamW", "learning_rate"]

MAX_BAD_STEPS = 10
"""Steps of stages 1 and 2 whose loss or gradient was not finite before a run stops."""


def learning_rate(config: StageConfig, step: int, steps: int) -> float:
    """Rate at one step of a schedule: warm-up, then constant and linearly decaying, or a cosine."""
    warmup, decay = round(config.warmup * steps), round(config.decay * steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if isinstance(config, LogitsConfig) and config.schedule == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2
    if step >= steps - decay:
        left = (steps - step) / (decay + 1)
        return config.min_lr + (config.lr - config.min_lr) * left
    return config.lr


class ClippedAdamW(torch.optim.AdamW):
    """AdamW (arXiv 1711.05101) that clips by the norm of all gradients and never waits for the GPU.

    A step whose loss or gradient is not finite leaves the weights and its own state as they are.
    Matrices decay; vectors (biases, gains, skips) do not.

    Args:
        parameters: What to train; all on one device.
        config: Rates, decay and the clipping norm.
        whole_norm: Where these are parts of larger tensors: this part's norm -> that of all parts.
    """

    grad_scale: Tensor
    found_inf: Tensor

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: StageConfig,
        *,
        whole_norm: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        trained = [p for p in parameters if p.requires_grad]
        device = trained[0].device
        decays = {True: config.weight_decay, False: 0.0}
        groups = [
            {"params": [p for p in trained if (p.dim() >= 2) == is_matrix], "weight_decay": decay}
            for is_matrix, decay in decays.items()
        ]
        self._rate = torch.tensor(config.lr, device=device)
        self._clip = config.grad_clip
        super().__init__(
            [group for group in groups if group["params"]],
            lr=self._rate,
            betas=config.betas,
            fused=True,
            # Only asked of a GPU, where a step may be recorded as a graph.
            capturable=device.type == "cuda",
        )
        self._trained = trained
        self._whole_norm = whole_norm

    def set_rate(self, rate: float) -> None:
        """Learning rate of the steps that follow."""
        self._rate.fill_(rate)

    def share_rate(self, rate: Tensor) -> None:
        """Take the learning rate from a scalar that several optimizers read."""
        self._rate = rate
        for group in self.param_groups:
            group["lr"] = rate

    @torch.no_grad()
    def clipped_step(self, loss: Tensor) -> Tensor:
        """One step with the gradients that are there.

        Args:
            loss: What they are the gradients of.

        Returns:
            1 if the step was refused, else 0; a scalar on the parameters' device.
        """
        gradients = [p.grad for p in self._trained if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if self._whole_norm is not None:
            norm = self._whole_norm(norm)
        # The fused kernel divides by the one and obeys the other; a gradient scaler for float16
        # would set them in the same way.
        self.grad_scale = ((norm + 1e-6) / self._clip).clamp_min(1.0)
        self.found_inf = (~(norm.isfinite() & loss.detach().isfinite())).float()
        self.step()
        return self.found_inf
