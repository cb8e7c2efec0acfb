"""What a continued run may do otherwise, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mecq_cli.training import state
from tests.faults.conftest import Course, assert_same
from tests.faults.warm import Ended, Warm


@pytest.fixture
def stopped(warm: Warm, short: Course, tmp_path: Path) -> Path:
    """A run that ended at its third step, with the checkpoints of steps 0 and 2."""
    run = tmp_path / "run"
    done = warm.run(
        *short.arguments, "--output", run, cwd=short.work,
        at_step={"step": 3, "tensor": "fc.bias", "value": float("nan")},
    )  # fmt: skip
    assert done.code == 4, done.err
    return run


def refused(done: Ended, *parts: str) -> None:
    assert done.code == 2, done
    assert done.err.count("error: ") == 1
    for part in parts:
        assert part in done.line, done.line


def test_a_run_may_be_moved_and_carried_out_otherwise(
    warm: Warm, short: Course, stopped: Path, tmp_path: Path
) -> None:
    moved = stopped.rename(tmp_path / "moved")
    data = Path(shutil.copytree(short.place / "data", tmp_path / "elsewhere"))
    done = warm.run(
        "quantize", "--resume", "--output", moved, "--data", data, "--workers", 2,
        "--checkpoint-every", 1, "--keep-checkpoints", 1, cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert [state.step_of(path) for path in state.checkpoints(moved / "checkpoints")] == [4]
    names = [
        folder / "checkpoints" / "step-00000002.safetensors" for folder in (short.whole, moved)
    ]
    shutil.copy(*names)
    assert_same(moved, short.whole)


def test_other_images_and_settings_are_refused(
    warm: Warm, short: Course, stopped: Path, tmp_path: Path
) -> None:
    kept = [*stopped.rglob("*.safetensors"), stopped / "config.toml"]
    before = {path: path.read_bytes() for path in kept}
    data = Path(shutil.copytree(short.place / "data", tmp_path / "other"))
    image = data / "train" / "class0" / "003.png"
    image.rename(image.with_name("0003.png"))
    resume = ("quantize", "--resume", "--output", stopped)
    refused(
        warm.run(*resume, "--data", data, cwd=tmp_path),
        "the images in --data are not those the run was started with",
    )
    refused(
        warm.run(*resume, "--lr", 0.1, cwd=tmp_path),
        "--lr: got 0.1", "was started with 0.05", "--resume may change", "--workers",
    )  # fmt: skip
    assert before == {path: path.read_bytes() for path in kept}
    assert {*stopped.rglob("*.safetensors")} < {*kept}


def test_other_weights_are_refused(warm: Warm, short: Course, tmp_path: Path) -> None:
    import timm
    import torch

    import tests.faults.tiny  # noqa: F401  # registers the network

    module = timm.create_model("tiny_for_faults", num_classes=2)
    weights, run = tmp_path / "float.pth", tmp_path / "run"
    torch.save(module.state_dict(), weights)
    arguments = [*short.arguments, "--pretrained", "--checkpoint", weights, "--output", run]
    poison = {"step": 3, "tensor": "fc.bias", "value": float("nan")}
    done = warm.run(*arguments, cwd=short.work, at_step=poison)
    assert done.code == 4, done.err
    with torch.no_grad():
        module.get_parameter("fc.bias")[0] += 1e-6
    torch.save(module.state_dict(), weights)
    resume = ("quantize", "--resume", "--output", run)
    refused(warm.run(*resume, cwd=tmp_path), "the float weights are not those")
