"""Collects the nodes of a graph with QONNX's quantizers. See `mecq_cli.export.qonnx_graph`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from mecq_cli.errors import ArtifactError
from mecq_cli.export.onnx_builder import GraphBuilder
from mecq_cli.integer.ir import Grid, IntegerModel, Node

DOMAIN = "qonnx.custom_op.general"
STEP_BITS = 10
"""Signed, for q - z of any 8-bit grid."""


class QonnxBuilder(GraphBuilder):
    """Adds Quant nodes, and notes the shape of every tensor."""

    def __init__(self, model: IntegerModel) -> None:
        super().__init__(model, model.output.name)
        self.tensors: dict[str, onnx.ValueInfoProto] = {}

    def emit(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        *,
        shape: Sequence[int] | None = None,
        **attributes: Any,
    ) -> str:
        """As in `GraphBuilder`; the shape is that of the operation, or ``shape``."""
        operation = name if name in self.shapes else name.rpartition("::")[0]
        shape = shape or (1, *self.shapes[operation])
        output = super().emit(op, inputs, name, **attributes)
        if name != self.output:
            info = helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)
            self.tensors[output] = info
        return output

    def zero(self, grid: Grid | None) -> str:
        return self.scalar(np.float32(0))

    def clip(self, node: Node, value: str, grid: Grid) -> None:
        self.emit("Clip", [value, *self._bounds(grid, np.float32(grid.scale))], node.name)

    def _bounds(self, grid: Grid, scale: np.float32) -> list[str]:
        ends = (grid.qmin - grid.zero_point, grid.qmax - grid.zero_point)
        return [self.scalar(np.float32(end) * scale) for end in ends]

    def quant(
        self,
        value: str,
        name: str,
        scale: str,
        bits: int,
        *,
        signed: bool,
        narrow: bool = False,
        zero_point: str | None = None,
        shape: Sequence[int] | None = None,
    ) -> str:
        """A Quant node; the zero point is 0 where none is named. ``narrow``: without the lowest."""
        width, zero = self.scalar(np.float32(bits)), zero_point or self.zero(None)
        return self.emit(
            "Quant",
            [value, scale, zero, width],
            name,
            shape=shape,
            domain=DOMAIN,
            signed=int(signed),
            narrow=int(narrow),
            rounding_mode="ROUND",
        )

    def steps(self, node: Node, value: str, name: str) -> str:
        """Values in steps of the node's grid as integers q - z, halves rounded to even."""
        grid = required(node)
        clipped = self.emit("Clip", [value, *self._bounds(grid, np.float32(1))], f"{name}_clipped")
        one = self.scalar(np.float32(1))
        return self.quant(clipped, name, one, STEP_BITS, signed=True)

    def quantized(self, node: Node, value: str) -> None:
        """Finish an operation: bring real numbers to its grid."""
        grid, name = required(node), node.name
        zero, bits, top = grid.zero_point, grid.bits, 2**grid.bits - 1
        if (grid.qmin, grid.qmax) == (zero, top) and zero > 0:
            value = self.emit("Relu", [value], f"{name}::relu")
        elif (grid.qmin, grid.qmax) != (0, top):
            bounds = self._bounds(grid, np.float32(grid.scale))
            value = self.emit("Clip", [value, *bounds], f"{name}::clipped")
        # One signed bit means -1 and +1 to QONNX.
        signed = zero > 0 and bits > 1
        scale = self.scalar(np.float32(grid.scale))
        shift = self.scalar(np.float32(zero - 2 ** (bits - 1) if signed else zero))
        self.quant(value, name, scale, bits, signed=signed, zero_point=shift)


def required(node: Node) -> Grid:
    """The grid of an operation that cannot do without one."""
    if node.grid is None:
        raise ArtifactError(f"{node.name}: {node.op} needs a grid for its output")
    return node.grid
