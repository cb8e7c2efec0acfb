"""Walks an exported graph and collects layers; how an operation becomes one, handlers know."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from mecq_cli.capture.constants import Expression, Number, evaluated, is_tensor, written
from mecq_cli.capture.in_place import changes_in_place
from mecq_cli.capture.layout import Layout, layout
from mecq_cli.capture.names import module_path, named
from mecq_cli.capture.rewriting import PART_OF
from mecq_cli.errors import UsageError
from mecq_cli.integer.ir import INPUT
from mecq_cli.layers import Layer

aten = torch.ops.aten
IGNORED = {
    *(aten.sym_size.int, aten._assert_tensor_metadata.default),
    *(operator.mul, operator.add, operator.sub, operator.floordiv, operator.truediv),
}
RANDOM = {
    *(aten.bernoulli_.float, aten.bernoulli.p, aten.bernoulli.default),
    *(aten.rand.default, aten.randn.default, aten.rand_like.default),
}
PLANAR = {
    *("conv2d", "max_pool2d", "avg_pool2d", "global_avg_pool", "flatten", "pad", "group_norm"),
    *("resize", "upsample", "adaptive_avg_pool2d"),
}
"""Kinds of layers that read [N, C, H, W] or whole images."""


class Reader:
    """Turns the nodes of an exported graph into layers.

    Args:
        graph: of `mecq_cli.capture.program`.
        handlers: what reads an operation, by its target.

    Attributes:
        layers: found so far.
        input_shape: of an image.
        alias: the layer whose value a node is.
        names: of all layers.
        constants: nodes whose value depends on no image.
        parts: nodes that split a value.
        notes: of the length of rows, by which they will be divided.
        noise: share of ones of a node that draws zeros and ones for stochastic depth.
    """

    def __init__(self, graph: GraphModule, handlers: Mapping[Any, Handler]) -> None:
        self.graph, self.handlers = graph, handlers
        self.layers: list[Layer] = []
        self.input_shape: tuple[int, ...] = ()
        self.alias: dict[FxNode, str] = {}
        self.names = {INPUT}
        self.constants: set[FxNode] = set()
        self.parts: set[FxNode] = set()
        self.notes: dict[FxNode, Any] = {}
        self.noise: dict[FxNode, float] = {}
        self._evaluated: dict[str, Tensor] = {}
        self._written: dict[FxNode, str] = {}
        self._made: dict[tuple[Any, tuple[int, ...]], str] = {}

    def read(self) -> list[Layer]:
        """All layers in the order of execution."""
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                self.alias[node] = INPUT
                self.input_shape = tuple(int(n) for n in node.meta["val"].shape[1:])
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
        self._keep(self.alias[tensors[0]])
        if not self.layers:
            raise UsageError("this model computes nothing from its input")

    def _keep(self, output: str) -> None:
        """Leave out what the output does not need, such as heads for training alone."""
        wanted = {output}
        for layer in reversed(self.layers):
            if layer.name in wanted:
                wanted.update(layer.inputs)
        self.layers = [layer for layer in self.layers if layer.name in wanted]

    def _call(self, node: FxNode) -> None:
        target = node.target
        if self._is_constant(node):
            self.constants.add(node)
            return
        handler = self.handlers.get(target)
        if handler is not None:
            self._handled(node, handler)
        elif target in IGNORED or not (node.users or changes_in_place(node)):
            return
        else:
            path = module_path(node)
            name = named(target)
            why = "has no integer form here yet"
            if PART_OF in node.meta:
                why = f"has no integer form here yet (it takes {name})"
                name = named(node.meta[PART_OF])
            elif changes_in_place(node):
                why = "changes a value in place, which has no form here (torch.cat has)"
            raise UsageError(
                f"layer {path or '(root)'}: the operation {name} {why}; this model cannot be "
                "quantized"
            )

    def _handled(self, node: FxNode, handler: Handler) -> None:
        try:
            handler(self, node)
        except UsageError as error:
            if PART_OF not in node.meta:
                raise
            raise UsageError(f"{error} (a part of {named(node.meta[PART_OF])})") from None

    def _is_constant(self, node: FxNode) -> bool:
        """Whether a value depends on no image; numbers of them, as in shapes, count as none."""
        return (
            is_tensor(node)
            and node.target not in RANDOM
            and not any(i in self.alias or i in self.parts for i in node.all_input_nodes)
            and all(self.is_constant(i) for i in node.all_input_nodes if is_tensor(i))
        )

    # -- helpers the handlers use -------------------------------------------------------------

    def argument(self, node: FxNode, index: int, name: str, default: Any = None) -> Any:
        """Positional or keyword argument of an aten call."""
        if len(node.args) > index:
            return node.args[index]
        return node.kwargs.get(name, default)

    def is_constant(self, value: Any) -> bool:
        """Whether it is a number, a parameter, or computed from such alone."""
        if isinstance(value, (int, float)):
            return True
        return isinstance(value, FxNode) and (value.op == "get_attr" or value in self.constants)

    def source(self, value: Any, like: FxNode | None = None) -> str:
        """Name of the layer that made a value; a constant becomes one that fits ``like``."""
        if like is not None and self.is_constant(value):
            return self.constant(value, layout(like))
        if not isinstance(value, FxNode) or value not in self.alias:
            raise UsageError(
                "an operation reads something that is neither the image nor a layer's output: "
                f"{value}; this model cannot be quantized"
            )
        return self.alias[value]

    def add(
        self,
        node: FxNode,
        kind: str,
        inputs: list[Any],
        suffix: str = "",
        owner: FxNode | None = None,
        **rest: Any,
    ) -> None:
        """Append a layer and remember which value it makes.

        Args:
            node: of which the shape is taken; its value is the layer's.
            kind, rest: as of `Layer`.
            inputs: nodes, or names of layers.
            suffix: to the name.
            owner: the node that really is read, where the layer is an addition of ours to what
                ``node`` makes, whose value stays as it is.
        """
        base = module_path(owner or node)
        name = ".".join(p for p in (base, suffix) if p) or kind
        if kind in PLANAR:
            for value in inputs:
                self.require_plain(node, value)
        sources = [i if isinstance(i, str) else self.source(i, node) for i in inputs]
        unique = self.append(name, kind, sources, layout(node).shape, **rest)
        if owner is None:
            self.alias[node] = unique

    def append(
        self, name: str, kind: str, sources: list[str], shape: tuple[int, ...], **rest: Any
    ) -> str:
        """Append a layer that reads others by name; returns its name, which is made unique."""
        if not shape:
            raise UsageError(
                f"layer {name or '(root)'}: a single number for each image, on no axis of its own, "
                "has no integer form here (with keepdim it has); this model cannot be quantized"
            )
        # The root has no name; two colons are for names that the program makes.
        name = name.lstrip(".").replace("::", ":")
        unique, count = name, 1
        while unique in self.names:
            count += 1
            unique = f"{name}_{count}"
        self.names.add(unique)
        self.layers.append(Layer(unique, kind, sources, shape, **rest))
        return unique

    def require_plain(self, node: FxNode, value: Any) -> None:
        """Raise UsageError unless a value has the images on its first axis, and nothing else."""
        if isinstance(value, FxNode) and value in self.alias and not layout(value).plain:
            raise UsageError(
                f"layer {module_path(node)}: it reads {[str(s) for s in value.meta['val'].shape]}, "
                "of which the first axis is not that of the images; this model cannot be quantized"
            )

    def constant(self, value: Any, like: Layout) -> str:
        """A layer that puts out a constant, with as many axes as what it is combined with."""
        axes = len(like.shape)
        if isinstance(value, FxNode):
            tensor = value.meta["val"] if value.op != "get_attr" else self.attribute(value)
            sizes = [1 if isinstance(n, torch.SymInt) else int(n) for n in tensor.shape]
            whole = len(sizes) == len(like.sizes)
            # The row of each image is the same one.
            if whole and (like.batch != 0 or sizes.pop(0) != 1):
                raise UsageError(
                    f"{value.name}: a constant of shape {list(tensor.shape)} differs from image "
                    "to image; this model cannot be quantized"
                )
            shape = (*(1,) * (axes - len(sizes)), *sizes)
        else:
            shape = (1,) * axes
        key = (value, shape)
        if key not in self._made:
            if isinstance(value, FxNode):
                path = str(value.target) if value.op == "get_attr" else module_path(value)
                name = path if value.op == "get_attr" else f"{path}.constant".lstrip(".")
                module: nn.Module = Expression(self.graph, value, shape)
            else:
                name, module = "number", Number(float(value), axes)
            self._made[key] = self.append(name, "constant", [INPUT], shape, module=module)
        return self._made[key]

    def attribute(self, node: FxNode) -> Tensor:
        """The tensor of a get_attr node."""
        tensor: Tensor = operator.attrgetter(str(node.target))(self.graph)
        return tensor

    def parameter(self, value: Any) -> tuple[str, Tensor] | None:
        """(path, tensor) of a get_attr node, None for None.

        What is computed from parameters alone, as by weight standardization, is computed here once
        and trained as it is from then on.
        """
        if value is None:
            return None
        if isinstance(value, FxNode) and value in self.constants:
            key = written(value, self._written)
            if key not in self._evaluated:  # a layer that is run twice has one weight
                self._evaluated[key] = evaluated(self.graph, value)
            return module_path(value), self._evaluated[key]
        if not isinstance(value, FxNode) or value.op != "get_attr":
            where = module_path(value) if isinstance(value, FxNode) else ""
            raise UsageError(
                f"layer {where or '(root)'}: a weight that is computed from the images has no "
                "integer form; this model cannot be quantized"
            )
        path = str(value.target)
        tensor = operator.attrgetter(path)(self.graph)
        return path, tensor


def pair(value: Any) -> list[int]:
    """One number or two as two."""
    if isinstance(value, int):
        return [value, value]
    values = [int(v) for v in value]
    return values * 2 if len(values) == 1 else values


Handler = Callable[[Reader, FxNode], None]
