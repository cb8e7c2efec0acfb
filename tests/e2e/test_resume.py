"""A run that was stopped, however, ends as one that was not."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mecq_cli.training import container
from tests.e2e.command import mecq, write_patterns
from tests.e2e.runs import rows

ROOT = Path(__file__).parents[2]
SETTINGS = """\
model = "resnet20_cifar"
wbits = 2
abits = 2
first_last_bits = 4
pretrained = false
data = "data"
img_size = 16
batch_size = 16
epochs = 6
checkpoint_every = 3
lr = 0.05
calibration_images = 32
bn_images = 64
device = "cpu"
compile = "off"
"""
STEPS = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_patterns(folder / "data", {"train": 32, "val": 8}, size=16)
    (folder / "run.toml").write_text(SETTINGS)
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The run that nobody stopped."""
    done = mecq("quantize", "--config", "run.toml", "--output", "whole", "-q", cwd=place)
    assert done.code == 0, done.err
    return place / "whole"


def stop(
    place: Path, output: str, number: int, when: Callable[[Path], bool], *more: str
) -> tuple[int, str]:
    """Start a run in a process of its own and send it a signal; (exit code, last line)."""
    # Who watches must not wait for the processor until the run is over.
    command = ["nice", sys.executable, "-m", "mecq_cli", "quantize", "--config", "run.toml"]
    process = subprocess.Popen(
        [*command, "--output", output, *more],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        },
    )
    limit = time.monotonic() + 120
    while not when(place / output) and process.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.005)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert out == "", err
    assert "Traceback" not in err
    return process.returncode, (err.splitlines() or [""])[-1]


def after(step: int) -> Callable[[Path], bool]:
    return lambda run: (run / "checkpoints" / f"step-{step:08d}.safetensors").exists()


def resume(place: Path, output: str) -> dict[str, Any]:
    return mecq("quantize", "--resume", "--output", output, "--json", cwd=place).document


def same(one: Path, two: Path) -> None:
    assert rows(one) == rows(two)
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    a, b = (json.loads((run / "summary.json").read_text()) for run in (one, two))
    for key in ("top1", "simulator_top1", "fp_top1", "sizes", "steps"):
        assert a[key] == b[key], key


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_run_goes_on_exactly(place: Path, whole: Path, number: signal.Signals) -> None:
    output = f"stopped-{number.name}"
    code, line = stop(place, output, number, after(6))
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
    else:
        assert code == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
        assert line.startswith("interrupted: stopped after step ")
        assert line.endswith(f"continue with: mecq quantize --resume --output {output}")
    assert not (place / output / "summary.json").exists()
    unfinished = mecq("eval", output, cwd=place)
    assert unfinished.code == 3
    assert f"mecq quantize --resume --output {output}" in unfinished.err

    summary = resume(place, output)
    assert 6 <= summary["resumed_at"] < STEPS
    same(place / output, whole)


def test_a_run_on_shards_is_that_on_the_folder_and_goes_on_exactly(
    place: Path, whole: Path
) -> None:
    for split in ("train", "val"):
        files = sorted((place / "data" / split).rglob("*.png"))
        for shard in range(2):
            with tarfile.open(place / f"shards-{split}-{shard}.tar", "w") as tar:
                for file in files[shard * len(files) // 2 : (shard + 1) * len(files) // 2]:
                    key = f"{file.parent.name}-{file.stem}"
                    tar.add(file, f"{key}.png")
                    label = file.parent.name.encode()
                    info = tarfile.TarInfo(f"{key}.cls")
                    info.size = len(label)
                    tar.addfile(info, io.BytesIO(label))
    data = f"wds/{place}/shards-*.tar"
    code, _ = stop(place, "sharded", signal.SIGKILL, after(6), "--data", data)
    assert code == -signal.SIGKILL
    assert tomllib.loads((place / "sharded/config.toml").read_text())["data"] == data
    summary = resume(place, "sharded")
    assert 6 <= summary["resumed_at"] < STEPS
    same(place / "sharded", whole)
    phases = summary["seconds_by_phase"]
    assert [*phases] == ["training", "batch norm", "writing", "evaluation"]
    assert 0 < sum(phases.values()) <= summary["seconds"] + 0.1
    assert mecq("eval", "sharded", "--json", cwd=place).document["top1"] == summary["top1"]


def test_a_signal_before_the_first_step_names_the_command_too(place: Path, whole: Path) -> None:
    def has_settings(run: Path) -> bool:
        return (run / "config.toml").exists()

    code, line = stop(place, "early", signal.SIGTERM, has_settings)
    assert code == 143
    assert line.endswith("continue with: mecq quantize --resume --output early")
    assert resume(place, "early")["resumed_at"] in (None, 0)
    same(place / "early", whole)


def test_a_finished_run_says_so(place: Path, whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.name != ".lock"}
    done = mecq("quantize", "--resume", "--output", "whole", "--json", cwd=place)
    assert "this run is finished" in done.err
    assert done.document == json.loads((whole / "summary.json").read_text())
    assert before == {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.name != ".lock"}


def test_the_settings_of_a_run_make_it_again(whole: Path, tmp_path: Path) -> None:
    """config.toml is complete; the bytes of an artifact depend on neither path nor time."""
    settings = whole / "config.toml"
    assert {"lr", "batch_size", "weight_decay", "amp"} <= {*tomllib.loads(settings.read_text())}
    done = mecq("quantize", "--config", settings, "-o", "other/place", "-q", cwd=tmp_path)
    assert done.code == 0, done.err
    same(tmp_path / "other" / "place", whole)
    assert (tmp_path / "other" / "place" / "config.toml").read_bytes() == settings.read_bytes()


def test_resume_without_a_checkpoint_starts_at_the_first_step(place: Path, whole: Path) -> None:
    done = mecq("quantize", "--config", "run.toml", "--resume", "-o", "new", "--json", cwd=place)
    assert done.document["resumed_at"] is None
    same(place / "new", whole)


def test_a_damaged_checkpoint_is_passed_over(place: Path, whole: Path) -> None:
    """The one before it is used; without any, nothing is guessed."""
    run = Path(shutil.copytree(whole, place / "damaged"))
    (run / "summary.json").unlink()
    (run / "model.safetensors").unlink()
    old, new = sorted((run / "checkpoints").iterdir())
    content = bytearray(new.read_bytes())
    content[len(content) // 2] ^= 1
    new.write_bytes(content)
    done = mecq("quantize", "--resume", "--output", run, "--json", cwd=place)
    assert done.document["resumed_at"] == int(old.stem.removeprefix("step-")) < STEPS
    assert "warning: " in done.err
    assert new.name in done.err
    same(run, whole)

    (run / "summary.json").unlink()
    for file in (run / "checkpoints").iterdir():
        file.write_bytes(b"")
    done = mecq("quantize", "--resume", "--output", run, cwd=place)
    assert done.code == 3
    assert "no checkpoint can be read" in done.err.splitlines()[-1]
    assert "--force" in done.err.splitlines()[-1]


def test_a_run_cannot_become_another_one(place: Path, whole: Path) -> None:
    done = mecq("quantize", "--resume", "--output", whole, "--wbits", "4", cwd=place)
    assert done.code == 2
    assert "--wbits: got 4" in done.err


def test_a_loss_that_is_not_finite_stops_before_the_update(place: Path) -> None:
    arguments = ["--config", "run.toml", "--lr", "1e30", "--output", "nan"]
    done = mecq("quantize", *arguments, cwd=place)
    assert done.code == 4
    line = done.err.splitlines()[-1]
    assert line.startswith("error: step ")
    assert "not finite" in line
    assert "--lr" in line
    newest = sorted((place / "nan" / "checkpoints").iterdir())[-1]
    tensors, _ = container.read(newest)
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point())


def test_weights_that_are_not_finite_are_found_before_training(place: Path) -> None:
    import timm

    import mecq_cli.models  # noqa: F401  # registers the CIFAR networks

    state = timm.create_model("resnet20_cifar", num_classes=2).state_dict()
    state["layer2.1.conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, place / "poison.pth")
    settings = SETTINGS.replace("pretrained = false\n", 'checkpoint = "poison.pth"\n')
    (place / "poison.toml").write_text(settings)
    done = mecq("quantize", "--config", "poison.toml", "--output", "poison", cwd=place)
    assert done.code in (3, 4)
    assert "NaN" in done.err.splitlines()[-1]
    assert not (place / "poison" / "model.safetensors").exists()
