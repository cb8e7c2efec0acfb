"""Thresholds in files: all 256 bytes in every runtime, round trips, and hostile ones refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mecq_cli.cli.views.sites import sites
from mecq_cli.errors import ArtifactError
from mecq_cli.export.safetensors import KIND, load, save, to_bytes
from mecq_cli.integer.ir import INPUT, MOST_THRESHOLD_BITS, Grid, IntegerModel, Node
from mecq_cli.integer.reference import run
from mecq_cli.sizes import site_rows
from mecq_cli.tensorfile import decode, encode
from tests.cli.test_views import drawn
from tests.export.test_profiles import by_qonnx, portable
from tests.integer.random_models import Maker
from tests.mutations import mutations, overwrite

FINE = Grid(0.0625, 0, 8, 0, 255)
PLACES: dict[str, tuple[Any, ...]] = {
    "uneven": (2, (3, 4, 200)),
    "equal": (2, (7, 7, 9)),
    "ends": (2, (1, 255, 256)),
    "never": (1, (256,)),
    "always but at zero": (1, (1,)),
    "most": (MOST_THRESHOLD_BITS, tuple(range(17, 257, 16))),
    "no zero": (2, (3, 4, 200), 3),
    "no zero, lopsided": (2, (1, 127, 253), 1),
    "no zero, signs": (1, (128,), 1),
    "no zero, never": (1, (256,), 1),
    "no zero, most": (MOST_THRESHOLD_BITS, tuple(range(17, 257, 16)), 15),
}
"""Bits, thresholds, and the zero point of a grid without zero."""


def all_bytes(
    bits: int, thresholds: tuple[int, ...], zero_point: int = 0
) -> tuple[IntegerModel, Any]:
    """Each integer of the fine grid, its code, and a layer that reads the codes."""
    images = (np.arange(256, dtype=np.float32) * FINE.scale).reshape(1, 1, 16, 16)
    maker = Maker(np.random.default_rng(0), images)
    last = maker.append(Node("q", "quantize", (INPUT,), FINE))
    spacing = 2 if zero_point else 1
    codes = Grid(0.5, zero_point, bits, 0, spacing * (2**bits - 1), spacing)
    attributes = {"thresholds": thresholds}
    last = maker.append(Node("t", "threshold", (last,), codes, attributes))
    maker.linear(maker.flatten(maker.conv(last, 2, 3, abits=4)), 3)
    return maker.model(), images


@pytest.mark.parametrize("name", PLACES)
def test_every_byte_has_its_code_in_every_runtime(name: str, tmp_path: Path) -> None:
    model, images = all_bytes(*PLACES[name])
    codes = run(model, images, keep=True)["t"].ravel()
    _, thresholds, *zero_point = PLACES[name]
    weight = 2 if zero_point else 1
    assert codes.tolist() == [weight * sum(q >= t for t in thresholds) for q in range(256)]

    save(model, tmp_path / "m.safetensors")
    stored = load(tmp_path / "m.safetensors")
    assert stored.nodes[1] == model.nodes[1]
    assert site_rows(stored)[1]["thresholds"] == list(thresholds)
    assert site_rows(stored)[1]["abits"] == PLACES[name][0]
    assert f" {thresholds[0]}" in drawn(sites, {"sites": site_rows(stored)}, width=200)[2]
    for profile in ("ort", "portable"):
        portable(stored, images, tmp_path / f"{profile}.onnx")


@pytest.mark.parametrize("name", PLACES)
def test_every_byte_has_its_code_in_qonnx(name: str, tmp_path: Path) -> None:
    qonnx = pytest.importorskip("qonnx.core.datatype", reason="needs the extra mecq[qonnx]")
    model, images = all_bytes(*PLACES[name])
    assert by_qonnx(model, images, tmp_path / "m.onnx")["off"] == 0
    graph = onnx.load(tmp_path / "m.onnx").graph
    (counted,) = (node for node in graph.node if node.op_type == "MultiThreshold")
    (kind,) = (a.s.decode() for a in counted.attribute if a.name == "out_dtype")
    bits, _, *zero_point = PLACES[name]
    levels = [2 * code - zero_point[0] if zero_point else code for code in range(2**bits)]
    assert all(qonnx.DataType[kind].allowed(level) for level in levels)


@pytest.fixture(scope="module")
def artifact() -> bytes:
    return to_bytes(all_bytes(*PLACES["uneven"])[0])


@pytest.fixture
def load_bytes(tmp_path: Path) -> Callable[[bytes], IntegerModel]:
    path = tmp_path / "m.safetensors"
    path.touch()

    def load_written(data: bytes) -> IntegerModel:
        overwrite(path, data)
        return load(path)

    return load_written


def rewritten(artifact: bytes, change: Callable[[Any], None], version: int = 2) -> bytes:
    """A file whose hashes are right, of another model."""
    tensors, metadata = decode(KIND, artifact, "")
    document = json.loads(metadata["model"])
    change(document["nodes"][1])
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return b"".join(encode(KIND, tensors, {"model": text}, version))


@pytest.mark.parametrize(
    ("thresholds", "message"),
    [
        ([3, 200, 4], "do not ascend"),
        ([3, 4], "2 thresholds are given, 4 codes take 3"),
        ([3, 4, 5, 6], "4 thresholds are given, 4 codes take 3"),
        ([*range(1, 17)], "thresholds cannot be"),
        ([], "thresholds cannot be"),
        ([0, 4, 200], "thresholds cannot be"),
        ([3, 4, 257], "thresholds cannot be"),
        ([3, 4, -(2**70)], "thresholds cannot be"),
        ([3, 4, 5.0], "thresholds cannot be"),
        ([3, 4, True], "thresholds cannot be"),
        ([3, 4, "5"], "thresholds cannot be"),
        ([3, 4, [5]], "thresholds cannot be"),
        (5, "thresholds cannot be"),
        (None, "thresholds cannot be"),
    ],
)
def test_hostile_thresholds_are_refused(
    artifact: bytes, load_bytes: Callable[[bytes], IntegerModel], thresholds: Any, message: str
) -> None:
    def change(node: dict[str, Any]) -> None:
        node["attributes"]["thresholds"] = thresholds

    with pytest.raises(ArtifactError, match=message) as caught:
        load_bytes(rewritten(artifact, change))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_thresholds_are_of_version_2_and_read_integers(
    artifact: bytes, load_bytes: Callable[[bytes], IntegerModel]
) -> None:
    assert load_bytes(rewritten(artifact, lambda node: None)).nodes[1].op == "threshold"
    with pytest.raises(ArtifactError, match="more than the model"):
        load_bytes(rewritten(artifact, lambda node: None, version=1))
    with pytest.raises(ArtifactError, match="its inputs must be integers"):
        load_bytes(rewritten(artifact, lambda node: node.update(inputs=["input"])))
    with pytest.raises(ArtifactError, match="2 inputs are given, it takes 1"):
        load_bytes(rewritten(artifact, lambda node: node.update(inputs=["q", "q"])))
    with pytest.raises(ArtifactError, match="its output must be integers"):
        load_bytes(rewritten(artifact, lambda node: node.update(grid=None)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spacing": 1}, "a spacing of 1 is not said"),
        ({"spacing": 3, "qmax": 9}, "the spacing is 3"),
        ({"spacing": 2.0, "qmax": 6, "zero_point": 3}, "are integers"),
        ({"spacing": True, "qmax": 6, "zero_point": 3}, "is not said"),
        ({"spacing": 2, "qmax": 6}, "without zero, whose zero point 0"),
        ({"spacing": 2, "qmax": 6, "zero_point": 4}, "without zero, whose zero point 4"),
        ({"spacing": 2, "qmax": 6, "zero_point": 7}, "without zero, whose zero point 7"),
        ({"spacing": 2, "qmax": 7, "zero_point": 3}, "do not go together"),
        ({"spacing": 2, "qmax": 4, "zero_point": 3}, "the range"),
        ({"spacing": 2, "qmin": 2, "qmax": 6, "zero_point": 3}, "the range"),
        ({"step": 2}, "a grid"),
    ],
)
def test_hostile_grids_without_zero_are_refused(
    artifact: bytes,
    load_bytes: Callable[[bytes], IntegerModel],
    change: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ArtifactError, match=message):
        load_bytes(rewritten(artifact, lambda node: node["grid"].update(change)))


def test_no_damage_goes_unnoticed(
    artifact: bytes, load_bytes: Callable[[bytes], IntegerModel]
) -> None:
    for name, damaged in mutations(artifact, 2_000, 1):
        with pytest.raises(ArtifactError) as caught:
            load_bytes(damaged)
        assert len(str(caught.value)) < 600, name
