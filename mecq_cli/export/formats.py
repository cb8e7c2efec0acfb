"""Formats of one file by name, beside ONNX and its profiles (`mecq_cli.export.onnx`)."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mecq_cli.errors import UsageError
from mecq_cli.export import safetensors
from mecq_cli.integer.ir import IntegerModel

Predict = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Normalised images [N, C, H, W] -> logits [N, classes]."""


class Format(NamedTuple):
    """What ``mecq export --format NAME`` writes, and how it is checked.

    Attributes:
        suffix: of the file, as ".npz".
        to_bytes: the whole content; the same model gives the same bytes.
        read: a file as the integer model it holds, or as what runs it. Its logits must be those of
            the simulator.
    """

    suffix: str
    to_bytes: Callable[[IntegerModel], bytes]
    read: Callable[[Path], IntegerModel | Predict]


FORMATS = {
    "safetensors": Format(".safetensors", safetensors.to_bytes, safetensors.load),
}


def require_format(name: str) -> None:
    """Raise UsageError unless ``mecq export`` can write a format of that name."""
    known = ["onnx", *FORMATS, "compressed-tensors"]
    if name not in known:
        near = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UsageError(f"--format: got {name!r}; {hint}allowed: {', '.join(known)}")
