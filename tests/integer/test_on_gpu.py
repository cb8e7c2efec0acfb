"""The integer model on a simulated GPU: all of it is there, and nothing waits for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mecq_cli.insertion import BitPlan
from mecq_cli.integerize import IntegerModule, integerize
from tests.exactness import float_network, quantized, random_images
from tests.simulated_gpu import Watch, put_on_gpu


@pytest.mark.parametrize(
    ("name", "size", "arguments"),
    [
        ("resnet20_cifar", 32, {}),
        ("mobilenetv2_035", 32, {}),
        ("skresnet18", 32, {}),
        ("vit_tiny_patch16_224", 32, {"img_size": 32, "patch_size": 8, "depth": 2}),
    ],
)
def test_the_integer_model_is_computed_on_the_device(
    name: str, size: int, arguments: dict[str, Any]
) -> None:
    network, images = float_network(name, size, **arguments), random_images(4, size)
    model = quantized(network, BitPlan(2, 4, quantizer="auto"), images)
    integers, simulated = IntegerModule(integerize(model, (3, size, size), {})), FakeTensorMode()
    put_on_gpu(integers, simulated)
    with simulated, Watch() as watch:
        logits = integers(torch.zeros(images.shape, device="cuda"))
    assert logits.device.type == "cuda"
    assert watch.found.total() == 0
