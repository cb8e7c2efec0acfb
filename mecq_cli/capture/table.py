"""Which operation of PyTorch has which handler."""

from __future__ import annotations

import operator
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
    aten.flatten.using_ints: moves.reshape,
    aten.view.default: moves.reshape,
    aten.reshape.default: moves.reshape,
    aten.squeeze.dim: moves.reshape,
    aten.squeeze.dims: moves.reshape,
    aten.slice.Tensor: moves.slice,
    aten.pad.default: moves.pad,
    aten.contiguous.default: moves.identity,
    aten.clone.default: moves.identity,
    aten.detach.default: moves.identity,
    **dict.fromkeys(activations.PLAIN, activations.plain),
    aten.gelu.default: activations.gelu,
    aten.gelu_.default: activations.gelu,
    aten.leaky_relu.default: activations.leaky_relu,
    aten.leaky_relu_.default: activations.leaky_relu,
    aten.elu.default: activations.elu,
    aten.elu_.default: activations.elu,
    aten.softplus.default: activations.softplus,
    aten.prelu.default: activations.prelu,
    aten.empty.memory_format: activations.noise,
    aten.new_empty.default: activations.noise,
    aten.bernoulli_.float: activations.noise,
    aten.div_.Scalar: arithmetic.divide,
    aten.div_.Tensor: arithmetic.divide,
    aten.div.Tensor: arithmetic.divide,
    aten.mul.Tensor: arithmetic.multiply,
    aten.mul_.Tensor: arithmetic.multiply,
    aten.sub.Tensor: arithmetic.subtract,
    aten.sub_.Tensor: arithmetic.subtract,
    aten.conv1d.default: products.conv1d,
    aten.squeeze.default: moves.reshape,
    aten.unsqueeze.default: moves.reshape,
    aten.view_as.default: moves.reshape,
    aten.reshape_as.default: moves.reshape,
    aten.transpose.int: moves.permute,
    aten.permute.default: moves.permute,
    aten.split.Tensor: moves.split,
    aten.split_with_sizes.default: moves.split,
    aten.chunk.default: moves.split,
    operator.getitem: moves.part,
    aten.expand.default: moves.expand,
    aten.expand_as.default: moves.expand,
    aten.upsample_nearest2d.vec: moves.upsample,
}
