"""The whole path with nothing but what the package brings: the demo, cut short."""

from __future__ import annotations

import copy
import json
import re
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import mecq_cli
from mecq_cli.errors import ArtifactError, UsageError
from mecq_cli.export.ort import OrtRunner
from mecq_cli.workflow.arms import ARMS
from mecq_cli.workflow.study import AGAIN
from tests.e2e.command import mecq, refused

FLOAT, W2A2 = 75.0, 60.0
"""Top-1 in percent that a few epochs reach at least."""


def test_demo(digits: Path) -> None:
    document = json.loads((digits / "demo.json").read_text())
    assert document["fp_top1"] >= FLOAT
    assert document["top1"] == document["simulator_top1"] >= W2A2
    assert document["images"] == 360
    assert [e["format"] for e in document["exports"]] == ["onnx", "safetensors"]
    for entry in document["exports"]:
        assert entry["verified"] is True
        assert (digits / entry["path"]).stat().st_size == entry["bytes"]
    again = mecq("demo", cwd=digits)
    assert again.code == 2
    assert "--force" in again.err


def test_a_demo_does_not_mix_with_files_of_others(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"mine")
    for more in ([], ["--force"]):
        done = mecq("demo", "--output", "photos", *more, cwd=tmp_path)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert "photos: holds other files (cat.jpg)" in done.err
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


@pytest.mark.parametrize("target", ["", "run", "run/model.onnx", "run/model.safetensors"])
def test_eval(digits: Path, target: str) -> None:
    folder = digits / "runs" / "demo"
    arguments = [folder / target, "--data", folder / "digits"] if target else []
    document = mecq("eval", *arguments, "--json", cwd=digits).document
    wanted = json.loads((folder / "run" / "summary.json").read_text())["top1"]
    assert document["top1"] == wanted >= W2A2


def test_eval_of_the_float_network(digits: Path) -> None:
    folder = digits / "runs" / "demo"
    document = mecq(
        "eval", "resnet20_cifar", "--checkpoint", folder / "float.safetensors", "--img-size", "16",
        "--data", folder / "digits", "--json", cwd=digits,
    ).document  # fmt: skip
    assert document["top1"] >= FLOAT
    assert document["top1"] == json.loads((digits / "demo.json").read_text())["fp_top1"]


def test_export_predict_and_inspect(digits: Path, tmp_path: Path) -> None:
    """Without settings, data or float weights: an artifact in a folder of its own."""
    folder = digits / "runs" / "demo"
    (tmp_path / "alone").mkdir()
    shutil.copy(folder / "run" / "model.safetensors", tmp_path / "alone")
    arguments = ["--data", folder / "digits", "--json"]
    done = mecq("export", "alone", *arguments, "--images", "50", cwd=tmp_path)
    assert (done.document["verified"], done.document["images"]) == (True, 50)
    assert mecq("eval", "alone", *arguments, cwd=tmp_path).document["top1"] >= W2A2
    files = [sorted((folder / f"digits/val/{n}").iterdir())[0] for n in range(10)]
    document = mecq("predict", "alone", *files, "--json", cwd=tmp_path).document
    right = [p["top5"][0]["class"] == str(n) for n, p in enumerate(document["predictions"])]
    assert sum(right) >= 5
    totals = mecq("inspect", "alone", "--json", cwd=tmp_path).document["totals"]
    assert totals["packed_bytes"] == (tmp_path / "alone" / "model.safetensors").stat().st_size


def test_the_program_in_the_quickstart(
    digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text()
    [program] = re.findall(
        r"(?:^    .*\n|^\n)*^    .*mecq_cli\.load(?:.*\n)(?:^    .*\n)*", text, re.M
    )
    image = sorted((digits / "runs/demo/digits/val/7").iterdir())[0]
    monkeypatch.chdir(digits)
    exec(textwrap.dedent(program).replace("photos/val/cat/0900.jpg", str(image)))
    predicted = mecq("predict", "runs/latest", image, "--json", cwd=digits).document
    assert capsys.readouterr().out.split() == [predicted["predictions"][0]["top5"][0]["class"]]


def test_a_loaded_artifact_computes_what_eval_counts(digits: Path) -> None:
    run = digits / "runs/demo/run"
    model = mecq_cli.load(run)
    assert model.classes == tuple("0123456789")
    assert (model.preprocessing.input_size, model.imagenet) == ((3, 16, 16), False)
    files = sorted((digits / "runs/demo/digits/val").glob("*/*"))
    images = torch.stack([model.read(file) for file in files])
    logits = model(images)
    assert (logits.dtype, logits.requires_grad) == (torch.float32, False)
    right = [
        model.classes[i] == file.parent.name
        for i, file in zip(logits.argmax(1), files, strict=True)
    ]
    assert 100 * sum(right) / len(right) == json.loads((run / "summary.json").read_text())["top1"]
    fused = OrtRunner(run / "model.onnx").run(images.numpy())
    np.testing.assert_array_equal(logits.numpy(), fused)

    same = mecq_cli.load(run / "model.safetensors")
    for count in (0, 1, 7):
        assert torch.equal(same(images[:count]), logits[:count])
    assert torch.equal(copy.deepcopy(model).to("cpu").half().train()(images), logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(images), logits)
    if torch.cuda.is_available():
        assert torch.equal(model.to("cuda")(images.to("cuda")).cpu(), logits)
    buffers = list(model.to("meta").buffers())
    assert len(buffers) > 20
    assert all(buffer.is_meta for buffer in buffers)


def test_what_cannot_be_loaded_is_named(digits: Path, tmp_path: Path) -> None:
    run = digits / "runs/demo/run"
    for path, message in (
        (run / "model.onnx", "no integer artifact; give a run folder"),
        (tmp_path / "none.safetensors", "no such file"),
        ("resnet18", "no integer artifact"),
    ):
        with pytest.raises(UsageError, match=message):
            mecq_cli.load(path)
    (tmp_path / "cut.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="not a usable mecq-integer file"):
        mecq_cli.load(tmp_path / "cut.safetensors")
    model = mecq_cli.load(run)
    for images in (
        torch.zeros(1, 3, 16, 17),
        torch.zeros(3, 16, 16),
        torch.zeros(1, 3, 16, 16).byte(),
    ):
        with pytest.raises(
            UsageError, match=r"this model wants normalised floats \[N, 3, 16, 16\]"
        ):
            model(images)


def test_the_weights_alone(digits: Path, tmp_path: Path) -> None:
    folder = digits / "runs" / "demo"
    shutil.copy(folder / "run" / "model.safetensors", tmp_path / "w2a2.safetensors")
    command = ["export", "w2a2.safetensors", "-f", "compressed-tensors", "--images", "50"]
    data = ["--data", folder / "digits"]
    done = mecq(*command, *data, "--json", cwd=tmp_path).document
    assert (done["verified"], done["images"], done["largest_difference"]) == (True, 50, 0.0)
    files = [tmp_path / done["path"], tmp_path / done["config"]]
    assert [file.name for file in files] == ["model.safetensors", "config.json"]
    assert done["bytes"] == sum(file.stat().st_size for file in files)
    # Weights of 2 bits without zero, -3, -1, 1, 3, take 3 bits there.
    assert files[0].stat().st_size < 1.35 * (tmp_path / "w2a2.safetensors").stat().st_size
    again = mecq(*command, *data, cwd=tmp_path)
    assert (again.code, again.out) == (2, "")
    assert "--force" in again.err
    shown = mecq(*command, *data, "--force", cwd=tmp_path)
    assert (shown.code, "next: " in shown.err) == (0, False)
    assert "described by" in shown.out
    other = mecq("eval", files[0], *data, cwd=tmp_path)
    assert (other.code, other.err.count("\n")) == (3, 1)
    assert "its format is 'pt'" in other.err


def test_a_dry_run_foretells_the_size(digits: Path) -> None:
    run = digits / "runs" / "demo" / "run"
    settings = run / "config.toml"
    done = mecq("quantize", "--config", settings, "--dry-run", "--json", cwd=digits)
    foretold = done.document["sizes"]
    sizes = json.loads((run / "summary.json").read_text())["sizes"]
    assert foretold["fp32_bytes"] == sizes["fp32_bytes"]
    assert foretold["ideal_bytes"] == sizes["ideal_bytes"]
    assert foretold["packed_bytes"] == pytest.approx(sizes["packed_bytes"], rel=0.02)
    assert {row["activation_scale"] for row in done.document["sites"]} == {None}
    assert (done.document["optimizer"], done.document["lr"]) == ("sgd", 0.01)


def test_images_held_out_of_training(digits: Path, tmp_path: Path) -> None:
    """Without a second folder; `mecq eval` uses the very images that were held out."""
    folder = digits / "runs" / "demo"
    shutil.copytree(folder / "digits" / "val", tmp_path / "data" / "train")
    arguments = [
        "quantize", "resnet20_cifar", "--wbits", "4", "--abits", "4", "--data", "data",
        "--checkpoint", folder / "float.safetensors", "--img-size", "16", "--val-split", "0.3",
        "--epochs", "0", "--output", "held", "--json",
    ]  # fmt: skip
    summary = mecq(*arguments, cwd=tmp_path).document
    assert 100 <= summary["images"] <= 115
    evaluated = mecq("eval", "--json", cwd=tmp_path).document
    assert evaluated["images"] == summary["images"]
    assert evaluated["top1"] == summary["top1"] >= W2A2
    # Others in their place would have been trained on.
    new = shutil.copy(next((tmp_path / "data" / "train").rglob("*.png")), tmp_path / "new.png")
    place = next((tmp_path / "data" / "train").iterdir()) / "new.png"
    shutil.move(new, place)
    refused(mecq("eval", "held", cwd=tmp_path), 2, "no longer those")
    place.unlink()
    # Wherever they are now; of other images all are taken.
    (tmp_path / "data").rename(tmp_path / "moved")
    refused(mecq("eval", "held", cwd=tmp_path), 3, "data")
    for target in ("held", "held/model.safetensors"):
        again = mecq("eval", target, "--data", "moved", "--json", cwd=tmp_path).document
        assert again["images"] == summary["images"]
        assert again["top1"] == summary["top1"]
    whole = mecq("eval", "held", "--data", folder / "digits", "--json", cwd=tmp_path).document
    assert whole["images"] == len([*(folder / "digits" / "val").rglob("*.png")])
    report = mecq("report", "held", "--data", "moved", "--json", cwd=tmp_path).document
    assert report["answers"]["of"] == summary["images"]


def test_a_file_in_a_run_is_verified_on_the_images_of_the_run(digits: Path, tmp_path: Path) -> None:
    target = digits / "runs" / "demo" / "run" / "model.safetensors"
    done = mecq("export", target, "--output", "x.onnx", "--images", 20, "--json", cwd=tmp_path)
    assert done.document["verified"] is True


def test_a_study_tabulates_its_arms_and_goes_on(digits: Path) -> None:
    arms = "none;two views, stages 1;weights 0.1"
    command = [
        "bench", "mec", "resnet20_cifar", "--wbits", 2, "--abits", 2, "--img-size", 16,
        "--data", "runs/demo/digits", "--checkpoint", "runs/demo/float.safetensors",
        "--output", "study", "--epochs", 1, "--max-steps", 2, "--seeds", 1, "--per-class", 20,
        "--tune", "--compile", "off", "--arms", arms, "--json",
    ]  # fmt: skip
    first = mecq(*command, cwd=digits).document
    assert [row["arm"] for row in first["rows"]] == arms.split(";")
    assert first["train_images"] == 200
    for wrong in (("resnet2", 2, "resnet2"), ("--checkpoint", 3, "no such weight file")):
        # What never began is in nobody's way.
        name, code, words = wrong
        other = ["bench", "mec", name if code == 2 else "resnet20_cifar", *command[3:]]
        if code == 3:
            other += ["--checkpoint", "missing.pth"]
        refused(mecq(*other, "--output", "begun", cwd=digits), code, words)
    right = mecq(*command, "--output", "begun", "--arms", "none", "--max-steps", 1, cwd=digits)
    assert [row["arm"] for row in right.document["rows"]] == ["none"]
    assert first["images"] == 143  # a tenth of each of the ten classes of train, rounded
    lengths = json.loads(
        (digits / "study/two_views-stages_1-seed0/metrics.jsonl").read_text().splitlines()[-1]
    )["coding_length"]
    assert len(lengths) == 3
    assert min(lengths.values()) > 0
    assert mecq(*command, cwd=digits).document["rows"] == first["rows"]
    # It is this study, and no other one by the same name.
    for changed, words in {
        ("--wbits", 4): "--wbits: got 4, but the study in study was started with 2",
        ("--per-class", 10): "--per-class: got 10",
        ("--checkpoint", "runs/demo/run/model.safetensors"): "--checkpoint: its content is not",
    }.items():
        refused(mecq(*command, *changed, cwd=digits), 2, words)
    elsewhere = [*command[:-1], "--output", "runs/demo/run"]
    refused(mecq(*elsewhere, cwd=digits), 2, "holds no study")
    refused(mecq(*command, "--arms", "non", cwd=digits), 2, "did you mean 'none'?")
    # `mecq quantize` would train on other images; the report does not advise it.
    run = digits / "study" / "none-seed0"
    assert json.loads((run / "summary.json").read_text())["again"] == AGAIN
    document = mecq("report", run, "--data", "runs/demo/digits", "--json", cwd=digits).document
    assert document["command"] is None
    assert f"{AGAIN} makes it again" in (run / "report.html").read_text()


def test_the_arms_of_a_study_are_listed(tmp_path: Path) -> None:
    shown = mecq("bench", "arms", cwd=tmp_path)
    assert shown.code == 0
    assert mecq("bench", "arms", "--json", cwd=tmp_path).document["arms"] == ARMS
    lines = shown.out.splitlines()
    assert [name for name in ARMS if not any(line.startswith(name) for line in lines)] == []
    assert "the default recipe" in lines[1]


def test_features_of_a_run(digits: Path, tmp_path: Path) -> None:
    picture = tmp_path / "spectra.svg"
    document = mecq(
        "bench", "features", "runs/demo/run", "--images", 200, "--plot", picture, "--json",
        cwd=digits,
    ).document  # fmt: skip
    again = ["bench", "features", "runs/demo/run", "--plot", picture]
    refused(mecq(*again, cwd=digits), 2, "exists already; give --force")
    refused(mecq(*again[:-1], "spectra.png", cwd=digits), 2, ".svg")
    full, quantized = document["networks"]
    assert full["top1"] >= FLOAT
    assert quantized["top1"] >= W2A2
    for site, reference in zip(quantized["sites"], full["sites"], strict=True):
        assert reference["cosine"] == pytest.approx(1.0)
        assert reference["cka"] == pytest.approx(1.0)
        assert 0.0 < site["cosine"] < 1.0
        assert 0.3 < site["cka"] < 1.0, "a trained network is still like the one it came from"
        assert sum(site["eigenvalues"]) == pytest.approx(1.0)
        assert 1.0 < site["effective_rank"] < len(site["eigenvalues"])
    assert picture.read_text().startswith("<?xml")


def test_entropy_of_a_run(digits: Path) -> None:
    document = mecq("inspect", "--json", cwd=digits).document
    assert document["entropy"]
    assert all(row["first"] > 0 and row["last"] > 0 for row in document["entropy"])
    assert "coding length, nats" in mecq("inspect", cwd=digits).out


def test_bench_train(tmp_path: Path) -> None:
    document = mecq(
        "bench", "train", "resnet20_cifar", "--batch-size", 16, "--rounds", 2, "--compile", "off",
        "--no-memory", "--threads", 1, "--json", cwd=tmp_path,
    ).document  # fmt: skip
    assert document["ratio"] > 1.0, "quantizers are not free without a compiler"
    assert document["qat_step_ms"] > document["fp_step_ms"] > 0
    assert [row["arm"] for row in document["rows"]] == [
        "fp",
        "quantizers",
        "distillation",
        "recipe",
    ]
