"""Writes functions of float values as ONNX nodes, of operators that opset 13 has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from mecq_cli.export.onnx_builder import GraphBuilder


def emit_function(
    builder: GraphBuilder, x: str, function: str, parameters: Sequence[float], name: str
) -> str:
    """A function of `mecq_cli.integer.functions`; the last node and its output are ``name``."""
    return _FUNCTIONS[function](builder, x, name, *map(float, parameters))


def _single(op: str) -> Callable[..., str]:
    return lambda builder, x, name: builder.emit(op, [x], name)


def _gated(gate: Callable[..., str]) -> Callable[..., str]:
    """X times a function of x."""
    return lambda builder, x, name: builder.emit(
        "Mul", [x, gate(builder, x, f"{name}::gate")], name
    )


def _hard_sigmoid(builder: GraphBuilder, x: str, name: str) -> str:
    return builder.emit("HardSigmoid", [x], name, alpha=1 / 6, beta=0.5)


def _gelu(builder: GraphBuilder, x: str, name: str) -> str:
    root, one, half = (
        builder.scalar(np.float32(value)) for value in (1 / math.sqrt(2.0), 1.0, 0.5)
    )
    part = builder.emit("Mul", [x, root], f"{name}::scaled")
    part = builder.emit("Erf", [part], f"{name}::erf")
    return _half_of(builder, x, part, one, half, name)


def _gelu_tanh(builder: GraphBuilder, x: str, name: str) -> str:
    numbers = (0.044715, math.sqrt(2.0 / math.pi), 1.0, 0.5)
    cubic, root, one, half = (builder.scalar(np.float32(value)) for value in numbers)
    part = builder.emit("Mul", [x, x], f"{name}::square")
    part = builder.emit("Mul", [part, cubic], f"{name}::scaled")
    part = builder.emit("Add", [part, one], f"{name}::inner")
    part = builder.emit("Mul", [part, x], f"{name}::cubic")
    part = builder.emit("Mul", [part, root], f"{name}::argument")
    part = builder.emit("Tanh", [part], f"{name}::tanh")
    return _half_of(builder, x, part, one, half, name)


def _half_of(builder: GraphBuilder, x: str, part: str, one: str, half: str, name: str) -> str:
    """X (1 + part) / 2."""
    part = builder.emit("Add", [part, one], f"{name}::sum")
    part = builder.emit("Mul", [x, part], f"{name}::product")
    return builder.emit("Mul", [part, half], name)


def _mish_gate(builder: GraphBuilder, x: str, name: str) -> str:
    return builder.emit("Tanh", [builder.emit("Softplus", [x], f"{name}_softplus")], name)


def _clamp(builder: GraphBuilder, x: str, name: str, low: float, high: float) -> str:
    bounds = [builder.scalar(np.float32(bound)) for bound in (low, high)]
    return builder.emit("Clip", [x, *bounds], name)


_FUNCTIONS: dict[str, Callable[..., str]] = {
    "silu": _gated(_single("Sigmoid")),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "sigmoid": _single("Sigmoid"),
    "tanh": _single("Tanh"),
    "hardswish": _gated(_hard_sigmoid),
    "hardsigmoid": _hard_sigmoid,
    "leaky_relu": lambda builder, x, name, slope: builder.emit("LeakyRelu", [x], name, alpha=slope),
    "elu": lambda builder, x, name, alpha: builder.emit("Elu", [x], name, alpha=alpha),
    "softplus": _single("Softplus"),
    "mish": _gated(_mish_gate),
    "clamp": _clamp,
    "negative": _single("Neg"),
    "abs": _single("Abs"),
}
