"""A float network as an ONNX file: what an integer export is compared with.

It is written from the layers of `mecq_cli.capture`, as quantized networks are, so both files hold
the same operations. Batch norm is folded into the weights, padding into the convolutions;
activations are Relu and Clip nodes, which onnxruntime fuses with the operation before them. The
file is what a deployment without quantization would use, and nothing in it is slower than need be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from mecq_cli.capture import capture
from mecq_cli.errors import ArtifactError
from mecq_cli.export.onnx_builder import LOGITS
from mecq_cli.export.onnx_functions import emit_function
from mecq_cli.integer.geometry import adaptive_places
from mecq_cli.integer.ir import INPUT, Node
from mecq_cli.layers import Layer

OPSET = 21
IR_VERSION = 10

Array = NDArray[Any]


def float_onnx(model: nn.Module, input_shape: tuple[int, int, int]) -> onnx.ModelProto:
    """The network in evaluation mode: input "input" float32 [batch, C, H, W], output "logits".

    Args:
        model: any classifier [N, C, H, W] -> [N, classes].
        input_shape: (C, H, W).

    Raises:
        UsageError: `mecq_cli.capture` cannot read the model.
        ArtifactError: a layer cannot be written.
    """
    layers = capture(model, input_shape)
    writer = _Writer(input_shape)
    for layer in layers:
        emit = _EMITTERS.get(layer.kind)
        if emit is None:
            raise ArtifactError(
                f"the float network cannot be written as ONNX: layer {layer.name} ({layer.kind})"
            )
        emit(writer, layer)
        writer.shapes[layer.name] = layer.shape
    last = layers[-1]
    writer.node("Identity", [writer.values[last.name]], LOGITS)
    graph = helper.make_graph(
        writer.nodes,
        "float",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["batch", *input_shape])],
        [helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", *last.shape])],
        initializer=list(writer.initializers),
    )
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    onnx.checker.check_model(proto, full_check=True)
    return proto


class _Writer:
    """Collects nodes and initializers; ``values`` leads from a layer to its output tensor."""

    def __init__(self, input_shape: Sequence[int]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.values = {INPUT: INPUT}
        self.shapes: dict[str, tuple[int, ...]] = {INPUT: tuple(input_shape)}

    def node(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, array: Array, name: str) -> str:
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    emit = node
    """As the writers of functions call it."""

    def scalar(self, value: np.generic) -> str:
        """Store a number; equal ones share a tensor."""
        name = f"{value.dtype}::{value!s}"
        if name not in {tensor.name for tensor in self.initializers}:
            self.constant(np.asarray(value), name)
        return name

    def layer(
        self, layer: Layer, op: str, constants: Sequence[str] = (), **attributes: Any
    ) -> None:
        """The operation of a layer, and the activation behind it."""
        inputs = [self.values[name] for name in layer.inputs]
        value = self.node(op, [*inputs, *constants], f"{layer.name}::{op}", **attributes)
        if layer.ceiling == math.inf:
            value = self.node("Relu", [value], f"{layer.name}::relu")
        elif layer.ceiling is not None:
            bounds = [
                self.constant(np.array(bound, np.float32), f"{layer.name}::{which}")
                for which, bound in (("low", 0.0), ("high", layer.ceiling))
            ]
            value = self.node("Clip", [value, *bounds], f"{layer.name}::clip")
        self.values[layer.name] = value


def _product(writer: _Writer, layer: Layer) -> None:
    weight, bias = _folded(layer)
    of_tokens = layer.kind == "linear" and len(layer.shape) > 1  # for which Gemm has no form
    stored = np.ascontiguousarray(weight.T) if of_tokens else weight
    constants = [
        writer.constant(stored, f"{layer.name}::weight"),
        writer.constant(bias, f"{layer.name}::bias"),
    ]
    if of_tokens:
        product = f"{layer.name}::product"
        read = [writer.values[layer.inputs[0]], constants[0]]
        writer.values[product] = writer.node("MatMul", read, product)
        writer.layer(replace(layer, inputs=[product]), "Add", constants[1:])
        return
    if layer.kind == "linear":
        writer.layer(layer, "Gemm", constants, transB=1)
        return
    a = layer.attributes
    writer.layer(
        layer,
        "Conv",
        constants,
        kernel_shape=list(weight.shape[2:]),
        strides=a["stride"],
        pads=a["padding"],
        dilations=a["dilation"],
        group=a["groups"],
    )


def _folded(layer: Layer) -> tuple[Array, Array]:
    """Weight and bias as float32, with the batch norm in them."""
    assert isinstance(layer.module, (nn.Conv2d, nn.Linear))
    weight = layer.module.weight.detach().double().cpu()
    bias = torch.zeros(len(weight), dtype=torch.float64)
    if layer.module.bias is not None:
        bias = layer.module.bias.detach().double().cpu()
    norm = layer.norm
    if norm is not None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        variance, mean = norm.running_var.double().cpu(), norm.running_mean.double().cpu()
        factor = norm.weight.detach().double().cpu() / torch.sqrt(variance + norm.eps)
        weight = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
        bias = norm.bias.detach().double().cpu() + (bias - mean) * factor
    return weight.float().numpy(), bias.float().numpy()


def _max_pool2d(writer: _Writer, layer: Layer) -> None:
    writer.layer(layer, "MaxPool", dilations=layer.attributes["dilation"], **_window(layer))


def _avg_pool2d(writer: _Writer, layer: Layer) -> None:
    include = int(layer.attributes["count_include_pad"])
    writer.layer(layer, "AveragePool", count_include_pad=include, **_window(layer))


def _window(layer: Layer) -> dict[str, Any]:
    a = layer.attributes
    return {
        "kernel_shape": a["kernel"],
        "strides": a["stride"],
        "pads": a["padding"] * 2,
        "ceil_mode": int(a["ceil_mode"]),
    }


def _slice(writer: _Writer, layer: Layer) -> None:
    vectors = [
        writer.constant(np.array(layer.attributes[key], np.int64), f"{layer.name}::{key}")
        for key in ("starts", "ends", "axes", "steps")
    ]
    writer.layer(layer, "Slice", vectors)


def _pad(writer: _Writer, layer: Layer) -> None:
    widths = [0, *layer.attributes["before"], 0, *layer.attributes["after"]]
    writer.layer(layer, "Pad", [writer.constant(np.array(widths, np.int64), f"{layer.name}::pads")])


def _function(writer: _Writer, layer: Layer) -> None:
    a, source = layer.attributes, writer.values[layer.inputs[0]]
    value = emit_function(writer, source, a["name"], a["parameters"], f"{layer.name}::function")
    writer.values[layer.name] = value


def _reshape(writer: _Writer, layer: Layer) -> None:
    shape = np.array([-1, *layer.attributes["shape"]], np.int64)  # -1: the batch
    writer.layer(layer, "Reshape", [writer.constant(shape, f"{layer.name}::shape")])


def _transpose(writer: _Writer, layer: Layer) -> None:
    writer.layer(layer, "Transpose", perm=[0, *layer.attributes["axes"]])


def _upsample(writer: _Writer, layer: Layer) -> None:
    """By places, a whole one for each."""
    size, before = layer.attributes["size"], writer.shapes[layer.inputs[0]]
    value = writer.values[layer.inputs[0]]
    for axis, (n, m) in enumerate(zip(before[1:], size, strict=True), 2):
        places = np.array([i * n // m for i in range(m)], np.int64)
        stored = writer.constant(places, f"{layer.name}::places_{axis}")
        value = writer.node("Gather", [value, stored], f"{layer.name}::axis_{axis}", axis=axis)
    writer.values[layer.name] = value


def _resize(writer: _Writer, layer: Layer) -> None:
    sizes = writer.constant(np.array(layer.attributes["size"], np.int64), f"{layer.name}::sizes")
    corners = layer.attributes["align_corners"]
    writer.layer(
        layer,
        "Resize",
        ["", "", sizes],
        mode="linear",
        coordinate_transformation_mode="align_corners" if corners else "half_pixel",
        axes=[2, 3],
    )


def _adaptive_avg_pool2d(writer: _Writer, layer: Layer) -> None:
    """Products with matrices of zeros and ones, and a division."""
    node = Node(layer.name, layer.kind, (), None, layer.attributes)
    rows, columns, counts = adaptive_places(node, writer.shapes[layer.inputs[0]])
    stored = [
        writer.constant(array, f"{layer.name}::{name}")
        for name, array in (("rows", rows), ("columns", columns.T.copy()), ("counts", counts))
    ]
    value = writer.values[layer.inputs[0]]
    value = writer.node("MatMul", [stored[0], value], f"{layer.name}::tall")
    value = writer.node("MatMul", [value, stored[1]], f"{layer.name}::sum")
    writer.values[layer.name] = writer.node("Div", [value, stored[2]], f"{layer.name}::mean")


def _relu(writer: _Writer, layer: Layer) -> None:
    writer.layer(layer, "Identity")


def _dropout(writer: _Writer, layer: Layer) -> None:
    writer.values[layer.name] = writer.values[layer.inputs[0]]


_EMITTERS: dict[str, Callable[[_Writer, Layer], None]] = {
    "conv2d": _product,
    "linear": _product,
    "affine": _product,
    "function": _function,
    "relu": _relu,
    "mul": lambda writer, layer: writer.layer(layer, "Mul"),
    "reshape": _reshape,
    "transpose": _transpose,
    "upsample": _upsample,
    "resize": _resize,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "add": lambda writer, layer: writer.layer(layer, "Add"),
    "concat": lambda writer, layer: writer.layer(layer, "Concat", axis=1),
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
    "global_avg_pool": lambda writer, layer: writer.layer(layer, "GlobalAveragePool"),
    "flatten": lambda writer, layer: writer.layer(layer, "Flatten", axis=1),
    "slice": _slice,
    "pad": _pad,
    "dropout": _dropout,
}
