"""One network, run in every way there is, compared integer by integer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mecq_cli.calibration import calibrate
from mecq_cli.export import onnx, safetensors
from mecq_cli.export.ort import OrtRunner
from mecq_cli.insertion import BitPlan, QuantizedModel, insert
from mecq_cli.integer.ir import Node
from mecq_cli.integer.reference import run
from mecq_cli.integer.validate import validate
from mecq_cli.integerize import IntegerModule, integerize
from mecq_cli.kernels import run_all, run_node
from mecq_cli.models.loading import load_model
from mecq_cli.replay import Way, replay

Values = dict[str, NDArray[Any]]


# On busy cores the threads of one operation wait for each other, many times as long as they work.
torch.set_num_threads(1)


def float_network(name: str, size: int, **arguments: Any) -> nn.Module:
    """A network with random weights whose batch norms are as odd as real ones may be."""
    torch.manual_seed(0)
    if name.startswith("torchvision/"):
        model = load_model(name, pretrained=False, num_classes=10, img_size=size).module
    else:
        model = timm.create_model(name, num_classes=10, **arguments)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            with torch.no_grad():
                norm.weight.normal_(1.0, 0.3)
                norm.weight[0] *= -1.0
                norm.weight[1 % len(norm.weight)] = 0.0
                norm.bias.normal_(0.0, 0.3)
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.running_mean.normal_(0.0, 0.3)
                norm.running_var.uniform_(0.2, 2.0)
    return model


def random_images(count: int, size: int) -> Tensor:
    """Smooth noise, normalised: [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(1)
    small = torch.randn(count, 3, size // 4, size // 4, generator=generator)
    return nn.functional.interpolate(small, size=(size, size), mode="bilinear")


def quantized(model: nn.Module, plan: BitPlan, images: Tensor) -> QuantizedModel:
    """Inserted and calibrated, in evaluation mode."""
    _, channels, height, width = images.shape
    network = insert(model, (channels, height, width), plan)
    calibrate(network, [images], 1)
    return network.eval()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, in standard deviations of what is expected."""
    return float((found - expected).square().mean().sqrt() / expected.std())


def taken_all_the_way(
    model: nn.Module, plan: BitPlan, images: Tensor, path: Path
) -> tuple[QuantizedModel, float]:
    """A network that `check` has passed, and how far it is from the float one."""
    with torch.no_grad():
        expected = model(images)
    network = quantized(model, plan, images)
    check(network, images, path)
    return network, relative_error(network(images), expected)


@torch.no_grad()
def simulate(network: QuantizedModel, images: Tensor) -> Values:
    """What every operation of the simulator puts out in evaluation mode."""
    values: Values = {}

    def keep(node: Node, *arguments: Any) -> Tensor:
        output = run_node(node, *arguments)
        values[node.name] = output.numpy().copy()
        return output

    with patch("mecq_cli.sites.base.run_node", keep):
        network(images)
    return values


def check(network: QuantizedModel, images: Tensor, path: Path) -> Counter[str]:
    """Compare all ways of running ``network``, every integer of every operation.

    Returns how many integers there are in all ways together (all), how many of them were compared
    (compared; without optimizations, not where float32 cannot tell), how many of those are another
    step in graphs that compute in float (off), and how many operations there are whose integers
    are not all alike (alive) or are (dead).
    """
    size = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    model = integerize(network, size, {"model": "test"})
    validate(model)
    safetensors.save(model, path / "model.safetensors", force=True)
    stored = safetensors.load(path / "model.safetensors")
    pixels = np.ascontiguousarray(images.numpy())
    ways = [
        Way("simulator", lambda x: simulate(network, torch.from_numpy(x)), exact=True),
        Way("torch", lambda x: _numpy(run_all(stored, torch.from_numpy(x))), exact=True),
    ]
    runners = {}
    for profile, file in {"ort": "model.onnx", "portable": "portable.onnx"}.items():
        onnx.save(model, path / file, profile=profile, force=True)
        runners[profile] = OrtRunner(path / file, threads=1)
        ways.append(Way(profile, runners[profile].run_all, exact=True))
    plain = OrtRunner(path / "model.onnx", optimize=False, threads=1)
    ways.append(Way("unoptimized", plain.run_all, exact=False))
    wanted = run(stored, pixels, keep=True)
    found = replay(stored, ways, [pixels])
    found.require("test")
    counts: Counter[str] = Counter()
    for way in ways:
        total = found.total(way.name)
        counts.update(all=total.values + total.left_out, compared=total.values, off=total.differing)
    for node in model.nodes:
        values = wanted[node.name]
        counts["alive" if values.min() < values.max() else "dead"] += node.grid is not None

    logits = run(stored, pixels)
    others = [network(images).detach().numpy(), IntegerModule(stored)(images).numpy()]
    # Extra outputs keep onnxruntime from some fusions, so the plain sessions are compared too.
    others += [runner.run(pixels) for runner in runners.values()]
    exact = all(node.grid is not None for node in model.nodes[:-1])
    for other in others:
        if exact:
            np.testing.assert_array_equal(other, logits)
        else:
            np.testing.assert_allclose(other, logits, atol=0.1 * float(np.abs(logits).max()))
    return counts


def _numpy(values: dict[str, Tensor]) -> Values:
    return {name: value.numpy() for name, value in values.items()}
