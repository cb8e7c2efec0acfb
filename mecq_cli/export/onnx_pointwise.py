"""Writes lookups and products of two values as ONNX nodes."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from mecq_cli.export.onnx_builder import Builder
from mecq_cli.integer.ir import Node


def emit_lookup(builder: Builder, node: Node) -> None:
    """One entry of the table for each byte, as GatherElements on a vector.

    Tried on onnxruntime 1.32, a thread: 0.9 ns a value, casts included. Gather, which takes any
    shape, copies every byte by itself and takes 7.8 ns. A Sigmoid and its kin between
    DequantizeLinear and QuantizeLinear are as fast, and a byte that comes near to a half is rounded
    as each runtime's approximation wants.
    """
    name, shape = node.name, builder.shapes[node.name]
    index = builder.emit("Cast", [node.inputs[0]], f"{name}::index", to=TensorProto.INT32)
    vector = builder.constant(np.array([-1], np.int64), "int64::[-1]")
    index = builder.emit("Reshape", [index, vector], f"{name}::vector")
    table = builder.constant(node.tensors["table"], f"{name}::table")
    found = builder.emit("GatherElements", [table, index], f"{name}::found", axis=0)
    size = builder.constant(np.array([-1, *shape], np.int64), f"int64::{[-1, *shape]}")
    builder.emit("Reshape", [found, size], name)


def emit_mul(builder: Builder, node: Node) -> None:
    """Becomes QLinearMul, exact between powers of two as all other ways.

    Where a product may be 2^31 steps and more, that one wraps around, and floats are multiplied.
    """
    if node.grid is None:
        builder.emit("Mul", node.inputs, node.name)
        return
    steps = 1.0 / node.grid.scale
    for grid in (builder.integer_grid(node, index) for index in (0, 1)):
        steps *= grid.scale * grid.reach
    factors = builder.operands(node, fused=steps < 2.0**30)
    builder.quantized(node, builder.emit("Mul", factors, f"{node.name}::product"))
