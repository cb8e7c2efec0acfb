"""Operations that write to what they read."""

from __future__ import annotations

import operator

from torch.fx import Node as FxNode


def changes_in_place(node: FxNode) -> bool:
    """Whether an operation writes to one of its operands, which others may read later."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def changes_a_part(node: FxNode) -> bool:
    """Whether one writes to a view of a value that is read later."""
    view = node.args[0] if changes_in_place(node) else None
    while isinstance(view, FxNode) and _is_view(view):
        base = view.args[0]
        assert isinstance(base, FxNode)
        if any(node < user for user in base.users):
            return True
        view = base
    return False


def _is_view(node: FxNode) -> bool:
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    alias = schema.returns[0].alias_info if schema is not None and schema.returns else None
    return alias is not None and not alias.is_write
