"""Which operation of PyTorch has which handler."""

from __future__ import annotations

from typing import Any

import torch

from mecq_cli.capture import activations, arithmetic, moves, pools, products
from mecq_cli.capture.reader import Handler

aten = torch.ops.aten

HANDLERS: dict[Any, Handler] = {
    aten.conv2d.default: products.conv2d,
    aten.conv2d.padding: products.conv2d,
    aten.linear.default: products.linear,
    aten.batch_norm.default: products.batch_norm,
    aten.relu.default: activations.activation,
    aten.relu_.default: activations.activation,
    aten.relu6.default: activations.activation,
    aten.relu6_.default: activations.activation,
    **dict.fromkeys(activations.CLAMPS, activations.activation),
    aten.dropout.default: activations.dropout,
    aten.dropout_.default: activations.dropout,
    aten.add.Tensor: arithmetic.add,
    aten.add_.Tensor: arithmetic.add,
    aten.cat.default: moves.concat,
    aten.max_pool2d.default: pools.max_pool,
    aten.avg_pool2d.default: pools.avg_pool,
    aten.adaptive_avg_pool2d.default: pools.adaptive_avg_pool,
    aten.mean.dim: pools.mean,
    aten.flatten.using_ints: moves.flatten,
    aten.view.default: moves.flatten,
    aten.reshape.default: moves.flatten,
    aten.squeeze.dim: moves.flatten,
    aten.squeeze.dims: moves.flatten,
    aten.slice.Tensor: moves.slice,
    aten.pad.default: moves.pad,
    aten.contiguous.default: moves.identity,
    aten.clone.default: moves.identity,
    aten.detach.default: moves.identity,
}
