"""A weight of the regularizer that suits a network: by the gradients, before the training.

How large the gradient of the term is against that of the task depends on both. Of a ResNet-20 that
classifies (128 images a step, W2 A2, the default weight) it is twice as large. Of networks that
segment it was 20 to 1,500 times as large: a loss that is the mean over all pixels is small from the
start, and the gradient of the term grows on its way back through the backbone. Updates of that
length lower neither loss (docs/segmentation.md has the figures).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor

from mecq_cli.training.step import TrainingStep

BATCHES = 4
"""That gradients are compared on."""


def balanced_weight(
    step: TrainingStep, batches: Iterable[tuple[Tensor, Tensor]], share: float
) -> float:
    """The weight with which the gradient of the term is ``share`` times that of the task.

    Norms over all parameters; the geometric mean over `BATCHES`; two digits, and no more than the
    weight of the recipe. All processes get the same.

    Args:
        step: of a calibrated network, before its first update; it stays as it is.
        batches: normalised images and labels; of several processes, the part of this one.
        share: what the ratio shall be.
    """
    model, most = step.model, step.recipe.mec_weight
    before = {name: value.clone() for name, value in model.state_dict().items()}
    was_training = model.training
    model.train()
    ratios = []
    with torch.random.fork_rng():
        for images, labels in islice(batches, BATCHES):
            of_task, of_term = (_norm(step, images, labels, which) for which in ("task", "term"))
            if 0 < of_term < math.inf and 0 < of_task < math.inf:
                ratios.append(math.log(of_task / of_term))
    model.load_state_dict(before)
    model.train(was_training)
    step.regularizer.states.clear()
    weight = most
    if ratios:
        weight = min(share * math.exp(sum(ratios) / len(ratios)), most)
    return step.processes.broadcast(float(f"{weight:.2g}"))


def _norm(step: TrainingStep, images: Tensor, labels: Tensor, which: str) -> float:
    """Of the gradient of one part of the loss, once the distortion is what it will be."""
    _, task, term, _ = step.losses(images, labels, step.recipe.total_steps)
    # The other part is there, times nothing: several processes wait for every gradient.
    (task + 0.0 * term if which == "task" else term + 0.0 * task).backward()
    gradients = [p.grad for p in step.model.parameters() if p.grad is not None]
    norm = float(torch.stack(torch._foreach_norm(gradients)).norm())
    step.optimizer.zero_grad(set_to_none=True)
    return norm
