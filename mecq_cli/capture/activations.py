"""Handlers of activation functions and dropout."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import Node as FxNode

from mecq_cli.capture.reader import Reader, module_path
from mecq_cli.capture.tokens import bounded_norm
from mecq_cli.errors import UsageError

aten = torch.ops.aten


CLAMPS = (
    aten.hardtanh.default,
    aten.hardtanh_.default,
    aten.clamp.default,
    aten.clamp_.default,
    aten.clamp_min.default,
    aten.clamp_min_.default,
)


def activation(reader: Reader, node: FxNode) -> None:
    """ReLU, ReLU6, and clamps that start at zero."""
    if node.args[0] in reader.notes:
        bounded_norm(reader, node)
        return
    ceiling = float("inf")
    if node.target in CLAMPS:
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


def dropout(reader: Reader, node: FxNode) -> None:
    """Dropout; nothing at all where it drops nothing."""
    p = float(node.args[1])  # type: ignore[arg-type]
    if p == 0.0:
        reader.alias[node] = reader.source(node.args[0])
    else:
        reader.add(node, "dropout", [node.args[0]], module=nn.Dropout(p))
