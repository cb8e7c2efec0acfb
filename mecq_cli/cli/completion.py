"""What the completion of the shell offers, which must be quick: no torch, no timm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mecq_cli import models

NAMES = Path(models.__file__).with_name("names.txt")
"""A name a line; a test says how to write it anew."""

# Those that are in tables of modules that need torch; a test compares.
QUANTIZERS = (
    "auto", "lsq", "lsq+", "lsq-mid-rise", "pact", "dorefa", "ewgs", "lsq-thresholds", "n2uq",
)  # fmt: skip
ESTIMATORS = ("moe", "exact", "taylor")
TASKS = ("auto", "classify", "segment", "detect")
FORMATS = ("onnx", "safetensors", "compressed-tensors")


def model_names(incomplete: str) -> list[str]:
    """The names of models that begin so."""
    names = NAMES.read_text(encoding="utf-8").split()
    return [name for name in names if name.startswith(incomplete)]


def one_of(*names: str) -> Callable[[str], list[str]]:
    """Offers these names."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]
