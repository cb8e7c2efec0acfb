"""Channels that become positions, and positions that become channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mecq_cli.capture.rewriting import Composition

aten = torch.ops.aten


def _pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor | None:
    r = upscale_factor
    if x.dim() != 4:
        return None
    return tiled(x.unflatten(1, (x.shape[1] // r**2, r, r)))


def tiled(parts: Tensor) -> Tensor:
    """Parts [N, C, r, s, H, W] as [N, C, H r, W s]."""
    n, c, r, s, height, width = parts.shape
    return parts.permute(0, 1, 4, 2, 5, 3).reshape(n, c, height * r, width * s)


def _pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor | None:
    r = downscale_factor
    if x.dim() != 4:
        return None
    parts: Tensor = x.unflatten(3, (x.shape[3] // r, r)).unflatten(2, (x.shape[2] // r, r))
    return parts.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def _channel_shuffle(x: Tensor, groups: int) -> Tensor:
    parts: Tensor = x.unflatten(1, (groups, x.shape[1] // groups))
    return parts.transpose(1, 2).flatten(1, 2)


TABLE: Mapping[Any, Composition] = {
    aten.pixel_shuffle.default: Composition(_pixel_shuffle),
    aten.pixel_unshuffle.default: Composition(_pixel_unshuffle),
    aten.channel_shuffle.default: Composition(_channel_shuffle),
}
