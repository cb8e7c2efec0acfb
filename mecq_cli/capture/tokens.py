"""Handlers of what transformers are made of: norms, attention, products with constants."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.fx import Node as FxNode

from mecq_cli.capture.layout import layout
from mecq_cli.capture.names import module_path
from mecq_cli.capture.products import set_parameter
from mecq_cli.capture.reader import Reader
from mecq_cli.capture.token_moves import reshaped, transposed
from mecq_cli.errors import UsageError


def _affine(
    reader: Reader, node: FxNode, module: nn.Module, channels: int, weight: Any, bias: Any
) -> None:
    """Weight and bias of a norm, ones and zeros where it has none."""
    for name, value, number in (("weight", weight, 1.0), ("bias", bias, 0.0)):
        found = reader.parameter(value)
        plain = torch.full((channels,), number)
        if found is None:
            delattr(module, name)
            module.register_buffer(name, plain)
        else:
            set_parameter(module, name, found[1])


def layer_norm(reader: Reader, node: FxNode) -> None:
    """A layer norm over the last axis."""
    sizes = [int(n) for n in node.args[1]]  # type: ignore[union-attr, arg-type]
    if len(sizes) != 1:
        raise UsageError(
            f"layer {module_path(node)}: a layer norm over {len(sizes)} axes is not supported; "
            "this model cannot be quantized"
        )
    with torch.device("meta"):
        module = nn.LayerNorm(sizes[0], eps=float(reader.argument(node, 4, "eps", 1e-5)))
    weight, bias = reader.argument(node, 2, "weight"), reader.argument(node, 3, "bias")
    _affine(reader, node, module, sizes[0], weight, bias)
    reader.add(node, "layer_norm", [node.args[0]], module=module)


def group_norm(reader: Reader, node: FxNode) -> None:
    """A group norm over channels and positions."""
    channels = layout(node).shape[0]
    eps = float(reader.argument(node, 4, "eps", 1e-5))
    with torch.device("meta"):
        module = nn.GroupNorm(int(node.args[1]), channels, eps=eps)  # type: ignore[arg-type]
    weight, bias = reader.argument(node, 2, "weight"), reader.argument(node, 3, "bias")
    _affine(reader, node, module, channels, weight, bias)
    reader.add(node, "group_norm", [node.args[0]], module=module)


def rms_norm(reader: Reader, node: FxNode) -> None:
    """A norm of the last axis by the mean of the squares; its weight is multiplied later."""
    sizes = list(node.args[1])  # type: ignore[arg-type]
    if len(sizes) != 1:
        raise UsageError(f"layer {module_path(node)}: an RMS norm over {len(sizes)} axes")
    eps = reader.argument(node, 3, "eps")
    attributes = {"eps": torch.finfo(torch.float32).eps if eps is None else float(eps)}
    reader.add(node, "rms_norm", [node.args[0]], attributes=attributes)


def softmax(reader: Reader, node: FxNode) -> None:
    """A softmax or its logarithm; over another axis than the last it is turned there and back."""
    place = layout(node)
    index = int(reader.argument(node, 1, "dim", -1)) % len(place.sizes)
    base, last = module_path(node), len(place.shape)
    if index == place.batch:
        raise UsageError(f"layer {base}: a softmax over images; this model cannot be quantized")
    order = [*range(1, last + 1)]
    axis = place.axis(index)
    order[axis - 1], order[-1] = order[-1], order[axis - 1]
    name = transposed(reader, base, reader.source(node.args[0]), place.shape, order)
    shape = tuple(place.shape[i - 1] for i in order)
    kind = "log_softmax" if "log" in str(node.target) else "softmax"
    name = reader.append(f"{base}.{kind}".lstrip("."), kind, [name], shape)
    reader.alias[node] = transposed(reader, base, name, shape, order)


def matmul(reader: Reader, node: FxNode) -> None:
    """The product of two values, which have the same axes but the last two."""
    a, b = node.args[0], node.args[1]
    if reader.is_constant(a) or reader.is_constant(b):
        raise UsageError(
            f"layer {module_path(node)}: the product of a value and a constant that is no linear "
            "layer is not supported; this model cannot be quantized"
        )
    assert isinstance(a, FxNode)
    assert isinstance(b, FxNode)
    shapes = [layout(value).shape for value in (a, b)]
    if shapes[0][:-2] != shapes[1][:-2] or layout(a).batch != 0 or layout(b).batch != 0:
        raise UsageError(
            f"layer {module_path(node)}: the product of {list(shapes[0])} and {list(shapes[1])} "
            "is not supported; this model cannot be quantized"
        )
    reader.add(node, "matmul", [a, b], suffix="matmul", attributes={"factor": 1.0})


def attention(reader: Reader, node: FxNode) -> None:
    """scaled_dot_product_attention, as the operations it stands for."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    q, k, v, mask, p, causal = (
        reader.argument(node, i, name, None) for i, name in enumerate(names)
    )
    base = module_path(node)
    if causal or node.kwargs.get("enable_gqa"):
        raise UsageError(
            f"layer {base}: causal or grouped attention is not supported; this model cannot be "
            "quantized"
        )
    shape, keys = layout(q).shape, layout(k).shape
    query = reader.source(q, node)
    if _one_for_all_heads(shape, keys) and mask is None:
        shape = (*keys[:-2], math.prod(shape[:-1]), shape[-1])
        query = reshaped(reader, f"{base}.queries", query, shape)
    if layout(q).batch != 0 or layout(v).batch != 0 or shape[:-2] != keys[:-2]:
        raise UsageError(f"layer {base}: attention between {list(shape)} and {list(keys)}")
    scale = node.kwargs.get("scale")
    factor = 1.0 / math.sqrt(shape[-1]) if scale is None else float(scale)  # type: ignore[arg-type]
    axes = len(keys)
    order = {"axes": [*range(1, axes - 1), axes, axes - 1]}
    turned = (*keys[:-2], keys[-1], keys[-2])
    k = reader.append(f"{base}.keys", "transpose", [reader.source(k)], turned, attributes=order)
    scores = (*shape[:-1], keys[-2])
    attributes = {"factor": factor}
    name = reader.append(f"{base}.scores", "matmul", [query, k], scores, attributes=attributes)
    if mask is not None:
        if not reader.is_constant(mask):
            terms = [name, reader.source(mask)]
        elif _is_boolean(reader, mask):
            raise UsageError(
                f"layer {base}: a mask of true and false is not supported; give attn_mask as "
                "numbers that are added, 0 and -100; this model cannot be quantized"
            )
        else:
            terms = [name, reader.constant(mask, layout(node))]
        name = reader.append(f"{base}.mask", "add", terms, scores)
    name = reader.append(f"{base}.softmax", "softmax", [name], scores)
    if p:
        dropout = nn.Dropout(float(p))
        name = reader.append(f"{base}.dropout", "dropout", [name], scores, module=dropout)
    values = (*scores[:-1], layout(v).shape[-1])
    name = reader.append(
        f"{base}.values",
        "matmul",
        [name, reader.source(v)],
        values,
        attributes={"factor": 1.0},
    )
    reader.alias[node] = reshaped(reader, f"{base}.heads", name, layout(node).shape, values)


def _is_boolean(reader: Reader, mask: FxNode) -> bool:
    value = reader.attribute(mask) if mask.op == "get_attr" else mask.meta["val"]
    return bool(value.dtype == torch.bool)


def _one_for_all_heads(queries: tuple[int, ...], keys: tuple[int, ...]) -> bool:
    """Whether all heads share their keys (multi-query attention): they are more rows of one."""
    heads = queries[:-2] != keys[:-2] and len(queries) == len(keys)
    return heads and all(n == 1 for n in keys[:-2])


def vector_norm(reader: Reader, node: FxNode) -> None:
    """The length of rows along one axis, by which they will be divided."""
    order, axes = reader.argument(node, 1, "ord", 2), reader.argument(node, 2, "dim")
    source = node.args[0]
    assert isinstance(source, FxNode)
    rank = len(source.meta["val"].shape)
    along = [int(axis) % rank for axis in axes or ()]
    if float(order) != 2.0 or len(along) != 1 or along[0] == layout(source).batch:
        raise UsageError(f"layer {module_path(node)}: a norm of another kind than that of rows")
    reader.notes[node] = {"rows": source, "axis": along[0]}


def bounded_norm(reader: Reader, node: FxNode) -> None:
    """The same, not below a bound."""
    low, high = reader.argument(node, 1, "min"), reader.argument(node, 2, "max")
    if not isinstance(low, (int, float)) or not 0 < low < 1 or high is not None:
        raise UsageError(
            f"layer {module_path(node)}: the length of rows may have a lower bound between 0 and 1 "
            "alone; this model cannot be quantized"
        )
    reader.notes[node] = {**reader.notes[node.args[0]], "eps": float(low)}  # type: ignore[index]
