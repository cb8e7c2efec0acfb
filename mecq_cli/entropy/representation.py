"""What is coded: features as rows, centred and normalised."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-5
"""Added to the variance of a column."""

CONSTANT = 1e-3 * EPS
"""Variance of a column up to which it is taken for constant."""

SHORTEST = 1e-6
"""Rows below this length are divided by it."""


def as_rows(features: Tensor, grid: int = 1) -> Tensor:
    """Features as float32 rows: those of an image averaged over its positions.

    Args:
        features: [N, d], tokens [N, T, d] or maps [N, d, H, W].
        grid: maps are averaged within grid x grid cells, each a row of its own; no more cells
            than there are positions.

    Returns:
        [N, d], or [N * cells, d] with a grid.
    """
    if features.dim() == 2:
        return features.float()
    if features.dim() == 3:
        return _position_mean(features, (1,))
    height, width = features.shape[2:]
    cells = (min(grid, height), min(grid, width))
    if cells == (1, 1):
        return _position_mean(features, (2, 3))
    pooled = F.adaptive_avg_pool2d(features.float(), cells)
    return pooled.permute(0, 2, 3, 1).flatten(0, 2)


def centre(z: Tensor) -> Tensor:
    """Rows [..., m, d] minus their mean: the large common part of ReLU features carries nothing."""
    return z - z.mean(-2, keepdim=True)


def normalise(z: Tensor) -> Tensor:
    """Rows [..., m, d] at unit length; a row of zeros stays one."""
    return z / row_norms(z)


def row_norms(z: Tensor) -> Tensor:
    """Of rows [..., m, d], at least `SHORTEST`: [..., m, 1]."""
    found: Tensor = torch.linalg.vector_norm(z, dim=-1, keepdim=True)
    return found.clamp_min(SHORTEST)


def standardise(z: Tensor) -> Tensor:
    """Columns [..., m, d] at mean 0 and variance 1, as a batch norm without affine part does."""
    centred = centre(z)
    return centred * inverse_deviations(centred)


def inverse_deviations(centred: Tensor) -> Tensor:
    """1 / the deviation of columns [..., m, d] of mean 0: [..., 1, d]; of constant ones 0.

    In a batch of few images many features are constant, or differ by rounding alone. They say
    nothing, and their gradients would be hundreds of times those of the others.
    """
    variance = centred.square().mean(-2, keepdim=True)
    rates: Tensor = torch.rsqrt(variance + EPS) * (variance > CONSTANT)
    return rates


def varied(z: Tensor) -> Tensor:
    """Rows [..., m, d] minus their mean, with constant columns at 0 as in `standardise`.

    Without it, rows that differ by rounding alone would come to length one, and their gradients
    with them.
    """
    centred = centre(z)
    return centred * (centred.square().mean(-2, keepdim=True) > CONSTANT)


def _position_mean(features: Tensor, positions: tuple[int, ...]) -> Tensor:
    rows = _PositionMean.apply(features, positions)
    assert isinstance(rows, Tensor)
    return rows


class _PositionMean(torch.autograd.Function):
    """The mean over positions in float32, whose gradient is not written out for every position.

    PyTorch's own fills a map with the gradient, in float32 and in the memory format that suits
    nobody: for the maps of a ResNet-50 that took three times as long as the mean itself. Here it
    is a view, in the map's own type.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, positions: tuple[int, ...]) -> Tensor:
        ctx.shape, ctx.dtype, ctx.positions = features.shape, features.dtype, positions
        return features.mean(positions, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        count = 1
        for position in ctx.positions:
            count *= ctx.shape[position]
            gradient = gradient.unsqueeze(position)
        return (gradient / count).to(ctx.dtype).expand(ctx.shape), None
