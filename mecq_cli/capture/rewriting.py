"""Operations that are made of others, written out in the exported graph before it is read.

What PyTorch itself composes of other operations (``einsum``, ``movedim``, ``narrow``, ...) is
replaced by these; what `composed/` has a function for, by the operations of that function. Blocks
of a context, such as ``torch.no_grad()``, are put where they stand. So `table.py` needs a handler
only for what has a form of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx import GraphModule
from torch.fx import Node as FxNode
from torch.fx.experimental.proxy_tensor import make_fx

from mecq_cli.capture.in_place import changes_a_part
from mecq_cli.capture.layout import size_of
from mecq_cli.capture.names import module_path, named
from mecq_cli.errors import UsageError

PART_OF = "mecq_part_of"
"""Key under which a node says which operation of the model it belongs to."""

_BLOCKS = {
    torch.ops.higher_order.wrap_with_set_grad_enabled: 1,
    torch.ops.higher_order.wrap_with_autocast: 4,
}
"""Operations that run a graph of their own, and which argument that is."""


Constant = Callable[[Any], bool]
"""Whether an operand depends on no image."""


class Composition(NamedTuple):
    """What an operation is made of.

    Attributes:
        call: takes what the operation takes.
        when: says for which nodes.
    """

    call: Callable[..., Any]
    when: Callable[[FxNode, Constant], bool] = lambda node, constant: True


class Rewriter:
    """Writes out the composed operations of a graph.

    Args:
        graph: changed in place.
        known: operations that stay as they are.
        compositions: of others, and of some of those where their condition holds.
    """

    def __init__(
        self,
        graph: GraphModule,
        known: Container[Any],
        compositions: Mapping[Any, Composition],
    ) -> None:
        self.graph, self.known, self.compositions = graph, known, compositions
        self._mode = _mode(graph)
        self._varying: set[FxNode] = set()
        self._made = 0

    def run(self) -> None:
        """All of them, those inside of others too."""
        node = next(iter(self.graph.graph.nodes))
        while node.op != "output":
            before = node.prev
            if node.op == "call_function":
                _require_whole(node)
                if self._written_out(node):
                    node = before.next
                    continue
            if node.op == "placeholder" or self._reads_images(node):
                self._varying.add(node)
            node = node.next
        # What nobody reads may have no form.
        self.graph.graph.eliminate_dead_code()
        self.graph.graph.lint()
        self.graph.recompile()

    def constant(self, value: Any) -> bool:
        """Whether a value depends on no image, as far as it has been read.

        Noise, which the reader looks after, counts as none that does.
        """
        return not isinstance(value, FxNode) or value not in self._varying

    def _reads_images(self, node: FxNode) -> bool:
        """Numbers of images, as in shapes, count as none."""
        number = isinstance(node.meta.get("val"), torch.SymInt)
        return not number and any(i in self._varying for i in node.all_input_nodes)

    def _written_out(self, node: FxNode) -> bool:
        target = node.target
        if target in _BLOCKS:
            where = _BLOCKS[target]
            block = node.args[where]
            assert isinstance(block, FxNode)
            inputs = list(node.args[where + 1 :])
            self._put(node, self._attribute(block).graph, inputs, prefix=f"{block.target}.")
            return True
        if not self._reads_images(node):
            return False  # it is computed as it is
        composition = self.compositions.get(target)
        if composition is not None and composition.when(node, self.constant):
            return self._replaced(node, composition.call, {})
        parts = getattr(target, "_can_decompose", None)
        if target in self.known or parts is None or not parts():
            return False
        assert isinstance(target, torch._ops.OpOverload)
        return self._replaced(node, target, {target: target.decompose})

    def _replaced(
        self, node: FxNode, call: Callable[..., Any], table: dict[Any, Callable[..., Any]]
    ) -> bool:
        """Put the operations of a function of PyTorch in the place of a node.

        It stays where the function gives None, fails, or gives something of another shape, and
        where PyTorch composes the operation of itself; the reader refuses it then.
        """
        try:
            body, leaves = self._traced(node, call, table)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
            # The function does not expect what the operation was given.
            return False
        result = body.output_node().args[0]
        again = any(inner.target is node.target for inner in body.nodes)
        if result is None or (again and not self.compositions.get(node.target)):
            return False
        taken = [u for u in node.users if u.target is operator.getitem and u.users]
        if isinstance(result, (tuple, list)) and any(result[int(u.args[1])] is None for u in taken):  # type: ignore[arg-type]
            return False
        if not _alike(result, node.meta["val"]):
            return False
        self._put(node, body, leaves)
        return True

    def _traced(
        self, node: FxNode, call: Callable[..., Any], table: dict[Any, Callable[..., Any]]
    ) -> tuple[fx.Graph, list[Any]]:
        leaves = node.all_input_nodes
        values = [self._value(leaf) for leaf in leaves]

        def function(*given: Any) -> Any:
            by_node = dict(zip(leaves, given, strict=True))
            args = fx.node.map_arg(node.args, by_node.__getitem__)
            return call(*args, **fx.node.map_arg(node.kwargs, by_node.__getitem__))

        with self._mode:
            body = make_fx(function, decomposition_table=table, pre_dispatch=True)(*values)
        for inner in body.graph.nodes:
            if inner.op == "get_attr":  # a tensor that the function made
                inner.target = self._stored(operator.attrgetter(str(inner.target))(body))
            inner.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
            inner.meta[PART_OF] = node.meta.get(PART_OF, node.target)
        return body.graph, list(leaves)

    def _value(self, leaf: FxNode) -> Any:
        """What a node yields, as far as tracing asks."""
        if "val" in leaf.meta:
            return leaf.meta["val"]
        tensor: Tensor = self._attribute(leaf)
        return self._mode.from_tensor(tensor, static_shapes=True)

    def _attribute(self, node: FxNode) -> Any:
        return operator.attrgetter(str(node.target))(self.graph)

    def _stored(self, tensor: Tensor) -> str:
        self._made += 1
        name = f"_written_out_{self._made}"
        self.graph.register_buffer(name, tensor)
        return name

    def _put(self, node: FxNode, body: fx.Graph, inputs: list[Any], prefix: str = "") -> None:
        """The nodes of a graph in the place of one that it stands for."""
        values: dict[FxNode, Any] = {}
        left = iter(inputs)
        result: Any = None
        with self.graph.graph.inserting_before(node):
            for inner in body.nodes:
                if inner.op == "placeholder":
                    values[inner] = next(left)
                elif inner.op == "output":
                    result = fx.node.map_arg(inner.args[0], values.__getitem__)
                else:
                    values[inner] = self.graph.graph.node_copy(inner, values.__getitem__)
                    if inner.op == "get_attr":
                        values[inner].target = prefix + str(inner.target)
        if isinstance(result, FxNode):
            node.replace_all_uses_with(result)
        else:
            for user in list(node.users):
                value = result[int(user.args[1])]  # type: ignore[arg-type]
                if value is not None:
                    user.replace_all_uses_with(value)
                self.graph.graph.erase_node(user)
        self.graph.graph.erase_node(node)


def _require_whole(node: FxNode) -> None:
    """Before an operation in place becomes one that is not."""
    if changes_a_part(node):
        raise UsageError(
            f"layer {module_path(node) or '(root)'}: the operation {named(node.target)} changes a "
            "part of a value in place, which has no form here (torch.cat has); this model cannot "
            "be quantized"
        )


def _alike(result: Any, value: Any) -> bool:
    """Whether nodes yield tensors of these shapes, as far as they yield any."""
    if isinstance(result, (tuple, list)):
        pairs = zip(result, value, strict=True)
        return all(made is None or _alike(made, wanted) for made, wanted in pairs)
    made, wanted = ([size_of(n) for n in v.shape] for v in (result.meta["val"], value))
    return made == wanted


def _mode(graph: GraphModule) -> Any:
    """In which the graph was exported: its values have shapes and no content."""
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            return node.meta["val"].fake_mode
    raise AssertionError("a graph without inputs")
