"""Writes conv2d and linear operations as ONNX nodes. See `mecq_cli.export.onnx_graph`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from onnx import TensorProto

from mecq_cli.export.onnx_builder import Builder, float_product, product_operator
from mecq_cli.export.onnx_stem import rewrite_stem
from mecq_cli.integer.ir import Grid, Node

CACHE = 2**20
"""Bytes of weights that the second-level cache of a core can hold; most have 1 or 2 MiB."""
CHANNELS = 16
"""Output channels that a part of a convolution must have a multiple of, to be fast."""


def emit_product(builder: Builder, node: Node) -> None:
    """conv2d and linear. Both are exact once fused; float products follow the fused integer ones.

    Only the logits may be a DequantizeLinear -> Gemm without QuantizeLinear: anywhere else one
    might come later and be fused with it.
    """
    grid = builder.input_grid(node)
    if grid is not None and not builder.tuned:
        node = _with_positive_scales(node)
    if node.op == "linear" and len(builder.shapes[node.inputs[0]]) > 1:
        _token_product(builder, node, grid)
        return
    if grid is None:
        _float_product(builder, node)
    elif node.grid is not None:
        parts = _parts(node) if builder.tuned else [node]
        if len(parts) == 1:
            builder.quantized(node, _sum(builder, node, grid, f"{node.name}::sum"))
        else:
            _joined(builder, node, node.grid, parts)
    elif node.op == "linear" and node.name == builder.output:
        _sum(builder, node, grid, node.name)
    else:
        _exact_product(builder, node, grid)


def _token_product(builder: Builder, node: Node, grid: Grid | None) -> None:
    """A linear layer on tokens [N, ..., I]: as one of rows where that is fused, see QGemm."""
    if grid is None:
        _float_product(builder, node)
    elif node.grid is None:
        _exact_product(builder, node, grid)
    else:
        *places, inputs = builder.shapes[node.inputs[0]]
        name, outputs = node.name, len(node.tensors["weight"])
        shape = builder.constant(np.array([-1, inputs], np.int64), f"{name}::rows_shape")
        rows = builder.emit("Reshape", [node.inputs[0], shape], f"{name}::rows")
        value = builder.emit("DequantizeLinear", [rows, *builder.grid(grid)], f"{rows}_float")
        product = _sum(builder, node, grid, f"{name}::sum", value)
        target = replace(node, name=f"{name}::quantized_rows")
        builder.quantized(target, product)
        shape = builder.constant(np.array([-1, *places, outputs], np.int64), f"{name}::shape")
        builder.emit("Reshape", [target.name, shape], name)


def _parts(node: Node) -> list[Node]:
    """A large convolution as several with a part of the output channels each.

    onnxruntime goes through all the weights for every few pixels. Weights that the cache of a core
    cannot hold come from farther away each time, which takes a tenth longer, or more.
    """
    weight = node.tensors["weight"]
    count = 1
    while weight.size // count > CACHE and weight.shape[0] % (2 * count * CHANNELS) == 0:
        count *= 2
    if count == 1 or node.op != "conv2d" or node.attributes["groups"] != 1:
        return [node]
    split = {name: np.split(tensor, count) for name, tensor in node.tensors.items()}
    return [
        replace(
            node,
            name=f"{node.name}::part_{index}",
            tensors={name: tensors[index] for name, tensors in split.items()},
        )
        for index in range(count)
    ]


def _joined(builder: Builder, node: Node, target: Grid, parts: Sequence[Node]) -> None:
    """The parts of a convolution, one after the other."""
    values = []
    for part in parts:
        inputs = [_sum(builder, part, builder.integer_grid(node), f"{part.name}::sum")]
        inputs += builder.grid(target)
        values.append(builder.emit("QuantizeLinear", inputs, f"{part.name}::quantized"))
    if (target.qmin, target.qmax) == (0, 255):
        builder.emit("Concat", values, node.name, axis=1)
    else:
        builder.clip(node, builder.emit("Concat", values, f"{node.name}::joined", axis=1), target)


def _with_positive_scales(node: Node) -> Node:
    """The same sums, with the sign of a scale in its weights and bias.

    Some runtimes refuse negative scales. Left as they are: channels with a weight of -128, which
    has no opposite in int8. Weights of fewer bits may leave their range, but not int8.
    """
    weight, scale, bias = (node.tensors[name] for name in ("weight", "weight_scale", "bias"))
    flipped = (scale < 0) & (weight.reshape(len(weight), -1).min(1) > -128)
    signs = np.where(flipped, -1, 1)
    factors = signs.reshape(-1, *[1] * (weight.ndim - 1)).astype(np.int8)
    tensors = {
        "weight": weight * factors,
        "weight_scale": scale * signs.astype(np.float32),
        "bias": bias * signs.astype(np.int32),
    }
    return replace(node, tensors=tensors)


def _sum(builder: Builder, node: Node, grid: Grid, output: str, value: str | None = None) -> str:
    """Gemm or Conv between DequantizeLinear, which becomes QGemm or, with a grid, QLinearConv.

    ``value`` is its input as a float, where that is not simply the node's.
    """
    node, stem = rewrite_stem(builder, node) if builder.tuned else (node, None)
    name, tensors = node.name, node.tensors
    scale = builder.constant(tensors["weight_scale"].astype(np.float32), f"{name}::weight_scale")
    inputs = [builder.weight(node), scale]
    if node.op == "linear":
        channels = [len(tensors["weight"])]
        inputs.append(builder.filled(channels, np.int8(0), f"{name}::weight_zero_point"))
    weight = builder.emit("DequantizeLinear", inputs, f"{name}::weight_float", axis=0)
    bias = builder.constant(tensors["bias"].astype(np.int32), f"{name}::bias")
    if builder.tuned:
        step = builder.scalar(np.float32(grid.scale))
        bias_scale = builder.emit("Mul", [step, scale], f"{name}::bias_scale")
    else:
        products = np.float32(grid.scale) * tensors["weight_scale"].astype(np.float32)
        bias_scale = builder.constant(products, f"{name}::bias_scale")
    bias = builder.emit("DequantizeLinear", [bias, bias_scale], f"{name}::bias_float", axis=0)
    if stem is None:
        value = builder.dequantized(node) if value is None else value
    else:
        value = builder.emit("DequantizeLinear", [stem, *builder.grid(grid)], f"{stem}::float")
    op, attributes = product_operator(node)
    return builder.emit(op, [value, weight, bias], output, **attributes)


def _exact_product(builder: Builder, node: Node, grid: Grid) -> None:
    """Integer input, float output: fl(fl(acc) * fl(s_x * s_w))."""
    name, tensors = node.name, node.tensors
    zero, weight = builder.scalar(np.uint8(grid.zero_point)), builder.weight(node)
    if node.op == "linear":
        weight = builder.emit("Transpose", [weight], f"{name}::weight_columns", perm=[1, 0])
        op, attributes = "MatMulInteger", {}
    else:
        op, attributes = "ConvInteger", product_operator(node)[1]
    acc = builder.emit(op, [node.inputs[0], weight, zero], f"{name}::product", **attributes)
    channels = [-1, *[1] * (tensors["weight"].ndim - 2)]
    bias = builder.constant(tensors["bias"].reshape(channels), f"{name}::bias")
    acc = builder.emit("Add", [acc, bias], f"{name}::sum")
    acc = builder.emit("Cast", [acc], f"{name}::sum_float", to=TensorProto.FLOAT)
    scale = np.float32(grid.scale) * tensors["weight_scale"].astype(np.float32)
    builder.emit("Mul", [acc, builder.constant(scale.reshape(channels), f"{name}::scale")], name)


def _float_product(builder: Builder, node: Node) -> None:
    """Float input."""
    op, inputs, attributes = float_product(builder, node, *_float_weight(builder, node))
    builder.emit(op, inputs, node.name, **attributes)


def _float_weight(builder: Builder, node: Node) -> tuple[str, str]:
    """Weights fl(w * s_w), made at load time where they are stored as integers; and the bias."""
    name, tensors = node.name, node.tensors
    weight = tensors["weight"]
    scale = tensors["weight_scale"].astype(np.float32).reshape(-1, *[1] * (weight.ndim - 1))
    if weight.dtype == np.int8:
        scale_name = builder.constant(scale, f"{name}::weight_scale")
        integers = builder.weight(node, multiplied=False)
        integers = builder.emit("Cast", [integers], f"{name}::weight_cast", to=TensorProto.FLOAT)
        weight_name = builder.emit("Mul", [integers, scale_name], f"{name}::weight_float")
    else:
        weight_name = builder.constant(weight.astype(np.float32) * scale, f"{name}::weight")
    return weight_name, builder.constant(tensors["bias"].astype(np.float32), f"{name}::bias")
