"""Handlers of moving operations on values of any number of axes."""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch.fx import Node as FxNode

from mecq_cli.capture.layout import Layout, layout
from mecq_cli.capture.names import module_path
from mecq_cli.capture.reader import Reader
from mecq_cli.errors import UsageError
from mecq_cli.integer.ir import INPUT

aten = torch.ops.aten
BROADCASTING = (
    *(aten.mul.Tensor, aten.mul_.Tensor, aten.add.Tensor, aten.add_.Tensor),
    *(aten.sub.Tensor, aten.sub_.Tensor, aten.div.Tensor, aten.div_.Tensor),
)
"""Operations that repeat values by themselves."""

MOST_BRANCHES = 8
"""Longer sums are no sums of branches, and would be as many layers."""


def _value(node: FxNode) -> FxNode:
    source = node.args[0]
    assert isinstance(source, FxNode)
    return source


def reshape(reader: Reader, node: FxNode) -> None:
    """view, reshape, flatten, squeeze and their kin: the same values in the same order."""
    source = _value(node)
    if source in reader.notes:  # the length of rows
        reader.notes[node] = reader.notes[source]
        return
    a, b = layout(source), layout(node)
    if not (_leads(a) and _leads(b)) and _around(a) != _around(b):
        raise UsageError(
            f"layer {module_path(node)}: reshaping {list(a.sizes)} to {list(b.sizes)} would mix "
            "images; this model cannot be quantized"
        )
    if a.shape == b.shape:
        reader.alias[node] = reader.source(source)
    else:
        reader.alias[node] = _shaped(reader, node, reader.source(source), b.shape)


def _shaped(reader: Reader, node: FxNode, name: str, shape: tuple[int, ...]) -> str:
    base = module_path(node)
    if len(shape) == 1:
        return reader.append(base or "flatten", "flatten", [name], shape)
    return reshaped(reader, f"{base}.reshape".lstrip("."), name, shape)


def reshaped(
    reader: Reader,
    path: str,
    name: str,
    shape: tuple[int, ...],
    before: tuple[int, ...] | None = None,
) -> str:
    """The layer with the values of another in this shape; itself if ``before`` is the same."""
    if shape == before:
        return name
    return reader.append(path, "reshape", [name], shape, attributes={"shape": list(shape)})


def _leads(place: Layout) -> bool:
    return math.prod(place.sizes[: place.batch]) == 1


def _around(place: Layout) -> tuple[int, int, int]:
    """How many values lie before, on and behind the axis of the images."""
    sizes, batch = place.sizes, place.batch
    return math.prod(sizes[:batch]), sizes[batch], math.prod(sizes[batch + 1 :])


def permute(reader: Reader, node: FxNode) -> None:
    """Another order of the axes."""
    rank = len(_value(node).meta["val"].shape)
    axes = reader.argument(node, 1, "dims")
    _ordered(reader, node, [int(axis) % rank for axis in axes])


def transpose(reader: Reader, node: FxNode) -> None:
    """Two axes change places."""
    a, b = (int(reader.argument(node, i, f"dim{i - 1}")) for i in (1, 2))
    order = [*range(len(_value(node).meta["val"].shape))]
    order[a], order[b] = b, a
    _ordered(reader, node, order)


def _ordered(reader: Reader, node: FxNode, order: list[int]) -> None:
    source = _value(node)
    a, b = layout(source), layout(node)
    axes = [a.axis(order[axis]) for axis in b.order]
    name = reader.source(source)
    reader.alias[node] = transposed(reader, module_path(node), name, a.shape, axes)


def transposed(
    reader: Reader, base: str, name: str, shape: tuple[int, ...], axes: list[int]
) -> str:
    """The layer with the axes of another in this order, counted from 1; itself if that is its."""
    if axes == sorted(axes):
        return name
    path = f"{base}.transpose".lstrip(".")
    attributes = {"axes": axes}
    after = tuple(shape[axis - 1] for axis in axes)
    return reader.append(path, "transpose", [name], after, attributes=attributes)


def slice(reader: Reader, node: FxNode) -> None:
    """A part of a value."""
    source = _value(node)
    size = len(source.meta["val"].shape)
    axis = int(reader.argument(node, 1, "dim", 0)) % size
    start = int(reader.argument(node, 2, "start", 0) or 0)
    end = reader.argument(node, 3, "end")
    step = int(reader.argument(node, 4, "step", 1))
    place = layout(source)
    whole = end is None or (isinstance(end, int) and end >= 2**62)
    if axis == place.batch:
        if start == 0 and whole and step == 1:
            reader.alias[node] = reader.source(source)
            return
        raise UsageError(f"layer {module_path(node)}: images of a batch cannot be split")
    length = place.sizes[axis]
    bounds = (start, length if whole else int(end), step)
    reader.alias[node] = _cut(reader, node, source, axis, bounds)


def _cut(
    reader: Reader, node: FxNode, source: FxNode, axis: int, bounds: tuple[int, int, int]
) -> str:
    place, name = layout(source), reader.source(source)
    chosen = range(place.sizes[axis])[bounds[0] : bounds[1] : bounds[2]]
    if len(chosen) == place.sizes[axis]:
        return name
    return sliced(reader, module_path(node), name, place.shape, place.axis(axis), chosen)


def sliced(
    reader: Reader, base: str, name: str, shape: tuple[int, ...], axis: int, chosen: range
) -> str:
    """The layer with some places of an axis, counted from 1, of another of this shape."""
    attributes = {
        "axes": [axis],
        "starts": [chosen.start],
        "ends": [chosen.stop],
        "steps": [chosen.step],
    }
    after = (*shape[: axis - 1], len(chosen), *shape[axis:])
    return reader.append(f"{base}.slice".lstrip("."), "slice", [name], after, attributes=attributes)


def select(reader: Reader, node: FxNode) -> None:
    """One of the values along an axis, which is gone then."""
    source = _value(node)
    axis = int(reader.argument(node, 1, "dim")) % len(source.meta["val"].shape)
    index = int(reader.argument(node, 2, "index"))
    _selected(reader, node, source, axis, index)


def _selected(reader: Reader, node: FxNode, source: FxNode, axis: int, index: int) -> None:
    place = layout(source)
    if axis == place.batch:
        raise UsageError(f"layer {module_path(node)}: images of a batch cannot be split")
    index %= place.sizes[axis]
    name = _cut(reader, node, source, axis, (index, index + 1, 1))
    reader.alias[node] = _shaped(reader, node, name, layout(node).shape)


def parts(reader: Reader, node: FxNode) -> None:
    """unbind, split and chunk: each part is cut out where it is taken."""
    reader.source(_value(node))
    reader.parts.add(node)


def take(reader: Reader, node: FxNode) -> None:
    """One of several values."""
    several = _value(node)
    if several not in reader.parts:
        return
    source, index = _value(several), int(node.args[1])  # type: ignore[arg-type]
    rank = len(source.meta["val"].shape)
    if "unbind" in str(several.target):
        axis = int(reader.argument(several, 1, "dim", 0)) % rank
        _selected(reader, node, source, axis, index)
        return
    axis = int(reader.argument(several, 2, "dim", 0)) % rank
    if axis == layout(source).batch:
        raise UsageError(f"layer {module_path(node)}: images of a batch cannot be split")
    sizes = [int(part.shape[axis]) for part in several.meta["val"]]
    start = [0, *accumulate(sizes)][index]
    reader.alias[node] = _cut(reader, node, source, axis, (start, start + sizes[index], 1))


def roll(reader: Reader, node: FxNode) -> None:
    """A cyclic shift."""
    source = _value(node)
    place = layout(source)
    shifts, axes = reader.argument(node, 1, "shifts"), reader.argument(node, 2, "dims", ())
    axes = [int(axis) % len(place.sizes) for axis in axes]
    if not axes or place.batch in axes:
        raise UsageError(f"layer {module_path(node)}: a cyclic shift of images or of all values")
    attributes = {"axes": [place.axis(axis) for axis in axes], "shifts": [int(n) for n in shifts]}
    reader.add(node, "roll", [source], suffix="roll", attributes=attributes)


def concat(reader: Reader, node: FxNode) -> None:
    """A concatenation; along another axis than the first it is turned there and back."""
    values = node.args[0]
    assert isinstance(values, (list, tuple))
    place = layout(node)
    axis = int(reader.argument(node, 1, "dim", 0)) % len(place.sizes)
    if axis == place.batch:
        raise UsageError(f"layer {module_path(node)}: images of a batch cannot be joined")
    names = [reader.source(value, node) for value in values]
    reader.alias[node] = joined(reader, module_path(node), names, place.shape, place.axis(axis))


def joined(reader: Reader, base: str, names: list[str], shape: tuple[int, ...], axis: int) -> str:
    """The layer of ``shape`` that others are joined to along an axis, counted from 1."""
    path = f"{base}.concat".lstrip(".")
    if axis == 1:
        return reader.append(path, "concat", names, shape)
    order = [axis, *(i + 1 for i in range(len(shape)) if i + 1 != axis)]
    shapes = {INPUT: reader.input_shape} | {layer.name: layer.shape for layer in reader.layers}
    turned = [transposed(reader, base, name, shapes[name], order) for name in names]
    after = tuple(shape[i - 1] for i in order)
    name = reader.append(path, "concat", turned, after)
    back = [order.index(i + 1) + 1 for i in range(len(order))]
    return transposed(reader, base, name, after, back)


def stack(reader: Reader, node: FxNode) -> None:
    """Values beside each other along an axis of its own."""
    values = node.args[0]
    assert isinstance(values, (list, tuple))
    place, base = layout(node), module_path(node)
    axis = int(reader.argument(node, 1, "dim", 0)) % len(place.sizes)
    if axis == place.batch or place.batch != 0:
        raise UsageError(f"layer {base}: images of a batch cannot be stacked")
    where = place.axis(axis)
    shape = (*place.shape[: where - 1], 1, *place.shape[where:])
    path = f"{base}.reshape".lstrip(".")
    names = [reshaped(reader, path, reader.source(value, node), shape) for value in values]
    reader.alias[node] = joined(reader, base, names, place.shape, where)


def total(reader: Reader, node: FxNode) -> None:
    """The sum along an axis of a few branches, as sums of two."""
    source = _value(node)
    place, base = layout(source), module_path(node)
    axes = reader.argument(node, 1, "dim")
    axes = [int(a) % len(place.sizes) for a in (axes if isinstance(axes, (list, tuple)) else ())]
    if len(axes) != 1 or axes[0] == place.batch:
        raise UsageError(f"layer {base}: a sum over images; this model cannot be quantized")
    where, name = place.axis(axes[0]), reader.source(source)
    one = (*place.shape[: where - 1], 1, *place.shape[where:])
    branches = [
        sliced(reader, base, name, place.shape, where, range(i, i + 1))
        for i in range(place.sizes[axes[0]])
    ]
    found = branches[0]
    for branch in branches[1:]:
        found = reader.append(f"{base}.add".lstrip("."), "add", [found, branch], one)
    after = layout(node).shape
    reader.alias[node] = found if after == one else _shaped(reader, node, found, after)


def axes_of_mean(reader: Reader, node: FxNode) -> list[int]:
    """One, several, or all where none is named; counted from 0."""
    rank = len(_value(node).meta["val"].shape)
    axes = reader.argument(node, 1, "dim")
    if axes is None:
        return [*range(rank)]
    return sorted(int(axis) % rank for axis in ([axes] if isinstance(axes, int) else axes))


def mean(reader: Reader, node: FxNode) -> None:
    """A mean over any axes, as one over the plane of [N, C, positions, 1]."""
    source = _value(node)
    place, base = layout(source), module_path(node)
    axes = axes_of_mean(reader, node)
    if place.batch in axes:
        raise UsageError(f"layer {base}: a mean over images; this model cannot be quantized")
    where = sorted(place.axis(axis) for axis in axes)
    others = [i + 1 for i in range(len(place.shape)) if i + 1 not in where]
    name = reader.source(source)
    name = transposed(reader, base, name, place.shape, [*others, *where])
    channels = math.prod(place.shape[i - 1] for i in others)
    count = math.prod(place.shape[i - 1] for i in where)
    plane = (channels, count, 1)
    if len(others) != 1 or len(where) != 2:
        path = f"{base}.reshape".lstrip(".")
        shape = {"shape": list(plane)}
        name = reader.append(path, "reshape", [name], plane, attributes=shape)
    name = reader.append(base or "mean", "global_avg_pool", [name], (channels, 1, 1))
    after = layout(node).shape
    if after != (channels, 1, 1):
        name = _shaped(reader, node, name, after)
    reader.alias[node] = name


def cast(reader: Reader, node: FxNode) -> None:
    """To another type of floats, which changes nothing; one to integers rounds, and is refused."""
    kind = node.meta["val"].dtype
    if not kind.is_floating_point:
        raise UsageError(
            f"layer {module_path(node) or '(root)'}: values are turned into "
            f"{str(kind).removeprefix('torch.')}, which has no integer form here; this model "
            "cannot be quantized"
        )
    same(reader, node)


def same(reader: Reader, node: FxNode) -> None:
    """What keeps values as they are; an expansion only where its readers repeat them."""
    source = _value(node)
    if source in reader.notes:
        reader.notes[node] = reader.notes[source]
        return
    a, b = layout(source), layout(node)
    expands = a.shape != b.shape
    if expands and any(user.target not in BROADCASTING for user in node.users):
        raise UsageError(
            f"layer {module_path(node)}: expanding {list(a.sizes)} to {list(b.sizes)} has no "
            "integer form here; this model cannot be quantized"
        )
    reader.alias[node] = reader.source(source)
