"""Networks that segment the scenes of `tests.scenes`: the figures of docs/segmentation.md.

    python -m tests.scenes SCENES
    OMP_NUM_THREADS=1 python -m tests.studies.segment_scenes SCENES WORK [--picture FILE]
    OMP_NUM_THREADS=1 python -m tests.studies.segment_scenes SCENES WORK \\
        --model lraspp_mobilenet_v3_large --seeds 2

Trains a network in float (WORK/float.pth, which is used again): a small one, or one with a name.
Quantizes it in several ways with several seeds, exports each and measures it by the artifact and by
the ONNX file. A line of JSON for each, and one with mean and standard deviation for each way; at
last the picture. Runs that are there are not made again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import mecq_cli
from mecq_cli.config import EvalConfig
from mecq_cli.data import dataset_of, eval_batches, normalize
from mecq_cli.errors import NumericError
from mecq_cli.events import Listener
from mecq_cli.models.loading import load_model
from mecq_cli.tasks.drawing import over
from mecq_cli.tasks.registry import task_named
from tests.blocks import Block, layer
from tests.scenes import CLASSES, IGNORED
from tests.studies.floats import say, train_in_float

PREPROCESSING = mecq_cli.Preprocessing(
    (3, 96, 96), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop_pct=1.0, crop_mode="squash"
)
SMALL, BATCH = "small", 16
SIZE, EPOCHS = 128, 40
"""Of networks with a name; the small one is trained for 10 epochs."""
BITS: dict[str, dict[str, Any]] = {
    "W4A4": {"wbits": 4, "abits": 4, "epochs": 3},
    "W2A2": {"wbits": 2, "abits": 2, "epochs": 4},
}
TERMS: dict[str, dict[str, Any]] = {
    "no entropy term": {"mec_weight": 0.0},
    "default": {},
    "weight 300": {"mec_weight": 300.0},
}
SHOWN = (3, 17, 24)
SIDE, GAP, TITLE = 160, 6, 22


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


def network(name: str) -> tuple[nn.Module, mecq_cli.Preprocessing, int]:
    """With random weights; its preprocessing; epochs of float training."""
    torch.manual_seed(0)
    if name == SMALL:
        return Small(), PREPROCESSING, 10
    loaded = load_model(name, pretrained=False, num_classes=len(CLASSES), img_size=SIZE)
    return loaded.module, loaded.preprocessing, EPOCHS


def train(
    net: nn.Module, preprocessing: mecq_cli.Preprocessing, epochs: int, scenes: Path, path: Path
) -> None:
    """In float, or by the weights that are there."""
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        net.eval()
        return
    net.to(memory_format=torch.channels_last)
    task = task_named("segment")
    split, _ = task.open_training(str(scenes), None, 0)
    data = dataset_of(split, preprocessing, train=True)
    for found in train_in_float(net, task, data, epochs=epochs, batch_size=BATCH, lr=4e-3):
        say(found)
    torch.save(net.state_dict(), path)
    net.eval()


def picture(
    scenes: Path, preprocessing: mecq_cli.Preprocessing, networks: dict[str, Any], output: Path
) -> None:
    """What each network makes of some scenes."""
    titles = ["picture", "mask", *networks]
    width, height = len(titles) * (SIDE + GAP) - GAP, len(SHOWN) * (SIDE + GAP) - GAP + TITLE
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, title in enumerate(titles):
        draw.text((column * (SIDE + GAP) + 4, 2), title, "black", font)
    dataset = dataset_of(task_named("segment").open_evaluation(str(scenes)), preprocessing)
    chosen = [batch for n, batch in enumerate(eval_batches(dataset, batch_size=1)) if n in SHOWN]
    for row, batch in enumerate(chosen):
        image = Image.fromarray(batch.images[0].permute(1, 2, 0).contiguous().numpy())
        mask = batch.labels[0].numpy().copy()
        mask[mask == IGNORED] = 0
        masks = [mask]
        with torch.no_grad():
            for network in networks.values():
                logits = network(normalize(batch.images, preprocessing))[0]
                masks.append(logits.argmax(0).numpy().astype(np.uint8))
        for column, cell in enumerate([image, *(over(image, m, len(CLASSES)) for m in masks)]):
            place = (column * (SIDE + GAP), TITLE + row * (SIDE + GAP))
            sheet.paste(cell.resize((SIDE, SIDE), Image.Resampling.NEAREST), place)
    sheet.quantize(256).save(output, optimize=True)


def measure(
    net: nn.Module, preprocessing: mecq_cli.Preprocessing, scenes: Path, run: Path, **settings: Any
) -> tuple[dict[str, Any], Any]:
    """Quantize, export, and measure the ONNX file; the integer network, too."""
    result = mecq_cli.quantize(
        net, scenes, preprocessing=preprocessing, output=run, batch_size=BATCH,
        calibration_images=128, bn_images=256, compile="off", device="cpu",
        resume=(run / "config.toml").exists(), **settings,
    )  # fmt: skip
    file = result.export(force=True)
    found = mecq_cli.evaluate(EvalConfig(target=str(file), data=str(scenes)), Listener())
    document = {
        "float": result.float_miou, "miou": result.miou, "onnx": found["miou"],
        "simulator": result.summary["simulator_miou"], "iou": found["iou"],
        "mec_weight": result.summary["mec_weight"],
        "bytes": result.summary["sizes"]["packed_bytes"], "onnx_bytes": file.stat().st_size,
        "fp32_bytes": result.summary["sizes"]["fp32_bytes"],
    }  # fmt: skip
    return document, result.module


def main(arguments: argparse.Namespace) -> None:
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    net, preprocessing, epochs = network(arguments.model)
    train(net, preprocessing, epochs, arguments.scenes, work / "float.pth")
    networks: dict[str, Any] = {"float": net}
    reached: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        for bits, of_bits in BITS.items():
            for term in arguments.terms.split(","):
                arm = f"{bits}, {term}"
                run = work / f"{bits}-{term}-{seed}".replace(" ", "-").lower()
                settings = {**of_bits, **TERMS[term], "seed": seed}
                try:
                    row, module = measure(net, preprocessing, arguments.scenes, run, **settings)
                except NumericError as error:  # a run that diverged
                    say({"arm": arm, "seed": seed, "error": str(error)})
                    continue
                say({"arm": arm, "seed": seed, **row})
                reached.setdefault(arm, []).append(row["miou"] - row["float"])
                if seed == 0 and term == "default":
                    networks[bits] = module
    for arm, changes in reached.items():
        spread = statistics.stdev(changes) if len(changes) > 1 else None
        change = statistics.mean(changes)
        say({"arm": arm, "seeds": len(changes), "change": change, "spread": spread})
    if arguments.picture is not None:
        picture(arguments.scenes, preprocessing, networks, arguments.picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Networks that segment scenes, at few bits.")
    parser.add_argument("scenes", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default=SMALL)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--terms", default=",".join(TERMS), help="joined by commas")
    parser.add_argument("--picture", type=Path)
    main(parser.parse_args())
