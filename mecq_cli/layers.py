"""The layers of a captured network, and what is folded into what.

Padding goes into the convolution behind it, batch norm and ReLU into the layer before them: what
is left are operations that have an integer form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mecq_cli.errors import UsageError


@dataclass
class Layer:
    """One float operation of the network.

    Attributes:
        name: module path, made unique; for an add or concat the path of its block plus the kind.
        kind: conv2d, linear, add, concat, max_pool2d, avg_pool2d, global_avg_pool, flatten,
            slice, pad, batch_norm, relu, dropout, reshape, transpose, roll, matmul, mul, rescale (a
            product with a constant), constant,
            layer_norm, group_norm, softmax, l2_normalize.
        inputs: names of other layers or INPUT.
        attributes: as in integer/ir.py.
        module: nn.Conv2d, nn.Linear, nn.Dropout or a norm holding the parameters; of a constant,
            what computes it.
        shape: of the output without the batch, (C, H, W), (K,) or tokens (..., K).
        norm: batch norm folded behind a conv2d or linear.
        gain: yields a factor for each of its channels, or one for all, behind that.
        ceiling: upper bound of a ReLU-like activation behind it (inf for ReLU, 6 for ReLU6);
            None without one.
    """

    name: str
    kind: str
    inputs: list[str]
    shape: tuple[int, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    module: nn.Module | None = None
    norm: nn.BatchNorm2d | nn.BatchNorm1d | None = None
    gain: nn.Module | None = None
    ceiling: float | None = None


class StochasticDepth(nn.Dropout):
    """A dropout of whole images.

    Args:
        p: share of the images whose value becomes zero in training.
        scaled: the others are divided by the share that is left.
    """

    def __init__(self, p: float, *, scaled: bool) -> None:
        super().__init__(p)
        self.scaled = scaled


class Users:
    """Which layers read which.

    Attributes:
        by_name: all layers.
        of: the readers of each.
    """

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = list(layers)
        self.by_name = {layer.name: layer for layer in layers}
        self.of: dict[str, list[Layer]] = {layer.name: [] for layer in layers}
        for layer in layers:
            for name in dict.fromkeys(layer.inputs):
                self.of.setdefault(name, []).append(layer)

    def only_one(self, name: str) -> bool:
        """Whether a layer has one reader."""
        return name in self.by_name and len(self.of[name]) == 1

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the value of a layer."""
        return self.by_name[name].shape

    def bypass(self, layer: Layer, source: str) -> None:
        """Let the readers of a layer read ``source`` instead, and drop it."""
        for reader in self.of[layer.name]:
            reader.inputs = [source if name == layer.name else name for name in reader.inputs]
        self.of[source] = [r for r in self.of[source] if r is not layer] + self.of[layer.name]
        for name in layer.inputs:
            self.of[name] = [reader for reader in self.of[name] if reader is not layer]
        self.layers.remove(layer)
        del self.by_name[layer.name], self.of[layer.name]

    def alive(self) -> list[Layer]:
        """The layers, without constants that nobody reads."""
        return [layer for layer in self.layers if layer.kind != "constant" or self.of[layer.name]]


def axis_before(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    """Where an axis, counted from 1, was before a reshape, if that left it whole."""
    lead, size = math.prod(after[: axis - 1]), after[axis - 1]
    for place, found in enumerate(before, 1):
        if found == size and math.prod(before[: place - 1]) == lead:
            return place
    return None


def fuse(layers: list[Layer]) -> list[Layer]:
    """Fold padding into the conv behind it, batch norm and ReLU into the layer before them.

    Raises:
        UsageError: a batch norm or a ReLU stands where it cannot be folded.
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
        if layer.kind in ("batch_norm", "relu"):
            _fold(layer, source, users)
            assert source is not None
            gone[layer.name] = source.name
            users[source.name] = users[layer.name]
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


def _fold(layer: Layer, source: Layer | None, users: dict[str, list[Layer]]) -> None:
    """Make ``source`` do what the batch norm or ReLU ``layer`` does."""
    alone = source is not None and len(users[source.name]) == 1
    if layer.kind == "batch_norm":
        if (
            source is None
            or not alone
            or source.kind not in ("conv2d", "linear")
            or source.norm is not None
            or source.ceiling is not None
        ):
            raise UsageError(
                f"layer {layer.name}: a batch norm that does not directly follow a convolution "
                "or linear layer has no integer form here yet; this model cannot be quantized"
            )
        assert isinstance(layer.module, (nn.BatchNorm2d, nn.BatchNorm1d))
        source.norm = layer.module
        return
    if source is None or not alone or source.kind not in ("conv2d", "linear", "add"):
        raise UsageError(
            f"layer {layer.name}: an activation that does not follow a convolution, a linear "
            "layer or an add has no integer form here yet; this model cannot be quantized"
        )
    assert layer.ceiling is not None
    source.ceiling = min(
        layer.ceiling, source.ceiling if source.ceiling is not None else float("inf")
    )
