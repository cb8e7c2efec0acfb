"""Products with a weight that is no layer's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node as FxNode

from mecq_cli.capture.rewriting import Composition, Constant

aten = torch.ops.aten


def _with_a_weight(node: FxNode, constant: Constant) -> bool:
    return constant(node.args[0]) != constant(node.args[1])


def _matmul(a: Tensor, b: Tensor) -> Tensor | None:
    """The weight is the operand whose sizes are all fixed: [..., I, O], of ones before the last."""
    if _is_weight(b):
        return F.linear(a, _matrix(b).t())
    if _is_weight(a) and b.dim() > 2:
        return F.linear(b.transpose(-2, -1), _matrix(a)).transpose(-2, -1)
    return None


def _is_weight(x: Tensor) -> bool:
    fixed = all(isinstance(n, int) for n in x.shape)
    return x.dim() >= 2 and fixed and math.prod(x.shape[:-2]) == 1


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(x.shape[-2:])


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1 or not _is_weight(b) or bias.dim() != 1:
        return None
    return F.linear(a, b.t(), bias)


TABLE: Mapping[Any, Composition] = {
    aten.matmul.default: Composition(_matmul, _with_a_weight),
    aten.bmm.default: Composition(_matmul, _with_a_weight),
    aten.mm.default: Composition(_matmul, _with_a_weight),
    aten.addmm.default: Composition(_addmm),
}
