"""`mecq predict`: the five likeliest classes of single images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mecq_cli.config import PredictConfig
from mecq_cli.data import normalize, read_image
from mecq_cli.data.augmentation import eval_transform
from mecq_cli.errors import DataError, UsageError
from mecq_cli.events import Listener
from mecq_cli.runs import resolve_target
from mecq_cli.workflow.targets import Opened, open_artifact, open_onnx, require_artifact


def predict(config: PredictConfig, listener: Listener) -> dict[str, Any]:
    """Classes and probabilities (softmax of the logits) of each image.

    Raises:
        UsageError: the target is an FP model's name.
        DataError: an image cannot be read.
    """
    target = resolve_target(config.target)
    if target.run is not None:
        opened = open_artifact(require_artifact(target.run))
    elif target.kind == "artifact" and target.path is not None:
        opened = open_artifact(target.path)
    elif target.kind == "onnx" and target.path is not None:
        opened = open_onnx(target.path)
    else:
        raise UsageError(
            f"{target.name}: no such run or file; give a run folder, an integer .safetensors or an "
            ".onnx file; for FP models there is mecq eval"
        )
    return {
        "target": target.name,
        "predictions": [_one(opened, path) for path in config.images],
    }


def _one(opened: Opened, path: Path) -> dict[str, Any]:
    if not path.exists():
        raise DataError(f"{path}: no such image file")
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give its images, such as {path / '*.jpg'}")
    if not path.is_file():
        # Before it is opened: opening a pipe would wait for a writer.
        raise DataError(f"cannot use image {str(path)!r}: it is not a regular file; give an image")
    transform = eval_transform(opened.preprocessing)
    pixels = torch.tensor(transform(Image.fromarray(read_image(path))))[None]
    with torch.no_grad():
        logits = opened.predict(normalize(pixels, opened.preprocessing))[0]
    probabilities = torch.softmax(logits.double(), 0)
    best = probabilities.topk(min(5, len(probabilities)))
    return {
        "image": str(path),
        "top5": [
            {"class": opened.classes[i], "index": int(i), "probability": float(p)}
            for p, i in zip(best.values, best.indices, strict=True)
        ],
    }
