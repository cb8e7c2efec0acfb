"""Sensitivity by loss: how far the outputs move when a layer is rounded.

The Kullback-Leibler divergence of the outputs' distribution from the float network's, in nats. It
needs no labels, is never negative, and is what the distillation minimises.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mecq_cli.precision.rounding import Outputs


class LossDistance:
    """The mean divergence over the images, and over their pixels or anchors where these are
    classified.

    Args:
        reference: of the float network.
        classes: how many of its outputs are logits; None: all.
    """

    def __init__(self, reference: Outputs, classes: int | None = None) -> None:
        self._classes = classes
        self._goal = torch.log_softmax(reference[0][:, :classes].double(), 1)

    def __call__(self, outputs: Outputs) -> float:
        """Nats."""
        mine = torch.log_softmax(outputs[0][:, : self._classes].double(), 1)
        return float(F.kl_div(mine, self._goal, reduction="none", log_target=True).sum(1).mean())
