"""Writes an `IntegerModel` with the quantizers of QONNX (domain qonnx.custom_op.general).

QONNX carries real numbers in float32 tensors; what makes them integers are operators that round:

    Quant(x, scale, zeropt, bits)   (rne(clip(x / scale + zeropt)) - zeropt) * scale
    BipolarQuant(x, scale)          scale where x >= 0, else -scale

So an integer q on a grid is written as the real number scale * (q - zero_point), and

| operation                   | is written as                                                    |
|-----------------------------|------------------------------------------------------------------|
| quantize, requantize        | Quant                                                            |
| threshold                   | MultiThreshold, whose thresholds are t - 1/2 as real numbers     |
| dequantize                  | Identity: the values are real numbers already                    |
| conv2d, linear              | Conv or Gemm; the weight comes from a Quant (1 bit:              |
|                             | BipolarQuant), the bias from one of 32 bits; then Quant, where   |
|                             | the operation has a grid                                         |
| add                         | Add, Quant                                                       |
| mul                         | Mul, Quant                                                       |
| lookup                      | Gather from a table of 256 real numbers, at the integer          |
| avg_pool2d, global_avg_pool | AveragePool or GlobalAveragePool, Quant                          |
| max_pool2d, concat, ...     | the float operator: it moves numbers that lie on a grid          |
| all on floats               | the float operator                                               |

Where a grid is narrower than its bits, as after a ReLU, a Relu or Clip comes before the Quant.

* Weights are stored as float32, so the file is as large as the float network's.
* A scale of QONNX is positive, the factor of a folded batch norm may be negative: the weight is
  scaled by its size, and a Mul by +1 and -1 follows the product.
* `weight_multiplier` has no place here; it serves a bias in integers.
* A Quant with an integer zero point has no grid without zero. Weights on a mid-rise grid of b
  bits are written as signed, narrow ones of b + 1 bits, of which they use the odd integers.
* The zero point is 0 where a grid has no negative value, or is centred (signed). Otherwise it is
  counted from the centre: Quant rounds after it added the zero point, and a large one would
  swallow the digits that tell a value from a half.
* Averages between grids of one mantissa fall on halves all the time. They are computed as
  integers, which a Quant of scale 1 makes of the numbers, exactly as in `mecq_cli.integer.ir`.
* The batch is 1 and the shape of every tensor is stored, as the tools of QONNX want it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mecq_cli.errors import ArtifactError
from mecq_cli.export.onnx_builder import float_product, one_mantissa
from mecq_cli.export.onnx_moves import MOVES, pads
from mecq_cli.export.onnx_resize import emit_resize_of_one
from mecq_cli.export.qonnx_builder import DOMAIN, STEP_BITS, QonnxBuilder, required
from mecq_cli.integer.geometry import adaptive_places, windows
from mecq_cli.integer.ir import Grid, IntegerModel, Node

BIAS_BITS = 32


def build(model: IntegerModel) -> onnx.GraphProto:
    """The graph of a model: input "input" float32 [1, C, H, W], output "logits".

    Raises:
        ArtifactError: the model holds something that cannot be written.
    """
    builder = QonnxBuilder(model)
    for node in model.nodes:
        emit = _EMITTERS.get(node.op)
        if emit is None:
            raise ArtifactError(f"{node.name}: cannot write the operation '{node.op}' as QONNX")
        emit(builder, node)
    graph = builder.graph(1)
    graph.value_info.extend(builder.tensors.values())
    return graph


def _finish(
    builder: QonnxBuilder, node: Node, op: str, inputs: Sequence[str], **attributes: Any
) -> None:
    """A float operator, and the Quant where the operation has a grid."""
    if node.grid is None:
        builder.emit(op, inputs, node.name, **attributes)
    else:
        builder.quantized(node, builder.emit(op, inputs, f"{node.name}::real", **attributes))


def _quantize(builder: QonnxBuilder, node: Node) -> None:
    source, grid = builder.input_grid(node), required(node)
    if source is None or not one_mantissa(source, grid) or grid.zero_point == 0:
        builder.quantized(node, node.inputs[0])
        return
    # Halves and their neighbours are common; a zero point that is added first mixes them up.
    scale = builder.scalar(np.float32(grid.scale))
    value = builder.emit("Div", [node.inputs[0], scale], f"{node.name}::steps")
    value = builder.steps(node, value, f"{node.name}::integers")
    builder.emit("Mul", [value, scale], node.name)


def _threshold(builder: QonnxBuilder, node: Node) -> None:
    """Between two integers it does not matter how a sum of real numbers was rounded."""
    source, target = builder.integer_grid(node), required(node)
    thresholds = np.array(node.attributes["thresholds"], np.float64) - 0.5 - source.zero_point
    real = (thresholds * source.scale).astype(np.float32)[None]
    steps = target.spacing == 1
    # On a grid without zero first as odd integers: scaled at once, a sum would be rounded.
    counted = builder.emit(
        "MultiThreshold",
        [node.inputs[0], builder.constant(real, f"{node.name}::thresholds")],
        node.name if steps else f"{node.name}::steps",
        domain=DOMAIN,
        out_dtype=f"UINT{target.bits}" if steps else _signed(target),
        out_scale=target.scale if steps else 2.0,
        out_bias=0.0 if steps else -float(target.zero_point),
    )
    if not steps:
        builder.emit("Mul", [counted, builder.scalar(np.float32(target.scale))], node.name)


def _signed(grid: Grid) -> str:
    """The type of integers q - z."""
    return f"INT{grid.reach.bit_length() + 1}"


def _dequantize(builder: QonnxBuilder, node: Node) -> None:
    builder.emit("Identity", node.inputs, node.name)


def _add(builder: QonnxBuilder, node: Node) -> None:
    _finish(builder, node, "Add", node.inputs)


def _mul(builder: QonnxBuilder, node: Node) -> None:
    _finish(builder, node, "Mul", node.inputs)


def _lookup(builder: QonnxBuilder, node: Node) -> None:
    """The place in the table is the integer that a real number stands for."""
    source, target, name = builder.integer_grid(node), required(node), node.name
    shape = builder.shapes[node.inputs[0]]
    scale = builder.scalar(np.float32(source.scale))
    value = builder.emit("Div", [node.inputs[0], scale], f"{name}::steps")
    value = builder.emit("Round", [value], f"{name}::counts")
    zero = builder.scalar(np.float32(source.zero_point))
    value = builder.emit("Add", [value, zero], f"{name}::index")
    value = builder.emit("Cast", [value], f"{name}::place", to=onnx.TensorProto.INT64)
    builder.tensors[value].type.tensor_type.elem_type = onnx.TensorProto.INT64
    integers = node.tensors["table"].astype(np.float32) - np.float32(target.zero_point)
    table = builder.constant(integers * np.float32(target.scale), f"{name}::table")
    builder.emit("Gather", [table, value], name, axis=0, shape=(1, *shape))


def _product(builder: QonnxBuilder, node: Node) -> None:
    """conv2d and linear."""
    grid, name, tensors = builder.input_grid(node), node.name, node.tensors
    scale = tensors["weight_scale"].astype(np.float32)
    # Float weights are not scaled by a Quant and take the sign themselves.
    signs = np.ones_like(scale) if node.weight_bits == 32 else np.sign(scale)
    size = scale * signs
    bias = builder.constant(_bias(tensors["bias"], grid, scale, signs), f"{name}::bias")
    if grid is not None:
        unit = builder.constant(np.float32(grid.scale) * size, f"{name}::bias_scale")
        bias = builder.quant(
            bias,
            f"{name}::bias_quantized",
            unit,
            BIAS_BITS,
            signed=True,
            # A vector, since QONNX's ExtractBiasFromConv reshapes all but vectors of one value.
            zero_point=builder.constant(np.zeros(1, np.float32), "float32::[0.0]"),
            shape=size.shape,
        )
        # The scale belongs to the multiplied weight.
        size = size * np.float32(node.multiplier)
    weight = _weight(builder, node, size)
    op, inputs, attributes = float_product(builder, node, weight, bias)
    if (signs > 0).all():
        _finish(builder, node, op, inputs, **attributes)
        return
    value = builder.emit(op, inputs, f"{name}::unsigned", **attributes)
    channels = signs.reshape(-1, *[1] * (tensors["weight"].ndim - 2))
    _finish(builder, node, "Mul", [value, builder.constant(channels, f"{name}::signs")])


def _bias(
    bias: NDArray[Any], grid: Grid | None, scale: NDArray[np.float32], signs: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Real numbers, in the place before the multiplication by the signs."""
    if grid is None:
        return bias.astype(np.float32) * signs
    unit = (np.float32(grid.scale) * np.abs(scale)).astype(np.float64)
    # In units of a signed scale the sign is in the integer, so it must not be applied here.
    real: NDArray[np.float32] = (bias.astype(np.float64) * unit).astype(np.float32)
    return real


def _weight(builder: QonnxBuilder, node: Node, size: NDArray[np.float32]) -> str:
    """A weight as real numbers ``size`` * integers; float weights as they are."""
    name, weight = node.name, node.tensors["weight"]
    size = size.reshape(-1, *[1] * (weight.ndim - 1))
    stored = builder.constant(weight.astype(np.float32) * size, f"{name}::weight")
    if node.weight_bits is None or node.weight_bits == 32:
        return stored
    scale = builder.constant(size, f"{name}::weight_scale")
    output, shape = f"{name}::weight_quantized", weight.shape
    if node.weight_bits == 1:
        return builder.emit("BipolarQuant", [stored, scale], output, shape=shape, domain=DOMAIN)
    bits, narrow = node.weight_bits + node.mid_rise, node.mid_rise
    return builder.quant(stored, output, scale, bits, signed=True, narrow=narrow, shape=shape)


def _avg_pool2d(builder: QonnxBuilder, node: Node) -> None:
    shape, name = builder.shapes[node.inputs[0]], node.name
    axes = windows(node, shape)
    kernel = [axis.kernel for axis in axes]
    include = bool(node.attributes["count_include_pad"])
    counts = np.outer(axes[0].counts(include), axes[1].counts(include)).astype(np.float32)
    attributes: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": [axis.stride for axis in axes],
        "pads": pads(axes),
    }
    grid = builder.input_grid(node)
    if grid is not None and node.grid is not None and one_mantissa(grid, node.grid):
        ones = builder.constant(np.ones((shape[0], 1, *kernel), np.float32), f"{name}::ones")
        integers = _integers(builder, node, grid)
        total = builder.emit("Conv", [integers, ones], f"{name}::sum", group=shape[0], **attributes)
        _exact_mean(builder, node, grid, total, counts)
        return
    attributes["count_include_pad"] = 1
    places = np.float32(kernel[0] * kernel[1])
    if (counts == places).all():
        _finish(builder, node, "AveragePool", node.inputs, **attributes)
        return
    mean = builder.emit("AveragePool", node.inputs, f"{name}::mean", **attributes)
    _finish(builder, node, "Mul", [mean, builder.constant(places / counts, f"{name}::shares")])


def _adaptive_avg_pool2d(builder: QonnxBuilder, node: Node) -> None:
    grid, name = builder.input_grid(node), node.name
    channels, height, width = builder.shapes[node.inputs[0]]
    rows, columns, counts = adaptive_places(node, (channels, height, width))
    values = node.inputs[0] if grid is None else _integers(builder, node, grid)
    left, right = (
        builder.constant(rows, f"{name}::rows"),
        builder.constant(columns.T.copy(), f"{name}::columns"),
    )
    shape = (1, channels, len(rows), width)
    total = builder.emit("MatMul", [left, values], f"{name}::tall", shape=shape)
    total = builder.emit("MatMul", [total, right], f"{name}::sum")
    if grid is None:
        builder.emit("Div", [total, builder.constant(counts, f"{name}::counts")], name)
    else:
        _exact_mean(builder, node, grid, total, counts)


def _global_avg_pool(builder: QonnxBuilder, node: Node) -> None:
    grid, name = builder.input_grid(node), node.name
    if grid is None or node.grid is None or not one_mantissa(grid, node.grid):
        _finish(builder, node, "GlobalAveragePool", node.inputs)
        return
    _, height, width = builder.shapes[node.inputs[0]]
    axes = builder.constant(np.array([2, 3]), f"{name}::axes")
    total = builder.emit("ReduceSum", [_integers(builder, node, grid), axes], f"{name}::sum")
    _exact_mean(builder, node, grid, total, np.float32(height * width))


def _integers(builder: QonnxBuilder, node: Node, grid: Grid) -> str:
    """The input of an operation as q - z."""
    name, shape = node.name, (1, *builder.shapes[node.inputs[0]])
    scale, one = builder.scalar(np.float32(grid.scale)), builder.scalar(np.float32(1))
    value = builder.emit("Div", [node.inputs[0], scale], f"{name}::steps", shape=shape)
    return builder.quant(value, f"{name}::counts", one, STEP_BITS, signed=True, shape=shape)


def _exact_mean(
    builder: QonnxBuilder,
    node: Node,
    grid: Grid,
    total: str,
    counts: NDArray[np.float32] | np.float32,
) -> None:
    """Finish an average of exact sums as the table of `mecq_cli.integer.ir` says."""
    target, name = required(node), node.name
    factor = np.float32(grid.scale) / (np.float32(target.scale) * counts)
    mean = builder.emit(
        "Mul", [total, builder.constant(factor, f"{name}::factor")], f"{name}::mean"
    )
    integers = builder.steps(node, mean, f"{name}::integers")
    builder.emit("Mul", [integers, builder.scalar(np.float32(target.scale))], name)


_EMITTERS: dict[str, Callable[[QonnxBuilder, Node], None]] = {
    **MOVES,
    "quantize": _quantize,
    "requantize": _quantize,
    "dequantize": _dequantize,
    "threshold": _threshold,
    "conv2d": _product,
    "linear": _product,
    "lookup": _lookup,
    "add": _add,
    "mul": _mul,
    "avg_pool2d": _avg_pool2d,
    "global_avg_pool": _global_avg_pool,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "resize": emit_resize_of_one,
}
