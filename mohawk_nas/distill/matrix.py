"""Stage 1, matrix orientation: the mixing matrix approaches the teacher's softmax matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from mohawk_nas.capture import LayerCapture
from mohawk_nas.errors import MixerError
from mohawk_nas.kernels.matrix_orientation import matrix_distance
from mohawk_nas.mixer import Mixer

__all__ = ["matrix_loss"]


def matrix_loss(mixer: Mixer, capture: LayerCapture, *, squared: bool = False) -> Tensor:
    """Frobenius distance a head, averaged over batch and heads (arXiv 2408.10189).

    Args:
        mixer: The student's mixer of this layer.
        capture: The teacher's layer, with queries and keys.
        squared: Average the squared distances instead. Heads that are far off then weigh more, and
            the gradient vanishes with the distance.

    Raises:
        MixerError: The mixer does not offer its matrix as factors.
    """
    assert capture.query is not None and capture.key is not None and capture.scaling is not None
    factors = mixer.factors(capture.hidden, mask=capture.mask)
    if factors is None:
        raise MixerError(
            f"layer {capture.view.layer_idx}: stage 1 needs a mixer that offers its matrix as "
            f"factors, and {type(mixer).__name__} does not; set the stage-1 tokens to 0"
        )
    # The distance takes care of its own types.
    with torch.autocast(capture.hidden.device.type, enabled=False):
        distance = matrix_distance(
            capture.query,
            capture.key,
            factors,
            scaling=capture.scaling,
            heads=mixer.head_pairs(capture.query.shape[1]),
            window=capture.view.sliding_window,
            mask=capture.mask,
        )
        # The root has no gradient at zero.
        return distance.mean() if squared else torch.sqrt(distance.clamp_min(1e-12)).mean()
