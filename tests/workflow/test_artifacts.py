"""What artifacts and ONNX files say of themselves is checked before anything relies on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from mecq_cli.config import ExportConfig, InspectConfig, PredictConfig
from mecq_cli.errors import ArtifactError, UsageError
from mecq_cli.events import Listener
from mecq_cli.export import onnx as exporter
from mecq_cli.export import safetensors
from mecq_cli.export.seal import METADATA_KEY, seal
from mecq_cli.integer.ir import INPUT, Grid, IntegerModel, Node
from mecq_cli.workflow.artifacts import load_artifact
from mecq_cli.workflow.export import export
from mecq_cli.workflow.inspect import inspect
from mecq_cli.workflow.predict import predict

SIZE = [3, 32, 32]
PREPROCESSING = {
    "input_size": SIZE, "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bilinear",
    "crop_pct": 1.0, "crop_mode": "center",
}  # fmt: skip
DETECTOR = {
    "kind": "ssd", "size": SIZE[1:], "weights": [10, 10, 5, 5], "largest_growth": 4.0,
    "score_threshold": 0.1, "iou_threshold": 0.5, "candidates": 100, "detections": 10,
    "levels": [{"grid": [2, 2], "stride": [16, 16], "boxes": [[0, 0, 8, 8]]}],
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> IntegerModel:
    """The mean colour of an image, and a layer of 4 classes behind it."""
    grid = Grid(2.0**-5, 100, 8, 0, 255)
    weight: dict[str, NDArray[Any]] = {
        "weight": np.arange(-6, 6, dtype=np.int8).reshape(4, 3),
        "weight_scale": np.full(4, 0.01, np.float32),
        "bias": np.zeros(4, np.int32),
    }
    nodes = (
        Node("x", "quantize", (INPUT,), grid),
        Node("mean", "global_avg_pool", ("x",), grid),
        Node("flat", "flatten", ("mean",), grid),
        Node("fc", "linear", ("flat",), None, {}, 8, weight),
    )
    metadata = {"model": "net", "preprocessing": PREPROCESSING}
    return IntegerModel(nodes, (3, 32, 32), metadata)


def stored(model: IntegerModel, folder: Path, /, **metadata: Any) -> Path:
    described = {key: value for key, value in metadata.items() if value is not ...}
    rest = {key: value for key, value in model.metadata.items() if key not in metadata}
    safetensors.save(replace(model, metadata={**rest, **described}), folder / "a.safetensors")
    return folder / "a.safetensors"


def picture(folder: Path) -> Path:
    Image.new("RGB", (40, 36), "red").save(folder / "red.png")
    return folder / "red.png"


def test_classes_without_names_have_numbers(model: IntegerModel, tmp_path: Path) -> None:
    config = PredictConfig(
        target=str(stored(model, tmp_path)), images=(picture(tmp_path),), output=None
    )
    (found,) = predict(config, Listener())["predictions"]
    assert {row["class"] for row in found["top5"]} == {"0", "1", "2", "3"}


WRONG: list[tuple[Mapping[str, Any], str]] = [
    ({"task": ["classify"]}, "is for the task .* which this version does not know"),
    ({"task": "segment"}, r"is for the task segment, which outputs \[N, 4\] are not of"),
    ({"task": "detect"}, "says nothing of its boxes"),
    ({"task": "detect", "detector": DETECTOR}, "task detect, which outputs"),
    ({"task": "detect", "detector": {**DETECTOR, "candidates": 1.5}}, "makes no boxes"),
    (
        {
            "task": "detect",
            "detector": {
                **DETECTOR,
                "levels": [{"grid": [9999, 9999], "stride": [1, 1], "boxes": [[0, 0, 8, 8]]}],
            },
        },
        "makes no boxes",
    ),
    ({"fp32_bytes": "abc"}, "fp32_bytes are no number"),
    ({"model": ""}, "name of its model is none"),
    ({"model": "a\nb"}, "name of its model is none"),
    ({"model": 3}, "name of its model is none"),
    (
        {"preprocessing": {**PREPROCESSING, "input_size": [3, 64, 64]}},
        r"size \[3, 64, 64\] for a network that takes \[3, 32, 32\]",
    ),
    ({"preprocessing": {**PREPROCESSING, "crop_pct": 1e-4}}, "too large"),
]


@pytest.mark.parametrize(("metadata", "message"), WRONG)
def test_what_does_not_fit_the_graph_is_refused(
    metadata: Mapping[str, Any], message: str, model: IntegerModel, tmp_path: Path
) -> None:
    path = stored(model, tmp_path, **metadata)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_artifact(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ArtifactError):
        inspect(InspectConfig(target=str(path)), Listener())
    with pytest.raises(ArtifactError):
        export(ExportConfig(run=str(path), verify=False), Listener())
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("classes", [5, "abcd", ["a", "b"], ["a", 2, "c", "d"]])
def test_names_in_an_onnx_file(classes: Any, model: IntegerModel, tmp_path: Path) -> None:
    """Its checksum is right all the same: whoever made it meant it."""
    exporter.save(model, tmp_path / "a.onnx")
    proto = onnx.load_model(tmp_path / "a.onnx")
    entry = next(p for p in proto.metadata_props if p.key == METADATA_KEY)
    document = {**json.loads(entry.value), "classes": classes}
    kept = [p for p in proto.metadata_props if p.key == METADATA_KEY]
    del proto.metadata_props[:]
    proto.metadata_props.extend(kept)
    proto.metadata_props[0].value = json.dumps(document)
    (tmp_path / "a.onnx").write_bytes(seal(proto))
    config = PredictConfig(target=str(tmp_path / "a.onnx"), images=(picture(tmp_path),))
    with pytest.raises(ArtifactError, match=r"names (of its classes are none|for 4 classes)"):
        predict(config, Listener())


def test_what_no_verification_reads_is_refused(model: IntegerModel, tmp_path: Path) -> None:
    run = str(stored(model, tmp_path))
    with pytest.raises(UsageError, match="--images is what a file is verified on"):
        export(ExportConfig(run=run, verify=False, images=3), Listener())
    with pytest.raises(UsageError, match="--data is what a file is verified on"):
        export(ExportConfig(run=run, verify=False, data="d", images=3), Listener())
    done = export(ExportConfig(run=run, verify=False), Listener())
    assert (tmp_path / "a.py").exists()
    assert Path(done["path"]) == tmp_path / "a.onnx"


def test_packed_weights_go_to_a_folder_or_a_file_of_their_kind(
    model: IntegerModel, tmp_path: Path
) -> None:
    run = str(stored(model, tmp_path))

    def written(output: str) -> str:
        config = ExportConfig(
            run=run, format="compressed-tensors", verify=False, output=tmp_path / output
        )
        return str(Path(export(config, Listener())["path"]).relative_to(tmp_path))

    assert written("out") == "out/model.safetensors"
    assert written("other/weights.safetensors") == "other/weights.safetensors"
    (tmp_path / "file").write_text("mine")
    for output in ("foo.onnx", "file"):
        with pytest.raises(UsageError, match=r"is a folder, or a file that ends in \.safetensors"):
            written(output)
