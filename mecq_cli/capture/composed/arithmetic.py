"""Sums, differences and quotients, and the norms made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node as FxNode

from mecq_cli.capture.constants import is_tensor
from mecq_cli.capture.rewriting import Composition, Constant
from mecq_cli.capture.token_moves import MOST_BRANCHES

aten = torch.ops.aten


def _has_factor(name: str) -> Callable[[FxNode, Constant], bool]:
    return lambda node, constant: bool(node.kwargs.get(name, 1) != 1)


def _add(a: Tensor, b: Any, *, alpha: float) -> Tensor:
    total: Tensor = a + b * alpha
    return total


def _subtracts(node: FxNode, constant: Constant) -> bool:
    return by_a_weight(node, constant) or bool(node.kwargs.get("alpha", 1) != 1)


def _sub(a: Tensor, b: Any, *, alpha: float = 1) -> Tensor:
    difference: Tensor = a + b * -alpha
    return difference


def _rsub(a: Tensor, b: Any, alpha: float = 1) -> Tensor:
    difference: Tensor = b - (a if alpha == 1 else a * alpha)
    return difference


def _addcmul(a: Tensor, b: Tensor, c: Tensor, *, value: float = 1) -> Tensor:
    return a + (b * c if value == 1 else b * c * value)


def by_a_weight(node: FxNode, constant: Constant) -> bool:
    """Whether the second operand is a tensor of fixed values, and not the number of images."""
    by = node.args[1]
    return isinstance(by, FxNode) and constant(by) and is_tensor(by)


def _div(a: Tensor, b: Tensor) -> Tensor:
    return a * b.reciprocal()


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor, eps: float | None = None) -> Tensor:
    return F.rms_norm(x, list(shape), eps=eps) * weight


def _has_weight(node: FxNode, constant: Constant) -> bool:
    return len(node.args) > 2 and node.args[2] is not None


def _sum(x: Tensor, dim: Any, keepdim: bool = False, *, dtype: Any = None) -> Tensor | None:
    """The mean times the count; None of sums over images."""
    axes = {int(axis) % x.dim() for axis in dim or range(x.dim())}
    of_images = any(isinstance(x.shape[axis], torch.SymInt) for axis in axes)
    if of_images or not x.is_floating_point():
        return None
    return x.mean(tuple(axes), keepdim) * math.prod(x.shape[axis] for axis in axes)


def _is_no_branch(node: FxNode, constant: Constant) -> bool:
    """Whether it is more than a sum of a few values, which have a sum as such."""
    source, axes = node.args[0], node.args[1]
    assert isinstance(source, FxNode)
    several = isinstance(axes, (list, tuple)) and len(axes) == 1
    return not several or bool(source.meta["val"].shape[axes[0]] > MOST_BRANCHES)  # type: ignore[index]


TABLE: Mapping[Any, Composition] = {
    aten.add.Tensor: Composition(_add, _has_factor("alpha")),
    aten.add_.Tensor: Composition(_add, _has_factor("alpha")),
    aten.sub.Tensor: Composition(_sub, _subtracts),
    aten.sub_.Tensor: Composition(_sub, _subtracts),
    aten.rsub.Tensor: Composition(_rsub),
    aten.rsub.Scalar: Composition(_rsub, lambda node, constant: len(node.args) > 2),
    aten.addcmul.default: Composition(_addcmul),
    aten.addcmul_.default: Composition(_addcmul),
    aten.div.Tensor: Composition(_div, by_a_weight),
    aten.div_.Tensor: Composition(_div, by_a_weight),
    aten.rms_norm.default: Composition(_rms_norm, _has_weight),
    aten.sum.dim_IntList: Composition(_sum, _is_no_branch),
}
