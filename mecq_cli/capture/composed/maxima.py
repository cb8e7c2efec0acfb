"""Maxima and minima, by pools."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node as FxNode

from mecq_cli.capture.reader import pair
from mecq_cli.capture.rewriting import Composition, Constant
from mecq_cli.integer.operations import LARGEST_WINDOW

aten = torch.ops.aten


def _amax(x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor | None:
    """By pools: of the plane, or of a plane of [others, values]."""
    rank = x.dim()
    along = sorted({int(axis) % rank for axis in ([dim] if isinstance(dim, int) else dim)})
    if not along or along[0] == 0:
        return None
    sizes = [x.shape[axis] for axis in along]
    if rank == 4 and along == [2, 3] and max(sizes) <= LARGEST_WINDOW:
        found = F.max_pool2d(x, sizes)
        return found if keepdim else found.flatten(1)
    others = [axis for axis in range(1, rank) if axis not in along]
    rows, count = math.prod(x.shape[axis] for axis in others), math.prod(sizes)
    y = x.permute(0, *others, *along).reshape(x.shape[0], rows, count, 1)
    while count > 1:
        window = max(n for n in range(1, LARGEST_WINDOW + 1) if count % n == 0)
        if window == 1:
            return None
        y, count = F.max_pool2d(y, (window, 1)), count // window
    shape = [1 if axis in along else x.shape[axis] for axis in range(1, rank)]
    return y.reshape(x.shape[0], *(shape if keepdim else [x.shape[axis] for axis in others]))


def _amin(x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor | None:
    found = _amax(-x, dim, keepdim)
    return None if found is None else -found


def _with_places(found: Tensor | None) -> tuple[Tensor, None] | None:
    """Without the indices."""
    return None if found is None else (found, None)


def _max_dim(x: Tensor, dim: int, keepdim: bool = False) -> Any:
    return _with_places(_amax(x, dim, keepdim))


def _min_dim(x: Tensor, dim: int, keepdim: bool = False) -> Any:
    return _with_places(_amin(x, dim, keepdim))


def _maximum(a: Tensor, b: Tensor) -> Tensor | None:
    if a.dim() != b.dim() or a.shape[1:] != b.shape[1:]:
        return None
    return _amax(torch.stack([a, b], -1), -1)


def _minimum(a: Tensor, b: Tensor) -> Tensor | None:
    found = _maximum(-a, -b)
    return None if found is None else -found


def _of_two_values(node: FxNode, constant: Constant) -> bool:
    return not constant(node.args[0]) and not constant(node.args[1])


def _adaptive_max_pool2d(x: Tensor, size: Any) -> Any:
    sizes, wanted = x.shape[2:], pair(size)
    if x.dim() != 4 or any(n % m for n, m in zip(sizes, wanted, strict=True)):
        return None
    kernel = [n // m for n, m in zip(sizes, wanted, strict=True)]
    if wanted == [1, 1]:
        return _with_places(_amax(x, (2, 3), True))
    return (F.max_pool2d(x, kernel), None) if max(kernel) <= LARGEST_WINDOW else None


TABLE: Mapping[Any, Composition] = {
    aten.amax.default: Composition(_amax),
    aten.amin.default: Composition(_amin),
    aten.max.dim: Composition(_max_dim),
    aten.min.dim: Composition(_min_dim),
    aten.maximum.default: Composition(_maximum, _of_two_values),
    aten.minimum.default: Composition(_minimum, _of_two_values),
    aten.adaptive_max_pool2d.default: Composition(_adaptive_max_pool2d),
}
