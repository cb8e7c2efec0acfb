"""Functions by name: NumPy and torch agree, and tables are what their definition says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mecq_cli import functions
from mecq_cli.errors import ArtifactError
from mecq_cli.export.safetensors import load, save, to_bytes
from mecq_cli.integer.functions import FUNCTIONS, table
from mecq_cli.integer.ir import INPUT, Grid, IntegerModel, Node
from mecq_cli.integer.reference import run
from mecq_cli.sizes import site_rows
from tests.export.test_profiles import by_qonnx, portable
from tests.integer.random_models import Maker

NUMBERS = {"leaky_relu": [0.2], "elu": [0.7], "clamp": [-1.0, 2.0]}
SOURCE, TARGET = Grid(0.0625, 100, 8, 0, 255), Grid(0.03125, 20, 8, 0, 255)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_both_definitions_agree(name: str) -> None:
    x = np.linspace(-12, 12, 4001)
    numbers = NUMBERS.get(name, [])
    assert len(numbers) == FUNCTIONS[name].parameters
    expected = functions.FUNCTIONS[name](torch.from_numpy(x), *numbers)
    np.testing.assert_allclose(FUNCTIONS[name].call(x, *numbers), expected, atol=1e-6)
    single = FUNCTIONS[name].call(x.astype(np.float32), *numbers)
    np.testing.assert_allclose(single, expected, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_table_rounds_the_function(name: str) -> None:
    numbers = NUMBERS.get(name, [])
    entries = table(name, numbers, SOURCE, TARGET)
    x = torch.from_numpy((np.arange(256) - SOURCE.zero_point) * SOURCE.scale)
    y = functions.FUNCTIONS[name](x, *numbers).numpy()
    real = (entries.astype(np.float64) - TARGET.zero_point) * TARGET.scale
    low, high = ((q - TARGET.zero_point) * TARGET.scale for q in (0, 255))
    assert np.abs(real - y.clip(low, high)).max() <= TARGET.scale / 2 + 1e-6


def all_bytes(entries: np.ndarray) -> tuple[IntegerModel, np.ndarray]:
    """Each integer of a grid, its entry, and a layer that reads the entries."""
    images = (np.arange(256, dtype=np.float32) - SOURCE.zero_point) * SOURCE.scale
    maker = Maker(np.random.default_rng(0), images.astype(np.float32).reshape(1, 1, 16, 16))
    last = maker.append(Node("q", "quantize", (INPUT,), SOURCE))
    tensors = {"table": entries}
    last = maker.append(Node("l", "lookup", (last,), TARGET, tensors=tensors))
    maker.linear(maker.flatten(maker.conv(last, 2, 3, abits=4)), 3)
    return maker.model(), maker.images


def test_every_byte_has_its_entry_in_every_runtime(tmp_path: Path) -> None:
    entries = np.random.default_rng(1).permutation(256).astype(np.uint8)
    model, images = all_bytes(entries)
    np.testing.assert_array_equal(run(model, images, keep=True)["l"].ravel(), entries)
    save(model, tmp_path / "m.safetensors")
    stored = load(tmp_path / "m.safetensors")
    np.testing.assert_array_equal(stored.nodes[1].tensors["table"], entries)
    assert "lookup" in {row["type"] for row in site_rows(stored)}
    for profile in ("ort", "portable"):
        portable(stored, images, tmp_path / f"{profile}.onnx")


def test_every_byte_has_its_entry_in_qonnx(tmp_path: Path) -> None:
    pytest.importorskip("qonnx", reason="needs the extra: pip install 'mecq[qonnx]'")
    model, images = all_bytes(np.random.default_rng(1).permutation(256).astype(np.uint8))
    assert by_qonnx(model, images, tmp_path / "m.onnx")["off"] == 0


@pytest.mark.parametrize(
    "entries",
    [np.zeros(255, np.uint8), np.zeros(256, np.int8), np.zeros((1, 256), np.uint8)],
    ids=["short", "signed", "deep"],
)
def test_tables_of_another_form_are_refused(entries: np.ndarray) -> None:
    model, _ = all_bytes(np.zeros(256, np.uint8))
    nodes = list(model.nodes)
    nodes[1] = Node("l", "lookup", ("q",), TARGET, tensors={"table": entries})
    with pytest.raises(ArtifactError, match="table has 256 bytes"):
        to_bytes(IntegerModel(tuple(nodes), model.input_shape, {}))


def test_an_entry_out_of_range_is_refused() -> None:
    model, _ = all_bytes(np.full(256, 9, np.uint8))
    nodes = list(model.nodes)
    grid = Grid(0.5, 0, 3, 0, 7)
    nodes[1] = Node("l", "lookup", ("q",), grid, tensors=dict(nodes[1].tensors))
    with pytest.raises(ArtifactError, match="leaves the range"):
        to_bytes(IntegerModel(tuple(nodes), model.input_shape, {}))
