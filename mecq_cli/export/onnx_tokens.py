"""Writes what transformers are made of beside linear layers as ONNX nodes.

* A product of two values that goes to floats is a MatMulInteger, whose sums are exact, a Cast and
  one Mul: nothing of it can be fused with what follows. One that goes to a grid becomes a
  QLinearMatMul.
* Its factor is part of the scale of the first value, whose integers it does not touch.
* Norms and softmax read and give floats; there is no DequantizeLinear before a softmax with which
  onnxruntime could make it a QLinearSoftmax, which rounds in its own way.
* In opset 13 there is no LayerNormalization: it is spelled out, and onnxruntime puts it together.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from mecq_cli.export.onnx_builder import Builder
from mecq_cli.integer.ir import INPUT, Node

_BATCH = "::batch::size"


def _matmul(builder: Builder, node: Node) -> None:
    name, factor = node.name, np.float32(node.attributes["factor"])
    if builder.input_grid(node) is None:
        product = builder.emit("MatMul", node.inputs, f"{name}::product")
        builder.emit("Mul", [product, builder.scalar(factor)], name)
        return
    a, b = (builder.integer_grid(node, index) for index in (0, 1))
    scale = np.float32(a.scale) * factor
    if node.grid is None:
        zeros = [builder.scalar(np.uint8(grid.zero_point)) for grid in (a, b)]
        acc = builder.emit("MatMulInteger", [*node.inputs, *zeros], f"{name}::product")
        acc = builder.emit("Cast", [acc], f"{name}::sum", to=TensorProto.FLOAT)
        builder.emit("Mul", [acc, builder.scalar(scale * np.float32(b.scale))], name)
        return
    inputs = [node.inputs[0], builder.scalar(scale), builder.scalar(np.uint8(a.zero_point))]
    left = builder.emit("DequantizeLinear", inputs, f"{name}::left")
    product = builder.emit("MatMul", [left, builder.dequantized(node, 1)], f"{name}::sum")
    builder.quantized(node, product)


def _constant(builder: Builder, node: Node) -> None:
    value = node.tensors["value"]
    stored = builder.constant(value[None], f"{node.name}::stored")
    rest = builder.constant(np.ones(value.ndim, np.int64), f"::ones::{value.ndim}")
    shape = builder.emit("Concat", [batch_size(builder), rest], f"{node.name}::shape", axis=0)
    builder.emit("Expand", [stored, shape], node.name)


def batch_size(builder: Builder) -> str:
    """The number of images, as a vector of one."""
    if not builder.has(_BATCH):
        shape = builder.emit("Shape", [INPUT], "::batch::shape")
        first = builder.constant(np.zeros(1, np.int64), "::batch::first")
        builder.emit("Gather", [shape, first], _BATCH, axis=0)
    return _BATCH


def _layer_norm(builder: Builder, node: Node) -> None:
    name, eps = node.name, node.attributes["eps"]
    affine = [builder.constant(node.tensors[key], f"{name}::{key}") for key in ("weight", "bias")]
    if builder.tuned:
        inputs = [node.inputs[0], *affine]
        builder.emit("LayerNormalization", inputs, name, axis=-1, epsilon=eps)
        return
    mean = builder.emit("ReduceMean", node.inputs, f"{name}::mean", axes=[-1])
    centred = builder.emit("Sub", [node.inputs[0], mean], f"{name}::centred")
    square = builder.emit("Pow", [centred, builder.scalar(np.float32(2))], f"{name}::square")
    variance = builder.emit("ReduceMean", [square], f"{name}::variance", axes=[-1])
    shifted = builder.emit("Add", [variance, builder.scalar(np.float32(eps))], f"{name}::shifted")
    deviation = builder.emit("Sqrt", [shifted], f"{name}::deviation")
    value = builder.emit("Div", [centred, deviation], f"{name}::standardised")
    value = builder.emit("Mul", [value, affine[0]], f"{name}::scaled")
    builder.emit("Add", [value, affine[1]], name)


def _group_norm(builder: Builder, node: Node) -> None:
    name, groups = node.name, int(node.attributes["groups"])
    shape = builder.shapes[node.inputs[0]]
    flat = builder.constant(np.array([0, groups, -1], np.int64), f"{name}::groups")
    value = builder.emit("Reshape", [node.inputs[0], flat], f"{name}::parts")
    plain = [
        builder.constant(np.full(groups, number, np.float32), f"{name}::plain_{key}")
        for key, number in (("weight", 1), ("bias", 0))
    ]
    eps = node.attributes["eps"]
    inputs = [value, *plain]
    value = builder.emit("InstanceNormalization", inputs, f"{name}::standardised", epsilon=eps)
    back = builder.constant(np.array([0, *shape], np.int64), f"{name}::shape")
    value = builder.emit("Reshape", [value, back], f"{name}::joined")
    channels = [-1, *[1] * (len(shape) - 1)]
    affine: list[NDArray[np.float32]] = [
        node.tensors[key].reshape(channels) for key in ("weight", "bias")
    ]
    terms = [value, builder.constant(affine[0], f"{name}::weight")]
    value = builder.emit("Mul", terms, f"{name}::scaled")
    builder.emit("Add", [value, builder.constant(affine[1], f"{name}::bias")], name)


def _softmax(builder: Builder, node: Node) -> None:
    builder.emit("Softmax", node.inputs, node.name, axis=-1)


def _log_softmax(builder: Builder, node: Node) -> None:
    builder.emit("LogSoftmax", node.inputs, node.name, axis=-1)


def _sum_of_squares(builder: Builder, x: str, name: str) -> str:
    """Over the last axis."""
    axes = builder.constant(np.array([-1], np.int64), f"{name}::axes")
    squares = builder.emit("Mul", [x, x], f"{name}::squares")
    return builder.emit("ReduceSum", [squares, axes], f"{name}::sum", keepdims=1)


def _l2_normalize(builder: Builder, node: Node) -> None:
    name, x = node.name, node.inputs[0]
    length = builder.emit("Sqrt", [_sum_of_squares(builder, x, name)], f"{name}::length")
    least = builder.scalar(np.float32(node.attributes["eps"]))
    builder.emit("Div", [x, builder.emit("Max", [length, least], f"{name}::bounded")], name)


def _rms_norm(builder: Builder, node: Node) -> None:
    name, x = node.name, node.inputs[0]
    # The mean by a sum: what ReduceMean takes has changed between opsets.
    total = _sum_of_squares(builder, x, name)
    count = builder.scalar(np.float32(builder.shapes[x][-1]))
    mean = builder.emit("Div", [total, count], f"{name}::mean")
    eps = builder.scalar(np.float32(node.attributes["eps"]))
    length = builder.emit("Add", [mean, eps], f"{name}::bounded")
    builder.emit("Div", [x, builder.emit("Sqrt", [length], f"{name}::length")], name)


TOKENS: dict[str, Callable[[Builder, Node], None]] = {
    "matmul": _matmul,
    "constant": _constant,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "l2_normalize": _l2_normalize,
    "rms_norm": _rms_norm,
}
