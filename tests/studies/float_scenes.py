"""Trains a float network on the scenes of `tests.scenes`, for the figures of docs/segmentation.md.

python -m tests.scenes SCENES
python -m tests.studies.float_scenes SCENES float.pth [--model NAME] [--epochs N]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import Tensor, nn

from tests.scenes import CLASSES, IGNORED

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def read(folder: Path) -> tuple[Tensor, Tensor]:
    """Normalised pictures [N, 3, H, W] and masks [N, H, W]."""
    paths = sorted((folder / "images").iterdir())
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    masks = np.stack([np.asarray(Image.open(folder / "masks" / path.name)) for path in paths])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - MEAN) / STD, torch.from_numpy(masks).long()


@torch.no_grad()
def mean_iou(model: nn.Module, images: Tensor, masks: Tensor) -> float:
    """In percent."""
    model.eval()
    predicted = torch.cat([model(part)["out"].argmax(1) for part in images.split(25)])
    valid = masks != IGNORED
    shares = []
    for label in range(len(CLASSES)):
        a, b = (predicted == label) & valid, (masks == label) & valid
        shares.append(float((a & b).sum() / (a | b).sum()))
    return 100 * sum(shares) / len(shares)


def main() -> None:
    """Train, evaluate, save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("scenes", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="lraspp_mobilenet_v3_large")
    parser.add_argument("--start", type=Path, help="weights to go on with")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    given = parser.parse_args()
    torch.manual_seed(0)
    model = torchvision.models.get_model(
        given.model, weights=None, weights_backbone=None, num_classes=len(CLASSES)
    )
    if given.start is not None:
        model.load_state_dict(torch.load(given.start, weights_only=True))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    model = model.to(memory_format=torch.channels_last)
    train, val = read(given.scenes / "train"), read(given.scenes / "val")
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, weight_decay=1e-2)
    steps = len(train[0]) // given.batch
    schedule = CosineLRScheduler(
        optimizer, t_initial=given.epochs * steps, warmup_t=steps, t_in_epochs=False
    )
    began = time.perf_counter()
    for epoch in range(given.epochs):
        model.train()
        order = torch.randperm(len(train[0]))
        total = 0.0
        for step in range(steps):
            schedule.step_update(epoch * steps + step)
            chosen = order[step * given.batch : (step + 1) * given.batch]
            images, masks = train[0][chosen], train[1][chosen]
            if torch.rand(()) < 0.5:
                images, masks = images.flip(3), masks.flip(2)
            if torch.rand(()) < 0.5:
                images, masks = images.flip(2), masks.flip(1)
            images = images.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(images)["out"], masks, ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach())
        seconds = time.perf_counter() - began
        print(f"epoch {epoch}: loss {total / steps:.4f}, {seconds:.0f} s", flush=True)  # noqa: T201
        if epoch % 10 == 9 or epoch == given.epochs - 1:
            print(f"mIoU {mean_iou(model, *val):.2f} %", flush=True)  # noqa: T201
            torch.save(model.state_dict(), given.output)


if __name__ == "__main__":
    main()
