"""Operations that move values, and dropout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mecq_cli.integer.ir import Grid, Node
from mecq_cli.kernels import run_node
from mecq_cli.quantizers import ActivationQuantizer
from mecq_cli.sites.base import Site


class PassSite(Site):
    """An operation that moves values and keeps their grid: pool, concat, reshape, slice, pad."""

    def __init__(
        self,
        name: str,
        sources: Sequence[ActivationQuantizer | None],
        *,
        op: str,
        attributes: dict[str, Any],
    ) -> None:
        super().__init__(name, sources)
        self.op = op
        self.attributes = attributes
        # In training a zero is a zero: the grids play no part.
        self._moving = Node(name, op, (), None, attributes)

    def output_grid(self) -> Grid | None:
        """The grid of the input."""
        return self.source_grids()[0]

    def node(self, inputs: tuple[str, ...]) -> Node:
        """With its attributes."""
        return Node(self.name, self.op, inputs, self.output_grid(), dict(self.attributes))

    def forward(self, *inputs: Tensor) -> Tensor:
        """The same code moves real values and integers."""
        if not self.training:
            return super().forward(*inputs)
        return run_node(self._moving, inputs, [None] * len(inputs))


class DropoutSite(Site):
    """Dropout in training, nothing at all afterwards.

    Args:
        p: share of what is dropped.
        axes: how many of the first axes have a draw for each of their places: 1 drops whole images,
            as stochastic depth does, 2 whole channels; None: each value.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[ActivationQuantizer | None],
        p: float,
        *,
        axes: int | None = None,
    ) -> None:
        super().__init__(name, sources)
        self.p, self.axes = p, axes

    def forward(self, *inputs: Tensor) -> Tensor:
        """Same shape."""
        x = inputs[0]
        if self.axes is None or not self.training:
            return F.dropout(x, self.p, self.training)
        whole = [n if axis < self.axes else 1 for axis, n in enumerate(x.shape)]
        kept = F.dropout(x.new_ones(whole), self.p, self.training)
        return x * kept
