"""What sensitivities are measured on, by the size of the images."""

from __future__ import annotations

import math

import pytest

from mecq_cli.config import QuantizeConfig
from mecq_cli.models.loading import load_model
from mecq_cli.workflow.allot import wanted

COMMON = {"data": "data", "wbits": 4, "abits": 4, "target_avg_bits": 3.0}


@pytest.mark.parametrize(
    ("model", "size", "images"),
    [
        ("resnet20_cifar", 32, 64),
        ("resnet20_cifar", 224, 33),
        ("resnet20_cifar", 384, 11),
        ("resnet20_cifar", 800, 4),
        ("vit_tiny_patch16_224", 224, 33),
        ("vit_tiny_patch16_224", 384, 16),
    ],
)
def test_large_images_are_few_and_rows_are_not(model: str, size: int, images: int) -> None:
    config = QuantizeConfig.model_validate({"model": model, **COMMON})
    loaded = load_model(model, pretrained=False, img_size=size)
    found, grid = wanted(config, loaded)
    assert found == images
    if model == "resnet20_cifar":
        assert found * grid**2 >= 32
        assert grid == math.ceil(math.sqrt(32 / images))
    else:
        assert grid == 1
