"""Bilinear resizing: NumPy, torch and onnxruntime find the same places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mecq_cli.export import onnx
from mecq_cli.export.ort import OrtRunner
from mecq_cli.integer.ir import INPUT, IntegerModel, Node
from mecq_cli.integer.reference import execute, run
from mecq_cli.integer.validate import validate
from mecq_cli.kernels import run_model

SIZES = [
    *(((4, 5), (8, 10)), ((3, 7), (13, 11)), ((9, 6), (4, 3))),
    *(((33, 2), (65, 65)), ((1, 5), (7, 5))),
]


@pytest.mark.parametrize(("before", "after"), SIZES)
@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("profile", ["ort", "portable"])
def test_all_ways_agree(
    before: tuple[int, int], after: tuple[int, int], corners: bool, profile: str, tmp_path: Path
) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, *before)).astype(np.float32)
    attributes = {"size": list(after), "align_corners": corners}
    model = IntegerModel((Node("resize", "resize", (INPUT,), None, attributes),), (3, *before))
    validate(model)
    wanted = F.interpolate(
        torch.from_numpy(x).double(), after, mode="bilinear", align_corners=corners
    ).numpy()
    onnx.save(model, tmp_path / "model.onnx", profile=profile)
    found = {
        "reference": run(model, x),
        "torch": run_model(model, torch.from_numpy(x)).numpy(),
        "onnxruntime": OrtRunner(tmp_path / "model.onnx").run(x),
    }
    for way, values in found.items():
        assert values.shape == (2, 3, *after)
        # Torch and onnxruntime find the places in float32, in which 37.5 has 18 digits behind it.
        np.testing.assert_allclose(values, wanted, atol=3e-5, err_msg=way)


def test_between_powers_of_two_it_is_exact(tmp_path: Path) -> None:
    """Whatever the memory format: the bytes of all ways are the same."""
    steps = np.random.default_rng(0).integers(-128, 128, (2, 16, 6, 10))
    x = (steps * 2.0**-5).astype(np.float32)
    node = Node("resize", "resize", (INPUT,), None, {"size": [24, 40], "align_corners": False})
    model = IntegerModel((node,), (16, 6, 10))
    onnx.save(model, tmp_path / "model.onnx")
    wanted = execute(node, [x], [None])
    last = torch.from_numpy(x).contiguous(memory_format=torch.channels_last)
    assert np.array_equal(run_model(model, last).numpy(), wanted)
    assert np.array_equal(OrtRunner(tmp_path / "model.onnx").run(x), wanted)
