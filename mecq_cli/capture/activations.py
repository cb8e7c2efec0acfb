"""Handlers of activation functions and dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import Node as FxNode

from mecq_cli.capture.names import module_path
from mecq_cli.capture.reader import Reader
from mecq_cli.capture.tokens import bounded_norm
from mecq_cli.errors import UsageError

aten = torch.ops.aten

CLAMPS = (
    aten.hardtanh.default,
    aten.hardtanh_.default,
    aten.clamp.default,
    aten.clamp_.default,
    aten.clamp_min.default,
    aten.clamp_min_.default,
)

PLAIN: dict[Any, str] = {
    aten.silu.default: "silu",
    aten.silu_.default: "silu",
    aten.sigmoid.default: "sigmoid",
    aten.sigmoid_.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.tanh_.default: "tanh",
    aten.hardswish.default: "hardswish",
    aten.hardswish_.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.hardsigmoid_.default: "hardsigmoid",
    aten.mish.default: "mish",
    aten.mish_.default: "mish",
    aten.neg.default: "negative",
    aten.neg_.default: "negative",
    aten.abs.default: "abs",
    aten.abs_.default: "abs",
}
"""Operations without any setting, by the name of their function."""


def activation(reader: Reader, node: FxNode) -> None:
    """ReLU and clamps, of which ReLU6 is one."""
    if node.args[0] in reader.notes:
        bounded_norm(reader, node)
        return
    ceiling = float("inf")
    if node.target in CLAMPS:
        hard = node.target in (aten.hardtanh.default, aten.hardtanh_.default)
        low = reader.argument(node, 1, "min_val", reader.argument(node, 1, "min"))
        high = reader.argument(node, 2, "max_val", reader.argument(node, 2, "max"))
        low, high = (
            (-1.0 if hard and low is None else low),
            (1.0 if hard and high is None else high),
        )
        if not all(bound is None or isinstance(bound, (int, float)) for bound in (low, high)):
            raise UsageError(f"layer {module_path(node)}: a clamp to bounds that are computed")
        if low is None or float(low) != 0.0:
            bounds = [-LARGEST if low is None else float(low)]
            bounds += [LARGEST if high is None else float(high)]
            _function(reader, node, "clamp", bounds)
            return
        ceiling = float("inf") if high is None else float(high)
    reader.add(node, "relu", [node.args[0]], suffix="", ceiling=ceiling)


LARGEST = 1e30
"""In place of a bound that is missing."""


def plain(reader: Reader, node: FxNode) -> None:
    """A function without settings."""
    _function(reader, node, PLAIN[node.target], [])


def gelu(reader: Reader, node: FxNode) -> None:
    """Both forms."""
    approximate = node.kwargs.get("approximate", reader.argument(node, 1, "approximate", "none"))
    _function(reader, node, "gelu_tanh" if approximate == "tanh" else "gelu", [])


def leaky_relu(reader: Reader, node: FxNode) -> None:
    """With its slope."""
    slope = reader.argument(node, 1, "negative_slope", 0.01)
    _function(reader, node, "leaky_relu", [float(slope)])


def elu(reader: Reader, node: FxNode) -> None:
    """ELU; one whose input is scaled is refused."""
    alpha = float(reader.argument(node, 1, "alpha", 1.0))
    scales = (reader.argument(node, 2, "scale", 1), reader.argument(node, 3, "input_scale", 1))
    if any(float(scale) != 1.0 for scale in scales):
        raise UsageError(f"layer {module_path(node)}: an ELU with scales has no integer form here")
    _function(reader, node, "elu", [alpha])


def softplus(reader: Reader, node: FxNode) -> None:
    """Softplus; beyond its threshold it is the identity, and differs from it by nothing there.

    By less than 1e-6 from 14 on.
    """
    if float(reader.argument(node, 2, "threshold", 20.0)) < 14.0:
        raise UsageError(
            f"layer {module_path(node)}: a softplus with so low a threshold has no integer form"
        )
    if float(reader.argument(node, 1, "beta", 1.0)) != 1.0:
        raise UsageError(f"layer {module_path(node)}: a softplus with a beta has no integer form")
    _function(reader, node, "softplus", [])


def prelu(reader: Reader, node: FxNode) -> None:
    """With one slope for all channels, which stays as it is."""
    slope = reader.parameter(node.args[1])
    assert slope is not None
    _function(reader, node, "leaky_relu", [float(slope[1].detach())])


def _function(reader: Reader, node: FxNode, name: str, parameters: list[float]) -> None:
    given = {"name": name, "parameters": parameters}
    reader.add(node, "function", [node.args[0]], attributes=given)


def dropout(reader: Reader, node: FxNode) -> None:
    """Dropout of values or whole channels; nothing at all where it drops nothing."""
    p = float(node.args[1])  # type: ignore[arg-type]
    if p == 0.0:
        reader.alias[node] = reader.source(node.args[0])
        return
    channels = {"axes": 2} if "feature" in str(node.target) else {}
    if channels:
        reader.require_plain(node, node.args[0])
    reader.add(node, "dropout", [node.args[0]], module=nn.Dropout(p), attributes=channels)


def noise(reader: Reader, node: FxNode) -> None:
    """Zeros and ones for stochastic depth: an empty tensor, drawn, and divided by their share."""
    source = node.args[0]
    drawn = str(node.target).startswith("aten.bernoulli")
    share = float(reader.argument(node, 1, "p", 0.5)) if drawn else 1.0
    shape = node.meta["val"].shape
    if drawn and (not isinstance(shape[0], torch.SymInt) or any(size != 1 for size in shape[1:])):
        raise UsageError(
            f"layer {module_path(node) or '(root)'}: noise of shape {[str(s) for s in shape]} has "
            "no integer form; one draw for each image does (stochastic depth), and dropout"
        )
    if not drawn and isinstance(source, FxNode):
        share = reader.noise.get(source, 1.0)
    reader.noise[node] = share


def stochastic_depth(reader: Reader, node: FxNode, value: FxNode, share: float) -> None:
    """A value times such noise."""
    whole = {"axes": 1}
    module = nn.Dropout(1.0 - share)
    reader.add(node, "dropout", [value], suffix="drop", module=module, attributes=whole)
