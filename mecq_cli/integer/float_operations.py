"""Operations that stay in float, in NumPy, for `mecq_cli.integer.reference`.

Means and variances are computed in float64, so that the float32 sums of every runtime come near.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecq_cli.integer.ir import Node
from mecq_cli.integer.resizing import resize

Array = NDArray[Any]


def _constant(node: Node, inputs: Sequence[Array]) -> Array:
    value = node.tensors["value"]
    return np.ascontiguousarray(np.broadcast_to(value, (len(inputs[0]), *value.shape)))


def _layer_norm(node: Node, inputs: Sequence[Array]) -> Array:
    normalised = _standardised(inputs[0], node.attributes["eps"])
    scaled: Array = normalised * node.tensors["weight"] + node.tensors["bias"]
    return scaled


def _group_norm(node: Node, inputs: Sequence[Array]) -> Array:
    x = inputs[0]
    rows = x.reshape(len(x), node.attributes["groups"], -1)
    normalised = _standardised(rows, node.attributes["eps"]).reshape(x.shape)
    shape = (-1, *[1] * (x.ndim - 2))
    weight, bias = (node.tensors[name].reshape(shape) for name in ("weight", "bias"))
    scaled: Array = normalised * weight + bias
    return scaled


def _standardised(x: Array, eps: float) -> Array:
    """Over the last axis."""
    wide = x.astype(np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = np.square(centred).mean(-1, keepdims=True)
    standardised: Array = (centred / np.sqrt(variance + eps)).astype(np.float32)
    return standardised


def _softmax(node: Node, inputs: Sequence[Array]) -> Array:
    powers = np.exp(inputs[0] - inputs[0].max(-1, keepdims=True))
    shares: Array = powers / powers.sum(-1, keepdims=True)
    return shares


def _log_softmax(node: Node, inputs: Sequence[Array]) -> Array:
    below = inputs[0] - inputs[0].max(-1, keepdims=True)
    logarithms: Array = below - np.log(np.exp(below).sum(-1, keepdims=True))
    return logarithms


def _l2_normalize(node: Node, inputs: Sequence[Array]) -> Array:
    length = np.sqrt(np.square(inputs[0]).sum(-1, keepdims=True))
    unit: Array = inputs[0] / np.maximum(length, np.float32(node.attributes["eps"]))
    return unit


def _rms_norm(node: Node, inputs: Sequence[Array]) -> Array:
    wide = inputs[0].astype(np.float64)
    mean = np.square(wide).mean(-1, keepdims=True)
    normal: Array = (wide / np.sqrt(mean + node.attributes["eps"])).astype(np.float32)
    return normal


def _resize(node: Node, inputs: Sequence[Array]) -> Array:
    return resize(node, inputs[0])


FLOAT_OPERATIONS: Mapping[str, Callable[[Node, Sequence[Array]], Array]] = {
    "constant": _constant,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "l2_normalize": _l2_normalize,
    "rms_norm": _rms_norm,
    "resize": _resize,
}
"""By name; inputs and output are float32 and have the batch axis."""
