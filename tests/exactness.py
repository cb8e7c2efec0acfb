"""One network, run in every way there is, compared integer by integer."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mecq_cli.calibration import calibrate
from mecq_cli.export import onnx, safetensors
from mecq_cli.export.ort import OrtRunner
from mecq_cli.insertion import BitPlan, QuantizedModel, insert
from mecq_cli.integer.ir import INPUT, Grid, IntegerModel, Node, multiplied_weight
from mecq_cli.integer.reference import run
from mecq_cli.integer.validate import validate
from mecq_cli.integerize import IntegerModule, integerize
from mecq_cli.kernels import run_node
from mecq_cli.models.loading import load_model

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


@torch.no_grad()
def simulate(network: QuantizedModel, images: Tensor) -> Values:
    """What every site of the simulator puts out in evaluation mode."""
    values: Values = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            values[name] = output.numpy().copy()

        return hook

    handles = [site.register_forward_hook(keep(site.name)) for site in network.sites()]
    network(images)
    for handle in handles:
        handle.remove()
    return values


@torch.no_grad()
def execute(model: IntegerModel, images: Tensor) -> Values:
    """What the kernels compute from the integer model alone."""
    tensors: dict[str, Tensor] = {INPUT: images}
    grids: dict[str, Grid | None] = {INPUT: None}
    for node in model.nodes:
        inputs = [tensors[name] for name in node.inputs]
        tensors[node.name] = run_node(node, inputs, [grids[name] for name in node.inputs])
        grids[node.name] = node.grid
    return {name: value.numpy() for name, value in tensors.items() if name != INPUT}


def check(network: QuantizedModel, images: Tensor, path: Path) -> Counter[str]:
    """Compare all ways of running ``network``.

    Returns how many integers there are (all), how many were compared because their inputs were
    the same (compared; float operations between integers may differ in the last bit), how many
    of them the unoptimized graph rounds another way (off, at most by one), and how many
    operations there are whose integers are not all alike (alive) or are (dead).
    """
    size = (int(images.shape[1]), int(images.shape[2]), int(images.shape[3]))
    model = integerize(network, size, {"model": "test"})
    validate(model)
    safetensors.save(model, path / "model.safetensors", force=True)
    onnx.save(model, path / "model.onnx", force=True)
    stored = safetensors.load(path / "model.safetensors")
    pixels = np.ascontiguousarray(images.numpy())
    wanted = simulate(network, images)
    assert {*wanted} >= {node.name for node in model.nodes}
    exact = all(node.grid is not None for node in model.nodes[:-1])
    logits = IntegerModule(stored)(images).numpy()
    np.testing.assert_array_equal(logits, wanted[model.output.name])

    counts: Counter[str] = Counter()
    others = {
        "kernels": execute(stored, images),
        "reference": run(stored, pixels, keep=True),
        "onnxruntime": OrtRunner(path / "model.onnx", threads=1).run_all(pixels),
    }
    for name, values in others.items():
        counts += _compare(model, wanted, values, name)
        if exact:
            np.testing.assert_array_equal(values[model.output.name], logits, name)
        else:
            np.testing.assert_allclose(values[model.output.name], logits, atol=0.1 * _span(logits))
    if exact:
        assert counts["compared"] == counts["all"], counts
    assert not counts["off"]
    plain = OrtRunner(path / "model.onnx", optimize=False, threads=1).run_all(pixels)
    counts += _compare(model, wanted, plain, "unoptimized", allowed=1)
    return counts


def _span(values: NDArray[Any]) -> float:
    return float(np.abs(values).max())


def _cancels(node: Node, source: Grid, target: Grid) -> bool:
    """Whether large terms may cancel to less than a float32 sum of them resolves.

    Without optimizations onnxruntime adds floats, and what remains may be off by any number of
    steps. That takes a layer of which the grid is thousands of times finer than its terms.
    """
    terms = float(max(source.qmax - source.zero_point, source.zero_point - source.qmin))
    unit = source.scale / target.scale
    if node.op in ("conv2d", "linear"):
        weight = np.abs(multiplied_weight(node).astype(np.float64)).reshape(
            len(node.tensors["bias"]), -1
        )
        scale = np.abs(node.tensors["weight_scale"].astype(np.float64))
        sums = weight.sum(1) * terms + np.abs(node.tensors["bias"].astype(np.float64))
        terms = float((sums * scale).max())
    return terms * unit > 0.1 * 2**23


def _compare(
    model: IntegerModel, wanted: Values, got: Values, name: str, allowed: int = 0
) -> Counter[str]:
    counts: Counter[str] = Counter()
    same = {INPUT}
    grids = {node.name: node.grid for node in model.nodes}
    for node in model.nodes:
        a, b = wanted[node.name], got[node.name]
        assert a.shape == b.shape, (name, node.name, a.shape, b.shape)
        if node.grid is not None:
            counts["all"] += a.size
            counts["alive" if a.min() < a.max() else "dead"] += 1
            source = grids.get(node.inputs[0])
            if allowed and source and _cancels(node, source, node.grid):
                continue
            if same.issuperset(node.inputs):
                steps = np.abs(a.astype(np.int64) - b.astype(np.int64))
                counts.update(compared=a.size, off=int(np.count_nonzero(steps)))
                assert steps.max() <= allowed, (name, node, np.count_nonzero(steps), a.size)
        if np.array_equal(a, b):
            same.add(node.name)
    return counts
