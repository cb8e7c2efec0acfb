"""A small ViT for CIFAR, known to timm as ``cifar_vit``, and its float training.

    python -m tests.studies.cifar_vit DATA WEIGHTS [--threads N]

No checkpoint of one is at hand, so this makes it: patches of 4 pixels, 64 tokens and one more, six
blocks of 96 channels with 3 heads, 0.46 M weights; 40 epochs of the train set of ``DATA/cifar10``
by AdamW with random crops and flips. WEIGHTS/cifar_vit.pth is what tables of docs/results.md start
from.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    VisionTransformer,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from torch import nn

from mecq_cli.data import dataset_of, open_evaluation, open_split
from mecq_cli.evaluation import evaluate
from mecq_cli.models.loading import load_model
from mecq_cli.tasks.registry import task_of
from tests.studies.floats import say, train_in_float

NAME, CHECKPOINT = "cifar_vit", "cifar_vit.pth"
EPOCHS, BATCH, LR = 40, 128, 1e-3

default_cfgs = generate_default_cfgs({
    NAME: {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
})  # fmt: skip


@register_model
def cifar_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """With random weights; timm has none."""
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3}
    given = {**sizes, "mlp_ratio": 2.0, **kwargs}
    made: nn.Module = build_model_with_cfg(VisionTransformer, NAME, pretrained, **given)
    return made


def main() -> None:
    """Train, say the loss of each epoch and the figure of the val images, keep the weights."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("data", type=Path, help="folder with cifar10/")
    parser.add_argument("weights", type=Path, help="folder for the checkpoint")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    loaded = load_model(NAME, pretrained=False)
    net, task, preprocessing = loaded.module, task_of(loaded), loaded.preprocessing
    root = str(given.data / "cifar10")
    data = dataset_of(open_split(root, "train"), preprocessing, train=True)
    for epoch in train_in_float(
        net, task, data, epochs=given.epochs, batch_size=BATCH, lr=LR, bf16=True
    ):
        say(epoch)
        given.weights.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), given.weights / CHECKPOINT)
    val = dataset_of(open_evaluation(root), preprocessing)
    with torch.no_grad():
        found = evaluate(net.eval(), val, batch_size=250, device=torch.device("cpu"), task=task)
    say(found.figures)


if __name__ == "__main__":
    main()
