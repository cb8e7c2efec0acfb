"""What a run was started with and may be moved, but not be changed: its images and its weights.

Another set of images of the same size would continue without a word, and end as a run that
nobody can repeat.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mecq_cli.data import Split
from mecq_cli.data.boxes import BoxFiles
from mecq_cli.errors import UsageError


def digest_of_images(*splits: Split) -> str:
    """SHA-256 of names, classes and boxes; pixels are not read."""
    whole = hashlib.sha256()
    for split in splits:
        whole.update(repr((split.classes, len(split))).encode())
        for path in split.paths:
            whole.update(path.encode("utf-8", "surrogateescape") + b"\0")
        whole.update(split.labels.tobytes())
        if isinstance(split.files, BoxFiles):
            for row in split.rows:
                whole.update(split.files.rows(int(row)).tobytes())
    return whole.hexdigest()


def digest_of_weights(module: nn.Module) -> str:
    """SHA-256 of names and values."""
    whole = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        whole.update(name.encode() + b"\0")
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        whole.update(memoryview(flat.numpy()))
    return whole.hexdigest()


def require_same(stored: Mapping[str, Any], now: Mapping[str, str]) -> None:
    """Compare what a checkpoint says with what is here; what it does not know is not compared.

    Raises:
        UsageError: they differ.
    """
    words = {
        "images": "the images in --data are not those the run was started with (other names, "
        "classes, numbers or boxes)",
        "weights": "the float weights are not those the run was started with",
    }
    for key, value in now.items():
        if stored.get(key, value) != value:
            raise UsageError(
                f"--resume: {words[key]}; they may be moved but not changed: give the same ones, "
                "or start a new run with another --output"
            )
