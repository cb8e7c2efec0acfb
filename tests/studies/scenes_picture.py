"""The picture of docs/segmentation.md: what each network makes of some scenes.

python -m tests.studies.scenes_picture SCENES float.pth OUTPUT.png NAME=RUN ...
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

import mecq_cli
from mecq_cli.tasks.drawing import over
from tests.scenes import CLASSES, IGNORED
from tests.studies.float_scenes import MEAN, STD

NUMBERS = (3, 17, 24)
SIDE, GAP, TITLE = 160, 6, 22


def float_network(weights: Path) -> Callable[[Tensor], Tensor]:
    model = torchvision.models.get_model(
        "lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=len(CLASSES)
    )
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()
    return lambda x: model(x)["out"]


def main(scenes: Path, weights: Path, output: Path, runs: dict[str, Path]) -> None:
    networks: dict[str, Callable[[Tensor], Tensor]] = {"float": float_network(weights)}
    networks |= {name: mecq_cli.load(run) for name, run in runs.items()}
    titles = ["picture", "mask", *networks]
    width, height = len(titles) * (SIDE + GAP) - GAP, len(NUMBERS) * (SIDE + GAP) - GAP + TITLE
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for column, title in enumerate(titles):
        draw.text((column * (SIDE + GAP) + 4, 2), title, "black", font)
    for row, number in enumerate(NUMBERS):
        picture = Image.open(scenes / f"val/images/{number:04d}.png").convert("RGB")
        mask = np.array(Image.open(scenes / f"val/masks/{number:04d}.png"))
        mask[mask == IGNORED] = 0
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
        cells = [picture, over(picture, mask, len(CLASSES))]
        with torch.no_grad():
            for network in networks.values():
                said = network((pixels - MEAN) / STD)[0].argmax(0).to(torch.uint8).numpy()
                cells.append(over(picture, said, len(CLASSES)))
        for column, cell in enumerate(cells):
            place = (column * (SIDE + GAP), TITLE + row * (SIDE + GAP))
            sheet.paste(cell.resize((SIDE, SIDE), Image.Resampling.NEAREST), place)
    sheet.save(output, optimize=True)


if __name__ == "__main__":
    folder, start, target, *named = sys.argv[1:]
    main(
        Path(folder), Path(start), Path(target),
        {name: Path(run) for name, _, run in (one.partition("=") for one in named)},
    )  # fmt: skip
