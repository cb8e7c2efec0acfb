"""Detection through the command line: quantize, resume, eval, export, predict."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import mecq_cli
from mecq_cli.errors import UsageError
from mecq_cli.models.detection import BACKGROUND
from mecq_cli.tasks.drawing import BoxDrawing
from tests.detectors import small_ssd, tiny_retinanet
from tests.e2e.command import mecq, refused, write_patterns
from tests.e2e.runs import check_continued, rows, summary
from tests.e2e.test_report import check_offline
from tests.scenes import CLASSES, write_boxes, write_scenes

MODEL = "ssdlite320_mobilenet_v3_large"
SETTINGS = "bn_images = 8\ncalibration_images = 8\n"
NAMES = [BACKGROUND, *CLASSES[1:]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scenes and a run of two steps on them."""
    folder = tmp_path_factory.mktemp("detect")
    write_boxes(folder / "scenes", {"train": 8, "val": 4}, 64)
    (folder / "settings.toml").write_text(SETTINGS)
    done = mecq(
        "quantize", MODEL, "--wbits", 4, "--abits", 4, "--no-pretrained", "--data", "scenes",
        "--img-size", 64, "--max-steps", 2, "--batch-size", 4, "--checkpoint-every", 1,
        "--config", "settings.toml", "--device", "cpu", "--compile", "off", "--output", "run",
        cwd=folder,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert f"{MODEL} W4 A4 on cpu, task detect" in done.err
    assert "the entropy regularizer is off" in done.err
    assert "float mAP" in done.out
    return folder


def test_a_run_that_is_continued_ends_as_one_that_was_not_stopped(place: Path) -> None:
    check_continued(place / "run", ("task", "fp_map", "simulator_map", "map", "images"))
    assert {"train_anchors", "loss_task"} <= rows(place / "run")[0].keys()


def test_run_artifact_and_onnx_have_one_precision(place: Path) -> None:
    exported = mecq("export", "run", "--images", 4, "--json", cwd=place).document
    assert exported["verified"] is True
    assert exported["anchors"] > 4
    assert exported["top1_agreement"] >= 99.9
    assert exported["box_agreement"] >= 99
    assert exported["boxes"] > 50
    wanted = summary(place / "run")
    assert wanted["simulator_map"] == wanted["map"]
    found = {
        target: mecq("eval", *target.split(), "--data", "scenes", "--json", cwd=place).document
        for target in ("run", "run --simulator", "run/model.onnx")
    }
    for document in found.values():
        assert document["task"] == "detect"
        for key in ("map", "map_50", "map_75"):
            assert document[key] == pytest.approx(found["run"][key], abs=1e-6)
        assert document["classes"] == NAMES
        there = [share for share in document["ap"] if share is not None]
        assert document["map"] == pytest.approx(np.mean(there))
    assert found["run"]["map"] == wanted["map"]
    shown = mecq("eval", "run", cwd=place).out
    assert all(word in shown for word in ("mAP", "mAP at an IoU of 0.5", "AP of triangle"))


def test_boxes_are_written_and_drawn_onto_the_picture(place: Path) -> None:
    Image.open(place / "scenes/val/0001.png").resize((160, 80)).save(place / "wide.png")
    done = mecq("predict", "run", "wide.png", "--output", "found", "--json", cwd=place)
    (found,) = done.document["predictions"]
    stored = json.loads((place / found["boxes"]).read_text())
    assert stored == {key: found[key] for key in ("image", "size", "detections")}
    assert stored["size"] == [160, 80]
    scores = [row["score"] for row in stored["detections"]]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) > 5
    module = mecq_cli.load(place / "run")
    images = module.read(place / "wide.png")[None]
    boxes = module.detect(images)[0]
    for row, own in zip(stored["detections"], boxes, strict=True):
        assert row["class"] == NAMES[row["index"]] == NAMES[int(own[5])]
        scaled = own[:4] * torch.tensor([160 / 64, 80 / 64] * 2)
        assert row["box"] == pytest.approx(scaled.tolist(), abs=0.01)
        assert row["score"] == pytest.approx(float(own[4]))
    with Image.open(place / found["overlay"]) as overlay:
        assert (overlay.mode, overlay.size) == ("RGB", (160, 80))
        drawn = np.asarray(overlay) != np.asarray(Image.open(place / "wide.png"))
        assert drawn.any() == (scores[0] >= 0.5)
    again = mecq("predict", "run", "wide.png", "--output", "found", cwd=place)
    refused(again, 2, "wide.boxes.json exists", "--force")
    shown = mecq("predict", "run", "wide.png", "--output", "found", "--force", cwd=place).out
    assert "wide.boxes.png" in shown


def test_the_script_beside_the_file_needs_no_mecq(place: Path) -> None:
    if not (place / "run/model.onnx").exists():
        mecq("export", "run", "--no-verify", cwd=place)
    script = (place / "run/model.py").read_text().replace("LEAST = 0.5", "LEAST = 0.0001")
    (place / "run/all.py").write_text(script.replace("__file__", "'run/model.py'"))
    command = [sys.executable, "-I", "run/all.py", "scenes/val/0000.png"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    module = mecq_cli.load(place / "run")
    wanted = module.detect(module.read(place / "scenes/val/0000.png")[None])[0]
    assert len(said) == len(wanted)
    assert f": {NAMES[int(wanted[0, 5])]} ({100 * float(wanted[0, 4]):.1f} %) at " in said[0]


def test_what_does_not_fit_is_said_in_a_line(place: Path, tmp_path: Path) -> None:
    classes = write_patterns(tmp_path / "classes", {"train": 2, "val": 2})
    masks = write_scenes(tmp_path / "masks", {"train": 2, "val": 2}, 32)
    start = ["quantize", MODEL, "--wbits", 4, "--abits", 4, "--no-pretrained", "--device", "cpu"]
    for other in (classes, masks):
        done = mecq(*start, "--data", other, cwd=tmp_path)
        refused(done, 3, "holds no images with boxes", "data for another task")
    done = mecq(*start, "--task", "classify", "--data", place / "scenes", cwd=tmp_path)
    refused(done, 2, "--task classify", "made to detect")
    for name, word in (("resnet20_cifar", "detection"), ("lraspp_mobilenet_v3_large", "detection")):
        done = mecq("quantize", name, *start[2:], "--data", place / "scenes", cwd=tmp_path)
        refused(done, 3, f"data for {word}", "a model that detects")
    done = mecq("quantize", "fasterrcnn_resnet50_fpn", *start[2:], "--data", masks, cwd=tmp_path)
    refused(done, 2, "in two stages or without anchors", MODEL)
    file = tmp_path / "other/annotations/instances_val.json"
    other = Path(shutil.copytree(place / "scenes", tmp_path / "other"))
    document = json.loads(file.read_text())
    document["categories"][1]["name"] = "square"
    file.write_text(json.dumps(document))
    done = mecq("eval", place / "run", "--data", other, cwd=tmp_path)
    refused(done, 3, "are not those of", "square")
    document["annotations"][0]["category_id"] = 12
    file.write_text(json.dumps(document))
    done = mecq("eval", place / "run", "--data", other, cwd=tmp_path)
    refused(done, 3, "has the label 12, but the categories are 1, 2, 3")
    document["categories"].append({"id": 12, "name": "star"})
    file.write_text(json.dumps(document))
    done = mecq("eval", place / "run", "--data", other, cwd=tmp_path)
    refused(done, 2, "4 outputs, the background among them, and the data 4 categories")
    (other / "val/0000.png").unlink()
    done = mecq("eval", place / "run", "--data", other, cwd=tmp_path)
    refused(done, 3, "lists 1 images that are not there")


@pytest.mark.parametrize("kind", ["ssd", "retinanet"])
def test_a_module_of_a_program(
    kind: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network of torchvision's classes, around a backbone of one's own."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = small_ssd(64, widths=(8, 8, 8, 8, 8)) if kind == "ssd" else tiny_retinanet()
    preprocessing = mecq_cli.Preprocessing(
        (3, 64, 64), (0.5,) * 3, (0.5,) * 3, crop_pct=1.0, crop_mode="squash"
    )
    settings: dict[str, Any] = {
        "epochs": 2, "batch_size": 4, "calibration_images": 8, "bn_images": 8, "compile": "off",
        "device": "cpu",
    }  # fmt: skip
    result = mecq_cli.quantize(
        net, place / "scenes", 4, 4, preprocessing=preprocessing, mec_weight=1.0, **settings
    )
    assert result.summary["task"] == "detect"
    assert result.map == result.summary["simulator_map"]
    assert result.float_map is not None
    assert result.module.detector is not None
    anchors = len(result.module.detector.anchors)
    assert result(torch.zeros(2, 3, 64, 64)).shape == (2, 8, anchors)
    sites = rows(result.run)[0]["coding_length"]
    assert all(name.startswith("backbone.") for name in sites)
    assert {row["loss_mec"] != 0 for row in rows(result.run)} == {True}
    assert result.export().exists()
    items = TensorDataset(torch.zeros(4, 3, 64, 64), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UsageError, match="detects, and data sets of a program"):
        mecq_cli.quantize(net, (items, items), 4, 4)
    cropped = mecq_cli.Preprocessing((3, 64, 64), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(UsageError, match="cuts parts of the image off"):
        mecq_cli.quantize(net, place / "scenes", 4, 4, preprocessing=cropped)


def test_a_module_says_how_its_images_are_prepared(place: Path) -> None:
    net = small_ssd(64, widths=(8, 8, 8, 8, 8))
    net.transform.image_mean = [0.25] * 3
    result = mecq_cli.quantize(
        net, place / "scenes", 4, 4, epochs=0, device="cpu", calibration_images=4, bn_images=0,
        output=place / "own",
    )  # fmt: skip
    found = result.module.preprocessing
    assert (found.input_size, found.mean, found.crop_mode) == ((3, 64, 64), (0.25,) * 3, "squash")
    net.anchor_generator.steps = [8, 16, 48]
    with pytest.raises(UsageError, match=r"^model: SSD at 64 x 64 pixels has a map whose anchors"):
        mecq_cli.quantize(net, place / "scenes", 4, 4)


def test_a_report_shows_the_worst_answers_with_their_boxes(place: Path) -> None:
    report = mecq("report", "run", "--json", cwd=place).document
    answers, wanted = report["answers"], summary(place / "run")
    assert report["left_out"] == []
    assert (answers["images"], answers["figure"], answers["by_class"]) == (4, "mAP", "AP")
    assert answers["integer"] == wanted["map"]
    assert answers["fp"] == pytest.approx(wanted["fp_map"], abs=0.01)
    measured = mecq("eval", "run", "--json", cwd=place).document
    by_class = {row["class"]: row["integer"] for row in answers["classes"]}
    known = zip(measured["classes"], measured["ap"], strict=True)
    assert by_class == {name: value for name, value in known if value is not None}
    drawn = check_offline((place / "run/report.html").read_text()).all("img")
    assert len(drawn) == 4 * len(answers["examples"])
    # The second picture of an image has the boxes that are there, in the colours of the classes.
    colours = BoxDrawing().colours(len(NAMES))
    assert {row["class"]: row["colour"] for row in answers["classes"]} == {
        name: colours[NAMES.index(name)] for name in by_class
    }
    sources = [str(image["src"]).removeprefix("data:image/jpeg;base64,") for image in drawn[:2]]
    plain, boxes = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(source))), np.float64)
        for source in sources
    )
    document = json.loads((place / "scenes/annotations/instances_val.json").read_text())
    name = Path(answers["examples"][0]["path"]).name
    number = next(image["id"] for image in document["images"] if image["file_name"] == name)
    left, top, _, height = next(
        row["bbox"] for row in document["annotations"] if row["image_id"] == number
    )
    changed = np.abs(boxes - plain).max(2)
    edge = changed[top : top + height, left]
    assert np.median(edge) > 40
    assert (changed < 30).mean() > 0.6


def test_deployment_is_timed_without_the_making_of_boxes(place: Path) -> None:
    flags = ("--threads", 1, "--repeats", 1, "--batch-sizes", 1, "--calibration-images", 4)
    document = mecq("bench", "deploy", "run", *flags, "--json", cwd=place).document
    assert set(document["kernels"]) == {"fp32", "static_int8", "mecq"}
    for kernels in document["kernels"].values():
        assert "NonMaxSuppression" not in kernels
    assert document["kernels"]["mecq"]["QLinearConv"] > 50


def test_bits_are_allotted_for_a_target(place: Path) -> None:
    command = (
        "quantize", MODEL, "--target-avg-bits", 3, "--abits", 4, "--no-pretrained", "--data",
        "scenes", "--img-size", 64, "--max-steps", 2, "--batch-size", 4, "--device", "cpu",
        "--compile", "off", "--dry-run",
    )  # fmt: skip
    refused = mecq(*command, "--sensitivity", "hessian", cwd=place)
    assert (refused.code, "does not see what makes boxes" in refused.err) == (2, True)
    document = mecq(*command, "--json", cwd=place).document
    assert document["allotment"]["sensitivity"] == "loss"
    boxes = [
        r for r in document["sites"] if "regression_head" in r["layer"] and r.get("sensitivity")
    ]
    assert boxes, "what makes boxes is seen"
    assert document["allotment"]["average_bits"] == pytest.approx(3, abs=0.05)
    assert document["allotment"]["weight_bytes"] == document["sizes"]["ideal_bytes"]
