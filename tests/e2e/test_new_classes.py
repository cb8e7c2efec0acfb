"""A network that knows ten digits gets two other classes: its new last layer is fitted first."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mecq_cli.config import from_toml
from mecq_cli.runs import RunFolder
from mecq_cli.workflow import new_classifier
from mecq_cli.workflow.float_model import load_float
from tests.e2e.command import Done, mecq, refused

SETTINGS = """\
model = "resnet20_cifar"
img_size = 16
reset_classifier = true
wbits = 4
abits = 4
max_steps = 6
batch_size = 32
checkpoint_every = 3
keep_checkpoints = 3
calibration_images = 64
bn_images = 64
device = "cpu"
compile = "off"
"""


@pytest.fixture(scope="module")
def place(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Even and odd digits, the settings, and a run in ``whole``."""
    folder = tmp_path_factory.mktemp("parity")
    source = digits / "runs" / "demo"
    for part in ("train", "val"):
        for digit in range(10):
            target = folder / "data" / part / ("even", "odd")[digit % 2]
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted((source / "digits" / part / str(digit)).iterdir()):
                shutil.copy(path, target / f"{digit}-{path.name}")
    (folder / "settings.toml").write_text(SETTINGS)
    shutil.copy(source / "float.safetensors", folder)
    done = quantize(folder, "whole")
    assert "last layer is fitted" in done.err
    return folder


def quantize(place: Path, output: str, *more: object) -> Done:
    return mecq(
        "quantize", "--config", "settings.toml", "--data", "data", "--checkpoint",
        "float.safetensors", "--output", output, "--json", *more, cwd=place,
    )  # fmt: skip


def test_the_float_network_knows_the_new_classes(place: Path) -> None:
    summary = json.loads((place / "whole" / "summary.json").read_text())
    assert summary["fp_trained"]
    assert summary["fp_top1"] > 80
    assert summary["top1"] > 70
    config = from_toml(place / "whole" / "config.toml")
    assert config.distill  # there is something to learn from


def test_without_it_the_last_layer_is_random(place: Path) -> None:
    (place / "random.toml").write_text(SETTINGS + "fit_classifier = false\n")
    done = quantize(place, "random", "--config", "random.toml", "--epochs", 0)
    assert not done.document["fp_trained"]
    assert done.document["fp_top1"] < 80
    assert not (place / "random" / "classifier.safetensors").exists()
    assert not from_toml(place / "random" / "config.toml").distill


def test_a_run_that_goes_on_has_the_same_teacher(place: Path) -> None:
    shutil.copytree(place / "whole", place / "stopped")
    for name in ("summary.json", "model.safetensors"):
        (place / "stopped" / name).unlink()
    (place / "stopped" / "checkpoints" / "step-00000006.safetensors").unlink()
    done = quantize(place, "stopped", "--resume")
    assert done.document["resumed_at"] == 3
    assert "is fitted" not in done.err
    artifact = (place / "stopped" / "model.safetensors").read_bytes()
    assert artifact == (place / "whole" / "model.safetensors").read_bytes()


def test_whoever_opens_the_run_has_that_float_network(place: Path) -> None:
    run = RunFolder(place / "whole")
    with contextlib.chdir(place):
        loaded, _ = load_float(from_toml(run.config), ("even", "odd"), run)
    kept = safetensors.torch.load_file(run.classifier)
    layer = loaded.module.get_submodule("linear")
    state = layer.state_dict()
    assert all(torch.equal(state[name], kept[name]) for name in ("weight", "bias"))
    assert mecq("report", "whole", "--json", cwd=place).document["left_out"] == []


def test_a_last_layer_that_is_gone(place: Path) -> None:
    shutil.copytree(place / "whole", place / "lost")
    for name in ("summary.json", "classifier.safetensors"):
        (place / "lost" / name).unlink()
    refused(quantize(place, "lost", "--resume"), 3, "classifier.safetensors", "gone", "--force")
    assert not (place / "lost" / "classifier.safetensors").exists()


def test_a_run_that_is_stopped_while_it_fits_can_be_continued(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(new_classifier, "fit", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
        done = quantize(place, "early")
    assert done.code == 130
    assert "mecq quantize --resume --output early" in done.err.splitlines()[-1]
    done = mecq("quantize", "--resume", "--output", "early", "--json", cwd=place)
    assert done.document["fp_trained"]


def test_a_last_layer_that_cannot_be_fitted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(new_classifier, "inputs_of", lambda *_: None)
        done = quantize(place, "odd", "--epochs", 0)
    assert "stays random" in done.err
    assert not done.document["fp_trained"]
    config = from_toml(place / "odd" / "config.toml")
    assert (config.fit_classifier, config.distill) == (False, False)


def test_a_last_layer_that_cannot_be_read(place: Path) -> None:
    shutil.copytree(place / "whole", place / "damaged")
    (place / "damaged" / "summary.json").unlink()
    (place / "damaged" / "classifier.safetensors").write_bytes(b"nothing")
    done = quantize(place, "damaged", "--resume")
    refused(done, 3, "classifier.safetensors", "--force")
    done = quantize(place, "damaged", "--force", "--epochs", 0)
    assert done.document["fp_trained"]
