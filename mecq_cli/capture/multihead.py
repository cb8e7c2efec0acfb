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
from typing import Any

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
    return (
        module.batch_first
        and module._qkv_same_embed_dim
        and module.bias_k is None
        and not module.add_zero_attn
    )


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
    """What the module computes of tokens [N, T, C] that attend to each other."""
    masked = attn_mask is not None or key_padding_mask is not None or rest.get("is_causal")
    if query is not key or key is not value or query.dim() != 3 or masked:
        return nn.MultiheadAttention.forward(
            module, query, key, value, key_padding_mask, need_weights, attn_mask, **rest
        )
    n, t, c = query.shape
    rows = F.linear(query, module.in_proj_weight, module.in_proj_bias)
    q, k, v = rows.reshape(n, t, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    dropout = module.dropout if module.training else 0.0
    found = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    out = module.out_proj(found.transpose(1, 2).reshape(n, t, c))
    if not need_weights:
        return out, None
    # Who asks for them, which is the default, seldom reads them: then they are left out.
    weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), -1)
    return out, weights.mean(1) if rest.get("average_attn_weights", True) else weights
