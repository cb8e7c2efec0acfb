"""Check an integer model before anything runs it: what ir.py says in words, as code.

A model that passes has known operations in a possible order, shapes that fit each other and a
bounded size, and numbers from which no runner gets NaN or an overflow of its accumulator.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecq_cli.errors import ArtifactError
from mecq_cli.integer.ir import INPUT, MID_RISE_BITS, MOVES, Grid, IntegerModel, Node
from mecq_cli.integer.operations import MOST_ELEMENTS, RULES, Kind, Rule, Value

_MAX_DIMS = 7
"""Of a tensor."""
_LARGEST = 2.0**100
"""Of a scale or its inverse, so that float32 sums of what is scaled stay finite."""
_LARGEST_FACTOR = 2.0**90
"""Of what sums of integers, which are below 2^31, are multiplied by."""
_KINDS = {
    "grid": "integers on a grid",
    "float": "float",
    "any": "all float or all integers on a grid",
}
_COORDINATES = 4
"""Numbers that move an anchor, behind its logits."""
_SUMS = {
    "conv2d", "linear", "matmul", "avg_pool2d", "global_avg_pool", "adaptive_avg_pool2d"
}  # fmt: skip
_TENSORS = {"weight", "weight_scale", "bias"}


def validate(model: IntegerModel) -> None:
    """Check a whole model.

    Raises:
        ArtifactError: the first node (or field of the model) that is wrong, and why.
    """
    shape = model.input_shape
    if not _are_ints(shape, 3, 1, MOST_ELEMENTS) or math.prod(shape) > MOST_ELEMENTS:
        raise ArtifactError(f"input_shape {_short(shape)} is not (channels, height, width)")
    if not model.nodes:
        raise ArtifactError("the model has no nodes")
    values = {INPUT: Value(tuple(shape), None)}
    for node in model.nodes:
        try:
            values[node.name] = _check_node(node, values)
        except ValueError as reason:
            where = f"node {_short(node.name)} ({_short(node.op)})"
            raise ArtifactError(f"{where}: {reason}") from reason
    logits = values[model.output.name]
    boxes = _COORDINATES if len(logits.shape) == 2 else 0
    if len(logits.shape) > 3 or logits.shape[0] <= boxes:
        raise ArtifactError(
            "the last node must yield logits [N, classes] or [N, classes, H, W], or those of "
            f"anchors [N, classes + 4, anchors], not {logits}"
        )
    classes = model.metadata.get("classes")
    if classes is not None and not (
        isinstance(classes, list | tuple)
        and len(classes) == logits.shape[0] - boxes
        and all(isinstance(name, str) for name in classes)
    ):
        raise ArtifactError(
            f"the metadata must name {logits.shape[0] - boxes} classes, one for each logit"
        )


def _check_node(node: Node, values: Mapping[str, Value]) -> Value:
    _check_name(node.name, values)
    rule = RULES.get(node.op)
    if rule is None:
        raise ValueError(f"unknown operation; known are {', '.join(RULES)}")
    missing = [name for name in node.inputs if name not in values]
    if missing:
        raise ValueError(f"input {_short(missing[0])} is not an earlier node")
    inputs = [values[name] for name in node.inputs]
    if not inputs or (rule.inputs is not None and len(inputs) != rule.inputs):
        raise ValueError(f"{len(inputs)} inputs are given, it takes {rule.inputs or 'some'}")
    if node.grid is not None:
        _check_grid(node.grid)
    _check_spacing(node, inputs)
    _check_kinds(rule, [value.grid is None for value in inputs], node.grid is None)
    _check_attributes(node.attributes, rule.attributes)
    if rule.weight_dims is not None:
        _check_weights(node, inputs[0], rule.weight_dims)
    elif node.weight_bits is not None or node.mid_rise:
        raise ValueError("this operation has no weights")
    else:
        _check_tensors(node, rule.tensors)
    _check_factors(node, inputs)
    shape = rule.shape(node, inputs)
    if min(shape) < 1 or math.prod(shape) > MOST_ELEMENTS:
        raise ValueError(f"its output would have the shape {_short(shape)}")
    return Value(shape, node.grid)


def _check_name(name: Any, values: Mapping[str, Value]) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= 256 or not name.isprintable():
        raise ValueError("a name has 1 to 256 printable characters")
    if "::" in name:
        raise ValueError("two colons are for the names that an ONNX file adds")
    if name in values:
        raise ValueError("the name is used twice")


def _check_grid(grid: Grid) -> None:
    numbers = (grid.bits, grid.zero_point, grid.qmin, grid.qmax, grid.spacing)
    if not _are_ints(numbers, 5, 0, 255):
        raise ValueError("bits, zero_point, qmin, qmax and spacing are integers from 0 to 255")
    if grid.spacing not in (1, 2):
        raise ValueError(f"the spacing is {grid.spacing}, not 1 or 2")
    top = grid.spacing * (2**grid.bits - 1)
    if not 1 <= grid.bits <= 8 or not grid.qmin <= grid.qmax <= top:
        raise ValueError(
            f"{grid.bits} bits and the range [{grid.qmin}, {grid.qmax}] do not go together"
        )
    if grid.spacing == 2 and not (grid.zero_point % 2 and 0 < grid.zero_point < top):
        raise ValueError(f"the grid is one without zero, whose zero point {grid.zero_point} is not")
    scale: Any = grid.scale
    if not isinstance(scale, float) or not 1 / _LARGEST <= scale <= _LARGEST:
        raise ValueError(f"the scale {_short(scale)} is not a positive float of usual size")
    if float(np.float32(scale)) != scale:
        raise ValueError(f"the scale {scale!r} is not a float32 number; round it before")


def _check_spacing(node: Node, inputs: Sequence[Value]) -> None:
    """Only a threshold makes every second integer, and what moves integers keeps them so."""
    if node.grid is None or node.grid.spacing == 1 or node.op == "threshold":
        return
    if node.op not in MOVES or any(value.grid != node.grid for value in inputs):
        raise ValueError("a grid without zero is made by a threshold")


def _check_kinds(rule: Rule, inputs_float: list[bool], output_float: bool) -> None:
    if len({*inputs_float}) > 1 or rule.reads == ("grid" if inputs_float[0] else "float"):
        raise ValueError(f"its inputs must be {_KINDS[rule.reads]}")
    yields = rule.yields
    if yields == "same" or (yields == "any" and inputs_float[0]):
        yields = "float" if inputs_float[0] else "grid"
    if yields == ("grid" if output_float else "float"):
        raise ValueError(f"its output must be {_KINDS[yields]}")


def _check_attributes(given: Mapping[str, Any], wanted: Mapping[str, Kind]) -> None:
    if given.keys() != wanted.keys():
        raise ValueError(f"the attributes must be: {', '.join(wanted) or 'none'}")
    for name, kind in wanted.items():
        if not _is_kind(given[name], kind):
            raise ValueError(f"{name} cannot be {_short(given[name])}")


def _is_kind(value: Any, kind: Kind) -> bool:
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "name":
        return isinstance(value, str)
    if kind == "numbers":
        return isinstance(value, tuple | list) and all(_is_kind(v, "number") for v in value)
    if isinstance(kind, str):
        if value is None:
            return kind == "number or None"
        return type(value) in (int, float) and -_LARGEST <= value <= _LARGEST
    if kind.count == 1:
        value = (value,)
    counts = range(1, kind.most + 1) if kind.count is None else (kind.count,)
    return any(_are_ints(value, count, kind.low, kind.high) for count in counts)


def _are_ints(values: Any, count: int, low: int, high: int) -> bool:
    return (
        isinstance(values, tuple | list)
        and len(values) == count
        and all(type(v) is int and low <= v <= high for v in values)
    )


def _check_weights(node: Node, value: Value, dims: int) -> None:
    """Types, shapes and ranges of the tensors of a conv2d or linear node."""
    bits = node.weight_bits
    if bits is None or type(bits) is not int or not (1 <= bits <= 8 or bits == 32):
        raise ValueError(f"weight_bits are 1 to 8 or 32, not {_short(bits)}")
    if node.mid_rise and bits not in MID_RISE_BITS:
        raise ValueError(f"mid_rise is for weights of 2 to 6 bits, not {bits}")
    if node.tensors.keys() != _TENSORS:
        raise ValueError(f"the tensors must be: {', '.join(sorted(_TENSORS))}")
    if value.grid is not None and bits == 32:
        raise ValueError("float weights need a float input; dequantize it in a node of its own")
    weight, scale, bias = (node.tensors[name] for name in ("weight", "weight_scale", "bias"))
    if weight.ndim != dims or 0 in weight.shape:
        raise ValueError(f"a weight of shape {_short(weight.shape)} is of no use here")
    if scale.shape != weight.shape[:1] or bias.shape != weight.shape[:1]:
        raise ValueError("weight_scale and bias have one value for each output channel")
    types = [str(array.dtype) for array in (weight, scale, bias)]
    wanted = [
        "float32" if bits == 32 else "int8",
        "float32",
        "float32" if value.grid is None else "int32",
    ]
    if types != wanted:
        raise ValueError(f"weight, weight_scale and bias must be {wanted}, not {types}")
    if not np.isfinite(scale).all() or not scale.all() or np.abs(scale).max() > _LARGEST:
        raise ValueError("a weight_scale is zero, not finite or of unusual size")
    if bits < 32:
        _check_range(weight, bits, node.mid_rise)
    rows = np.abs(weight.reshape(len(weight), -1).astype(np.float64))
    if value.grid is None:
        _check_floats(rows * np.abs(scale[:, None].astype(np.float64)), bias)
    else:
        _check_accumulator(rows * node.multiplier, bias, value.grid)


def _check_factors(node: Node, inputs: Sequence[Value]) -> None:
    """What sums of integers are multiplied by is finite, and every step on the way there."""
    grids = [value.grid for value in inputs if value.grid is not None]
    if node.op not in _SUMS or not grids:
        return
    factors = [grids[0].scale]
    if "weight_scale" in node.tensors:
        factors.append(factors[-1] * float(np.abs(node.tensors["weight_scale"]).max()))
    if node.op == "matmul":
        factors.append(factors[-1] * abs(float(node.attributes["factor"])))
        factors.append(factors[-1] * grids[1].scale)
    if node.grid is not None:
        factors.append(factors[-1] / node.grid.scale)
    if max(factors) > _LARGEST_FACTOR:
        raise ValueError("its scales make a factor of unusual size")


def _check_tensors(node: Node, names: tuple[str, ...]) -> None:
    """Of an operation without weights."""
    if node.tensors.keys() != {*names}:
        raise ValueError(f"its tensors must be: {', '.join(names) or 'none'}")
    if node.op == "lookup":
        return  # its rule checks the table
    for name, array in node.tensors.items():
        if str(array.dtype) != "float32" or not 0 < array.ndim <= _MAX_DIMS or 0 in array.shape:
            raise ValueError(f"{name} is not a float32 tensor of usual shape")
        if not (np.abs(array) <= _LARGEST).all():  # so that NaN is refused too
            raise ValueError(f"{name} holds what is not finite or of unusual size")


def _check_range(weight: NDArray[np.int8], bits: int, mid_rise: bool) -> None:
    odd = mid_rise or bits == 1
    low, high = (1 - 2**bits, 2**bits - 1) if odd else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    if weight.min() < low or weight.max() > high or (odd and not (weight % 2).all()):
        allowed = f"odd, from {low} to {high}" if mid_rise else f"{low} to {high}"
        allowed = "-1 and +1" if bits == 1 else allowed
        raise ValueError(f"weights of {bits} bits are {allowed}, others were found")


def _check_floats(weight: NDArray[np.float64], bias: NDArray[np.float32]) -> None:
    # Written so that NaN, which compares as false, is refused too.
    if not ((weight <= _LARGEST).all() and (np.abs(bias) <= _LARGEST).all()):
        raise ValueError("a weight or a bias is not finite or of unusual size")


def _check_accumulator(rows: NDArray[np.float64], bias: NDArray[np.int32], grid: Grid) -> None:
    """The sum of the worst input must fit int32, or runners would wrap around."""
    worst = rows.sum(1) * grid.reach + np.abs(bias.astype(np.float64))
    if worst.max() >= 2**31:
        raise ValueError(f"output channel {int(worst.argmax())} may overflow its int32 sum")


def _short(value: Any) -> str:
    """A value from a file, safe to show in one line."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
