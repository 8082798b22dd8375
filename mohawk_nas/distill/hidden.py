"""Stage 2, hidden-state alignment: the mixer's output approaches the teacher's.

B batch, T tokens, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mohawk_nas.capture import LayerCapture
from mohawk_nas.mixer import Mixer

__all__ = ["hidden_loss", "relative_distance"]


def hidden_loss(mixer: Mixer, capture: LayerCapture) -> Tensor:
    """Mean L2 distance a token (arXiv 2408.10189), over the teacher's mean norm.

    The division only sets the scale: it makes layers comparable and one clipping norm fit them
    all.
    """
    output = mixer(capture.hidden, mask=capture.mask)
    error = torch.linalg.vector_norm(output.float() - capture.output.float(), dim=-1)
    size = torch.linalg.vector_norm(capture.output.float(), dim=-1)
    if capture.mask is not None:
        error, size = error[capture.mask], size[capture.mask]
    loss: Tensor = error.mean() / size.mean()
    return loss


def relative_distance(output: Tensor, target: Tensor) -> Tensor:
    """Squared distance over the target's power, one a block.

    Args:
        output: The student's mixer output, ``(B, T, D)``.
        target: The teacher's, ``(B, T, D)``.

    Returns:
        ``(B,)`` in float32; 0 is equal, 1 is as bad as no output at all.
    """
    error = (output.float() - target.float()).square().sum((1, 2))
    return error / target.float().square().sum((1, 2))
