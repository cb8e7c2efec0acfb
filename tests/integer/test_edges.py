"""Models at the edge of what is allowed: every runner says what the reference says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mecq_cli.errors import ArtifactError
from mecq_cli.export.onnx import save
from mecq_cli.export.ort import OrtRunner
from mecq_cli.integer.ir import INPUT, Grid, IntegerModel, Node
from mecq_cli.integer.reference import run
from mecq_cli.integer.validate import validate
from mecq_cli.integerize import IntegerModule

UNIT = Grid(1.0, 0, 8, 0, 255)


def agree(model: IntegerModel, images: NDArray[np.float32], folder: Path) -> NDArray[np.float32]:
    """Reference, torch, and onnxruntime in both profiles, with optimizations and without."""
    validate(model)
    wanted = run(model, images)
    found = {"torch": IntegerModule(model)(torch.from_numpy(images)).numpy()}
    for profile in ("ort", "portable"):
        path = folder / f"{profile}.onnx"
        save(model, path, profile=profile)
        for optimize in (True, False):
            runner = OrtRunner(path, optimize=optimize, threads=1)
            found[f"{profile} {optimize}"] = runner.run(images)
    for name, values in found.items():
        np.testing.assert_array_equal(values, wanted, name)
    return wanted


def image(*values: float) -> NDArray[np.float32]:
    return np.array([[[values]]], np.float32)


def test_what_is_moved_is_clipped_to_the_range_of_the_node(tmp_path: Path) -> None:
    narrow = Grid(1.0, 0, 8, 2, 5)
    pool: dict[str, Any] = {
        "kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1),
        "ceil_mode": False,
    }  # fmt: skip
    nodes = (
        Node("x", "quantize", (INPUT,), UNIT),
        Node("pool", "max_pool2d", ("x",), narrow, pool),
        Node("around", "pad", ("pool",), narrow, {"before": (0, 0, 1), "after": (0, 0, 0)}),
        Node("flat", "flatten", ("around",), narrow),
        Node("logits", "dequantize", ("flat",), None),
    )
    model = IntegerModel(nodes, (1, 1, 4))
    assert agree(model, image(1, 4, 7, 200), tmp_path).tolist() == [[2, 2, 4, 5, 5]]


def test_a_last_node_on_a_grid_yields_real_values(tmp_path: Path) -> None:
    grid = Grid(0.5, 3, 8, 0, 255)
    nodes = (Node("x", "quantize", (INPUT,), grid), Node("logits", "flatten", ("x",), grid))
    found = agree(IntegerModel(nodes, (1, 1, 3)), image(1, -1, 20), tmp_path)
    assert found.tolist() == [[1, -1, 20]]


@pytest.mark.parametrize("exponent", [-23, -40])
def test_sums_of_values_far_apart(exponent: int, tmp_path: Path) -> None:
    """The least unit of the fine one decides which way a half is rounded."""
    cut: dict[str, Any] = {"axes": (1,), "steps": (1,)}
    coarse, fine = Grid(2.0**-5, 0, 8, 0, 255), Grid(2.0**exponent, 128, 8, 0, 255)
    target = Grid(2.0**-4, 0, 8, 0, 255)
    nodes = (
        Node("first", "slice", (INPUT,), None, {**cut, "starts": (0,), "ends": (1,)}),
        Node("second", "slice", (INPUT,), None, {**cut, "starts": (1,), "ends": (2,)}),
        Node("a", "quantize", ("first",), coarse),
        Node("b", "quantize", ("second",), fine),
        Node("sum", "add", ("a", "b"), target),
        Node("flat", "flatten", ("sum",), target),
        Node("logits", "dequantize", ("flat",), None),
    )
    halves = np.array([129, 133, 253, 131]) / 32
    tiny = 2.0**exponent * np.array([1, 0, -1, 1])
    images = np.array([[[halves], [tiny]]], np.float32)
    found = agree(IntegerModel(nodes, (2, 1, 4)), images, tmp_path)
    # 64.5 and a little, 66.5, 126.5 less a little, 65.5 and a little
    assert (found * 16).tolist() == [[65, 66, 126, 66]]


@pytest.mark.parametrize("target", [None, Grid(float(np.float32(0.0171)), 0, 8, 0, 255)])
def test_the_mean_of_a_large_plane(target: Grid | None, tmp_path: Path) -> None:
    """Sums beyond 2^24, which float32 does not hold."""
    size, source = 320, Grid(float(np.float32(0.0171)), 3, 8, 0, 255)
    nodes = [
        Node("x", "quantize", (INPUT,), source),
        Node("mean", "global_avg_pool", ("x",), target),
        Node("flat", "flatten", ("mean",), target),
    ]
    if target is not None:
        nodes.append(Node("logits", "dequantize", ("flat",), None))
    integers = np.random.default_rng(0).integers(200, 253, (2, 8, size, size))
    images = (integers * np.float32(source.scale)).astype(np.float32)
    found = agree(IntegerModel(tuple(nodes), (8, size, size)), images, tmp_path)
    if target is None:
        exact = integers.sum((2, 3)).astype(np.float32)
        wanted = exact * (np.float32(source.scale) / np.float32(size * size))
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("grid", [UNIT, Grid(0.5, 0, 8, 0, 255), Grid(1.0, 2, 8, 0, 255)])
def test_a_norm_reads_what_is_on_a_grid(grid: Grid, tmp_path: Path) -> None:
    """Of a product with 1 onnxruntime would leave bytes for it."""
    affine = {
        "weight": np.ones(4, np.float32),
        "bias": np.zeros(4, np.float32),
    }
    nodes = (
        Node("x", "quantize", (INPUT,), grid),
        Node("float", "dequantize", ("x",), None),
        Node("norm", "layer_norm", ("float",), None, {"eps": 1e-5}, tensors=affine),
        Node("logits", "flatten", ("norm",), None),
    )
    model = IntegerModel(nodes, (1, 1, 4))
    images = image(1, 4, 7, 20)
    wanted = run(model, images)
    for profile in ("ort", "portable"):
        path = tmp_path / f"{profile}.onnx"
        save(model, path, profile=profile)
        found = OrtRunner(path, threads=1).run(images)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_factors_that_are_not_finite_are_refused() -> None:
    """Both scales are of usual size, their product is not: 0 times infinity."""
    grid = Grid(2.0**60, 0, 8, 0, 255)
    weight: dict[str, NDArray[Any]] = {
        "weight": np.array([[1, -1]], np.int8),
        "weight_scale": np.array([2.0**90], np.float32),
        "bias": np.array([0], np.int32),
    }
    nodes = (
        Node("x", "quantize", (INPUT,), grid),
        Node("flat", "flatten", ("x",), grid),
        Node("logits", "linear", ("flat",), None, {}, 8, weight),
    )
    with pytest.raises(ArtifactError, match="its scales make a factor of unusual size"):
        validate(IntegerModel(nodes, (1, 1, 2)))
