"""Operations on values, one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from mecq_cli.functions import FUNCTIONS
from mecq_cli.integer.functions import table
from mecq_cli.integer.ir import Node
from mecq_cli.quantizers import ActivationQuantizer
from mecq_cli.sites.base import Site


class AddSite(Site):
    """Residual add."""

    op = "add"

    def compute(self, *inputs: Tensor) -> Tensor:
        """The sum."""
        return inputs[0] + inputs[1]


class MulSite(Site):
    """The product of two values, such as a value and its gate."""

    op = "mul"

    def compute(self, *inputs: Tensor) -> Tensor:
        """The product."""
        return inputs[0] * inputs[1]


class FunctionSite(Site):
    """A function of each value: between two grids a table, on floats the function itself.

    Args:
        function: its name in `mecq_cli.functions`.
        parameters: its numbers.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[ActivationQuantizer | None],
        output_quantizer: ActivationQuantizer | None,
        ceiling: float | None,
        *,
        function: str,
        parameters: Sequence[float],
    ) -> None:
        super().__init__(name, sources, output_quantizer, ceiling)
        self.function, self.numbers = function, tuple(parameters)

    def compute(self, *inputs: Tensor) -> Tensor:
        """The function."""
        return FUNCTIONS[self.function](inputs[0], *self.numbers)

    def node(self, inputs: tuple[str, ...]) -> Node:
        """With its table, or its name."""
        (source,), target = self.source_grids(), self.output_grid()
        if source is None or target is None:
            attributes = {"name": self.function, "parameters": self.numbers}
            return Node(self.name, "function", inputs, None, attributes)
        entries = table(self.function, self.numbers, source, target)
        return Node(self.name, "lookup", inputs, target, tensors={"table": entries})


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
