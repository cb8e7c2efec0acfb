"""A small network that segments the scenes of `tests.scenes`: the figures of docs/segmentation.md.

    python -m tests.scenes SCENES
    OMP_NUM_THREADS=1 python -m tests.studies.segment_scenes SCENES WORK [PICTURE.png]

Trains it in float (WORK/float.pth, which is used again), quantizes it in several ways, exports each
and measures it by the artifact and by the ONNX file. A line of JSON each; at last the picture.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn

import mecq_cli
from mecq_cli.config import EvalConfig
from mecq_cli.data import dataset_of, eval_batches, normalize, train_batches
from mecq_cli.events import Listener
from mecq_cli.tasks.drawing import over
from mecq_cli.tasks.registry import task_named
from tests.scenes import CLASSES, IGNORED

PREPROCESSING = mecq_cli.Preprocessing(
    (3, 96, 96), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop_pct=1.0, crop_mode="squash"
)
EPOCHS, BATCH = 10, 16
ARMS: dict[str, dict[str, Any]] = {
    "W4A4": {"wbits": 4, "abits": 4, "epochs": 3},
    "W2A2": {"wbits": 2, "abits": 2, "epochs": 4},
    "W4A4, MEC": {"wbits": 4, "abits": 4, "epochs": 3, "mec_weight": 10.0},
    "W4A4, MEC 300": {"wbits": 4, "abits": 4, "epochs": 3, "mec_weight": 300.0},
    "W2A2, MEC": {"wbits": 2, "abits": 2, "epochs": 4, "mec_weight": 10.0},
}
SHOWN = (3, 17, 24)
SIDE, GAP, TITLE = 160, 6, 22


def layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Block(nn.Module):
    """Residual, at half the size."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.second = layer(inputs, outputs, 2), layer(outputs, outputs)[:2]
        self.shortcut = nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


class Small(nn.Module):
    """Three residual stages, a pooled branch, and two resolutions that meet; 0.2 M weights."""

    def __init__(self, classes: int = len(CLASSES)) -> None:
        super().__init__()
        self.stem = layer(3, 16, 2)
        self.low, self.high, self.top = Block(16, 32), Block(32, 48), Block(48, 64)
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 16, 1), nn.ReLU())
        self.project, self.join = layer(80, 32), layer(64, 32)
        self.classifier = nn.Conv2d(32, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(self.stem(x))
        top = self.top(self.high(low))
        pooled = F.interpolate(self.pooled(top), top.shape[-2:], mode="bilinear")
        both = self.project(torch.cat([top, pooled], 1))
        both = F.interpolate(both, low.shape[-2:], mode="bilinear")
        logits = self.classifier(self.join(torch.cat([low, both], 1)))
        return F.interpolate(logits, x.shape[-2:], mode="bilinear")


def train(scenes: Path, path: Path) -> Small:
    """The float network."""
    torch.manual_seed(0)
    net, task = Small().to(memory_format=torch.channels_last), task_named("segment")
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    split, _ = task.open_training(str(scenes), None, 0)
    data = dataset_of(split, PREPROCESSING, train=True)
    steps = len(data) // BATCH
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=1e-2)
    schedule = CosineLRScheduler(optimizer, EPOCHS * steps, warmup_t=steps, t_in_epochs=False)
    for epoch in range(EPOCHS):
        for step, batch in enumerate(train_batches(data, batch_size=BATCH, epoch=epoch)):
            schedule.step_update(epoch * steps + step)
            loss = task.loss(net(normalize(batch.images, PREPROCESSING)), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        say({"epoch": epoch, "loss": float(loss.detach())})
    torch.save(net.state_dict(), path)
    return net.eval()


def say(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()


def picture(scenes: Path, networks: dict[str, Any], output: Path) -> None:
    """What each network makes of some scenes."""
    titles = ["picture", "mask", *networks]
    width, height = len(titles) * (SIDE + GAP) - GAP, len(SHOWN) * (SIDE + GAP) - GAP + TITLE
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, title in enumerate(titles):
        draw.text((column * (SIDE + GAP) + 4, 2), title, "black", font)
    dataset = dataset_of(task_named("segment").open_evaluation(str(scenes)), PREPROCESSING)
    chosen = [batch for n, batch in enumerate(eval_batches(dataset, batch_size=1)) if n in SHOWN]
    for row, batch in enumerate(chosen):
        image = Image.fromarray(batch.images[0].permute(1, 2, 0).contiguous().numpy())
        mask = batch.labels[0].numpy().copy()
        mask[mask == IGNORED] = 0
        masks = [mask]
        with torch.no_grad():
            for network in networks.values():
                logits = network(normalize(batch.images, PREPROCESSING))[0]
                masks.append(logits.argmax(0).numpy().astype(np.uint8))
        for column, cell in enumerate([image, *(over(image, m, len(CLASSES)) for m in masks)]):
            place = (column * (SIDE + GAP), TITLE + row * (SIDE + GAP))
            sheet.paste(cell.resize((SIDE, SIDE), Image.Resampling.NEAREST), place)
    sheet.quantize(256).save(output, optimize=True)


def main(scenes: Path, work: Path, output: Path | None) -> None:
    work.mkdir(parents=True, exist_ok=True)
    net = train(scenes, work / "float.pth")
    networks: dict[str, Any] = {"float": net}
    for name, settings in ARMS.items():
        run = work / name.replace(", ", "-").lower()
        result = mecq_cli.quantize(
            net, scenes, preprocessing=PREPROCESSING, output=run, batch_size=BATCH,
            calibration_images=128, bn_images=256, compile="off", device="cpu",
            resume=(run / "config.toml").exists(), **settings,
        )  # fmt: skip
        file = result.export(force=True)
        found = mecq_cli.evaluate(EvalConfig(target=str(file), data=str(scenes)), Listener())
        say({
            "arm": name, "float": result.float_miou, "miou": result.miou, "onnx": found["miou"],
            "simulator": result.summary["simulator_miou"], "iou": found["iou"],
            "bytes": result.summary["sizes"]["packed_bytes"], "onnx_bytes": file.stat().st_size,
            "fp32_bytes": result.summary["sizes"]["fp32_bytes"],
        })  # fmt: skip
        if "MEC" not in name:
            networks[name] = result.module
            if output is not None:
                picture(scenes, networks, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
