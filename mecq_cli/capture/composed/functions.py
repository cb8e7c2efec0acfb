"""Functions of one value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node as FxNode

from mecq_cli.capture.rewriting import Composition, Constant

aten = torch.ops.aten


def _prelu(x: Tensor, weight: Tensor) -> Tensor | None:
    """With a slope for each channel; with one for all it is a leaky ReLU."""
    if weight.numel() == 1 or x.dim() < 2:
        return None
    slopes = weight.reshape(-1, *[1] * (x.dim() - 2))
    return x.relu() + slopes * x.clamp(max=0.0)


def _elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    return None if input_scale != 1 else F.elu(x, alpha) * scale


def _elu_has_scale(node: FxNode, constant: Constant) -> bool:
    scale = node.args[2] if len(node.args) > 2 else node.kwargs.get("scale", 1)
    return bool(scale != 1)


def _celu(x: Tensor, alpha: float = 1.0) -> Tensor:
    return F.elu(x) if alpha == 1 else F.elu(x / alpha) * alpha


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    value, gate = x.chunk(2, dim)
    return value * gate.sigmoid()


def _log_sigmoid(x: Tensor) -> Tensor:
    return -F.softplus(-x)


def _softshrink(x: Tensor, lambd: float = 0.5) -> Tensor:
    return x - x.clamp(-lambd, lambd)


def _threshold(x: Tensor, threshold: float, value: float) -> Tensor | None:
    return x.clamp(min=threshold) if threshold == value else None


TABLE: Mapping[Any, Composition] = {
    aten.prelu.default: Composition(_prelu),
    aten.elu.default: Composition(_elu, _elu_has_scale),
    aten.elu_.default: Composition(_elu, _elu_has_scale),
    aten.celu.default: Composition(_celu),
    aten.celu_.default: Composition(_celu),
    aten.glu.default: Composition(_glu),
    aten.log_sigmoid.default: Composition(_log_sigmoid),
    aten.softshrink.default: Composition(_softshrink),
    aten.threshold.default: Composition(_threshold),
    aten.threshold_.default: Composition(_threshold),
}
