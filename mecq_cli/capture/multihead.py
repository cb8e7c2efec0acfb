"""PyTorch's own multi-head attention, read in another order of the axes.

`nn.MultiheadAttention` brings the images to the second axis and then joins the tokens of all of
them to rows, image by image within each token. There the images are on no axis of their own any
more. While a model is exported, its modules of that kind compute the same with the images on the
first axis all along.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def images_first(model: nn.Module) -> Iterator[None]:
    """Let the attention of a model keep its images on the first axis; undone at the end."""
    found = [m for m in model.modules() if type(m) is nn.MultiheadAttention and _is_plain(m)]
    for module in found:
        module.forward = partial(_forward, module)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in found:
            del module.forward


def _is_plain(module: nn.MultiheadAttention) -> bool:
    return module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn


def _forward(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    **rest: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the module computes of tokens [N, T, C], or [T, N, C] where it is made for these."""
    masked = attn_mask is not None or key_padding_mask is not None or rest.get("is_causal")
    if query.dim() != 3 or masked:
        return nn.MultiheadAttention.forward(
            module, query, key, value, key_padding_mask, need_weights, attn_mask, **rest
        )
    q, k, v = (_heads(module, rows) for rows in _projected(module, query, key, value))
    dropout = module.dropout if module.training else 0.0
    found = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    out = _turned(module, module.out_proj(found.transpose(1, 2).flatten(2)))
    if not need_weights:
        return out, None
    # Who asks for them, which is the default, seldom reads them: then they are left out.
    weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), -1)
    return out, weights.mean(1) if rest.get("average_attn_weights", True) else weights


def _turned(module: nn.MultiheadAttention, tokens: Tensor) -> Tensor:
    """With the images on the first axis, or back."""
    return tokens if module.batch_first else tokens.transpose(0, 1)


def _projected(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, ...]:
    """Queries, keys and values: one product where all three are of the same tokens."""
    weight, bias = module.in_proj_weight, module.in_proj_bias
    if query is key and key is value:
        return F.linear(_turned(module, query), weight, bias).chunk(3, -1)
    # The annotation of PyTorch leaves out that there may be none.
    biases = [None] * 3 if cast("Tensor | None", bias) is None else bias.chunk(3)
    return tuple(
        F.linear(_turned(module, tokens), w, b)
        for tokens, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True)
    )


def _heads(module: nn.MultiheadAttention, rows: Tensor) -> Tensor:
    """[N, T, C] as [N, heads, T, C / heads]."""
    heads: Tensor = rows.unflatten(2, (module.num_heads, -1))
    return heads.transpose(1, 2)
