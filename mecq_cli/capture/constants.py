"""Values that depend on no image: position embeddings, bias tables, gains; as modules."""

from __future__ import annotations

import hashlib
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import GraphModule
from torch.fx import Node as FxNode


class Expression(nn.Module):
    """What a part of an exported graph computes from parameters alone.

    Whatever needs no parameter that can be trained is computed at once and kept as a buffer; the
    parameters are the model's own.

    Args:
        graph: the exported one.
        node: whose value it is; it depends on no image. Where it has one row for each image, all
            alike, the value has one.
        shape: of the result; the values are in the same order, and axes of one are repeated.
    """

    def __init__(self, graph: GraphModule, node: FxNode, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self._known: dict[str, str] = {}
        program = fx.Graph()
        root = nn.Module()
        program.output(self._copy(graph, node, program, root, {}))
        self.program = fx.GraphModule(root, program)

    def _copy(
        self,
        graph: GraphModule,
        node: FxNode,
        program: fx.Graph,
        root: nn.Module,
        done: dict[FxNode, FxNode],
    ) -> FxNode:
        if node in done:
            return done[node]
        if not _trainable(graph, node):
            name = f"fixed_{len(done)}"
            with torch.no_grad():
                root.register_buffer(name, _evaluate(graph, node, {}).detach().clone())
            done[node] = program.get_attr(name)
        elif node.op == "get_attr":
            name = f"parameter_{len(done)}"
            root.register_parameter(name, operator.attrgetter(str(node.target))(graph))
            done[node] = program.get_attr(name)
        else:

            def convert(value: Any) -> Any:
                if isinstance(value, FxNode):
                    if is_tensor(value):
                        return self._copy(graph, value, program, root, done)
                    return _evaluate(graph, value, {})
                return value

            arguments = fx.node.map_aggregate(node.args, convert)
            keywords = fx.node.map_aggregate(node.kwargs, convert)
            assert callable(node.target)
            done[node] = program.call_function(node.target, arguments, keywords)
        return done[node]

    def forward(self) -> Tensor:
        """The value."""
        value: Tensor = self.program()
        return value.float().reshape(self.shape)


class Number(nn.Module):
    """A number as a constant of so many axes of one."""

    value: Tensor

    def __init__(self, value: float, axes: int) -> None:
        super().__init__()
        self.register_buffer("value", torch.full((1,) * axes, value))

    def forward(self) -> Tensor:
        """The value."""
        return self.value


def is_tensor(node: FxNode) -> bool:
    """Whether a node of an exported graph yields tensors; parameters have no meta."""
    value = node.meta.get("val")
    several = isinstance(value, (list, tuple)) and all(isinstance(v, Tensor) for v in value)
    return node.op == "get_attr" or isinstance(value, Tensor) or several


def evaluated(graph: GraphModule, node: FxNode) -> Tensor:
    """The value of a node that depends on no image; a parameter where it depends on some."""
    with torch.no_grad():
        value: Tensor = _evaluate(graph, node, {}).detach().clone()
    return nn.Parameter(value, requires_grad=_trainable(graph, node))


def written(node: FxNode, done: dict[FxNode, str]) -> str:
    """A digest of how a value is computed from parameters; ``done`` has those that are known."""
    if node not in done:
        operands = fx.node.map_arg((node.args, node.kwargs), lambda n: written(n, done))
        text = f"{node.op} {node.target} {operands}"
        done[node] = hashlib.sha256(text.encode()).hexdigest()
    return done[node]


def _trainable(graph: GraphModule, node: FxNode) -> bool:
    if node.op == "get_attr":
        tensor: Tensor = operator.attrgetter(str(node.target))(graph)
        return tensor.requires_grad
    return any(_trainable(graph, source) for source in node.all_input_nodes)


def _evaluate(graph: GraphModule, node: FxNode, done: dict[FxNode, Any]) -> Any:
    """The value of a node, for one image."""
    if node not in done:
        if node.op == "get_attr":
            done[node] = operator.attrgetter(str(node.target))(graph)
        elif node.target is torch.ops.aten.sym_size.int:
            done[node] = 1
        else:
            assert callable(node.target)
            convert = lambda value: _evaluate(graph, value, done)  # noqa: E731
            arguments = fx.node.map_arg(node.args, convert)
            done[node] = node.target(*arguments, **fx.node.map_arg(node.kwargs, convert))
    return done[node]
