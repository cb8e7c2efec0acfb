"""What nodes and operations of an exported graph are called, for people."""

from __future__ import annotations

from typing import Any

from torch.fx import Node as FxNode


def module_path(node: FxNode) -> str:
    """Path of the innermost module a node comes from."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = [path for path, _ in stack.values()]
    return str(entries[-1]) if entries else ""


def named(target: Any) -> str:
    """Of an operation."""
    return str(getattr(target, "__name__", target))
