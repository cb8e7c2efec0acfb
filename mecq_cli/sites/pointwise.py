"""Operations on values, one by one."""

from __future__ import annotations

import math

from torch import Tensor

from mecq_cli.integer.ir import Node
from mecq_cli.sites.base import Site


class AddSite(Site):
    """Residual add."""

    op = "add"

    def compute(self, *inputs: Tensor) -> Tensor:
        """The sum."""
        return inputs[0] + inputs[1]


class ClipSite(Site):
    """A ReLU or ReLU6 on floats; on a grid it is part of the operation before it."""

    op = "clip"

    def compute(self, *inputs: Tensor) -> Tensor:
        """`forward` clips by the ceiling."""
        return inputs[0]

    def node(self, inputs: tuple[str, ...]) -> Node:
        """With its bounds."""
        assert self.ceiling is not None
        top = self.ceiling if math.isfinite(self.ceiling) else None
        return Node(self.name, self.op, inputs, None, {"min": 0.0, "max": top})
