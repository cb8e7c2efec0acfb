"""Walks an exported graph and collects layers; how an operation becomes one, handlers know."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from mecq_cli.errors import UsageError
from mecq_cli.integer.ir import INPUT
from mecq_cli.layers import Layer

aten = torch.ops.aten
IGNORED = {aten.sym_size.int, operator.getitem}


class Reader:
    """Turns the nodes of an exported graph into layers.

    Args:
        graph: of `mecq_cli.capture.program`.
        handlers: what reads an operation, by its target.
    """

    def __init__(self, graph: GraphModule, handlers: Mapping[Any, Handler]) -> None:
        self.graph, self.handlers = graph, handlers
        self.layers: list[Layer] = []
        self.alias: dict[FxNode, str] = {}
        self.names: set[str] = set()
        self.modules: dict[str, nn.Module] = {}

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
        if self.alias[tensors[0]] != self.layers[-1].name:
            raise UsageError("the logits are not the last thing this model computes")

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


def pair(value: Any) -> list[int]:
    """One number or two as two."""
    if isinstance(value, int):
        return [value, value]
    values = [int(v) for v in value]
    return values * 2 if len(values) == 1 else values


Handler = Callable[[Reader, FxNode], None]
