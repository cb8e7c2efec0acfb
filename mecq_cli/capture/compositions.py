"""Operations as functions of others, in plain PyTorch; the first axis is that of the images.

A function gives None where it has no form for what it is given: then the operation is refused by
its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node as FxNode

from mecq_cli.capture.constants import is_tensor
from mecq_cli.capture.layout import layout
from mecq_cli.capture.reader import pair
from mecq_cli.capture.rewriting import Composition, Constant
from mecq_cli.capture.token_moves import BROADCASTING, MOST_BRANCHES
from mecq_cli.integer.operations import LARGEST_WINDOW

aten = torch.ops.aten

_MOST_COPIES = 8
"""Of a value of several positions beside itself, which are joined one by one."""

# -- arithmetic ----------------------------------------------------------------------------------


def _has_factor(name: str) -> Callable[[FxNode, Constant], bool]:
    return lambda node, constant: bool(node.kwargs.get(name, 1) != 1)


def _add(a: Tensor, b: Any, *, alpha: float) -> Tensor:
    total: Tensor = a + b * alpha
    return total


def _subtracts(node: FxNode, constant: Constant) -> bool:
    return _by_a_weight(node, constant) or bool(node.kwargs.get("alpha", 1) != 1)


def _sub(a: Tensor, b: Any, *, alpha: float = 1) -> Tensor:
    difference: Tensor = a + b * -alpha
    return difference


def _rsub(a: Tensor, b: Any, alpha: float = 1) -> Tensor:
    difference: Tensor = b - (a if alpha == 1 else a * alpha)
    return difference


def _addcmul(a: Tensor, b: Tensor, c: Tensor, *, value: float = 1) -> Tensor:
    return a + (b * c if value == 1 else b * c * value)


def _by_a_weight(node: FxNode, constant: Constant) -> bool:
    """A tensor, not the number of images."""
    by = node.args[1]
    return isinstance(by, FxNode) and constant(by) and is_tensor(by)


def _div(a: Tensor, b: Tensor) -> Tensor:
    return a * b.reciprocal()


# -- products with a weight that is no layer's ---------------------------------------------------


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
    y = _tiled(y.unflatten(1, (weight.shape[1] * groups, s, t)))
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


# -- norms and sums ------------------------------------------------------------------------------


def _rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor, eps: float | None = None) -> Tensor:
    return F.rms_norm(x, list(shape), eps=eps) * weight


def _has_weight(node: FxNode, constant: Constant) -> bool:
    return len(node.args) > 2 and node.args[2] is not None


def _sum(x: Tensor, dim: Any, keepdim: bool = False, *, dtype: Any = None) -> Tensor | None:
    """The mean times the count; None of sums over images."""
    axes = {int(axis) % x.dim() for axis in dim or range(x.dim())}
    of_images = any(isinstance(x.shape[axis], torch.SymInt) for axis in axes)
    if of_images or not x.is_floating_point():
        return None
    return x.mean(tuple(axes), keepdim) * math.prod(x.shape[axis] for axis in axes)


def _is_no_branch(node: FxNode, constant: Constant) -> bool:
    """Whether it is more than a sum of a few values, which have a sum as such."""
    source, axes = node.args[0], node.args[1]
    assert isinstance(source, FxNode)
    several = isinstance(axes, (list, tuple)) and len(axes) == 1
    return not several or bool(source.meta["val"].shape[axes[0]] > MOST_BRANCHES)  # type: ignore[index]


# -- functions -----------------------------------------------------------------------------------


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


# -- maxima --------------------------------------------------------------------------------------


def _amax(x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor | None:
    """By pools: of the plane, or of a plane of [others, values]."""
    rank = x.dim()
    along = sorted({int(axis) % rank for axis in ([dim] if isinstance(dim, int) else dim)})
    if not along or along[0] == 0:
        return None
    sizes = [x.shape[axis] for axis in along]
    if rank == 4 and along == [2, 3] and max(sizes) <= LARGEST_WINDOW:
        found = F.max_pool2d(x, sizes)
        return found if keepdim else found.flatten(1)
    others = [axis for axis in range(1, rank) if axis not in along]
    rows, count = math.prod(x.shape[axis] for axis in others), math.prod(sizes)
    y = x.permute(0, *others, *along).reshape(x.shape[0], rows, count, 1)
    while count > 1:
        window = max(n for n in range(1, LARGEST_WINDOW + 1) if count % n == 0)
        if window == 1:
            return None
        y, count = F.max_pool2d(y, (window, 1)), count // window
    shape = [1 if axis in along else x.shape[axis] for axis in range(1, rank)]
    return y.reshape(x.shape[0], *(shape if keepdim else [x.shape[axis] for axis in others]))


def _amin(x: Tensor, dim: Any = (), keepdim: bool = False) -> Tensor | None:
    found = _amax(-x, dim, keepdim)
    return None if found is None else -found


def _with_places(found: Tensor | None) -> tuple[Tensor, None] | None:
    """Without the indices."""
    return None if found is None else (found, None)


def _max_dim(x: Tensor, dim: int, keepdim: bool = False) -> Any:
    return _with_places(_amax(x, dim, keepdim))


def _min_dim(x: Tensor, dim: int, keepdim: bool = False) -> Any:
    return _with_places(_amin(x, dim, keepdim))


def _maximum(a: Tensor, b: Tensor) -> Tensor | None:
    if a.dim() != b.dim() or a.shape[1:] != b.shape[1:]:
        return None
    return _amax(torch.stack([a, b], -1), -1)


def _minimum(a: Tensor, b: Tensor) -> Tensor | None:
    found = _maximum(-a, -b)
    return None if found is None else -found


def _of_two_values(node: FxNode, constant: Constant) -> bool:
    return not constant(node.args[0]) and not constant(node.args[1])


def _adaptive_max_pool2d(x: Tensor, size: Any) -> Any:
    sizes, wanted = x.shape[2:], pair(size)
    if x.dim() != 4 or any(n % m for n, m in zip(sizes, wanted, strict=True)):
        return None
    kernel = [n // m for n, m in zip(sizes, wanted, strict=True)]
    if wanted == [1, 1]:
        return _with_places(_amax(x, (2, 3), True))
    return (F.max_pool2d(x, kernel), None) if max(kernel) <= LARGEST_WINDOW else None


# -- moves ---------------------------------------------------------------------------------------


def _pixel_shuffle(x: Tensor, upscale_factor: int) -> Tensor | None:
    r = upscale_factor
    if x.dim() != 4:
        return None
    return _tiled(x.unflatten(1, (x.shape[1] // r**2, r, r)))


def _tiled(parts: Tensor) -> Tensor:
    """Parts [N, C, r, s, H, W] as [N, C, H r, W s]."""
    n, c, r, s, height, width = parts.shape
    return parts.permute(0, 1, 4, 2, 5, 3).reshape(n, c, height * r, width * s)


def _pixel_unshuffle(x: Tensor, downscale_factor: int) -> Tensor | None:
    r = downscale_factor
    if x.dim() != 4:
        return None
    parts: Tensor = x.unflatten(3, (x.shape[3] // r, r)).unflatten(2, (x.shape[2] // r, r))
    return parts.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def _channel_shuffle(x: Tensor, groups: int) -> Tensor:
    parts: Tensor = x.unflatten(1, (groups, x.shape[1] // groups))
    return parts.transpose(1, 2).flatten(1, 2)


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


COMPOSITIONS: Mapping[Any, Composition] = {
    aten.add.Tensor: Composition(_add, _has_factor("alpha")),
    aten.add_.Tensor: Composition(_add, _has_factor("alpha")),
    aten.sub.Tensor: Composition(_sub, _subtracts),
    aten.sub_.Tensor: Composition(_sub, _subtracts),
    aten.rsub.Tensor: Composition(_rsub),
    aten.rsub.Scalar: Composition(_rsub, lambda node, constant: len(node.args) > 2),
    aten.addcmul.default: Composition(_addcmul),
    aten.addcmul_.default: Composition(_addcmul),
    aten.div.Tensor: Composition(_div, _by_a_weight),
    aten.div_.Tensor: Composition(_div, _by_a_weight),
    aten.matmul.default: Composition(_matmul, _with_a_weight),
    aten.bmm.default: Composition(_matmul, _with_a_weight),
    aten.mm.default: Composition(_matmul, _with_a_weight),
    aten.addmm.default: Composition(_addmm),
    aten.conv_transpose2d.input: Composition(_conv_transpose2d, _by_a_weight),
    aten.rms_norm.default: Composition(_rms_norm, _has_weight),
    aten.sum.dim_IntList: Composition(_sum, _is_no_branch),
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
    aten.amax.default: Composition(_amax),
    aten.amin.default: Composition(_amin),
    aten.max.dim: Composition(_max_dim),
    aten.min.dim: Composition(_min_dim),
    aten.maximum.default: Composition(_maximum, _of_two_values),
    aten.minimum.default: Composition(_minimum, _of_two_values),
    aten.adaptive_max_pool2d.default: Composition(_adaptive_max_pool2d),
    aten.pixel_shuffle.default: Composition(_pixel_shuffle),
    aten.pixel_unshuffle.default: Composition(_pixel_unshuffle),
    aten.channel_shuffle.default: Composition(_channel_shuffle),
    aten.expand.default: Composition(_expand, _is_copied),
    aten.repeat.default: Composition(_repeat),
    aten.repeat_interleave.self_int: Composition(_repeat_interleave),
}
