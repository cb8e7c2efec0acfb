"""Semantic segmentation through the command line: quantize, resume, eval, export, predict."""

from __future__ import annotations

import base64
import copy
import io
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import mecq_cli
from mecq_cli.errors import DataError
from mecq_cli.report import page
from tests.e2e.command import mecq, refused, write_patterns
from tests.e2e.runs import check_continued, rows, summary
from tests.e2e.test_report import check_offline
from tests.scenes import CLASSES, write_scenes
from tests.test_segmentation_networks import Pyramid

MODEL = "lraspp_mobilenet_v3_large"
SETTINGS = "bn_images = 8\ncalibration_images = 8\n"
PLAIN = mecq_cli.Preprocessing(
    (3, 32, 32), (0.5,) * 3, (0.5,) * 3, crop_pct=1.0, crop_mode="squash"
)
QUICK: dict[str, Any] = {
    "epochs": 1, "batch_size": 4, "calibration_images": 8, "bn_images": 8, "compile": "off",
    "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with scenes and a run of two steps on them."""
    folder = tmp_path_factory.mktemp("segment")
    write_scenes(folder / "scenes", {"train": 8, "val": 4}, 32)
    (folder / "settings.toml").write_text(SETTINGS)
    done = mecq(
        "quantize", MODEL, "--wbits", 4, "--abits", 4, "--no-pretrained", "--data", "scenes",
        "--img-size", 32, "--max-steps", 2, "--batch-size", 4, "--checkpoint-every", 1,
        "--config", "settings.toml", "--device", "cpu", "--compile", "off", "--output", "run",
        cwd=folder,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert f"{MODEL} W4 A4 on cpu, task segment" in done.err
    assert "entropy balanced" in done.err.replace(",", "")
    assert "entropy term: weight" in done.err
    assert "float mIoU" in done.out
    return folder


def test_a_run_that_is_continued_ends_as_one_that_was_not_stopped(place: Path) -> None:
    check_continued(
        place / "run", ("task", "fp_miou", "simulator_miou", "miou", "images", "mec_weight")
    )
    assert {"train_pixels", "loss_task"} <= rows(place / "run")[0].keys()


def test_run_artifact_and_onnx_have_one_mean_iou(place: Path) -> None:
    exported = mecq("export", "run", "--images", 4, "--json", cwd=place).document
    assert exported["verified"] is True
    assert exported["pixels"] == 4 * 32 * 32
    assert exported["top1_agreement"] >= 99.9
    wanted = summary(place / "run")
    assert wanted["simulator_miou"] == wanted["miou"]
    found = {
        target: mecq("eval", *target.split(), "--data", "scenes", "--json", cwd=place).document
        for target in ("run", "run --simulator", "run/model.onnx")
    }
    for document in found.values():
        assert document["task"] == "segment"
        assert document["miou"] == pytest.approx(wanted["miou"], abs=0.05)
        assert document["classes"] == list(CLASSES)
        there = [share for share in document["iou"] if share is not None]
        assert document["miou"] == pytest.approx(np.mean(there))
    assert found["run"]["miou"] == wanted["miou"]
    shown = mecq("eval", "run", cwd=place).out
    assert all(word in shown for word in ("mIoU", "pixel accuracy", "IoU of triangle"))


def test_masks_are_drawn_over_the_picture(place: Path) -> None:
    image = place / "scenes/val/images/0001.png"
    Image.open(image).resize((80, 40)).save(place / "wide.png")
    done = mecq("predict", "run", "wide.png", "--output", "masks", "--json", cwd=place)
    (found,) = done.document["predictions"]
    with Image.open(place / found["mask"]) as mask:
        assert (mask.mode, mask.size) == ("P", (80, 40))
        indices = np.asarray(mask)
    shares = {row["index"]: row["share"] for row in found["classes"]}
    assert sum(shares.values()) == pytest.approx(100)
    for index, share in shares.items():
        assert share == pytest.approx(100 * float((indices == index).mean()))
    with Image.open(place / found["overlay"]) as overlay:
        assert (overlay.mode, overlay.size) == ("RGB", (80, 40))
    again = mecq("predict", "run", "wide.png", "--output", "masks", cwd=place)
    refused(again, 2, "wide.mask.png exists", "--force")


@pytest.fixture(scope="module")
def reported(place: Path) -> dict[str, Any]:
    return mecq("report", "run", "--json", cwd=place).document


def test_a_report_shows_the_worst_answers_over_their_pictures(
    place: Path, reported: dict[str, Any]
) -> None:
    answers, wanted = reported["answers"], summary(place / "run")
    assert reported["left_out"] == []
    assert (answers["images"], answers["of"], answers["figure"]) == (4, 4, "mIoU")
    assert answers["integer"] == wanted["miou"]
    assert answers["fp"] == pytest.approx(wanted["fp_miou"], abs=0.01)
    assert answers["worse"] + answers["better"] + answers["same"] == 4
    measured = mecq("eval", "run", "--json", cwd=place).document
    by_class = {row["class"]: row["integer"] for row in answers["classes"]}
    assert by_class == {
        name: value
        for name, value in zip(measured["classes"], measured["iou"], strict=True)
        if value is not None
    }
    for ranked in (answers["classes"], answers["examples"]):
        assert [row["integer"] for row in ranked] == sorted(row["integer"] for row in ranked)
    found = check_offline((place / "run/report.html").read_text())
    drawn = found.all("img")
    assert len(drawn) == 4 * len(answers["examples"]) == 16
    # The second picture of the worst image is its mask, over it.
    stem = Path(answers["examples"][0]["path"]).name
    with Image.open(place / "scenes/val/masks" / stem) as file:
        mask = np.asarray(file)
    with Image.open(place / "scenes/val/images" / stem) as file:
        picture = np.asarray(file.convert("RGB"), np.float64)
    encoded = str(drawn[1]["src"]).removeprefix("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as file:
        shown = np.asarray(file, np.float64)
    ground = mask == 0
    assert np.abs(shown - picture)[ground].mean() < 12, "bare, but for JPEG"
    assert np.abs(shown - picture)[~ground].mean() > 30, "painted"


def test_names_in_such_a_report_are_text(reported: dict[str, Any]) -> None:
    evil = "<img src=x onerror=alert(1)>\"'&\x1b[2J"
    document = copy.deepcopy(reported)
    answers = document["answers"]
    answers["figure"] = answers["by_class"] = answers["split"] = evil
    for row in (*answers["classes"], *answers["examples"]):
        row["class"] = row["path"] = evil
    answers["classes"][-1]["colour"] = evil
    picture = "data:image/jpeg;base64,"
    for pictures in ((picture,) * 4, (picture,) * 3):
        shown = {example["index"]: pictures for example in answers["examples"]}
        found = check_offline(page.render(document, shown))
        assert len(found.all("img")) == len(pictures) * len(answers["examples"])
        assert "<img src=x" in " ".join(found.text)
        # Without the float network there is one picture less.
        answers["fp"] = None
        for row in (*answers["classes"], *answers["examples"]):
            row["fp"] = None


def test_the_script_beside_the_file_needs_no_mecq(place: Path) -> None:
    if not (place / "run/model.onnx").exists():
        mecq("export", "run", "--no-verify", cwd=place)
    command = [sys.executable, "-I", "run/model.py", "scenes/val/images/0000.png"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with Image.open(place / "0000.mask.png") as mask:
        said = np.asarray(mask)
    module = mecq_cli.load(place / "run")
    logits = module(module.read(place / "scenes/val/images/0000.png")[None])[0]
    assert np.mean(said == logits.argmax(0).numpy()) > 0.99
    with Image.open(place / "scenes/val/images/0000.png") as image:
        image.resize((70, 41)).save(place / "wide.png")
    subprocess.run([*command[:-1], "wide.png"], cwd=place, capture_output=True, check=True)
    with Image.open(place / "wide.mask.png") as mask:
        assert mask.size == (70, 41)


def test_what_does_not_fit_is_said_in_a_line(place: Path, tmp_path: Path) -> None:
    classes = write_patterns(tmp_path / "classes", {"train": 2, "val": 2})
    start = ["quantize", MODEL, "--wbits", 4, "--abits", 4, "--no-pretrained", "--device", "cpu"]
    done = mecq(*start, "--data", classes, cwd=tmp_path)
    refused(done, 3, "data for classification, and the model segments")
    done = mecq(*start, "--task", "classify", "--data", place / "scenes", cwd=tmp_path)
    refused(done, 2, "--task classify", "made to segment")
    done = mecq("quantize", "resnet20_cifar", *start[2:], "--data", place / "scenes", cwd=tmp_path)
    refused(done, 3, "data for segmentation, and the model classifies")
    done = mecq("eval", place / "run", "--data", classes, cwd=tmp_path)
    refused(done, 3, "data for classification")
    other = Path(shutil.copytree(place / "scenes", tmp_path / "other"))
    (other / "classes.txt").write_text("ground\ndisc\nsquare\ntriangle\n")
    done = mecq("eval", place / "run", "--data", other, cwd=tmp_path)
    refused(done, 3, "are not those of", "square")
    (other / "classes.txt").write_text("ground\ndisc\nbox\n")
    done = mecq("eval", place / "run", "--data", other, cwd=tmp_path)
    refused(done, 2, "4 outputs and the masks have 3 classes")


def test_a_module_of_a_program(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits are those under "out"; the head for training alone is left out."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = Pyramid(classes=4)
    result = mecq_cli.quantize(
        net, place / "scenes", 4, 4, preprocessing=PLAIN, mec_weight=1.0, **QUICK
    )
    assert result.summary["task"] == "segment"
    assert result.miou == result.summary["simulator_miou"]
    assert "aux_classifier" not in {node.name for node in result.module.model.nodes}
    assert result(torch.zeros(2, 3, 32, 32)).shape == (2, 4, 32, 32)
    assert rows(result.run)[0]["coding_length"].keys() >= {"stem.0"}
    assert {row["loss_mec"] != 0 for row in rows(result.run)} == {True}
    assert isinstance(net(torch.zeros(2, 3, 32, 32)), dict)
    assert result.export().exists()


class Scenes(Dataset[tuple[Any, Any]]):
    """Pairs of a folder, as ``change`` makes them."""

    classes = CLASSES

    def __init__(self, folder: Path, change: Any = lambda image, mask: (image, mask)) -> None:
        self.change = change
        self.images = sorted((folder / "images").iterdir())
        self.masks = sorted((folder / "masks").iterdir())

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        with Image.open(self.images[index]) as image, Image.open(self.masks[index]) as mask:
            return self.change(image.convert("RGB"), mask.copy())  # type: ignore[no-any-return]


def as_bytes(image: Image.Image, mask: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels, torch.from_numpy(np.array(mask)).long()


def as_floats(image: Image.Image, mask: Image.Image) -> tuple[torch.Tensor, Any]:
    pixels, labels = as_bytes(image, mask)
    return 2 * (pixels.float() / 255) - 1, labels.numpy()


def test_pairs_of_a_program_train_as_a_folder_does(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net, scenes = Pyramid(classes=4), place / "scenes"
    runs: dict[str, Any] = {
        "folder": scenes,
        "pillow": (Scenes(scenes / "train"), Scenes(scenes / "val")),
        "bytes": (
            DataLoader(Scenes(scenes / "train", as_bytes), 4),
            Scenes(scenes / "val", as_bytes),
        ),
    }
    results = {
        name: mecq_cli.quantize(net, data, 4, 4, preprocessing=PLAIN, output=name, **QUICK)
        for name, data in runs.items()
    }
    files = [(run.run / "model.safetensors").read_bytes() for run in results.values()]
    assert files[0] == files[1] == files[2]
    assert {run.miou for run in results.values()} == {results["folder"].miou}
    assert results["pillow"].module.classes == CLASSES
    file = results["pillow"].export()
    evaluated = mecq("eval", file, "--data", scenes, "--json", cwd=tmp_path).document
    assert evaluated["miou"] == pytest.approx(results["pillow"].miou, abs=0.05)
    refused(mecq("eval", "pillow", cwd=tmp_path), 3, "data sets of the program", "--data DIR")


def test_float_pairs_are_taken_as_they_are(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scenes = place / "scenes"
    data = (Scenes(scenes / "train", as_floats), Scenes(scenes / "val", as_floats))
    result = mecq_cli.quantize(Pyramid(classes=4), data, 4, 4, preprocessing=PLAIN, **QUICK)
    evaluated = mecq("eval", result.run, "--data", scenes, "--json", cwd=tmp_path).document
    assert evaluated["miou"] == result.miou


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image, mask: (image, 3), "train[0]: the mask is of type int; give a tensor"),
        (lambda image, mask: (image, mask.convert("RGB")), "a Pillow image of mode RGB"),
        (lambda image, mask: (image, as_bytes(image, mask)[1].float()), "[32, 32] of float32"),
        (lambda image, mask: (image, as_bytes(image, mask)[1] - 1), "holds -1 to"),
        (lambda image, mask: (image, mask.resize((16, 32))), "16 x 32 pixels and its image"),
        (lambda image, mask: (image, as_bytes(image, mask)[1] % 4 + 3), "holds the label 6"),
        (lambda image, mask: (as_floats(image, mask)[0], mask.resize((9, 9))), "9 x 9 pixels"),
        (lambda image, mask: (image, mask, 1), "give (image, label or mask)"),
    ],
)
def test_pairs_that_cannot_be_are_said(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    scenes = place / "scenes"
    data = (Scenes(scenes / "train", change), Scenes(scenes / "val"))
    with pytest.raises(DataError) as caught:
        mecq_cli.quantize(Pyramid(classes=4), data, 4, 4, preprocessing=PLAIN, **QUICK)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bits_are_allotted_for_a_target(place: Path) -> None:
    document = mecq(
        "quantize", MODEL, "--target-avg-bits", 3, "--abits", 4, "--no-pretrained", "--data",
        "scenes", "--img-size", 32, "--max-steps", 2, "--batch-size", 4, "--device", "cpu",
        "--compile", "off", "--dry-run", "--json", cwd=place,
    ).document  # fmt: skip
    assert document["allotment"]["average_bits"] == pytest.approx(3, abs=0.05)
    assert len({row["wbits"] for row in document["sites"] if row["wbits"]}) > 2
