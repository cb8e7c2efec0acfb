"""A small network that detects the shapes of `tests.scenes`: the figures of docs/detection.md.

    OMP_NUM_THREADS=1 python -m tests.studies.detect_scenes WORK [PICTURE.png]

Draws the scenes (WORK/scenes), trains an SSD in float (WORK/float.pth; both are used again),
quantizes it in several ways, exports each and measures it by the artifact and by the ONNX file. A
line of JSON each; at last the picture.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import mecq_cli
from mecq_cli.config import EvalConfig
from mecq_cli.data import boxes, dataset_of, eval_batches, normalize
from mecq_cli.evaluation import evaluate
from mecq_cli.events import Listener
from mecq_cli.models.detection import detector_of, outputs_only
from mecq_cli.tasks.decoding import SCORE
from mecq_cli.tasks.detection import Detection
from mecq_cli.tasks.drawing import boxed
from tests.detectors import small_ssd
from tests.scenes import CLASSES, write_boxes
from tests.studies.floats import say, train_in_float

SIZE, BATCH, EPOCHS = 96, 16, 30
IMAGES = {"train": 1600, "val": 400}
PREPROCESSING = mecq_cli.Preprocessing(
    (3, SIZE, SIZE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop_pct=1.0, crop_mode="squash"
)
DRAWN = ("W4A4", "W2A2")
ARMS: dict[str, dict[str, Any]] = {
    "W4A4, not trained": {"wbits": 4, "abits": 4, "epochs": 0},
    "W2A2, not trained": {"wbits": 2, "abits": 2, "epochs": 0},
    "W4A4": {"wbits": 4, "abits": 4, "epochs": 4},
    "W2A2": {"wbits": 2, "abits": 2, "epochs": 10},
    "W4A4, MEC": {"wbits": 4, "abits": 4, "epochs": 4, "mec_weight": 10.0},
    "W2A2, MEC": {"wbits": 2, "abits": 2, "epochs": 10, "mec_weight": 10.0},
}
SHOWN = (3, 17, 24)
SIDE, GAP, TITLE = 180, 6, 22


def train(scenes: Path, path: Path) -> nn.Module:
    """The float network."""
    torch.manual_seed(0)
    net = outputs_only(small_ssd(SIZE, len(CLASSES))).to(memory_format=torch.channels_last)
    task = Detection(detector_of(net.eval(), (SIZE, SIZE)), net)
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    splits = task.open_training(str(scenes), None, 0)
    outputs = task.match_classes(splits[0].classes, len(CLASSES)).indices
    data = dataset_of(splits[0], PREPROCESSING, outputs, train=True)
    for found in train_in_float(net, task, data, epochs=EPOCHS, batch_size=BATCH, lr=3e-3):
        if found["epoch"] % 5 == 4:
            net.eval()
            val = dataset_of(splits[1], PREPROCESSING, outputs)
            measured = evaluate(
                lambda images: task.answers(net(images)), val, batch_size=100,
                device=torch.device("cpu"), task=task, outputs=len(CLASSES),
            )  # fmt: skip
            found |= measured.figures
        say(found)
    torch.save(net.state_dict(), path)
    return net.eval()


def picture(scenes: Path, task: Detection, networks: dict[str, Any], output: Path) -> None:
    """What each network finds in some scenes."""
    titles = ["what is there", *networks]
    width, height = len(titles) * (SIDE + GAP) - GAP, len(SHOWN) * (SIDE + GAP) - GAP + TITLE
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, title in enumerate(titles):
        draw.text((column * (SIDE + GAP) + 4, 2), title, "black", font)
    split = task.open_evaluation(str(scenes)).take(SHOWN)
    dataset = dataset_of(split, PREPROCESSING, range(1, len(CLASSES)))
    for row, batch in enumerate(eval_batches(dataset, batch_size=1)):
        pixels = batch.images[0].permute(1, 2, 0).contiguous().numpy()
        image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST)
        rows = batch.labels[0]
        truth = torch.cat([rows[:, boxes.BOX], torch.ones(len(rows), 1), rows[:, :1]], 1)
        with torch.no_grad():
            images = normalize(batch.images, PREPROCESSING)
            answers = [truth, *(task.answers(net(images))[0] for net in networks.values())]
        for column, found in enumerate(answers):
            named = [
                {
                    "class": CLASSES[int(label)],
                    "index": int(label),
                    "score": score,
                    "box": [corner * SIDE / SIZE for corner in corners],
                }
                for *corners, score, label in found[found[:, SCORE] > 0].tolist()
            ]
            place = (column * (SIDE + GAP), TITLE + row * (SIDE + GAP))
            sheet.paste(boxed(image, named, len(CLASSES)), place)
    sheet.quantize(256).save(output, optimize=True)


def main(work: Path, output: Path | None) -> None:
    scenes = work / "scenes"
    if not scenes.exists():
        write_boxes(scenes, IMAGES, SIZE)
    net = train(scenes, work / "float.pth")
    task = Detection(detector_of(net, (SIZE, SIZE)), net)
    networks: dict[str, Any] = {"float": net}
    for name, settings in ARMS.items():
        run = work / name.replace(", ", "-").replace(" ", "-").lower()
        result = mecq_cli.quantize(
            net, scenes, preprocessing=PREPROCESSING, output=run, batch_size=BATCH,
            calibration_images=128, bn_images=512, compile="off", device="cpu",
            resume=(run / "config.toml").exists(), **settings,
        )  # fmt: skip
        file = result.export(force=True)
        found = mecq_cli.evaluate(EvalConfig(target=str(file), data=str(scenes)), Listener())
        say({
            "arm": name, "float": result.float_map, "map": result.map, "onnx": found["map"],
            "simulator": result.summary["simulator_map"], "map_50": found["map_50"],
            "ap": found["ap"], "bytes": result.summary["sizes"]["packed_bytes"],
            "onnx_bytes": file.stat().st_size, "seconds": result.summary["seconds"],
            "fp32_bytes": result.summary["sizes"]["fp32_bytes"],
        })  # fmt: skip
        if name in DRAWN:
            networks[name] = result.module
            if output is not None:
                picture(scenes, task, networks, output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
