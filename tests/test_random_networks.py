"""Random torch networks all the way: insertion, calibration, integers, safetensors, ONNX.

Simulator, NumPy reference, torch kernels and optimized onnxruntime must give the same integers,
and the same seed the same bytes. `tests/integer/random_models.py` draws integer models directly,
of which a captured network uses only a part.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mecq_cli.calibration import reestimate_batch_norm
from mecq_cli.export import onnx, safetensors
from mecq_cli.insertion import QuantizedModel
from mecq_cli.integer.ir import IntegerModel
from mecq_cli.integerize import integerize
from mecq_cli.quantizers.n2uq import N2uqActivation
from tests.exactness import check, quantized
from tests.random_networks import CLASSES, random_network


def build(seed: int, quantizer: str = "lsq") -> tuple[QuantizedModel, Tensor]:
    """A quantized network in evaluation mode, every second one trained a little, and images.

    In every fourth the sizes of the channels go through many orders of magnitude.
    """
    network, plan, images = random_network(
        seed, spread=4.0 if seed % 4 == 2 else 0.7, quantizer=quantizer
    )
    model = quantized(network, plan, images)
    if seed % 2:
        torch.manual_seed(seed)  # dropout
        spread_thresholds(model)
        train(model, images)
    return model, images


def spread_thresholds(model: QuantizedModel) -> None:
    """As long training may: far from even, over as much as before."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, N2uqActivation):
                reach = module.widths.sum()
                module.widths.mul_(torch.exp(torch.randn_like(module.widths)))
                module.widths.mul_(reach / module.widths.sum())
    model.project()


def train(model: QuantizedModel, images: Tensor) -> None:
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.01)
    for _ in range(2):
        loss = F.cross_entropy(model(images), torch.arange(len(images)) % CLASSES)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        model.project()
    reestimate_batch_norm(model, [images])
    model.eval()


def integers(model: QuantizedModel, images: Tensor) -> IntegerModel:
    _, channels, height, width = images.shape
    return integerize(model, (channels, height, width), {"model": "test"})


def check_seeds(seeds: range, folder: Path, *, repeat: int, quantizer: str = "lsq") -> Counter[str]:
    """Every ``repeat``-th network is built twice. Returns what there was, and bits of layers."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        model, images = build(seed, quantizer)
        try:
            counts.update(check(model, images, folder))
            if seed % repeat == 0:
                again = integers(*build(seed, quantizer))
                assert safetensors.to_bytes(again) == (folder / "model.safetensors").read_bytes()
                assert onnx.to_bytes(again) == (folder / "model.onnx").read_bytes()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        integer = integers(model, images)
        counts.update(f"{node.op}" for node in integer.nodes)
        counts.update(f"W{node.weight_bits}" for node in integer.nodes if node.weight_bits)
        counts.update(f"A{node.grid.bits}" for node in integer.nodes if node.grid)
        zeroless = [node for node in integer.nodes if node.grid and node.grid.spacing == 2]
        counts["without zero"] += len(zeroless)
    return counts


def check_counts(counts: Counter[str]) -> None:
    """The unoptimized graph may round another way, rarely; and all there is has been used."""
    check_rounding(counts)
    operations = "quantize requantize conv2d linear add concat flatten slice pad"
    operations += " max_pool2d avg_pool2d global_avg_pool adaptive_avg_pool2d"
    operations += " lookup mul reshape transpose upsample"
    bits = [f"{kind}{bits}" for kind in "WA" for bits in range(1, 9)]
    assert not [name for name in operations.split() + bits if not counts[name]], counts


def test_random_networks_are_exact_and_repeatable(tmp_path: Path) -> None:
    check_counts(check_seeds(range(24), tmp_path, repeat=3))


def check_rounding(counts: Counter[str]) -> None:
    """Hardly a step of difference, of nearly all integers, of which most are of use."""
    assert counts["off"] <= 5 + 1e-5 * counts["all"], counts
    assert counts["compared"] > 0.95 * counts["all"], counts
    assert counts["dead"] < 0.25 * counts["alive"], counts


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_random_networks_are_exact_and_repeatable(tmp_path: Path) -> None:
    check_counts(check_seeds(range(1_000, 1_500), tmp_path, repeat=3))


def test_random_networks_with_thresholds_are_exact_and_repeatable(tmp_path: Path) -> None:
    counts = check_seeds(range(12, 24), tmp_path, repeat=4, quantizer="n2uq")
    check_rounding(counts)
    assert counts["threshold"] > 30, counts


def test_random_networks_without_zero_are_exact_and_repeatable(tmp_path: Path) -> None:
    counts = check_seeds(range(24, 34), tmp_path, repeat=5, quantizer="auto")
    check_rounding(counts)
    assert counts["without zero"] > 5, counts


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_random_networks_without_zero_are_exact(tmp_path: Path) -> None:
    # Not those with sizes of many orders, of which products are refused now and then.
    check_rounding(check_seeds(range(3_001, 3_401, 4), tmp_path, repeat=3, quantizer="auto"))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_random_networks_with_thresholds_are_exact(tmp_path: Path) -> None:
    check_rounding(check_seeds(range(2_000, 2_300), tmp_path, repeat=3, quantizer="n2uq"))
