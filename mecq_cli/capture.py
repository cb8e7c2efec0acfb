"""A model, as the list of layers it really runs, found by torch.export.

Modules alone do not show what happens between them: residual adds, concatenations, padding.
The exported graph does. It is read in training mode, so that batch norm is still its own
operation, and the float operations become `Layer` records with the original parameters.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from mecq_cli.errors import UsageError
from mecq_cli.integer.ir import INPUT
from mecq_cli.layers import Layer, fuse

aten = torch.ops.aten


def capture(model: nn.Module, input_shape: tuple[int, int, int]) -> list[Layer]:
    """Layers of ``model`` in the order of execution; the last one gives the logits.

    Args:
        model: any classifier [N, C, H, W] -> [N, classes]; its parameters are shared, not copied.
        input_shape: (C, H, W).

    Raises:
        UsageError: the model cannot be exported, or has an operation without an integer form.
    """
    reader = _Reader(_export(model, input_shape))
    layers = reader.read()
    return fuse(layers)


def _export(model: nn.Module, input_shape: tuple[int, int, int]) -> GraphModule:
    was_training = model.training
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    example = torch.zeros(2, *input_shape, device=device)
    batch = ({0: torch.export.Dim.DYNAMIC},)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for training in (True, False):  # a second head only exists in training
                model.train(training)
                program = torch.export.export(model, (example,), dynamic_shapes=batch, strict=False)
                if len(program.graph_signature.user_outputs) == 1:
                    break
            graph = program.module()
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        raise UsageError(
            f"{type(model).__name__} cannot be read by torch.export at input {input_shape}: "
            f"{first[0] if first else type(error).__name__}"
        ) from error
    finally:
        model.train(was_training)
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(buffers[name])
    assert isinstance(graph, GraphModule)
    return graph


class _Reader:
    """Turns the nodes of an exported graph into layers."""

    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph
        self.layers: list[Layer] = []
        self.alias: dict[FxNode, str] = {}
        self.names: set[str] = set()
        self.modules: dict[str, nn.Module] = {}

    def read(self) -> list[Layer]:
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                self.alias[node] = INPUT
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                self._output(node)
        return self.layers

    def _output(self, node: FxNode) -> None:
        outputs = node.args[0]
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        tensors = [o for o in outputs if isinstance(o, FxNode)]
        if len(tensors) != 1 or tensors[0] not in self.alias:
            raise UsageError(
                f"a classifier with one output is needed; this model returns {len(tensors)}"
            )
        if self.alias[tensors[0]] != self.layers[-1].name:
            raise UsageError("the logits are not the last thing this model computes")

    def _call(self, node: FxNode) -> None:
        target = node.target
        handler = _HANDLERS.get(target)
        if handler is not None:
            handler(self, node)
        elif target in _IGNORED or not node.users:
            return
        else:
            path = module_path(node)
            name = getattr(target, "__name__", str(target))
            raise UsageError(
                f"layer {path or '(root)'}: the operation {name} has no integer form here yet; "
                f"this model cannot be quantized"
            )

    # -- helpers the handlers use -------------------------------------------------------------

    def argument(self, node: FxNode, index: int, name: str, default: Any = None) -> Any:
        """Positional or keyword argument of an aten call."""
        if len(node.args) > index:
            return node.args[index]
        return node.kwargs.get(name, default)

    def source(self, value: Any) -> str:
        """Name of the layer that made a value."""
        if not isinstance(value, FxNode) or value not in self.alias:
            raise UsageError(
                "an operation reads something that is neither the image nor a layer's output: "
                f"{value}; this model cannot be quantized"
            )
        return self.alias[value]

    def add(
        self, node: FxNode, kind: str, inputs: list[Any], suffix: str = "", **rest: Any
    ) -> None:
        """Append a layer and remember which value it makes."""
        base = module_path(node)
        name = ".".join(p for p in (base, suffix) if p) or kind
        unique, count = name, 1
        while unique in self.names:
            count += 1
            unique = f"{name}_{count}"
        self.names.add(unique)
        shape = tuple(int(n) for n in node.meta["val"].shape[1:])
        self.layers.append(Layer(unique, kind, [self.source(i) for i in inputs], shape, **rest))
        self.alias[node] = unique

    def parameter(self, value: Any) -> tuple[str, Tensor] | None:
        """(path, tensor) of a get_attr node, None for None."""
        if value is None:
            return None
        if not isinstance(value, FxNode) or value.op != "get_attr":
            raise UsageError(
                "a weight is computed from other weights (weight standardisation or sharing); "
                "this model cannot be quantized"
            )
        path = str(value.target)
        tensor = operator.attrgetter(path)(self.graph)
        return path, tensor


def module_path(node: FxNode) -> str:
    """Path of the innermost module a node comes from."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = [path for path, _ in stack.values()]
    return str(entries[-1]) if entries else ""


def _pair(value: Any) -> list[int]:
    if isinstance(value, int):
        return [value, value]
    values = [int(v) for v in value]
    return values * 2 if len(values) == 1 else values


def _four_sides(padding: Any, kernel: tuple[int, int], dilation: list[int]) -> list[int]:
    """Padding of a convolution as (top, left, bottom, right)."""
    if not isinstance(padding, str):
        return _pair(padding) * 2
    # "same" (its odd element comes last) or "valid"
    total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
    return [t // 2 for t in total] + [t - t // 2 for t in total]


def _set(module: nn.Module, name: str, tensor: Tensor | None) -> None:
    if tensor is None:
        module.register_parameter(name, None)
    else:
        module.register_parameter(
            name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
        )


def _conv2d(reader: _Reader, node: FxNode) -> None:
    weight = reader.parameter(node.args[1])
    bias = reader.parameter(reader.argument(node, 2, "bias"))
    assert weight is not None
    stride = _pair(reader.argument(node, 3, "stride", [1, 1]))
    dilation = _pair(reader.argument(node, 5, "dilation", [1, 1]))
    groups = int(reader.argument(node, 6, "groups", 1))
    o, i, kh, kw = weight[1].shape
    padding = _four_sides(reader.argument(node, 4, "padding", [0, 0]), (kh, kw), dilation)
    with torch.device("meta"):
        module = nn.Conv2d(i * groups, o, (kh, kw), groups=groups, bias=bias is not None)
    _set(module, "weight", weight[1])
    _set(module, "bias", bias[1] if bias else None)
    attributes = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }
    reader.add(node, "conv2d", [node.args[0]], attributes=attributes, module=module)


def _linear(reader: _Reader, node: FxNode) -> None:
    weight = reader.parameter(node.args[1])
    bias = reader.parameter(reader.argument(node, 2, "bias"))
    assert weight is not None
    with torch.device("meta"):
        module = nn.Linear(weight[1].shape[1], weight[1].shape[0], bias=bias is not None)
    _set(module, "weight", weight[1])
    _set(module, "bias", bias[1] if bias else None)
    reader.add(node, "linear", [node.args[0]], module=module)


def _batch_norm(reader: _Reader, node: FxNode) -> None:
    weight, bias = reader.parameter(node.args[1]), reader.parameter(node.args[2])
    mean, var = reader.parameter(node.args[3]), reader.parameter(node.args[4])
    if mean is None or var is None:
        raise UsageError(
            f"layer {module_path(node)}: batch norm without running statistics cannot be folded"
        )
    kind = nn.BatchNorm1d if len(node.meta["val"].shape) == 2 else nn.BatchNorm2d
    with torch.device("meta"):
        module = kind(mean[1].numel(), eps=float(node.args[7]))  # type: ignore[arg-type]
    device = mean[1].device
    _set(module, "weight", weight[1] if weight else torch.ones_like(mean[1]))
    _set(module, "bias", bias[1] if bias else torch.zeros_like(mean[1]))
    # The captured network owns its statistics: the FP model it came from stays as it is.
    module.register_buffer("running_mean", mean[1].detach().clone())
    module.register_buffer("running_var", var[1].detach().clone())
    module.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=device))
    reader.add(node, "batch_norm", [node.args[0]], module=module)


def _activation(reader: _Reader, node: FxNode) -> None:
    ceiling = float("inf")
    if node.target in _CLAMPS:
        low = reader.argument(node, 1, "min_val", reader.argument(node, 1, "min"))
        high = reader.argument(node, 2, "max_val", reader.argument(node, 2, "max"))
        if low is None or float(low) != 0.0:
            raise UsageError(
                f"layer {module_path(node)}: a clamp that does not start at 0 has no integer "
                "form here yet"
            )
        ceiling = float("inf") if high is None else float(high)
    elif node.target in (aten.relu6.default, aten.relu6_.default):
        ceiling = 6.0
    reader.add(node, "relu", [node.args[0]], suffix="", ceiling=ceiling)


def _dropout(reader: _Reader, node: FxNode) -> None:
    p = float(node.args[1])  # type: ignore[arg-type]
    if p == 0.0:
        reader.alias[node] = reader.source(node.args[0])
    else:
        reader.add(node, "dropout", [node.args[0]], module=nn.Dropout(p))


def _add(reader: _Reader, node: FxNode) -> None:
    a, b = node.args[0], node.args[1]
    if isinstance(a, FxNode) and a.op == "get_attr" and "num_batches_tracked" in str(a.target):
        return
    if not (isinstance(a, FxNode) and isinstance(b, FxNode)) or node.kwargs.get("alpha", 1) != 1:
        raise UsageError(f"layer {module_path(node)}: adding a constant has no integer form yet")
    shapes = [list(value.meta["val"].shape[1:]) for value in (a, b)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"layer {module_path(node)}: adding values of different shapes, {shapes[0]} and "
            f"{shapes[1]}, has no integer form here yet; this model cannot be quantized"
        )
    reader.add(node, "add", [a, b], suffix="add")


def _concat(reader: _Reader, node: FxNode) -> None:
    values = node.args[0]
    assert isinstance(values, (list, tuple))
    if int(reader.argument(node, 1, "dim", 0)) not in (1, -3):
        raise UsageError(f"layer {module_path(node)}: only channels can be concatenated")
    reader.add(node, "concat", list(values), suffix="concat")


def _max_pool(reader: _Reader, node: FxNode) -> None:
    kernel = _pair(node.args[1])
    stride = reader.argument(node, 2, "stride")
    attributes = {
        "kernel": kernel,
        "stride": _pair(stride) if stride else kernel,
        "padding": _pair(reader.argument(node, 3, "padding", 0)),
        "dilation": _pair(reader.argument(node, 4, "dilation", 1)),
        "ceil_mode": bool(reader.argument(node, 5, "ceil_mode", False)),
    }
    reader.add(node, "max_pool2d", [node.args[0]], attributes=attributes)


def _avg_pool(reader: _Reader, node: FxNode) -> None:
    kernel = _pair(node.args[1])
    stride = reader.argument(node, 2, "stride")
    attributes = {
        "kernel": kernel,
        "stride": _pair(stride) if stride else kernel,
        "padding": _pair(reader.argument(node, 3, "padding", 0)),
        "ceil_mode": bool(reader.argument(node, 4, "ceil_mode", False)),
        "count_include_pad": bool(reader.argument(node, 5, "count_include_pad", True)),
    }
    if reader.argument(node, 6, "divisor_override") is not None:
        raise UsageError(f"layer {module_path(node)}: avg_pool2d with a divisor of its own")
    reader.add(node, "avg_pool2d", [node.args[0]], attributes=attributes)


def _adaptive_avg_pool(reader: _Reader, node: FxNode) -> None:
    source = node.args[0]
    assert isinstance(source, FxNode)
    size = list(source.meta["val"].shape[2:])
    if _pair(node.args[1]) == [1, 1]:
        reader.add(node, "global_avg_pool", [source])
    elif _pair(node.args[1]) == size:
        reader.alias[node] = reader.source(source)
    else:
        raise UsageError(
            f"layer {module_path(node)}: adaptive pooling from {size} to {node.args[1]} has no "
            "integer form here yet"
        )


def _mean(reader: _Reader, node: FxNode) -> None:
    source = node.args[0]
    assert isinstance(source, FxNode)
    rank = len(source.meta["val"].shape)
    axes = reader.argument(node, 1, "dim")
    axes = sorted(int(d) % rank for d in (axes if isinstance(axes, (list, tuple)) else [axes]))
    if rank != 4 or axes != [2, 3]:
        raise UsageError(f"layer {module_path(node)}: a mean over axes {axes} has no integer form")
    reader.add(node, "global_avg_pool", [source])
    if not reader.argument(node, 2, "keepdim", False):
        pooled = reader.alias[node]
        reader.names.add(f"{pooled}.flatten")
        shape = (int(source.meta["val"].shape[1]),)
        reader.layers.append(Layer(f"{pooled}.flatten", "flatten", [pooled], shape))
        reader.alias[node] = f"{pooled}.flatten"


def _flatten(reader: _Reader, node: FxNode) -> None:
    """flatten, view and reshape to [N, -1]; anything else is refused."""
    source = node.args[0]
    assert isinstance(source, FxNode)
    before, after = source.meta["val"].shape, node.meta["val"].shape
    if len(before) == len(after):
        reader.alias[node] = reader.source(source)
    elif len(after) == 2 and str(before[0]) == str(after[0]):
        reader.add(node, "flatten", [source])
    else:
        raise UsageError(
            f"layer {module_path(node)}: reshaping {list(before)} to {list(after)} has no "
            "integer form here yet"
        )


def _slice(reader: _Reader, node: FxNode) -> None:
    source = node.args[0]
    assert isinstance(source, FxNode)
    shape = source.meta["val"].shape
    axis = int(reader.argument(node, 1, "dim", 0)) % len(shape)
    start = int(reader.argument(node, 2, "start", 0) or 0)
    end = reader.argument(node, 3, "end")
    step = int(reader.argument(node, 4, "step", 1))
    whole = end is None or (isinstance(end, int) and end >= 2**62)
    if start == 0 and whole and step == 1:
        reader.alias[node] = reader.source(source)
        return
    if axis == 0:
        raise UsageError(f"layer {module_path(node)}: images of a batch cannot be split")
    length = int(shape[axis])
    stop = length if whole else min(int(end), length)
    attributes = {"axes": [axis], "starts": [start], "ends": [stop], "steps": [step]}
    reader.add(node, "slice", [source], suffix="slice", attributes=attributes)


def _pad(reader: _Reader, node: FxNode) -> None:
    widths = [int(w) for w in node.args[1]]  # type: ignore[union-attr, arg-type]
    mode = reader.argument(node, 2, "mode", "constant")
    value = reader.argument(node, 3, "value", 0.0) or 0.0
    if mode != "constant" or float(value) != 0.0:
        raise UsageError(f"layer {module_path(node)}: only padding with zeros has an integer form")
    if min(widths) < 0:
        raise UsageError(
            f"layer {module_path(node)}: padding by {widths} has no integer form; cut with a slice"
        )
    pairs = list(zip(widths[::2], widths[1::2], strict=True))
    pairs += [(0, 0)] * (3 - len(pairs))
    attributes = {"before": [p[0] for p in pairs[::-1]], "after": [p[1] for p in pairs[::-1]]}
    reader.add(node, "pad", [node.args[0]], suffix="pad", attributes=attributes)


def _identity(reader: _Reader, node: FxNode) -> None:
    reader.alias[node] = reader.source(node.args[0])


_CLAMPS = (
    aten.hardtanh.default,
    aten.hardtanh_.default,
    aten.clamp.default,
    aten.clamp_.default,
    aten.clamp_min.default,
    aten.clamp_min_.default,
)

_HANDLERS: dict[Any, Callable[[_Reader, FxNode], None]] = {
    aten.conv2d.default: _conv2d,
    aten.conv2d.padding: _conv2d,
    aten.linear.default: _linear,
    aten.batch_norm.default: _batch_norm,
    aten.relu.default: _activation,
    aten.relu_.default: _activation,
    aten.relu6.default: _activation,
    aten.relu6_.default: _activation,
    **dict.fromkeys(_CLAMPS, _activation),
    aten.dropout.default: _dropout,
    aten.dropout_.default: _dropout,
    aten.add.Tensor: _add,
    aten.add_.Tensor: _add,
    aten.cat.default: _concat,
    aten.max_pool2d.default: _max_pool,
    aten.avg_pool2d.default: _avg_pool,
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool,
    aten.mean.dim: _mean,
    aten.flatten.using_ints: _flatten,
    aten.view.default: _flatten,
    aten.reshape.default: _flatten,
    aten.squeeze.dim: _flatten,
    aten.squeeze.dims: _flatten,
    aten.slice.Tensor: _slice,
    aten.pad.default: _pad,
    aten.contiguous.default: _identity,
    aten.clone.default: _identity,
    aten.detach.default: _identity,
}

_IGNORED = {aten.sym_size.int, operator.getitem}
