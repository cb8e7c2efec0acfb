"""`mecq demo`: the whole path in about a minute, offline, on handwritten digits.

The images are the 1,797 digits that scikit-learn ships (UCI, 8 x 8 pixels). They are written as
an ordinary image folder, a small ResNet is trained on them in float, and the rest is what any
user would do: quantize to 2 bits, export, verify.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save as to_safetensors
from sklearn.datasets import load_digits
from torch import nn

from mecq_cli.config import DemoConfig, ExportConfig, QuantizeConfig
from mecq_cli.data import ImageDataset, normalize, open_training, train_batches
from mecq_cli.errors import EnvironmentFailure, UsageError
from mecq_cli.events import Listener
from mecq_cli.models.loading import load_model
from mecq_cli.models.order import channels_last
from mecq_cli.runs import RUNS
from mecq_cli.storage import atomic_write
from mecq_cli.workflow.export import export
from mecq_cli.workflow.quantize import quantize

MODEL = "resnet20_cifar"
SIZE = 16
"""Pixels: twice the original, so that three stages still have something to look at."""

EVERY = 5
"""One image in five is for validation."""

FP_EPOCHS = 8
QAT_EPOCHS = 8


def demo(config: DemoConfig, listener: Listener) -> dict[str, Any]:
    """Train, quantize to W2A2, evaluate, export both formats, verify.

    Raises:
        UsageError: the folder is in use and ``force`` was not given.
        EnvironmentFailure: it cannot be made.
    """
    folder = config.output or RUNS / "demo"
    run, data, weights = folder / "run", folder / "digits", folder / "float.safetensors"
    if run.exists() and not config.force:
        raise UsageError(f"{folder}: there was a demo before; --force starts it over")
    others = sorted(path.name for path in folder.glob("*") if path not in (run, data, weights))
    if others:
        raise UsageError(
            f"{folder}: holds other files ({', '.join(others[:3])}); --output names a new folder"
        )
    for mine in (data, weights):
        if mine.exists() and not config.force:
            raise UsageError(f"{mine} exists; --force overwrites it, --output gives another place")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFailure(
            f"{folder}: cannot be made: {error.strerror}; give another --output"
        ) from error
    write_digits(data)
    listener.note(f"wrote 1,797 handwritten digits to {data}")
    train_float(data, weights, listener)
    summary = quantize(
        QuantizeConfig(
            model=MODEL,
            wbits=2,
            abits=2,
            data=str(data),
            checkpoint=weights,
            img_size=SIZE,
            epochs=QAT_EPOCHS,
            batch_size=64,
            compile="off",
            output=run,
            force=True,
        ),
        {},
        listener,
    )
    exports = [
        export(ExportConfig(run=str(run), format="onnx", force=True), listener),
        export(ExportConfig(run=str(run), format="safetensors", force=True), listener),
    ]
    return {**summary, "exports": exports}


def write_digits(folder: Path) -> None:
    """The digits as train/ and val/ with a folder a class."""
    digits = load_digits()
    pixels = np.clip(digits.images * (255.0 / 16.0), 0, 255).round().astype(np.uint8)
    for number, (image, label) in enumerate(zip(pixels, digits.target, strict=True)):
        split = "val" if number % EVERY == 0 else "train"
        path = folder / split / str(label) / f"{number:04d}.png"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        large = Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        large.convert("RGB").save(path)


def train_float(data: Path, weights: Path, listener: Listener) -> None:
    """A float network to start from, as a .safetensors state dict."""
    torch.manual_seed(0)
    loaded = load_model(MODEL, pretrained=False, num_classes=10, img_size=SIZE)
    model: nn.Module = channels_last(loaded.module).train()
    split, _ = open_training(data)
    dataset = ImageDataset(split, loaded.preprocessing, train=True)
    steps = FP_EPOCHS * (len(dataset) // 64)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    listener.note("a float network is trained first")
    listener.start("train float", steps)
    done = 0
    for epoch in range(FP_EPOCHS):
        for batch in train_batches(dataset, batch_size=64, epoch=epoch):
            loss = F.cross_entropy(
                model(normalize(batch.images, loaded.preprocessing)), batch.labels
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            listener.advance("train float", done)
    listener.finish("train float")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    atomic_write(weights, to_safetensors(state), force=True)
