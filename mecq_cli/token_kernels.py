"""Kernels in torch of what transformers have beside linear layers; see `mecq_cli.kernels`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mecq_cli.integer.ir import EXACT, Grid, Node

Tensors = Mapping[str, Tensor]
"""Those of a node by their names in `Node.tensors`, of the same types."""


def matmul(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    """The product of two values; on grids its sums are exact."""
    a, b = inputs
    source, other = grids
    factor = node.attributes["factor"]
    if source is None or other is None:
        scaled: Tensor = torch.matmul(a, b) * factor
        return scaled
    acc = _exact_sums(a - source.zero_point, b - other.zero_point, source.reach * other.reach)
    multiplier = scalar(source.scale, a) * scalar(factor, a) * scalar(other.scale, a)
    if node.grid is None:
        return acc * multiplier
    q = torch.round(acc * (multiplier / scalar(node.grid.scale, a))) + node.grid.zero_point
    return torch.clamp(q, node.grid.qmin, node.grid.qmax)


def _exact_sums(a: Tensor, b: Tensor, largest: int) -> Tensor:
    """fl(a b), where no product of two integers is larger than ``largest``."""
    if not a.is_cuda and a.shape[-1] * largest < EXACT:
        return torch.matmul(a, b)
    return torch.matmul(a.double(), b.double()).float()


def scalar(value: float, like: Tensor) -> Tensor:
    """Float32, made on the device of ``like``: to copy it there would take longer."""
    return torch.full((), value, dtype=torch.float32, device=like.device)


def roll(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    """What leaves at one end comes in at the other."""
    return torch.roll(inputs[0], tuple(node.attributes["shifts"]), tuple(node.attributes["axes"]))


def softmax(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    """Over the last axis."""
    return torch.softmax(inputs[0], -1)


def log_softmax(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    """Over the last axis."""
    return torch.log_softmax(inputs[0], -1)


def l2_normalize(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    """Rows of length one."""
    return F.normalize(inputs[0], dim=-1, eps=node.attributes["eps"])


def rms_norm(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    """Rows whose values have a mean square of one."""
    return F.rms_norm(inputs[0], inputs[0].shape[-1:], eps=node.attributes["eps"])


def _constant(node: Node, x: Tensor, tensors: Tensors) -> Tensor:
    value = tensors["value"]
    return value.expand(x.shape[0], *value.shape)


def _layer_norm(node: Node, x: Tensor, tensors: Tensors) -> Tensor:
    weight = tensors["weight"]
    return F.layer_norm(x, weight.shape, weight, tensors["bias"], node.attributes["eps"])


def _group_norm(node: Node, x: Tensor, tensors: Tensors) -> Tensor:
    a = node.attributes
    return F.group_norm(x, a["groups"], tensors["weight"], tensors["bias"], a["eps"])


WITH_TENSORS: Mapping[str, Callable[[Node, Tensor, Tensors], Tensor]] = {
    "constant": _constant,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
}
"""Operations on floats that have tensors of their own."""
