"""One row: quantize for two steps, evaluate, export twice, verify; in a process of its own.

    python -m tests.studies.support.one NAME SIZE BITS

Prints a JSON object. With BITS 0 the network only gets its quantizers.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import mecq_cli
from mecq_cli.config import EvalConfig, ExportConfig, from_flags, resolve
from mecq_cli.errors import MecqError
from mecq_cli.events import Listener
from mecq_cli.export import safetensors
from mecq_cli.insertion import BitPlan, insert
from mecq_cli.models.loading import load_model

IMAGES = 8
CLASSES = 10
REASON = 300


def make_images(folder: Path, size: int) -> None:
    """Noise and gradients, a folder a class."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(CLASSES):
            place = folder / split / f"class_{label}"
            place.mkdir(parents=True)
            for number in range(2 if split == "train" else 1):
                pixels = rng.normal(128 + 10 * (label - 5), 40, (size, size, 3))
                pixels += np.linspace(-60, 60, size)[:, None, None] * rng.normal()
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(place / f"{number}.png")


def run(name: str, size: int, bits: int) -> dict[str, Any]:
    """The row; what did not work has the reason in its place, and nothing after it is tried."""
    row: dict[str, Any] = {"size": size, "bits": bits}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        steps = (
            _whole(name, size, bits, place, row) if bits else [("capture", _capture(name, size))]
        )
        for step, call in steps:
            started = time.monotonic()
            try:
                row[step] = call() or True
            except MecqError as error:
                row[step] = str(error)[:REASON]
            except Exception as error:  # noqa: BLE001  # a row says what went wrong, whatever it was
                row[step] = f"{type(error).__name__}: {error}".splitlines()[0][:REASON]
            row[f"{step}_seconds"] = round(time.monotonic() - started, 1)
            if isinstance(row[step], str):
                break
    return row


def _capture(name: str, size: int) -> Callable[[], None]:
    def call() -> None:
        model = load_model(name, pretrained=False, num_classes=CLASSES, img_size=size).module
        insert(model, (3, size, size), BitPlan(4, 4))

    return call


def _whole(
    name: str, size: int, bits: int, place: Path, row: dict[str, Any]
) -> list[tuple[str, Callable[[], Any]]]:
    output, listener = place / "run", Listener()

    def quantize() -> None:
        make_images(place / "data", size)
        values = {
            "model": name, "wbits": bits, "abits": bits, "data": str(place / "data"),
            "pretrained": False, "img_size": size, "max_steps": 2, "batch_size": IMAGES,
            "calibration_images": IMAGES, "bn_images": IMAGES, "workers": 0, "device": "cpu",
            "compile": "off", "output": str(output),
        }  # fmt: skip
        mecq_cli.quantize_config(*resolve(None, values), listener)

    def evaluate() -> None:
        mecq_cli.evaluate(from_flags(EvalConfig, {"target": str(output)}), listener)
        model = safetensors.load(output / "model.safetensors")
        row["operations"] = dict(Counter(node.op for node in model.nodes))

    def export(form: str) -> Callable[[], None]:
        def call() -> None:
            values = {"run": str(output), "format": form, "images": IMAGES}
            document = mecq_cli.export_artifact(from_flags(ExportConfig, values), listener)
            row[f"{form}_bytes"] = document.get("bytes")

        return call

    return [
        ("quantize", quantize),
        ("evaluate", evaluate),
        ("onnx", export("onnx")),
        ("safetensors", export("safetensors")),
    ]


def main() -> None:
    """Print one row."""
    torch.set_num_threads(1)
    name, size, bits = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sys.stdout.write(json.dumps(run(name, size, bits)) + "\n")


if __name__ == "__main__":
    main()
