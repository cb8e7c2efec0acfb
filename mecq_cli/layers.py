"""The layers of a captured network."""

from __future__ import annotations

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
            flatten, reshape, transpose, slice, pad, upsample, relu, dropout; and batch_norm,
            until it is fused.
        inputs: names of other layers or INPUT.
        attributes: as in integer/ir.py; dropout: images (whole ones are dropped).
        module: nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.BatchNorm1d or nn.Dropout holding the
            parameters.
        shape: of the output without the batch, (C, H, W) or (K,).
        norm: batch norm folded behind a conv2d, linear or affine.
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
    ceiling: float | None = None
