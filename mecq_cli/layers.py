"""The layers of a captured network."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass
class Layer:
    """One float operation of the network.

    Attributes:
        name: module path, made unique; for an add or concat the path of its block plus the kind.
        kind: conv2d, linear, affine (a depthwise convolution with a kernel of 1 x 1), add, mul,
            function, concat, max_pool2d, avg_pool2d, adaptive_avg_pool2d, global_avg_pool,
            flatten, reshape, transpose, slice, pad, roll, upsample, resize (bilinear), relu,
            dropout; matmul, rescale (a product with a constant), constant, layer_norm, group_norm,
            softmax, log_softmax, l2_normalize, rms_norm; and batch_norm, until it is fused.
        inputs: names of other layers or INPUT.
        attributes: as in integer/ir.py; dropout: axes (how many of the first ones, that
            of the images counted, have a draw for each of their places).
        module: nn.Conv2d, nn.Linear, nn.Dropout or a norm holding the parameters; of a constant,
            what computes it.
        shape: of the output without the batch, (C, H, W), (K,) or tokens (..., K).
        norm: batch norm folded behind a conv2d, linear or affine.
        gain: yields a factor for each channel of a conv2d or linear, or one for all, behind that.
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
