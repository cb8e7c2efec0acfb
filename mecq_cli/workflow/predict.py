"""`mecq predict`: the five likeliest classes of single images, their masks, or their boxes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mecq_cli.config import PredictConfig
from mecq_cli.data import normalize, read_image
from mecq_cli.data.augmentation import eval_transform
from mecq_cli.data.images import picture_of
from mecq_cli.errors import DataError, UsageError
from mecq_cli.events import Listener
from mecq_cli.storage import atomic_write
from mecq_cli.target import resolve_target
from mecq_cli.tasks.decoding import SCORE
from mecq_cli.tasks.drawing import as_image, boxed, over
from mecq_cli.tasks.figures import DETECT, SEGMENT
from mecq_cli.workflow.targets import Opened, open_artifact, open_onnx, require_artifact


def predict(config: PredictConfig, listener: Listener) -> dict[str, Any]:
    """Classes and probabilities (softmax of the logits) of each image, or masks, or boxes.

    Raises:
        UsageError: the target is an FP model's name, or a file exists already.
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
    if opened.task.name == SEGMENT:
        predictions = segmented(config, opened)
    elif opened.task.name == DETECT:
        predictions = detected(config, opened)
    elif config.output is not None:
        raise UsageError(
            f"--output: {target.name} classifies; only masks and boxes are written to files"
        )
    else:
        predictions = [_one(opened, path) for path in config.images]
    return {"target": target.name, "predictions": predictions}


def looked_at(opened: Opened, path: Path) -> tuple[Image.Image, torch.Tensor]:
    """A picture, and what is said of it: logits, or boxes."""
    if not path.exists():
        raise DataError(f"{path}: no such file; give an image")
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give its images, such as {path / '*.jpg'}")
    if not path.is_file():
        # Before it is opened: opening a pipe would wait for a writer.
        raise DataError(f"cannot use image {str(path)!r}: it is not a regular file; give an image")
    picture = Image.fromarray(read_image(path, advice=""))
    pixels = torch.tensor(eval_transform(opened.preprocessing)(picture))[None]
    with torch.no_grad():
        return picture, opened.answers(normalize(pixels, opened.preprocessing))[0]


def _one(opened: Opened, path: Path) -> dict[str, Any]:
    _, logits = looked_at(opened, path)
    probabilities = torch.softmax(logits.double(), 0)
    best = probabilities.topk(min(5, len(probabilities)))
    return {
        "image": str(path),
        "top5": [
            {"class": opened.classes[i], "index": int(i), "probability": float(p)}
            for p, i in zip(best.values, best.indices, strict=True)
        ],
    }


def _files(config: PredictConfig, endings: dict[str, str]) -> list[dict[str, Path]]:
    """The files that are written for each image, by what they hold.

    Raises:
        UsageError: one of them exists, or two would have one name.
    """
    folder = config.output or Path()
    names = [path.stem for path in config.images]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        kinds = " and ".join(f"{twice}.{ending}" for ending in endings.values())
        raise UsageError(f"two images are called {twice!r}, and both would get {kinds}; rename one")
    files = [
        {key: folder / f"{name}.{ending}" for key, ending in endings.items()} for name in names
    ]
    taken = next((f for pair in files for f in pair.values() if f.exists()), None)
    if taken is not None and not config.force:
        raise UsageError(f"{taken} exists; --force overwrites it, --output names another folder")
    return files


def _write(image: Image.Image, path: Path, *, force: bool) -> None:
    """As a PNG file."""
    data = io.BytesIO()
    image.save(data, "PNG")
    atomic_write(path, data.getvalue(), force=force)


def segmented(config: PredictConfig, opened: Opened) -> list[dict[str, Any]]:
    """Masks as PNG files, and drawn over their pictures.

    Raises:
        UsageError: one of the files exists, or two would have one name.
    """
    files = _files(config, {"mask": "mask.png", "overlay": "overlay.png"})
    return [
        _mask(opened, path, pair, force=config.force)
        for path, pair in zip(config.images, files, strict=True)
    ]


def _mask(opened: Opened, path: Path, files: dict[str, Path], *, force: bool) -> dict[str, Any]:
    picture, logits = looked_at(opened, path)
    mask, count = logits.argmax(0).to(torch.uint8).numpy(), len(opened.classes)
    preprocessing = opened.preprocessing
    if preprocessing.crop_mode == "squash" and preprocessing.crop_pct == 1:
        resized = Image.fromarray(mask).resize(picture.size, Image.Resampling.NEAREST)
        mask = np.asarray(resized)
    else:  # a part of the picture, as the network saw it
        picture = picture_of(eval_transform(preprocessing)(picture))
    drawn = {"mask": as_image(mask, count), "overlay": over(picture, mask, count)}
    for key, image in drawn.items():
        _write(image, files[key], force=force)
    shares = 100 * np.bincount(mask.ravel(), minlength=count) / mask.size
    order = [int(i) for i in np.argsort(-shares, kind="stable") if shares[i] > 0]
    return {
        "image": str(path),
        "classes": [
            {"class": opened.classes[i], "index": i, "share": float(shares[i])} for i in order
        ],
        **{key: str(file) for key, file in files.items()},
    }


def detected(config: PredictConfig, opened: Opened) -> list[dict[str, Any]]:
    """Boxes as JSON files, and drawn onto their pictures.

    Raises:
        UsageError: one of the files exists, or two would have one name.
    """
    files = _files(config, {"boxes": "boxes.json", "overlay": "boxes.png"})
    return [
        _boxes(opened, path, pair, force=config.force)
        for path, pair in zip(config.images, files, strict=True)
    ]


def _boxes(opened: Opened, path: Path, files: dict[str, Path], *, force: bool) -> dict[str, Any]:
    picture, answers = looked_at(opened, path)
    height, width = opened.preprocessing.input_size[1:]
    across, down = picture.width / width, picture.height / height
    found = []
    for *corners, score, label in answers[answers[:, SCORE] > 0].double().tolist():
        scaled = [c * s for c, s in zip(corners, (across, down, across, down), strict=True)]
        index = int(label)
        found.append(
            {
                "class": opened.classes[index],
                "index": index,
                "score": score,
                "box": [round(c, 2) for c in scaled],
            }
        )
    document = {"image": str(path), "size": [*picture.size], "detections": found}
    atomic_write(files["boxes"], (json.dumps(document, indent=2) + "\n").encode(), force=force)
    _write(boxed(picture, found, len(opened.classes)), files["overlay"], force=force)
    return document | {key: str(file) for key, file in files.items()}
