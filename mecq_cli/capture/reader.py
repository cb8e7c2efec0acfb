"""Walks an exported graph and collects layers; how an operation becomes one, handlers know."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from mecq_cli.errors import UsageError
from mecq_cli.integer.ir import INPUT
from mecq_cli.layers import Layer

aten = torch.ops.aten
IGNORED = {aten.sym_size.int}


class Reader:
    """Turns the nodes of an exported graph into layers.

    Args:
        graph: of `mecq_cli.capture.program`.
        handlers: what reads an operation, by its target.

    Attributes:
        layers: found so far.
        alias: the layer whose value a node is.
        names: of all layers.
        parts: begin and end of the parts that a node splits a value into, on the axis it names.
        noise: share of ones of a node that draws zeros and ones for stochastic depth.
    """

    def __init__(self, graph: GraphModule, handlers: Mapping[Any, Handler]) -> None:
        self.graph, self.handlers = graph, handlers
        self.layers: list[Layer] = []
        self.alias: dict[FxNode, str] = {}
        self.names: set[str] = set()
        self.parts: dict[FxNode, list[tuple[int, int]]] = {}
        self.noise: dict[FxNode, float] = {}

    def read(self) -> list[Layer]:
        """All layers in the order of execution."""
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
        handler = self.handlers.get(target)
        if handler is not None:
            handler(self, node)
        elif target in IGNORED or not node.users:
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
        unique, count = name, 1
        while unique in self.names:
            count += 1
            unique = f"{name}_{count}"
        self.names.add(unique)
        shape = tuple(int(n) for n in node.meta["val"].shape[1:])
        sources = [i if isinstance(i, str) else self.source(i) for i in inputs]
        self.layers.append(Layer(unique, kind, sources, shape, **rest))
        if owner is None:
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


def pair(value: Any) -> list[int]:
    """One number or two as two."""
    if isinstance(value, int):
        return [value, value]
    values = [int(v) for v in value]
    return values * 2 if len(values) == 1 else values


Handler = Callable[[Reader, FxNode], None]
