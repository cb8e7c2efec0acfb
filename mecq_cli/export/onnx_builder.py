"""Collects the nodes and tensors of an ONNX graph, with names that lead back to the model.

The last ONNX node of an operation carries the operation's name, the ones before it the name
with a suffix after ``::`` (in a file, `mecq_cli.export.onnx_compact` shortens these).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mecq_cli.errors import ArtifactError
from mecq_cli.integer.geometry import shapes
from mecq_cli.integer.ir import (
    INPUT,
    Grid,
    IntegerModel,
    Node,
    multiplied_weight,
)

LOGITS = "logits"
"""Name of the output of the graph."""
FLOAT_LOGITS = "::logits::float"
"""Name of the node that dequantizes them, where the last operation has a grid."""
ZERO = "::zero::float"
"""Name of the number zero, dequantized."""


class GraphBuilder:
    """Collects nodes and initializers, and knows the grid of every operation.

    Args:
        model: what is written.
        logits: the node whose output is that of the graph.
    """

    def __init__(self, model: IntegerModel, logits: str) -> None:
        self.model = model
        self.shapes = shapes(model)
        self.output = model.output.name
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._grids: dict[str, Grid | None] = {node.name: node.grid for node in model.nodes}
        self._grids[INPUT] = None
        self._images = {n.name for n in model.nodes if n.op == "quantize" and n.inputs == (INPUT,)}
        self._tensors: dict[str, str] = {INPUT: INPUT}
        for node in model.nodes:
            self._tensors[node.name] = f"{LOGITS}::value" if node.name == LOGITS else node.name
        self._tensors[logits] = LOGITS

    def emit(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        *,
        shape: Sequence[int] | None = None,
        **attributes: Any,
    ) -> str:
        """Add an ONNX node; ``name`` is of an operation (its final node) or has a ``::``.

        Inputs may be names of operations. Returns the name of the output tensor. ``shape`` is that
        of a value that is not the operation's own; who notes shapes needs it.
        """
        resolved = [self._tensors.get(tensor, tensor) for tensor in inputs]
        output = self._tensors.setdefault(name, name)
        self.nodes.append(helper.make_node(op, resolved, [output], name=name, **attributes))
        return output

    def has(self, name: str) -> bool:
        """Whether a node of such a name was emitted."""
        return any(node.name == name for node in self.nodes)

    def constant(self, array: NDArray[Any] | np.generic, name: str) -> str:
        """Store an array, packed where its type is smaller than a byte."""
        self.initializers[name] = numpy_helper.from_array(np.asarray(array), name)
        return name

    def scalar(self, value: np.generic) -> str:
        """Store a number; equal ones share a tensor."""
        name = f"::{value.dtype}::{value!s}"
        return name if name in self.initializers else self.constant(value, name)

    def input_grid(self, node: Node, index: int = 0) -> Grid | None:
        """The grid of an input of an operation."""
        return self._grids[node.inputs[index]]

    def reads_image(self, node: Node) -> bool:
        """Whether an operation reads the quantized image."""
        return node.inputs[0] in self._images

    def integer_grid(self, node: Node, index: int = 0) -> Grid:
        """The same, where a float will not do."""
        grid = self.input_grid(node, index)
        if grid is None:
            raise ArtifactError(f"{node.name}: {node.op} needs a grid and got a float")
        return grid

    def zero(self, grid: Grid | None) -> str:
        """The number 0 as it is carried on a grid, or as a float."""
        raise NotImplementedError

    def clip(self, node: Node, value: str, grid: Grid) -> None:
        """Finish an operation: clip values that are on a grid."""
        raise NotImplementedError

    def passed(
        self,
        op: str,
        node: Node,
        arguments: Sequence[str] = (),
        value: str | None = None,
        **attributes: Any,
    ) -> None:
        """An operation that moves values of any type, and clips them where its grid is tighter.

        Zero points, with which `op` may pad, count as input. ``value`` is what a first operator
        made of the only input.
        """
        grid, read = node.grid, node.inputs if value is None else [value]
        inputs = [*read, *arguments]
        sources = [self.input_grid(node, index) for index in range(len(node.inputs))]
        if grid is None or all(
            source is not None
            and grid.qmin <= min(source.qmin, source.zero_point)
            and max(source.qmax, source.zero_point) <= grid.qmax
            for source in sources
        ):
            self.emit(op, inputs, node.name, **attributes)
        else:
            self.clip(node, self.emit(op, inputs, f"{node.name}::moved", **attributes), grid)

    def graph(self, batch: str | int) -> onnx.GraphProto:
        """The graph of what was emitted: input "input" [batch, C, H, W], output "logits"."""
        image: list[str | int | None] = [batch, *self.model.input_shape]
        logits: list[str | int | None] = [batch, *self.shapes[self.output]]
        return helper.make_graph(
            self.nodes,
            str(self.model.metadata.get("model", "model")),
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, image)],
            [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, logits)],
            initializer=list(self.initializers.values()),
        )


def one_mantissa(source: Grid, target: Grid) -> bool:
    """Whether the step of one grid is the other's times a power of two: halves are common then."""
    mantissas = [np.frexp(np.float32(grid.scale))[0] for grid in (source, target)]
    return bool(mantissas[0] == mantissas[1])


class Builder(GraphBuilder):
    """Adds what QuantizeLinear and DequantizeLinear need, with uint8 activations.

    Args:
        model: what is written.
        tuned: for a current onnxruntime: weights in INT2, INT4 or INT8, constants made at load
            time where that saves bytes, and operations rewritten where that is faster. Otherwise
            everything is written as it is, which older and simpler runtimes want.
    """

    def __init__(self, model: IntegerModel, *, tuned: bool) -> None:
        output = model.output
        super().__init__(model, output.name if output.grid is None else FLOAT_LOGITS)
        self.tuned = tuned
        self._floats: set[str] = set()

    def grid(self, grid: Grid) -> tuple[str, str]:
        """Scale and zero point."""
        return self.scalar(np.float32(grid.scale)), self.scalar(np.uint8(grid.zero_point))

    def filled(self, shape: Sequence[int], value: np.generic, name: str) -> str:
        """A tensor of one value."""
        if not self.tuned:
            return self.constant(np.full(shape, value), name)
        size = self.constant(np.array(shape, np.int64), f"{name}_shape")
        tensor = numpy_helper.from_array(np.full(1, value))
        return self.emit("ConstantOfShape", [size], name, value=tensor)

    def dequantized(self, node: Node, index: int = 0) -> str:
        """An input of an operation as float."""
        source, grid = node.inputs[index], self.input_grid(node, index)
        if grid is None:
            return source
        name = f"{source}::float"
        if name not in self._floats:
            self._floats.add(name)
            self.emit("DequantizeLinear", [source, *self.grid(grid)], name)
        return name

    def spelled_out(self, node: Node, index: int, name: str) -> str:
        """An input as float, without a DequantizeLinear that might be fused with what follows."""
        grid = self.integer_grid(node, index)
        value = self.emit("Cast", [node.inputs[index]], f"{name}::cast", to=TensorProto.FLOAT)
        if grid.zero_point:
            zero = self.scalar(np.float32(grid.zero_point))
            value = self.emit("Sub", [value, zero], f"{name}::steps")
        elif grid.scale == 1.0:
            # A product with 1 would be removed, and the Cast fused with a norm that takes no bytes.
            return self.emit("Abs", [value], name)
        return self.emit("Mul", [value, self.scalar(np.float32(grid.scale))], name)

    def operands(self, node: Node, *, fused: bool) -> list[str]:
        """Both inputs of an operation as floats, to be fused with it or not."""
        if fused:
            return [self.dequantized(node, index) for index in (0, 1)]
        return [self.spelled_out(node, i, f"{node.name}::float_{i}") for i in (0, 1)]

    def float_zero(self) -> str:
        """Zero as a number on a grid, which makes an Add with it a QLinearAdd."""
        if ZERO not in self._floats:
            self._floats.add(ZERO)
            # Not the tensor that zero points share: onnxruntime gives this one more dimensions, and
            # chooses slower kernels where a zero point is not a constant that is used as it is.
            zero = self.constant(np.uint8(0), f"{ZERO}::value")
            inputs = [zero, self.scalar(np.float32(1)), self.scalar(np.uint8(0))]
            self.emit("DequantizeLinear", inputs, ZERO)
        return ZERO

    def counted(self, node: Node) -> str:
        """The input of an operation as float in steps of its grid: q - z."""
        one, zero = self.scalar(np.float32(1)), self.integer_grid(node).zero_point
        inputs = [node.inputs[0], one, self.scalar(np.uint8(zero))]
        return self.emit("DequantizeLinear", inputs, f"{node.name}::steps")

    def quantized(
        self, node: Node, value: str, scale: np.float32 | None = None, *, clip: bool = False
    ) -> None:
        """Finish an operation: bring a float tensor to its grid.

        Args:
            node: the operation.
            value: the tensor, left as it is where the operation has no grid.
            scale: other than the grid's, for values that are no multiples of its scale.
            clip: clip in any case.
        """
        grid = node.grid
        if grid is None:
            raise ArtifactError(f"{node.name}: {node.op} needs a grid for its output")
        own_scale, zero_point = self.grid(grid)
        inputs = [value, own_scale if scale is None else self.scalar(scale), zero_point]
        if clip or (grid.qmin, grid.qmax) != (0, 255):
            inputs = [self.emit("QuantizeLinear", inputs, f"{node.name}::quantized")]
            self.clip(node, inputs[0], grid)
        else:
            self.emit("QuantizeLinear", inputs, node.name)

    def clip(self, node: Node, value: str, grid: Grid) -> None:
        bounds = [self.scalar(np.uint8(grid.qmin)), self.scalar(np.uint8(grid.qmax))]
        self.emit("Clip", [value, *bounds], node.name)

    def zero(self, grid: Grid | None) -> str:
        return self.scalar(np.float32(0) if grid is None else np.uint8(grid.zero_point))

    def weight(self, node: Node, *, multiplied: bool = True) -> str:
        """The integers of a weight as an INT8 tensor.

        Tuned they are stored in as few bits as ONNX has, and the multiplication is part of the
        graph: onnxruntime does it once, when it loads the file.
        """
        weight, multiplier, shift = node.tensors["weight"], node.multiplier if multiplied else 1, 0
        if node.mid_rise and (weight % 2).all():  # a stem that was widened holds zeros
            # Odd numbers 2 c + 1: the codes c take the bits they have.
            weight, multiplier, shift = weight >> 1, 2 * multiplier, multiplier
        size = max(-int(weight.min()), int(weight.max()) + 1)
        if size > 8 or (node.weight_bits or 8) > 4 or not self.tuned:
            stored = multiplied_weight(node) if multiplied else node.tensors["weight"]
            return self.constant(stored.astype(np.int8), f"{node.name}::weight")
        narrow = (node.weight_bits or 8) <= 2 and size <= 2
        dtype = ml_dtypes.int2 if narrow else ml_dtypes.int4
        name = self.constant(weight.astype(dtype), f"{node.name}::weight")
        if multiplier > 1:
            wide = self.emit("Cast", [name], f"{node.name}::weight_int32", to=TensorProto.INT32)
            factor = self.scalar(np.int32(multiplier))
            name = self.emit("Mul", [wide, factor], f"{node.name}::weight_multiplied")
        if shift:
            offset = self.scalar(np.int32(shift))
            name = self.emit("Add", [name, offset], f"{node.name}::weight_shifted")
        return self.emit("Cast", [name], f"{node.name}::weight_int8", to=TensorProto.INT8)


def float_product(
    builder: GraphBuilder, node: Node, weight: str, bias: str
) -> tuple[str, list[str], dict[str, Any]]:
    """The last float operator of a conv2d or linear node, its inputs and its attributes.

    Gemm takes matrices only: on tokens [N, ..., I] it is the sum behind a MatMul.
    """
    if node.op == "linear" and len(builder.shapes[node.name]) > 1:
        name, shape = node.name, node.tensors["weight"].shape[::-1]
        columns = builder.emit(
            "Transpose", [weight], f"{name}::weight_columns", perm=[1, 0], shape=shape
        )
        product = builder.emit("MatMul", [node.inputs[0], columns], f"{name}::product")
        return "Add", [product, bias], {}
    op, attributes = product_operator(node)
    return op, [node.inputs[0], weight, bias], attributes


def product_operator(node: Node) -> tuple[str, dict[str, Any]]:
    """The float operator of a conv2d or linear node, and its attributes."""
    if node.op == "linear":
        return "Gemm", {"transB": 1}
    attributes = {
        "kernel_shape": list(node.tensors["weight"].shape[2:]),
        "strides": list(node.attributes["stride"]),
        "pads": list(node.attributes["padding"]),
        "dilations": list(node.attributes["dilation"]),
        "group": int(node.attributes["groups"]),
    }
    return "Conv", attributes
