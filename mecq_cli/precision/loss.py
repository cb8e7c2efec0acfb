"""Sensitivity by loss: how far the outputs move when a layer is rounded.

The divergence of the outputs from those of the float network, which is what the distillation
minimises: of classes Kullback-Leibler's, in nats, of a network that detects that of its classes and
boxes. It needs no labels and is never negative.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mecq_cli.precision.rounding import Outputs

Divergence = Callable[[Tensor, Tensor], Tensor]
"""Of outputs from those of the float network: a task's, see `mecq_cli.tasks.base.Task`."""


class LossDistance:
    """The divergence of the outputs, in float64.

    Args:
        reference: of the float network.
        divergence: of the task.
    """

    def __init__(self, reference: Outputs, divergence: Divergence) -> None:
        self._goal, self._divergence = reference[0].double(), divergence

    def __call__(self, outputs: Outputs) -> float:
        """As the task has it."""
        return float(self._divergence(outputs[0].double(), self._goal))
