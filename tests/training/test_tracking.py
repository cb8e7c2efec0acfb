"""TensorBoard's events say what metrics.jsonl says, each step once."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import mecq, write_patterns

SETTINGS = """\
model = "resnet20_cifar"
wbits = 2
abits = 2
pretrained = false
data = "data"
img_size = 16
batch_size = 8
epochs = 2
checkpoint_every = 3
keep_checkpoints = 9
calibration_images = 16
bn_images = 16
device = "cpu"
compile = "off"
"""
STEPS = 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tracking")
    write_patterns(folder / "data", {"train": 16, "val": 4}, size=16)
    (folder / "run.toml").write_text(SETTINGS)
    return folder


def scalars(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """What TensorBoard reads."""
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reading.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def check(run: Path) -> None:
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    summary = json.loads((run / "summary.json").read_text())
    found = scalars(run / "tensorboard")
    for key, tag in (
        ("loss", "loss/total"), ("loss_task", "loss/task"), ("loss_mec", "loss/entropy"),
        ("train_top1", "accuracy/train_top1"), ("lr", "schedule/lr"),
    ):  # fmt: skip
        wanted: list[Any] = [(row["step"] + 1, pytest.approx(row[key], rel=1e-5)) for row in rows]
        assert found[tag] == wanted
    assert [step for step, _ in found["loss/total"]] == list(range(1, STEPS + 1))
    for site in rows[0]["coding_length"]:
        assert len(found[f"coding_length/{site}"]) == STEPS
    assert found["accuracy/top1"] == [(STEPS, pytest.approx(summary["top1"]))]


def test_the_events_are_the_record_also_after_a_resume(place: Path) -> None:
    command = ["quantize", "--config", "run.toml", "--output", "run", "-q"]
    done = mecq(*command, "--log", "tensorboard", cwd=place)
    assert done.code == 0, done.err
    run = place / "run"
    check(run)
    # As if it had been killed in step 8, with events of steps that are done again.
    for name in ("summary.json", "model.safetensors"):
        (run / name).unlink()
    for step in sorted((run / "checkpoints").iterdir())[2:]:
        step.unlink()
    done = mecq("quantize", "--resume", "--output", "run", "-q", cwd=place)
    assert done.code == 0, done.err
    assert json.loads((run / "summary.json").read_text())["resumed_at"] == 3
    check(run)
    again = mecq("quantize", "--resume", "--output", "run", "-q", cwd=place)
    assert again.code == 0, again.err
    check(run)


def test_asked_for_at_a_resume_they_begin_at_the_first_step(place: Path) -> None:
    done = mecq("quantize", "--config", "run.toml", "--output", "late", "-q", cwd=place)
    assert done.code == 0, done.err
    run = place / "late"
    assert not (run / "tensorboard").exists()
    for name in ("summary.json", "model.safetensors"):
        (run / name).unlink()
    for step in sorted((run / "checkpoints").iterdir())[3:]:
        step.unlink()
    words = ["quantize", "--resume", "--output", "late", "--log", "tensorboard", "-q"]
    done = mecq(*words, cwd=place)
    assert done.code == 0, done.err
    check(run)
    # Starting over leaves nothing of it.
    shutil.rmtree(place / "late" / "checkpoints")
    done = mecq(
        "quantize", "--config", "run.toml", "--output", "late", "--force", "--epochs", "0", "-q",
        cwd=place,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert not (run / "tensorboard").exists()


def test_without_tensorboard_the_extra_is_named(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    command = ["quantize", "--config", "run.toml", "--output", "none", "--log", "tensorboard"]
    done = mecq(*command, cwd=place)
    assert (done.code, done.out, done.err.count("\n")) == (6, "", 1)
    assert "pip install 'mecq[tracking]'" in done.err
    assert not (place / "none").exists()
