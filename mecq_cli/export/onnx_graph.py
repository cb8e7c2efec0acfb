"""Writes the operations of an `IntegerModel` as ONNX nodes that onnxruntime fuses and computes
exactly as `mecq_cli.integer.ir` says.

Each choice here was tried on onnxruntime 1.32 (CPU), with graph optimizations on and off:

* weights are packed INT2 or INT4, cast to INT8 and only then dequantized: onnxruntime folds the
  cast at load time, but crashes if QLinearConv meets a sub-byte type;
* a clip tighter than uint8 acts on the uint8 values: a float Clip would prevent the fusion;
* the scale of a bias is a product in the graph, which saves its bytes in the file;
* QGemm wants an explicit zero point of the weights, per channel;
* a requantization adds zero: QLinearAdd takes a quarter of the time of DequantizeLinear and
  QuantizeLinear. Where a value lies so near to a half that the order of operations decides, these
  two do it, and a Clip follows them, needed or not: without it onnxruntime may merge two Q/DQ
  pairs into one with another scale;
* the convolution that reads the image is rewritten, see `mecq_cli.export.onnx_stem`, and one
  whose weights are larger than a cache is split, see `mecq_cli.export.onnx_products`;
* average pooling is a depthwise convolution with ones, since QLinearAveragePool adds floats, and
  over a plane too large for that a sum of int64;
* products with a float output go through ConvInteger or MatMulInteger, whose sums are exact;
* a dequantization that float operations follow is spelled out, lest these be fused with a
  later QuantizeLinear into operators that round otherwise; so is one before a product on grids that
  lie so far apart that QLinearMul would not be exact. An add on such grids is one of float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from mecq_cli.errors import ArtifactError
from mecq_cli.export.onnx_builder import FLOAT_LOGITS, Builder, one_mantissa
from mecq_cli.export.onnx_compact import compact
from mecq_cli.export.onnx_moves import MOVES, pads
from mecq_cli.export.onnx_pointwise import emit_lookup, emit_mul
from mecq_cli.export.onnx_products import emit_product
from mecq_cli.export.onnx_resize import emit_resize
from mecq_cli.export.onnx_thresholds import emit_threshold
from mecq_cli.export.onnx_tokens import TOKENS
from mecq_cli.integer.geometry import adaptive_places, windows
from mecq_cli.integer.ir import EXACT, SPREAD, Grid, IntegerModel, Node, spread


def build(model: IntegerModel, *, tuned: bool) -> onnx.GraphProto:
    """The graph of a model: input "input" float32 [batch, C, H, W], output "logits".

    Args:
        model: a valid model.
        tuned: for a current onnxruntime, in opset 25. Otherwise opset 13 will do, and everything
            is written as plainly as onnxruntime's exact kernels allow.

    Raises:
        ArtifactError: the model holds something that cannot be written.
    """
    builder = Builder(model, tuned=tuned)
    for node in model.nodes:
        emit = _EMITTERS.get(node.op)
        if emit is None:
            raise ArtifactError(f"{node.name}: cannot write the operation '{node.op}' as ONNX")
        emit(builder, node)
    output = model.output
    if output.grid is not None:
        builder.emit("DequantizeLinear", [output.name, *builder.grid(output.grid)], FLOAT_LOGITS)
    graph = builder.graph("batch")
    return compact(graph, [node.name for node in model.nodes]) if tuned else graph


def _quantize(builder: Builder, node: Node) -> None:
    builder.quantized(node, node.inputs[0])


def _requantize(builder: Builder, node: Node) -> None:
    source, target, value = builder.integer_grid(node), node.grid, builder.dequantized(node)
    if target is None or not (builder.tuned and _is_decided(source, target)):
        builder.quantized(node, value, clip=True)
    else:
        terms = [value, builder.float_zero()]
        builder.quantized(node, builder.emit("Add", terms, f"{node.name}::sum"))


def _is_decided(source: Grid, target: Grid) -> bool:
    """Whether no value of ``source`` comes so near to a half that rounding errors matter.

    QLinearAdd rounds q * r + (z_y - z_x * r) with r = fl(s_x / s_y), in float32 (24 bits) or fixed
    point (22 bits): its error is below 2^-21 of the sizes of the terms and of the sum.
    """
    ratio = np.float64(np.float32(source.scale)) / np.float64(np.float32(target.scale))
    if not 2.0**-10 <= ratio <= 2.0**8:
        return False
    values = np.arange(source.qmin, source.qmax + 1)
    sums = (values - source.zero_point) * ratio + target.zero_point
    distance = np.abs(sums - np.floor(sums) - 0.5)
    terms = (values + source.zero_point) * ratio + target.zero_point + np.abs(sums)
    unclipped = (sums > target.qmin - 1) & (sums < target.qmax + 1)
    return bool(np.all(distance[unclipped] > 2.0**-21 * terms[unclipped]))


def _dequantize(builder: Builder, node: Node) -> None:
    builder.spelled_out(node, 0, node.name)


def _add(builder: Builder, node: Node) -> None:
    if node.grid is None:
        builder.emit("Add", node.inputs, node.name)
        return
    if spread(node.grid, *(builder.integer_grid(node, i) for i in (0, 1))) <= SPREAD:
        # QLinearAdd adds q * s_x / s_y of both, and a constant of all zero points, in fixed point
        # or float32.
        terms = [builder.dequantized(node, i) for i in (0, 1)]
        builder.quantized(node, builder.emit("Add", terms, f"{node.name}::sum"))
    else:
        _add_in_float64(builder, node, node.grid)


def _add_in_float64(builder: Builder, node: Node, target: Grid) -> None:
    """There is no QuantizeLinear of these, so it is written out."""
    name, steps = node.name, []
    for i in (0, 1):
        grid, own = builder.integer_grid(node, i), f"{node.name}::{i}"
        value = builder.emit("Cast", [node.inputs[i]], f"{own}::cast", to=TensorProto.DOUBLE)
        zero = builder.scalar(np.float64(grid.zero_point))
        value = builder.emit("Sub", [value, zero], f"{own}::centred")
        ratio = builder.scalar(np.float64(grid.scale / target.scale))
        steps.append(builder.emit("Mul", [value, ratio], f"{own}::steps"))
    value = builder.emit("Round", [builder.emit("Add", steps, f"{name}::sum")], f"{name}::rounded")
    zero = builder.scalar(np.float64(target.zero_point))
    value = builder.emit("Add", [value, zero], f"{name}::moved")
    ends = [builder.scalar(np.float64(end)) for end in (target.qmin, target.qmax)]
    value = builder.emit("Clip", [value, *ends], f"{name}::clipped")
    builder.emit("Cast", [value], name, to=TensorProto.UINT8)


def _avg_pool2d(builder: Builder, node: Node) -> None:
    grid, shape = builder.input_grid(node), builder.shapes[node.inputs[0]]
    axes = windows(node, shape)
    include = bool(node.attributes["count_include_pad"])
    counts = np.outer(axes[0].counts(include), axes[1].counts(include)).astype(np.float32)
    name, kernel = node.name, [axis.kernel for axis in axes]
    attributes: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": [axis.stride for axis in axes],
        "pads": pads(axes),
        "group": shape[0],
    }
    size = [shape[0], 1, *kernel]
    if grid and node.grid and counts.min() == counts.max() and not _ties(grid, node.grid):
        ones = builder.filled(size, np.int8(1), f"{name}::ones")
        inputs = [ones, builder.scalar(np.float32(1))]
        ones = builder.emit("DequantizeLinear", inputs, f"{name}::ones_float")
        terms = [builder.dequantized(node), ones]
        acc = builder.emit("Conv", terms, f"{name}::sum", **attributes)
        builder.quantized(node, acc, np.float32(node.grid.scale) * counts[0, 0])
        return
    ones = builder.filled(size, np.float32(1), f"{name}::ones")
    values = node.inputs[0] if grid is None else builder.counted(node)
    acc = builder.emit("Conv", [values, ones], f"{name}::sum", **attributes)
    if grid is None:
        builder.emit("Div", [acc, builder.constant(counts, f"{name}::counts")], name)
    else:
        _scaled(builder, node, acc, grid, counts)


def _adaptive_avg_pool2d(builder: Builder, node: Node) -> None:
    """As products with matrices of zeros and ones, whose sums of integers are exact in float32."""
    grid, shape, name = builder.input_grid(node), builder.shapes[node.inputs[0]], node.name
    rows, columns, counts = adaptive_places(node, shape)
    values = node.inputs[0] if grid is None else builder.counted(node)
    acc = builder.emit("MatMul", [builder.constant(rows, f"{name}::rows"), values], f"{name}::tall")
    acc = builder.emit(
        "MatMul", [acc, builder.constant(columns.T.copy(), f"{name}::columns")], f"{name}::sum"
    )
    if grid is None:
        builder.emit("Div", [acc, builder.constant(counts, f"{name}::counts")], name)
    else:
        _scaled(builder, node, acc, grid, counts)


def _global_avg_pool(builder: Builder, node: Node) -> None:
    grid, name = builder.input_grid(node), node.name
    if grid is None:
        builder.emit("GlobalAveragePool", node.inputs, name)
        return
    _, height, width = builder.shapes[node.inputs[0]]
    count = np.float32(height * width)
    exact = height * width * grid.reach < EXACT
    if exact and node.grid is not None and not _ties(grid, node.grid):
        factor = np.float32(grid.scale) / (np.float32(node.grid.scale) * count)
        # QLinearGlobalAveragePool refuses any other.
        if 2.0**-32 <= factor < 256:
            mean = [builder.dequantized(node)]
            builder.quantized(node, builder.emit("GlobalAveragePool", mean, f"{name}::mean"))
            return
    axes = builder.constant(np.array([2, 3]), f"{name}::axes")
    if exact:
        acc = builder.emit("ReduceSum", [builder.counted(node), axes], f"{name}::sum")
    else:
        acc = _sum_in_int64(builder, node, grid, axes)
    _scaled(builder, node, acc, grid, count)


def _sum_in_int64(builder: Builder, node: Node, grid: Grid, axes: str) -> str:
    """Of integers without their zero point, as float32."""
    name = node.name
    value = builder.emit("Cast", [node.inputs[0]], f"{name}::cast", to=TensorProto.INT64)
    zero = builder.scalar(np.int64(grid.zero_point))
    value = builder.emit("Sub", [value, zero], f"{name}::centred")
    acc = builder.emit("ReduceSum", [value, axes], f"{name}::integers")
    return builder.emit("Cast", [acc], f"{name}::sum", to=TensorProto.FLOAT)


def _ties(source: Grid, target: Grid) -> bool:
    """Whether averages often fall halfway between two steps while the scale is no power of two.

    A float mean then rounds away from the tie by chance, so that the graph would depend on
    whether it is fused; exact sums and one multiplication do not.
    """
    power_of_two = np.frexp(np.float32(source.scale))[0] == 0.5
    return one_mantissa(source, target) and not power_of_two


def _scaled(
    builder: Builder, node: Node, acc: str, grid: Grid, counts: NDArray[np.float32] | np.float32
) -> None:
    """Finish an average: multiply exact sums as the table says; nothing for a fusion to change."""
    scale = np.float32(grid.scale)
    if node.grid is None:
        multiplier = builder.constant(scale / counts, f"{node.name}::multiplier")
        builder.emit("Mul", [acc, multiplier], node.name)
        return
    factor = scale / (np.float32(node.grid.scale) * counts)
    multiplier = builder.constant(factor, f"{node.name}::multiplier")
    steps = builder.emit("Mul", [acc, multiplier], f"{node.name}::mean")
    builder.quantized(node, steps, np.float32(1))


_EMITTERS: dict[str, Callable[[Builder, Node], None]] = {
    **MOVES,
    "quantize": _quantize,
    "requantize": _requantize,
    "dequantize": _dequantize,
    "threshold": emit_threshold,
    "conv2d": emit_product,
    "linear": emit_product,
    "lookup": emit_lookup,
    "add": _add,
    "mul": emit_mul,
    "avg_pool2d": _avg_pool2d,
    "global_avg_pool": _global_avg_pool,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "resize": emit_resize,
    **TOKENS,
}
