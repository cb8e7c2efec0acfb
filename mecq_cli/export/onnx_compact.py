"""Makes a graph say the same in fewer bytes.

In a network of many small layers the names of intermediate tensors weigh as much as a tenth of
its 2-bit weights. What a reader looks for keeps its name: the last node of each operation and
its output, the input, the logits. All others go by the operation's number, and Conv says only
what is not the default.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import helper

_WINDOW = ("kernel_shape", "strides", "dilations", "pads", "group")


def compact(graph: onnx.GraphProto, operations: Sequence[str]) -> onnx.GraphProto:
    """Rename ``operation::part`` to ``number::part``, in place, and leave out what is implied.

    Args:
        graph: as `mecq_cli.export.onnx_builder` makes it.
        operations: names of the operations, in their order.
    """
    numbers = {name: str(number) for number, name in enumerate(operations)}

    def short(name: str) -> str:
        operation, mark, part = name.partition("::")
        return f"{numbers[operation]}::{part}" if mark and operation in numbers else name

    for node in graph.node:
        for names in (node.input, node.output):
            names[:] = [short(name) for name in names]
        if "::" in node.name:
            node.ClearField("name")
        if node.op_type == "Conv":
            _leave_out_defaults(node)
    for tensor in graph.initializer:
        tensor.name = short(tensor.name)
    return graph


def operations_of(outputs: Sequence[str], operations: Sequence[str]) -> list[str]:
    """The operation that each of some nodes of a compacted graph belongs to.

    Args:
        outputs: a tensor of each node, in the order of execution. A name that onnxruntime made up
            counts to the next known operation, since that has its own name at its last node.
        operations: as for `compact`.
    """
    known = {name: name for name in operations}
    known |= {str(number): name for number, name in enumerate(operations)}
    found: list[str] = []
    current = operations[-1]
    for output in reversed(outputs):
        current = known.get(output.partition("::")[0], current)
        found.append(current)
    return found[::-1]


def _leave_out_defaults(node: onnx.NodeProto) -> None:
    """Of a convolution; its kernel's shape is that of its weight."""
    for name in _WINDOW:
        found = [attribute for attribute in node.attribute if attribute.name == name]
        for attribute in found:
            value = helper.get_attribute_value(attribute)
            sides = {"strides": 1, "dilations": 1, "pads": 0}
            implied = name == "kernel_shape" or (name == "group" and value == 1)
            if implied or (name in sides and set(value) == {sides[name]}):
                node.attribute.remove(attribute)
