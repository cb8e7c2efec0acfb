"""Pairs of products that leave 16 bits, against an emulation of the instruction that adds them."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mecq_cli.insertion import BitPlan
from mecq_cli.integer.ir import INPUT, Grid, IntegerModel, Node, multiplied_weight
from mecq_cli.integer.saturation import saturating
from mecq_cli.integerize import integerize
from tests.exactness import float_network, quantized, random_images


def one_layer(weight: NDArray[np.int8], bits: int, grid: Grid) -> IntegerModel:
    """A linear layer behind a quantized image of one pixel."""
    tensors: dict[str, NDArray[Any]] = {
        "weight": weight,
        "weight_scale": np.ones(len(weight), np.float32),
        "bias": np.zeros(len(weight), np.int32),
    }
    nodes = (
        Node("image", "quantize", (INPUT,), grid),
        Node("flat", "flatten", ("image",), grid),
        Node("fc", "linear", ("flat",), None, {}, bits, tensors),
    )
    return IntegerModel(nodes, (weight.shape[1], 1, 1))


def saturates(weight: NDArray[np.int8], grid: Grid) -> bool:
    """Whether a saturating sum of any two products differs from the exact one."""
    largest = max(grid.qmax, grid.zero_point)
    for row in weight.astype(np.int64):
        for pair in combinations(row, 2):
            for inputs in ((largest, largest), (0, largest), (largest, 0)):
                total = int(np.dot(pair, inputs))
                if np.clip(total, -(2**15), 2**15 - 1) != total:
                    return True
    return False


@pytest.mark.parametrize("qmax", [3, 127, 128, 200, 255])
@pytest.mark.parametrize("bits", range(1, 9))
def test_the_bound_is_that_of_the_instruction(bits: int, qmax: int) -> None:
    rng = np.random.default_rng(bits)
    half = 2 ** (bits - 1)
    for _ in range(20):
        low, high = sorted(rng.integers(-half, half, 2))
        weight = rng.integers(low, high + 1, (2, 5)).astype(np.int8)
        if bits == 1:
            weight = rng.choice([-1, 1], (2, 5)).astype(np.int8)
        grid = Grid(1.0, int(rng.integers(0, qmax + 1)), 8, 0, qmax)
        model = one_layer(weight, bits, grid)
        wanted = saturates(multiplied_weight(model.output), grid)
        assert saturating(model) == (["fc"] if wanted else [])
        if bits < 8 or qmax < 128:
            assert not wanted


@pytest.mark.parametrize(("largest", "found"), [(64, []), (65, ["fc"])])
def test_the_largest_weight_that_is_safe(largest: int, found: list[str]) -> None:
    weight = np.full((1, 4), largest, np.int8)
    assert saturating(one_layer(weight, 8, Grid(1.0, 0, 8, 0, 255))) == found


@pytest.mark.parametrize(("plan", "inner"), [(BitPlan(8, 8), 8), (BitPlan(2, 2), 2)])
def test_a_reduced_range_rules_it_out(plan: BitPlan, inner: int) -> None:
    """Real layers: all of W8A8, the first and the last one of W2A2."""
    images = random_images(4, 32)
    bits, layers = {}, {}
    for reduced in (False, True):
        own = BitPlan(plan.wbits, plan.abits, reduce_range=reduced)
        network = quantized(float_network("resnet20_cifar", 32), own, images)
        model = integerize(network, (3, 32, 32), {})
        layers[reduced] = saturating(model)
        bits[reduced] = {n.name: n.weight_bits for n in model.nodes if n.weight_bits}
        if reduced:
            sizes = [np.abs(multiplied_weight(n)).max() for n in model.nodes if n.weight_bits]
            assert max(sizes) <= 64
    assert {*layers[False]} >= {"conv1", "linear"}
    assert layers[True] == []
    assert len(layers[False]) > 10 or inner == 2
    assert bits[True] == {name: 7 if b == 8 else b for name, b in bits[False].items()}
