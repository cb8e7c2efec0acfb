"""Transposed convolutions, as convolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mecq_cli.capture.composed.arithmetic import by_a_weight
from mecq_cli.capture.composed.shuffles import tiled
from mecq_cli.capture.reader import pair
from mecq_cli.capture.rewriting import Composition

aten = torch.ops.aten


def _conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    """A convolution that computes all values of a square of strides as channels, where it can."""
    stride, padding, extra, dilation = (
        pair(v) for v in (stride, padding, output_padding, dilation)
    )
    kernel = weight.shape[2:]
    whole = all(k % s == 0 for k, s in zip(kernel, stride, strict=True))
    inside = all(p >= e for p, e in zip(padding, extra, strict=True))
    if math.prod(stride) > 1 and whole and inside and dilation == [1, 1]:
        return _by_channels(x, weight, bias, stride, padding, extra, groups)
    for axis, s in ((2, stride[0]), (3, stride[1])):
        x = _with_zeros_between(x, axis, s)
    around: list[int] = []
    for i in (1, 0):
        reach = dilation[i] * (kernel[i] - 1) - padding[i]
        around += [reach, reach + extra[i] - (stride[i] - 1)]
    x = _padded(x, around)
    return F.conv2d(x, _turned(weight, groups), bias, dilation=dilation, groups=groups)


def _by_channels(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    extra: Sequence[int],
    groups: int,
) -> Tensor:
    """Where the kernel is a multiple of the stride: value q s + r is channel r at position q."""
    (s, t), (m, n) = stride, (weight.shape[2] // stride[0], weight.shape[3] // stride[1])
    size = [
        (x.shape[2 + i] - 1) * stride[i] + weight.shape[2 + i] - 2 * padding[i] + extra[i]
        for i in (0, 1)
    ]
    parts = _turned(weight.unflatten(3, (n, t)).unflatten(2, (m, s)), groups, (2, 4))
    kernels = parts.permute(0, 3, 5, 1, 2, 4).flatten(0, 2)  # [O s t, I, m, n]
    if bias is not None:
        bias = bias.unsqueeze(1).expand(-1, s * t).flatten()
    y = F.conv2d(F.pad(x, (n - 1, n - 1, m - 1, m - 1)), kernels, bias, groups=groups)
    y = tiled(y.unflatten(1, (weight.shape[1] * groups, s, t)))
    return y.narrow(2, padding[0], size[0]).narrow(3, padding[1], size[1])


def _turned(weight: Tensor, groups: int, plane: Sequence[int] = (2, 3)) -> Tensor:
    """Weights [I, O / groups, ...] of a transposed convolution as those of one: [O, I / groups]."""
    by_group: Tensor = weight.unflatten(0, (groups, weight.shape[0] // groups)).transpose(1, 2)
    return by_group.flatten(0, 1).flip(*plane)


def _with_zeros_between(x: Tensor, axis: int, stride: int) -> Tensor:
    """``stride`` - 1 zeros behind each row or column."""
    if stride == 1:
        return x
    sizes = list(x.shape[1:])
    lines = math.prod(sizes[:axis])
    wide = x.reshape(x.shape[0], lines, 1, math.prod(sizes) // lines)
    sizes[axis - 1] *= stride
    return F.pad(wide, (0, 0, 0, stride - 1)).reshape(x.shape[0], *sizes)


def _padded(x: Tensor, around: Sequence[int]) -> Tensor:
    """By as many zeros, or less values, as F.pad counts them."""
    for axis, (before, after) in ((3, around[:2]), (2, around[2:])):
        start, end = max(-before, 0), x.shape[axis] - max(-after, 0)
        if (start, end) != (0, x.shape[axis]):
            x = x.narrow(axis, start, end - start)
    return F.pad(x, [max(n, 0) for n in around]) if max(around) > 0 else x


TABLE: Mapping[Any, Composition] = {
    aten.conv_transpose2d.input: Composition(_conv_transpose2d, by_a_weight),
}
