"""No update multiplies or divides the step of a quantizer by more than a factor.

A step is as small as its values are: of a branch that begins with a factor of 1e-5 (LayerScale) it
is 1e-7, far less than what an optimizer adds in one update. Behind a step that has fallen to
nothing all values are zero, a batch norm divides by the root of its epsilon, and a few of those in
a row make gradients that overflow. Weights know no such edge, so they are not held.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mecq_cli.quantizers import Quantizer

FACTOR = 2.0
"""A step may double or halve. Trained networks stay far below that; a first update may not."""

_REMEMBERED = ("momentum_buffer", "exp_avg")
"""What optimizers keep of past gradients. Where an update was held it is forgotten, or one large
gradient would halve the step again and again."""


class StepLimit:
    """A context for an update: ``with limit: optimizer.step()``.

    Args:
        model: whose quantizers' positive parameters are held.
        optimizer: of these.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        found = [p for m in model.modules() if isinstance(m, Quantizer) for p in m.positive()]
        updated = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.steps = [p for p in found if id(p) in updated]
        self.before: list[Tensor] = []

    def __enter__(self) -> None:
        self.before = [step.detach().clone() for step in self.steps]

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        if not self.steps:
            return
        held = torch._foreach_maximum(self.steps, torch._foreach_mul(self.before, 1 / FACTOR))
        held = torch._foreach_minimum(held, torch._foreach_mul(self.before, FACTOR))
        for step, after in zip(self.steps, held, strict=True):
            for name in _REMEMBERED:
                kept = self.optimizer.state[step].get(name)
                if kept is not None:
                    kept.masked_fill_(after != step, 0.0)
        torch._foreach_copy_(self.steps, held)
