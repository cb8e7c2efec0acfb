"""Handlers of operations between values, or a value and a constant."""

from __future__ import annotations

from typing import Any

from torch.fx import Node as FxNode

from mecq_cli.capture.activations import noise, stochastic_depth
from mecq_cli.capture.layout import layout
from mecq_cli.capture.names import module_path
from mecq_cli.capture.reader import Reader
from mecq_cli.capture.token_moves import transposed
from mecq_cli.errors import UsageError


def add(reader: Reader, node: FxNode) -> None:
    """The sum of two values, or of a value and a constant."""
    a, b = node.args[0], node.args[1]
    if isinstance(a, FxNode) and a.op == "get_attr" and "num_batches_tracked" in str(a.target):
        return
    _same_rank(reader, node, a, b)
    reader.add(node, "add", [a, b], suffix="add")


def subtract(reader: Reader, node: FxNode) -> None:
    """A sum with a negative; a value less a number."""
    _difference(reader, node, node.args[0], node.args[1])


def subtract_from(reader: Reader, node: FxNode) -> None:
    """The other way round: ``1 - x``."""
    _difference(reader, node, node.args[1], node.args[0])


def _difference(reader: Reader, node: FxNode, a: Any, b: Any) -> None:
    if isinstance(b, (int, float)):
        reader.add(node, "add", [a, -b], suffix="add")
        return
    _same_rank(reader, node, a, b)
    assert isinstance(b, FxNode)
    given = {"name": "negative", "parameters": []}
    reader.add(b, "function", [b], suffix="negative", attributes=given, owner=node)
    reader.add(node, "add", [a, reader.layers[-1].name], suffix="add")


def power(reader: Reader, node: FxNode) -> None:
    """The second or third, as products."""
    value, exponent = node.args[0], reader.argument(node, 1, "exponent", 2)
    if exponent not in (2, 3):
        raise UsageError(
            f"layer {module_path(node)}: a power of {exponent} has no integer form here yet; this "
            "model cannot be quantized"
        )
    factor: Any = value
    if exponent == 3:
        assert isinstance(value, FxNode)
        reader.add(value, "mul", [value, value], suffix="square", owner=node)
        factor = reader.layers[-1].name
    reader.add(node, "mul", [factor, value], suffix="mul")


def multiply(reader: Reader, node: FxNode) -> None:
    """The product of two values, of a value and a constant, or with noise."""
    a, b = node.args[0], node.args[1]
    for value, other in ((a, b), (b, a)):
        if isinstance(other, FxNode) and other in reader.noise:
            assert isinstance(value, FxNode)
            stochastic_depth(reader, node, value, reader.noise[other])
            return
    if reader.is_constant(a) or reader.is_constant(b):
        reader.add(node, "rescale", [a, b], suffix="scale")
        return
    _same_rank(reader, node, a, b)
    reader.add(node, "mul", [a, b], suffix="mul")


def divide(reader: Reader, node: FxNode) -> None:
    """A value divided by a number or by the length of its rows, or noise for stochastic depth."""
    a, b = node.args[0], node.args[1]
    if isinstance(a, FxNode) and a in reader.noise:
        noise(reader, node)
        return
    length = reader.notes.get(b) if isinstance(b, FxNode) else None
    if isinstance(length, dict) and length.get("rows") is a and "eps" in length:
        _normalize(reader, node, length)
    elif isinstance(b, (int, float)) and b and not reader.is_constant(a):
        reader.add(node, "rescale", [a, 1.0 / b], suffix="scale")
    else:
        raise UsageError(f"layer {module_path(node)}: this division has no integer form here yet")


def _normalize(reader: Reader, node: FxNode, length: dict[str, Any]) -> None:
    """A division by the length along an axis: rows, to which the value is turned where need be."""
    value, base = length["rows"], module_path(node)
    place = layout(value)
    axis, shape = place.axis(length["axis"]), place.shape
    order = [*(i + 1 for i in range(len(shape)) if i + 1 != axis), axis]
    turned = transposed(reader, base, reader.source(value), shape, order)
    after = tuple(shape[i - 1] for i in order)
    attributes = {"eps": length["eps"]}
    path = f"{base}.normalize".lstrip(".")
    name = reader.append(path, "l2_normalize", [turned], after, attributes=attributes)
    back = [order.index(i + 1) + 1 for i in range(len(order))]
    reader.alias[node] = transposed(reader, base, name, after, back)


def _same_rank(reader: Reader, node: FxNode, a: Any, b: Any) -> None:
    """Axes of length 1 are repeated; axes that are missing are not made up."""
    if reader.is_constant(a) or reader.is_constant(b):
        return
    shapes = [list(layout(value).shape) for value in (a, b)]
    if len(shapes[0]) != len(shapes[1]):
        raise UsageError(
            f"layer {module_path(node)}: values of different shapes, {shapes[0]} and {shapes[1]}, "
            "have no integer form here yet; this model cannot be quantized"
        )
