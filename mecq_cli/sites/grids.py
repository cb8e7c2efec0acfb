"""Between floats and grids, and from one grid to another."""

from __future__ import annotations

from torch import Tensor

from mecq_cli.integer.ir import Node
from mecq_cli.sites.base import Site, threshold


class QuantizeSite(Site):
    """A float value onto a grid, or from one grid to another."""

    def compute(self, *inputs: Tensor) -> Tensor:
        """The value itself; `forward` rounds it."""
        return inputs[0]

    def node(self, inputs: tuple[str, ...]) -> Node:
        """``quantize`` after a float, ``requantize`` after a grid."""
        op = "quantize" if self._sources[0].module is None else "requantize"
        return Node(self.name, op, inputs, self.output_grid())

    def nodes(self, inputs: tuple[str, ...]) -> list[Node]:
        """Integers are compared as they are, where none has to be clipped or is out of reach."""
        (source,), q = self.source_grids(), self.output_quantizer
        if source is None or q is None or q.threshold_grid() is None or self.clips:
            return super().nodes(inputs)
        node = threshold(self.name, inputs, q, source)
        if node.attributes["thresholds"][0] < 1:  # all of the source's integers reach it
            return super().nodes(inputs)
        return [node]


class DequantizeSite(Site):
    """From a grid to float, for an operation that stays in float."""

    op = "dequantize"

    def compute(self, *inputs: Tensor) -> Tensor:
        """In training the value is a float already."""
        return inputs[0]
