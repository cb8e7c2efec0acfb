"""Operations as functions of others, in plain PyTorch, in a file a family.

The first axis is that of the images. A function gives None where it has no form for what it is
given: then the operation is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mecq_cli.capture.composed import (
    arithmetic,
    functions,
    maxima,
    products,
    repeats,
    shuffles,
    transposed,
)
from mecq_cli.capture.rewriting import Composition

__all__ = ["COMPOSITIONS"]

COMPOSITIONS: Mapping[Any, Composition] = {
    **arithmetic.TABLE,
    **functions.TABLE,
    **maxima.TABLE,
    **products.TABLE,
    **repeats.TABLE,
    **shuffles.TABLE,
    **transposed.TABLE,
}
