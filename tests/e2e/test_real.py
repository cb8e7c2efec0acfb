"""Every command on a real network and real images; each test fails if accuracy is lost.

The floors belong to the 1,000 images used here (100 of each class of CIFAR-10), on which the
float ResNet-20 has 91.0 %; on all 5,000 at hand it has 92.46 %.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mecq_cli.data import ImageDataset, eval_batches, normalize, open_evaluation
from mecq_cli.export import safetensors
from mecq_cli.export.ort import OrtRunner
from mecq_cli.insertion import QuantizedModel
from mecq_cli.integer.reference import run as run_reference
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.runs import RunFolder
from mecq_cli.training import state
from mecq_cli.workflow.common import insert_quantizers, load_for_data
from mecq_cli.workflow.targets import run_config
from tests.e2e.command import mecq
from tests.e2e.conftest import Run
from tests.exactness import check

FP, W4A4, W2A2 = 91.0, 88.0, 50.0
"""Top-1 in percent: the float network exactly, the others at least."""


def test_the_float_network_has_the_accuracy_that_is_known(
    some_cifar10: Path, resnet20: Path, tmp_path: Path
) -> None:
    done = mecq(
        "eval", "resnet20_cifar", "--checkpoint", resnet20, "--data", some_cifar10, "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert (done.document["kind"], done.document["images"]) == ("model", 1000)
    # One image may go the other way on another machine.
    assert done.document["top1"] == pytest.approx(FP, abs=0.1)
    assert done.document["top5"] > 99


@pytest.mark.long
@pytest.mark.parametrize("cifar10", [None], indirect=True)
def test_the_float_network_on_all_images(cifar10: Path, resnet20: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", resnet20, "--data", cifar10, "--json"]
    done = mecq("eval", "resnet20_cifar", *arguments, cwd=tmp_path)
    assert (done.document["images"], done.document["top1"]) == (5000, pytest.approx(92.46))


def test_a_calibrated_run(calibrated: Run) -> None:
    summary = calibrated.summary
    assert summary == json.loads((calibrated.folder / "summary.json").read_text())
    assert summary["fp_top1"] == pytest.approx(FP, abs=0.1)
    assert summary["top1"] >= W4A4
    assert summary["simulator_top1"] == summary["top1"]
    assert (summary["images"], summary["steps"], summary["finished"]) == (1000, 0, True)
    assert summary["resumed_at"] is None
    sizes = summary["sizes"]
    assert sizes["packed_bytes"] == (calibrated.folder / "model.safetensors").stat().st_size
    assert sizes["ratio"] == pytest.approx(sizes["fp32_bytes"] / sizes["packed_bytes"])
    assert sizes["ratio"] > 6


def test_a_trained_run(trained: Run) -> None:
    assert trained.summary["top1"] >= W2A2
    assert trained.summary["simulator_top1"] == trained.summary["top1"]
    rows = [json.loads(line) for line in (trained.folder / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(40))
    for row in rows:
        assert {"loss", "loss_task", "loss_mec", "lr", "seconds"} <= {*row}
    first, last = (np.mean([r["loss_task"] for r in part]) for part in (rows[:10], rows[-10:]))
    assert last < 0.8 * first
    assert rows[-1]["lr"] < rows[10]["lr"]
    assert all(np.isfinite(row["loss_mec"]) and row["loss_mec"] != 0 for row in rows)


@pytest.mark.parametrize("which", ["run", "latest", "artifact", "simulator"])
def test_eval_of_a_run(calibrated: Run, which: str) -> None:
    """The latest run and its data are the defaults."""
    targets: dict[str, list[object]] = {
        "run": [calibrated.folder],
        "latest": [],
        "artifact": [calibrated.folder / "model.safetensors", "--data", calibrated.data],
        "simulator": ["--simulator"],
    }
    document = mecq("eval", *targets[which], "--json", cwd=calibrated.place).document
    assert document["kind"] == ("simulator" if which == "simulator" else "artifact")
    assert (document["images"], document["split"]) == (1000, "val")
    assert document["top1"] == calibrated.summary["top1"] >= W4A4
    assert document["top5"] > 98


def test_export_as_onnx_and_what_runs_it(calibrated: Run, tmp_path: Path) -> None:
    """Verified, evaluated by `mecq eval`, and by the snippet beside it; without float weights."""
    target = tmp_path / "net.onnx"
    arguments = ["--output", target, "--images", "200", "--json"]
    document = mecq("export", *arguments, cwd=calibrated.place).document
    assert document["verified"] is True
    assert (document["images"], document["top1_agreement"]) == (200, 100)
    assert document["bytes"] == target.stat().st_size

    arguments = ["--data", calibrated.data, "--json"]
    evaluated = mecq("eval", target, *arguments, cwd=tmp_path).document
    assert evaluated["kind"] == "onnx"
    assert evaluated["top1"] == calibrated.summary["top1"] >= W4A4

    images = [calibrated.data / f"val/{name}" for name in ("cat", "ship", "truck")]
    files = [sorted(folder.iterdir())[0] for folder in images]
    predicted = mecq("predict", target, *files, "--json", cwd=tmp_path).document["predictions"]
    for file, entry in zip(files, predicted, strict=True):
        script = [sys.executable, str(document["snippet"]), str(file)]
        said = subprocess.run(script, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert entry["top5"][0]["class"] in said.stdout.splitlines()[0], said.stdout


def test_export_as_safetensors(calibrated: Run, tmp_path: Path) -> None:
    target = tmp_path / "net.safetensors"
    arguments = ["--format", "safetensors", "--output", target, "--images", "64", "--json"]
    document = mecq("export", calibrated.folder, *arguments, cwd=tmp_path).document
    assert document["verified"] is True
    assert target.read_bytes() == (calibrated.folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("which", ["run", "artifact"])
def test_predict(calibrated: Run, which: str) -> None:
    target = calibrated.folder / ("" if which == "run" else "model.safetensors")
    files = [
        f for d in sorted((calibrated.data / "val").iterdir()) for f in sorted(d.iterdir())[:5]
    ]
    document = mecq("predict", target, *files, "--json", cwd=calibrated.place).document
    right = 0
    for file, entry in zip(files, document["predictions"], strict=True):
        assert entry["image"] == str(file)
        chances = [one["probability"] for one in entry["top5"]]
        assert chances == sorted(chances, reverse=True)
        assert len(chances) == 5
        right += entry["top5"][0]["class"] == file.parent.name
    assert right >= 0.8 * len(files)


def test_inspect(trained: Run) -> None:
    document = mecq("inspect", "--json", cwd=trained.place).document
    products = [s for s in document["sites"] if s["type"] in ("conv2d", "linear")]
    assert [(s["wbits"], s["abits"]) for s in products] == [(8, 8), *[(2, 2)] * 18, (8, 8)]
    assert {s["abits"] for s in document["sites"] if s["type"] == "add"} == {8}
    totals = document["totals"]
    assert totals["ideal_bytes"] == sum(s["packed_bytes"] for s in document["sites"])
    assert totals["packed_bytes"] == trained.summary["sizes"]["packed_bytes"]
    assert trained.summary["top1"] >= W2A2


def test_the_tables_for_people(calibrated: Run) -> None:
    top1 = f"{calibrated.summary['top1']:.2f} %"
    assert calibrated.summary["top1"] >= W4A4
    evaluated = mecq("eval", "--quiet", cwd=calibrated.place)
    assert (evaluated.code, evaluated.err) == (0, "")
    assert top1 in evaluated.out
    inspected = mecq("inspect", "--quiet", cwd=calibrated.place)
    assert "layer1.0.conv1" in inspected.out
    assert "layer3.2.conv2" in inspected.out


def test_the_integers_of_the_trained_network_agree_everywhere(trained: Run, tmp_path: Path) -> None:
    """Real weights, real images, every edge of the graph, all runtimes."""
    config = run_config(RunFolder(trained.folder))
    split = open_evaluation(trained.data)
    loaded, _ = load_for_data(
        config.model, split.classes, checkpoint=config.checkpoint, pretrained=False
    )
    model: QuantizedModel = insert_quantizers(loaded, config)
    state.load_model(trained.folder / "checkpoints", model)
    batch = next(eval_batches(ImageDataset(split, loaded.preprocessing), batch_size=100))
    counts = check(model.eval(), normalize(batch.images, loaded.preprocessing), tmp_path)
    assert counts["off"] <= 3 + 1e-5 * counts["all"], counts


def test_logits_on_all_images_are_the_same_in_every_runtime(trained: Run, tmp_path: Path) -> None:
    target = tmp_path / "net.onnx"
    done = mecq("export", trained.folder, "-o", target, "--images", "64", "-q", cwd=tmp_path)
    assert done.code == 0, done.err
    model = safetensors.load(trained.folder / "model.safetensors")
    preprocessing = Preprocessing.from_json(dict(model.metadata["preprocessing"]))
    runner, plain = OrtRunner(target), OrtRunner(target, optimize=False)
    dataset = ImageDataset(open_evaluation(trained.data), preprocessing)
    hits = differ = 0
    for batch in eval_batches(dataset, batch_size=250):
        images = normalize(batch.images, preprocessing).contiguous().numpy()
        logits = run_reference(model, images)
        np.testing.assert_array_equal(runner.run(images), logits)
        differ += int((plain.run(images).argmax(1) != logits.argmax(1)).sum())
        hits += int((torch.from_numpy(logits.argmax(1)) == batch.labels).sum())
    assert hits / 10 == pytest.approx(trained.summary["top1"])
    assert differ <= 1
