"""Names of models for the completion of the shell, which must be quick: no torch, no timm."""

from __future__ import annotations

from pathlib import Path

from mecq_cli import models

NAMES = Path(models.__file__).with_name("names.txt")
"""A name a line; a test says how to write it anew."""


def model_names(incomplete: str) -> list[str]:
    """The names of models that begin so."""
    names = NAMES.read_text(encoding="utf-8").split()
    return [name for name in names if name.startswith(incomplete)]
