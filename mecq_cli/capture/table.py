"""Which operation of PyTorch has which handler."""

from __future__ import annotations

import operator
from typing import Any

import torch

from mecq_cli.capture import (
    activations,
    arithmetic,
    moves,
    pools,
    products,
    token_moves,
    tokens,
)
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
    aten.sub.Tensor: tokens.subtract,
    aten.mul.Tensor: tokens.mul,
    aten.div.Tensor: tokens.div,
    aten.div_.Tensor: tokens.div,
    aten.layer_norm.default: tokens.layer_norm,
    aten.group_norm.default: tokens.group_norm,
    aten.softmax.int: tokens.softmax,
    aten.matmul.default: tokens.matmul,
    aten.bmm.default: tokens.matmul,
    aten.scaled_dot_product_attention.default: tokens.attention,
    aten.linalg_vector_norm.default: tokens.vector_norm,
    aten.new_empty.default: tokens.empty,
    aten.empty_like.default: tokens.empty,
    aten.bernoulli_.float: tokens.bernoulli,
    aten.cat.default: token_moves.concat,
    aten.max_pool2d.default: pools.max_pool,
    aten.avg_pool2d.default: pools.avg_pool,
    aten.adaptive_avg_pool2d.default: pools.adaptive_avg_pool,
    aten.mean.dim: pools.mean,
    **dict.fromkeys(
        (
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.view.default,
            aten.reshape.default,
            aten.reshape_as.default,
            aten.view_as.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.unsqueeze.default,
        ),
        token_moves.reshape,
    ),
    aten.permute.default: token_moves.permute,
    aten.transpose.int: token_moves.transpose,
    aten.slice.Tensor: token_moves.slice,
    aten.select.int: token_moves.select,
    aten.unbind.int: token_moves.parts,
    aten.chunk.default: token_moves.parts,
    aten.split.Tensor: token_moves.parts,
    aten.split_with_sizes.default: token_moves.parts,
    operator.getitem: token_moves.take,
    aten.roll.default: token_moves.roll,
    aten.expand.default: token_moves.same,
    aten.expand_as.default: token_moves.same,
    aten.to.dtype: token_moves.same,
    aten.pad.default: moves.pad,
    aten.contiguous.default: moves.identity,
    aten.clone.default: moves.identity,
    aten.detach.default: moves.identity,
}
