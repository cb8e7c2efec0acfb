"""EMA: an exponential moving average of everything that is learned, which is kept at the end.

Near the end of a training at few bits weights still jump between two levels; their average lies on
the side where they are more often. PyTorch's `torch.optim.swa_utils` does the sum; a copy of the
whole network, as its AveragedModel keeps one, is not needed: batch norm statistics are measured
anew anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

REMEMBERED = (4,)
"""Bytes a checkpoint holds of each value of a parameter, tensor by tensor."""


class WeightAverage:
    """The average of a network's parameters, of which early ones are forgotten.

    The first update takes the weights as they are; what was before it, such as steps that were not
    calibrated yet, does not count. After n updates the decay is min(decay, (1 + n) / (10 + n)): the
    first weights, which are far off, do not linger.

    Args:
        model: whose parameters are averaged.
        decay: near 1; about 1 / (1 - decay) steps count.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0.0 < decay < 1.0:
            raise ValueError(f"a decay lies between 0 and 1, got {decay}")
        self.decay = decay
        self.updates = 0
        self._live = [p for p in model.parameters() if p.requires_grad]
        self._average: list[Tensor] = [p.detach().clone() for p in self._live]

    @torch.no_grad()
    def update(self, progress: float) -> None:
        """After an update of the parameters; ``progress`` plays no part."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.updates else 0.0
        average = get_ema_multi_avg_fn(decay)
        average(self._average, [p.detach() for p in self._live], self.updates)
        self.updates += 1

    @torch.no_grad()
    def settle(self) -> None:
        """The network becomes its average."""
        if self.updates:
            for live, average in zip(self._live, self._average, strict=True):
                live.copy_(average)

    def saved_states(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"updates": self.updates, "average": list(self._average)}

    def load_saved_states(self, state: dict[str, Any]) -> None:
        """Go on from `saved_states`."""
        _copy(self._average, state["average"])
        self.updates = int(state["updates"])


def _copy(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        if target.shape != value.shape:
            raise ValueError(f"an average of shape {list(value.shape)} for {list(target.shape)}")
        target.copy_(value)
