"""Handlers of operations between values, or a value and a constant."""

from __future__ import annotations

from typing import Any

from torch.fx import Node as FxNode

from mecq_cli.capture.activations import noise, stochastic_depth
from mecq_cli.capture.affine import scaled
from mecq_cli.capture.reader import Reader, module_path
from mecq_cli.errors import UsageError


def add(reader: Reader, node: FxNode) -> None:
    """The sum of two values, or of a value and a constant of each channel."""
    a, b = node.args[0], node.args[1]
    if isinstance(a, FxNode) and a.op == "get_attr" and "num_batches_tracked" in str(a.target):
        return
    if node.kwargs.get("alpha", 1) != 1:
        raise UsageError(f"layer {module_path(node)}: an add with a factor has no integer form yet")
    value, other = _value_first(reader, node, a, b)
    if isinstance(other, FxNode) and other in reader.alias:
        _same_rank(node, value, other)
        reader.add(node, "add", [a, b], suffix="add")
    else:
        scaled(reader, node, value, None, other)


def subtract(reader: Reader, node: FxNode) -> None:
    """A sum with a negative; a value less a number."""
    a, b = node.args[0], node.args[1]
    if node.kwargs.get("alpha", 1) != 1 or not isinstance(a, FxNode) or a not in reader.alias:
        raise UsageError(f"layer {module_path(node)}: this subtraction has no integer form yet")
    if isinstance(b, (int, float)):
        scaled(reader, node, a, None, -b)
        return
    if not isinstance(b, FxNode) or b not in reader.alias:
        raise UsageError(f"layer {module_path(node)}: subtracting a weight has no integer form yet")
    _same_rank(node, a, b)
    given = {"name": "negative", "parameters": []}
    reader.add(b, "function", [b], suffix="negative", attributes=given, owner=node)
    reader.add(node, "add", [a, reader.layers[-1].name], suffix="add")


def multiply(reader: Reader, node: FxNode) -> None:
    """The product of two values, of a value and a constant of each channel, or with noise."""
    a, b = node.args[0], node.args[1]
    for value, other in ((a, b), (b, a)):
        if isinstance(other, FxNode) and other in reader.noise:
            assert isinstance(value, FxNode)
            stochastic_depth(reader, node, value, reader.noise[other])
            return
    value, other = _value_first(reader, node, a, b)
    if isinstance(other, FxNode) and other in reader.alias:
        _same_rank(node, value, other)
        reader.add(node, "mul", [a, b], suffix="mul")
    else:
        scaled(reader, node, value, other, None)


def divide(reader: Reader, node: FxNode) -> None:
    """A value divided by a number, or noise for stochastic depth."""
    a, b = node.args[0], node.args[1]
    if isinstance(a, FxNode) and a in reader.noise:
        noise(reader, node)
        return
    if not isinstance(a, FxNode) or a not in reader.alias or not isinstance(b, (int, float)):
        raise UsageError(f"layer {module_path(node)}: this division has no integer form here yet")
    scaled(reader, node, a, 1.0 / b, None)


def _value_first(reader: Reader, node: FxNode, a: Any, b: Any) -> tuple[FxNode, Any]:
    for value, other in ((a, b), (b, a)):
        if isinstance(value, FxNode) and value in reader.alias:
            return value, other
    raise UsageError(
        f"layer {module_path(node)}: a weight is computed from other weights (weight "
        "standardisation or sharing); this model cannot be quantized"
    )


def _same_rank(node: FxNode, a: FxNode, b: FxNode) -> None:
    """Axes of length 1 are repeated; axes that are missing are not made up."""
    shapes = [list(value.meta["val"].shape[1:]) for value in (a, b)]
    if len(shapes[0]) != len(shapes[1]):
        raise UsageError(
            f"layer {module_path(node)}: values of different shapes, {shapes[0]} and {shapes[1]}, "
            "have no integer form here yet; this model cannot be quantized"
        )
