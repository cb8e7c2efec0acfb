"""Values that are repeated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node as FxNode

from mecq_cli.capture.constants import is_tensor
from mecq_cli.capture.layout import layout
from mecq_cli.capture.rewriting import Composition, Constant
from mecq_cli.capture.token_moves import BROADCASTING

aten = torch.ops.aten


_MOST_COPIES = 8
"""Of a value of several positions beside itself, which are joined one by one."""


def _expand(x: Tensor, size: Sequence[Any], *, implicit: bool = False) -> Tensor | None:
    if len(size) != x.dim():
        return None
    if _is_a_point(x) and min(size[2:]) > 0:
        x = _over_a_plane(x, size[2:])
    for axis in range(1, x.dim()):
        if x.shape[axis] == 1 and size[axis] not in (1, -1):
            x = _spread(x, axis, int(size[axis]))
    return x


def _is_copied(node: FxNode, constant: Constant) -> bool:
    """Whether an expansion is read by something that does not repeat values by itself."""
    source = node.args[0]
    assert isinstance(source, FxNode)
    if constant(source):
        return False
    shapes = source.meta["val"].shape, node.meta["val"].shape
    repeats = len(shapes[0]) == len(shapes[1]) and layout(source).shape != layout(node).shape
    return repeats and not all(_repeats(user, node, constant) for user in node.users)


def _repeats(user: FxNode, node: FxNode, constant: Constant) -> bool:
    """Whether one repeats the values of a node by itself, since another operand has them all."""
    others = [i for i in user.all_input_nodes if i is not node and is_tensor(i) and not constant(i)]
    return user.target in BROADCASTING and any(
        i.target is not aten.expand.default and layout(i).shape == layout(user).shape
        for i in others
    )


def _repeat(x: Tensor, repeats: Sequence[int]) -> Tensor | None:
    if len(repeats) != x.dim() or repeats[0] != 1:
        return None
    if _is_a_point(x):
        x, repeats = _over_a_plane(x, repeats[2:]), [*repeats[:2], 1, 1]
    for axis, count in enumerate(repeats):
        if count == 1:
            continue
        if count < 1:
            return None
        if x.shape[axis] == 1:
            x = _spread(x, axis, count)
        elif count <= _MOST_COPIES:
            x = torch.cat([x] * count, axis)
        else:
            return None
    return x


def _repeat_interleave(
    x: Tensor, repeats: int, dim: int | None = None, output_size: int | None = None
) -> Tensor | None:
    if dim is None or int(dim) % x.dim() == 0:
        return None
    axis = int(dim) % x.dim()
    return _spread(x.unsqueeze(axis + 1), axis + 1, repeats).flatten(axis, axis + 1)


def _is_a_point(x: Tensor) -> bool:
    return x.dim() == 4 and tuple(x.shape[2:]) == (1, 1)


def _over_a_plane(x: Tensor, size: Sequence[Any]) -> Tensor:
    """One value of each channel, repeated."""
    if tuple(size) == (1, 1):
        return x
    return F.interpolate(x, [int(n) for n in size], mode="nearest")


def _spread(x: Tensor, axis: int, count: int) -> Tensor:
    """An axis of one value, repeated: nearest neighbours of a plane of one value."""
    others = [n for i, n in enumerate(x.shape) if i not in (0, axis)]
    y = F.interpolate(x.reshape(x.shape[0], math.prod(others), 1, 1), (count, 1), mode="nearest")
    places = [*range(x.dim() - 1)]
    places.insert(axis, x.dim() - 1)
    return y.reshape(x.shape[0], *others, count).permute(places)


TABLE: Mapping[Any, Composition] = {
    aten.expand.default: Composition(_expand, _is_copied),
    aten.repeat.default: Composition(_repeat),
    aten.repeat_interleave.self_int: Composition(_repeat_interleave),
}
