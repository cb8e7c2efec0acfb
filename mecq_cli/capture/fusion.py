"""What is folded into what.

Padding goes into the convolution behind it, batch norm and ReLU into the layer before them: what
is left are operations that have an integer form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

from torch import nn

from mecq_cli.capture.affine import AFFINE_BITS, lone_batch_norm
from mecq_cli.layers import Layer

CLIPPING = ("conv2d", "linear", "affine", "add", "mul")
"""Kinds of layers whose grid can begin at zero because of a ReLU behind them."""


def fuse(layers: list[Layer]) -> list[Layer]:
    """Fold padding into the conv behind it, batch norm and ReLU into the layer before them.

    A batch norm that cannot be folded becomes an affine layer, a ReLU stays a layer of its own.
    """
    by_name = {layer.name: layer for layer in layers}
    users: dict[str, list[Layer]] = {layer.name: [] for layer in layers}
    for layer in layers:
        for name in layer.inputs:
            users.setdefault(name, []).append(layer)
    gone: dict[str, str] = {}
    kept: list[Layer] = []
    for layer in layers:
        layer.inputs = [gone.get(name, name) for name in layer.inputs]
        source = by_name.get(layer.inputs[0])
        if layer.kind == "conv2d" and source is not None and _spatial_pad(source, users):
            b, a = source.attributes["before"], source.attributes["after"]
            extra = [b[1], b[2], a[1], a[2]]
            layer.attributes["padding"] = [
                p + e for p, e in zip(layer.attributes["padding"], extra, strict=True)
            ]
            layer.inputs = list(source.inputs)
            kept.remove(source)
        if source is not None and _folded(layer, source, users):
            gone[layer.name] = source.name
            users[source.name] = users[layer.name]
        elif layer.kind == "batch_norm":
            made = lone_batch_norm(layer)
            kept += made
            by_name |= {new.name: new for new in made}
            users |= {new.name: [user] for new, user in pairwise(made)}
        else:
            kept.append(layer)
    return kept


def _spatial_pad(source: Layer, users: dict[str, list[Layer]]) -> bool:
    a = source.attributes
    return (
        source.kind == "pad"
        and len(users[source.name]) == 1
        and a["before"][0] == a["after"][0] == 0
        and min(a["before"] + a["after"]) >= 0
    )


def _folded(layer: Layer, source: Layer, users: Mapping[str, list[Layer]]) -> bool:
    """Make ``source`` do what ``layer`` does, where it can."""
    if len(users[source.name]) != 1:
        return False
    if layer.kind == "batch_norm":
        if source.kind not in ("conv2d", "linear") or source.norm or source.ceiling is not None:
            return False
        if source.gain is not None:
            return False
        assert isinstance(layer.module, (nn.BatchNorm2d, nn.BatchNorm1d))
        source.norm = layer.module
        return True
    if layer.kind == "affine":
        return _joined(layer, source)
    if layer.kind != "relu" or source.kind not in CLIPPING:
        return False
    assert layer.ceiling is not None
    source.ceiling = min(layer.ceiling, math.inf if source.ceiling is None else source.ceiling)
    return True


def _joined(layer: Layer, source: Layer) -> bool:
    """A factor and a summand, each of a channel, as one layer."""
    if source.kind != "affine" or source.norm or source.ceiling is not None:
        return False
    first, second = source.module, layer.module
    assert isinstance(first, nn.Conv2d)
    assert isinstance(second, nn.Conv2d)
    if first.bias is not None or second.bias is None or second.weight.requires_grad:
        return False
    first.bias = second.bias
    source.attributes = {**source.attributes, "wbits": AFFINE_BITS}
    return True
