"""Whole networks: simulator, integer artifact, reference and onnxruntime are one function."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mecq_cli.export import safetensors
from mecq_cli.insertion import BitPlan
from mecq_cli.integerize import integerize
from tests.exactness import check, float_network, quantized, random_images

NARROW: dict[str, Any] = {"channels": (16, 24, 32, 48)}
CASES = [
    ("resnet20_cifar", 32, {}, BitPlan(2, 2)),
    ("resnet20_cifar", 32, {}, BitPlan(8, 8)),
    ("resnet20_cifar", 32, {}, BitPlan(1, 1)),
    ("resnet20_cifar", 32, {}, BitPlan(3, 5)),
    ("resnet20_cifar", 32, {}, BitPlan(2, 32)),
    ("resnet20_cifar", 32, {}, BitPlan(32, 4)),
    ("resnet20_cifar", 32, {}, BitPlan(2, 2, residual_bits=32)),
    ("resnet20_cifar", 32, {}, BitPlan(2, 2, first_last_bits=1)),
    ("resnet18", 64, NARROW, BitPlan(4, 4)),
    ("resnet18", 64, NARROW, BitPlan(2, 3, overrides=[("layer1.*", 8, 7), ("fc", 32, None)])),
    ("tf_efficientnet_lite0", 64, {}, BitPlan(4, 4)),
    ("tf_efficientnet_lite0", 64, {}, BitPlan(8, 8)),
    ("torchvision/squeezenet1_0", 64, {}, BitPlan(2, 2)),
    ("torchvision/squeezenet1_0", 64, {}, BitPlan(32, 4)),
]


def named(value: object) -> str | None:
    if not isinstance(value, BitPlan):
        return None if isinstance(value, (str, int)) else "-"
    return f"w{value.wbits}a{value.abits}-{value.first_last_bits}-{value.residual_bits}"


@pytest.mark.parametrize(("name", "size", "arguments", "plan"), CASES, ids=named)
def test_every_way_to_run_a_network_gives_the_same_integers(
    tmp_path: Path, name: str, size: int, arguments: dict[str, Any], plan: BitPlan
) -> None:
    images = random_images(4, size)
    network = quantized(float_network(name, size, **arguments), plan, images)
    counts = check(network, images, tmp_path)
    assert counts["off"] <= 3 + 1e-5 * counts["all"], counts
    assert counts["all"] > 0 or plan.abits == 32


def test_weights_take_the_bits_they_have() -> None:
    images = random_images(2, 32)
    sizes = {}
    for bits in (1, 2, 4, 8):
        network = quantized(float_network("resnet20_cifar", 32), BitPlan(bits, 4), images)
        model = integerize(network, (3, 32, 32), {})
        inner = [n for n in model.nodes if n.weight_bits == bits and n.op == "conv2d"][1:]
        for node in inner:
            values = node.tensors["weight"]
            assert values.min() >= -(2 ** (bits - 1))
            assert values.max() <= max(2 ** (bits - 1) - 1, 1)
            assert len({*values.flatten().tolist()}) > 1
        sizes[bits] = len(safetensors.to_bytes(model))
    parameters = 270_000
    assert 0.9 < (sizes[4] - sizes[2]) / (parameters * 2 / 8) < 1.1
    assert 0.9 < (sizes[8] - sizes[4]) / (parameters * 4 / 8) < 1.1
    assert 0.9 < (sizes[2] - sizes[1]) / (parameters * 1 / 8) < 1.1


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_trained_network_and_its_integers_are_close(bits: int) -> None:
    """Fake-quantized training mode, batch norm with its statistics, against evaluation mode."""
    images = random_images(8, 32)
    network = quantized(float_network("resnet20_cifar", 32), BitPlan(bits, bits), images)
    with torch.no_grad():
        integer = network(images)
        network.train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        trained = network(images)
    distance = (trained - integer).norm() / integer.norm()
    assert distance < {2: 0.5, 4: 0.12, 8: 0.02}[bits], float(distance)


def test_the_metadata_and_the_shape_are_kept() -> None:
    images = random_images(2, 32)
    network = quantized(float_network("resnet20_cifar", 32), BitPlan(2, 2), images)
    model = integerize(network, (3, 32, 32), {"model": "x"})
    assert (model.input_shape, model.metadata) == ((3, 32, 32), {"model": "x"})
    assert Counter(n.op for n in model.nodes)["add"] == 9
    again = integerize(network, (3, 32, 32), {"model": "x"})
    assert safetensors.to_bytes(model) == safetensors.to_bytes(again)
