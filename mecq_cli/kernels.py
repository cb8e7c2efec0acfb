"""The operations of integer/ir.py in torch, exact, on integers carried as float32 tensors.

The simulator in evaluation mode and a loaded artifact both run on these. Products of integers
are accumulated where float32 is exact (|acc| < 2^24), otherwise the weight is split into two
halves of four bits whose sums are exact again, and the parts are joined in float64. On CUDA all
sums are in float64.

q tensors are [N, C, H, W], [N, K] or tokens [N, ..., K], float32, holding integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mecq_cli import token_kernels
from mecq_cli.functions import FUNCTIONS
from mecq_cli.integer.geometry import adaptive_windows, nearest
from mecq_cli.integer.ir import EXACT, INPUT, MOVES, SPREAD, Grid, IntegerModel, Node, spread
from mecq_cli.token_kernels import WITH_TENSORS, Tensors, scalar


def quantize(x: Tensor, grid: Grid) -> Tensor:
    """Float values to integers on ``grid``."""
    q = torch.round(x / scalar(grid.scale, x)) + grid.zero_point
    return torch.clamp(q, grid.qmin, grid.qmax)


def dequantize(q: Tensor, grid: Grid) -> Tensor:
    """Integers on ``grid`` to float values."""
    return (q - grid.zero_point) * scalar(grid.scale, q)


def run_node(
    node: Node,
    inputs: Sequence[Tensor],
    grids: Sequence[Grid | None],
    tensors: Tensors | None = None,
) -> Tensor:
    """One operation.

    Args:
        node: the operation.
        inputs: integers or floats, as ``grids`` say.
        grids: of the inputs, None for floats.
        tensors: those of the node, on the device of the inputs; made from the node if not given.
    """
    if node.op in ("conv2d", "linear", "lookup"):
        if tensors is None:
            tensors = node_tensors(node, inputs[0].device)
        if node.op == "lookup":
            return tensors["table"][inputs[0].int()].float()
        return _product(node, inputs[0], grids[0], tensors)
    if node.op in WITH_TENSORS:
        if tensors is None:
            tensors = node_tensors(node, inputs[0].device)
        return WITH_TENSORS[node.op](node, inputs[0], tensors)
    out = _OPERATIONS[node.op](node, inputs, grids)
    return _clipped(node, out, grids) if node.op in MOVES else out


def _clipped(node: Node, out: Tensor, grids: Sequence[Grid | None]) -> Tensor:
    """What was only moved, where that may lie outside of the node's range."""
    grid = node.grid
    if grid is None:
        return out
    sources = [_need(source) for source in grids]
    ends = [end for source in sources for end in (source.qmin, source.qmax)]
    if node.op == "pad":
        ends.append(sources[0].zero_point)
    inside = grid.qmin <= min(ends) and max(ends) <= grid.qmax
    return out if inside else out.clamp(grid.qmin, grid.qmax)


def node_tensors(node: Node, device: torch.device | None = None) -> dict[str, Tensor]:
    """The tensors of a node as torch tensors, none for most operations."""
    return {
        name: torch.from_numpy(np.ascontiguousarray(array)).to(device)
        for name, array in node.tensors.items()
    }


def _to_grid(acc: Tensor, multiplier: Tensor, grid: Grid) -> Tensor:
    q = torch.round(acc * multiplier) + grid.zero_point
    return torch.clamp(q, grid.qmin, grid.qmax)


def _need(grid: Grid | None) -> Grid:
    assert grid is not None, "an integer operation got a float input"
    return grid


def _multiply(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolution or matrix product, whatever the node is."""
    if node.op == "linear":
        return F.linear(x, weight, bias)
    attributes = node.attributes
    top, left, bottom, right = attributes["padding"]
    padding: tuple[int, int] = (top, left)
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    return F.conv2d(
        x,
        weight,
        bias,
        tuple(attributes["stride"]),
        padding,
        tuple(attributes["dilation"]),
        attributes["groups"],
    )


def _accumulate(node: Node, x: Tensor, tensors: Tensors, largest: int) -> Tensor:
    """fl(sum x W + b) for integers |x| <= ``largest``; the sum itself is exact."""
    weight, bias = tensors["weight"] * node.multiplier, tensors["bias"]
    shape = (1, -1, 1, 1) if node.op == "conv2d" else (1, -1)
    if x.is_cuda:
        # cuDNN is free to multiply float32 in TF32 or by Winograd's and Fourier's transforms.
        acc = _multiply(node, x.double(), weight.double(), None)
        return (acc + bias.double().reshape(shape)).float()
    reach = float(weight.flatten(1).double().abs().sum(1).max()) * largest
    if reach + float(bias.double().abs().max()) < EXACT:
        return _multiply(node, x, weight.float(), bias.float())
    high = torch.div(weight, 16, rounding_mode="floor")
    low = weight - 16 * high
    if reach / 8 < EXACT and float(low.flatten(1).float().sum(1).max()) * largest < EXACT:
        acc = _multiply(node, x, high.float(), None).double() * 16
        acc += _multiply(node, x, low.float(), None)
    else:
        acc = _multiply(node, x.double(), weight.double(), None)
    return (acc + bias.double().reshape(shape)).float()


def _product(node: Node, x: Tensor, grid: Grid | None, tensors: Tensors) -> Tensor:
    scale = tensors["weight_scale"]
    shape = (1, -1, 1, 1) if node.op == "conv2d" else (1, -1)
    if grid is None:
        weight = tensors["weight"].float()
        weight = weight * scale.reshape(-1, *([1] * (weight.dim() - 1)))
        return _multiply(node, x, weight, tensors["bias"])
    acc = _accumulate(node, x - grid.zero_point, tensors, grid.reach)
    multiplier = (scalar(grid.scale, x) * scale).reshape(shape)
    if node.grid is None:
        return acc * multiplier
    return _to_grid(acc, multiplier / scalar(node.grid.scale, x), node.grid)


def _add(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    if node.grid is None:
        return inputs[0] + inputs[1]
    sources = [_need(g) for g in grids]
    if spread(node.grid, *sources) > SPREAD:
        a, b = (
            (q.double() - g.zero_point) * (g.scale / node.grid.scale)
            for q, g in zip(inputs, sources, strict=True)
        )
        q = torch.round(a + b) + node.grid.zero_point
        return torch.clamp(q, node.grid.qmin, node.grid.qmax).float()
    a, b = (dequantize(q, g) for q, g in zip(inputs, sources, strict=True))
    return quantize(a + b, node.grid)


def _function(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    return FUNCTIONS[node.attributes["name"]](inputs[0], *node.attributes["parameters"])


def _mul(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    if node.grid is None:
        return inputs[0] * inputs[1]
    a, b = (dequantize(q, _need(g)) for q, g in zip(inputs, grids, strict=True))
    return quantize(a * b, node.grid)


def _clip(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    return torch.clamp(inputs[0], node.attributes["min"], node.attributes["max"])


def _max_pool(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    a = node.attributes
    return F.max_pool2d(
        inputs[0], a["kernel"], a["stride"], a["padding"], a["dilation"], a["ceil_mode"]
    )


def _mean(node: Node, acc: Tensor, count: Tensor, grid: Grid) -> Tensor:
    """Sums of ``count`` values, to the grid of the node or to floats."""
    scale = scalar(grid.scale, acc)
    if node.grid is None:
        return acc * (scale / count)
    return _to_grid(acc, scale / (scalar(node.grid.scale, acc) * count), node.grid)


def _global_avg_pool(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    q, grid = inputs[0], grids[0]
    if grid is None:
        return q.mean((2, 3), keepdim=True)
    count = q.shape[2] * q.shape[3]
    centred = q - grid.zero_point
    if count * grid.reach >= EXACT:
        centred = centred.double()
    acc = centred.sum((2, 3), keepdim=True).float()
    return _mean(node, acc, scalar(float(count), q), grid)


def _adaptive_avg_pool(
    node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]
) -> Tensor:
    """As products with matrices of zeros and ones: rows, then columns."""
    q, grid = inputs[0], grids[0]
    if grid is None:
        return F.adaptive_avg_pool2d(q, tuple(node.attributes["size"]))
    rows, columns = (
        _covers(windows, size, q)
        for windows, size in zip(adaptive_windows(node, q.shape[1:]), q.shape[2:], strict=True)
    )
    acc = (rows @ (q - grid.zero_point).double() @ columns.T).float()
    return _mean(node, acc, torch.outer(rows.sum(1), columns.sum(1)).float(), grid)


def _covers(windows: Sequence[tuple[int, int]], size: int, like: Tensor) -> Tensor:
    """[windows, size], 1 where a window holds a value."""
    place = torch.arange(size, device=like.device)
    return torch.stack([(place >= a) & (place < b) for a, b in windows]).double()


def _avg_pool(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    q, grid, a = inputs[0], grids[0], node.attributes
    window = (a["kernel"], a["stride"], a["padding"], a["ceil_mode"])
    if grid is None:
        return F.avg_pool2d(q, *window, a["count_include_pad"])

    def sums(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, *window, divisor_override=1)

    acc = sums(q - grid.zero_point)
    if a["count_include_pad"]:
        # Not always the whole window: ceil_mode lets the last ones reach beyond the padding.
        rows, columns = a["padding"]
        ones = F.pad(torch.ones_like(q[:1, :1]), (columns, columns, rows, rows), value=1.0)
        count = F.avg_pool2d(ones, a["kernel"], a["stride"], 0, a["ceil_mode"], divisor_override=1)[
            :, :, : acc.shape[2], : acc.shape[3]
        ]
    else:
        count = sums(torch.ones_like(q[:1, :1]))
    return _mean(node, acc, count, grid)


def _concat(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    return torch.cat(list(inputs), 1)


def _flatten(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    return inputs[0].flatten(1)


def _slice(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    a = node.attributes
    index = [slice(None)] * inputs[0].dim()
    for axis, start, end, step in zip(a["axes"], a["starts"], a["ends"], a["steps"], strict=True):
        index[axis] = slice(start, end, step)
    return inputs[0][tuple(index)]


def _reshape(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    return inputs[0].reshape(len(inputs[0]), *node.attributes["shape"])


def _transpose(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    return inputs[0].permute(0, *node.attributes["axes"])


def _upsample(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    rows, columns = (
        torch.tensor(places, device=inputs[0].device)
        for places in nearest(node, inputs[0].shape[1:])
    )
    return inputs[0].index_select(2, rows).index_select(3, columns)


def _resize(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    a = node.attributes
    return resize(inputs[0], a["size"], align_corners=a["align_corners"])


def resize(x: Tensor, size: Sequence[int], *, align_corners: bool) -> Tensor:
    """Bilinear, [N, C, H, W]; of one memory format, since the last bit depends on it."""
    x = x.contiguous()
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)


def _pad(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    before, after = node.attributes["before"], node.attributes["after"]
    widths = [w for b, a in zip(reversed(before), reversed(after), strict=True) for w in (b, a)]
    zero = 0 if grids[0] is None else grids[0].zero_point
    return F.pad(inputs[0], widths, value=float(zero))


def _quantize_node(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    return quantize(inputs[0], _need(node.grid))


def _dequantize_node(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    return dequantize(inputs[0], _need(grids[0]))


def _requantize_node(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    return quantize(dequantize(inputs[0], _need(grids[0])), _need(node.grid))


def _threshold_node(node: Node, inputs: Sequence[Tensor], grids: Sequence[Grid | None]) -> Tensor:
    code = torch.zeros_like(inputs[0])
    for threshold in node.attributes["thresholds"]:
        code += inputs[0] >= threshold
    return code * _need(node.grid).spacing


Operation = Callable[[Node, Sequence[Tensor], Sequence[Grid | None]], Tensor]

_OPERATIONS: Mapping[str, Operation] = {
    "quantize": _quantize_node,
    "dequantize": _dequantize_node,
    "requantize": _requantize_node,
    "threshold": _threshold_node,
    "add": _add,
    "mul": _mul,
    "clip": _clip,
    "function": _function,
    "max_pool2d": _max_pool,
    "avg_pool2d": _avg_pool,
    "global_avg_pool": _global_avg_pool,
    "adaptive_avg_pool2d": _adaptive_avg_pool,
    "concat": _concat,
    "flatten": _flatten,
    "slice": _slice,
    "reshape": _reshape,
    "transpose": _transpose,
    "upsample": _upsample,
    "resize": _resize,
    "pad": _pad,
    "roll": token_kernels.roll,
    "matmul": token_kernels.matmul,
    "softmax": token_kernels.softmax,
    "log_softmax": token_kernels.log_softmax,
    "l2_normalize": token_kernels.l2_normalize,
    "rms_norm": token_kernels.rms_norm,
}


def run_all(model: IntegerModel, images: Tensor) -> dict[str, Tensor]:
    """The output of every node by its name, for normalised float32 images [N, C, H, W]."""
    values: dict[str, Tensor] = {INPUT: images}
    grids: dict[str, Grid | None] = {INPUT: None}
    for node in model.nodes:
        inputs = [values[name] for name in node.inputs]
        values[node.name] = run_node(node, inputs, [grids[name] for name in node.inputs])
        grids[node.name] = node.grid
    return {node.name: values[node.name] for node in model.nodes}


def run_model(
    model: IntegerModel, images: Tensor, tensors: Sequence[Tensors] | None = None
) -> Tensor:
    """Logits [N, classes] of an `IntegerModel` for normalised float32 images [N, C, H, W].

    ``tensors`` are those of each node, on the device of the images, where they are there already.
    """
    values: dict[str, Tensor] = {INPUT: images}
    grids: dict[str, Grid | None] = {INPUT: None}
    last_use = {name: i for i, node in enumerate(model.nodes) for name in node.inputs}
    for i, node in enumerate(model.nodes):
        own = None if tensors is None else tensors[i]
        out = run_node(node, [values[n] for n in node.inputs], [grids[n] for n in node.inputs], own)
        values[node.name], grids[node.name] = out, node.grid
        for name in node.inputs:
            if last_use[name] == i:
                values.pop(name, None)
    output = model.output
    logits = values[output.name]
    return logits if output.grid is None else dequantize(logits, output.grid)
