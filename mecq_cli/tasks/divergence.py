"""How far the outputs of a network are from those of another, whatever the task."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def divergence(logits: Tensor, target: Tensor, temperature: float = 1.0) -> Tensor:
    """The Kullback-Leibler divergence from the logits of a float network; a float32 scalar.

    Mean over the images or, where pixels are classified, over all pixels: the float network has an
    answer for those without a label, too.

    Args:
        logits: float32, or float64, [N, classes] or [N, classes, H, W].
        target: of the same shape.
        temperature: of both softmaxes; its square is a factor, so that gradients stay as large.
    """
    t = temperature
    student = F.log_softmax(logits / t, 1)
    teacher = F.log_softmax(target.to(logits.dtype) / t, 1)
    total = F.kl_div(student, teacher, reduction="sum", log_target=True)
    return total / logits[:, 0].numel() * t * t
