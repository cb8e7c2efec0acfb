"""What onnxruntime made of a graph: which nodes of it compute with floats."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

PRODUCTS = frozenset(
    {
        *("Conv", "FusedConv", "ConvInteger", "QLinearConv"),
        *("Gemm", "FusedGemm", "QGemm", "MatMul", "FusedMatMul", "MatMulInteger", "QLinearMatMul"),
    }
)
"""Convolutions and linear layers, by what onnxruntime's optimizer calls them."""

_QGEMM_WITH_GRID = 9
"""Inputs of a QGemm whose output is on a grid; with fewer it is float."""


def float_nodes(graph: onnx.GraphProto) -> list[tuple[str, str]]:
    """(output, type) of the nodes between the first and the last layer whose output is float.

    A DequantizeLinear that only a QuantizeLinear reads is one half of a requantization, and not
    counted.

    Args:
        graph: an optimized graph, its nodes in the order of execution; see `OrtRunner.optimized`.
    """
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    types |= {value.name: value.type.tensor_type.elem_type for value in graph.input}
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        types |= dict.fromkeys(node.output, _output_type(node, types))
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    layers = [index for index, node in enumerate(graph.node) if node.op_type in PRODUCTS]
    inner = graph.node[layers[0] + 1 : layers[-1]] if layers else []
    return [
        (node.output[0], node.op_type)
        for node in inner
        if types[node.output[0]] == TensorProto.FLOAT
        and not (
            node.op_type == "DequantizeLinear" and readers[node.output[0]] == {"QuantizeLinear"}
        )
    ]


def _output_type(node: onnx.NodeProto, types: dict[str, int]) -> int:
    """Type of a node's output: optimized graphs do not say it. Most keep that of their input."""
    op = node.op_type
    if op == "QGemm":
        return TensorProto.UINT8 if len(node.input) >= _QGEMM_WITH_GRID else TensorProto.FLOAT
    if op.startswith("QLinear") or op == "QuantizeLinear":
        return TensorProto.UINT8
    if op in ("ConvInteger", "MatMulInteger"):
        return TensorProto.INT32
    if op == "DequantizeLinear":
        return TensorProto.FLOAT
    if op == "Cast":
        return next(int(helper.get_attribute_value(a)) for a in node.attribute if a.name == "to")
    return types.get(node.input[0], TensorProto.FLOAT) if node.input else TensorProto.FLOAT
