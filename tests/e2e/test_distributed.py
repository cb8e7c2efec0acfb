"""`mecq quantize` under torchrun and accelerate launch, with two processes on the CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.command import mecq, write_patterns

ROOT = Path(__file__).parents[2]
SETTINGS = """\
model = "resnet20_cifar"
wbits = 4
abits = 4
pretrained = false
data = "data"
img_size = 16
batch_size = 16
max_steps = 8
epochs = 2
checkpoint_every = 2
lr = 0.005
calibration_images = 32
bn_images = 64
device = "cpu"
amp = "off"
compile = "off"
"""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")


pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, settings, and in "one" the run of one process."""
    folder = tmp_path_factory.mktemp("launched")
    write_patterns(folder / "data", {"train": 32, "val": 8}, size=16)
    (folder / "run.toml").write_text(SETTINGS)
    done = mecq("quantize", "--config", "run.toml", "--output", "one", "-q", cwd=folder)
    assert done.code == 0, done.err
    return folder


def launched(place: Path, *command: str, output: str) -> subprocess.Popen[str]:
    quantize = ["-m", "mecq_cli", "quantize", "--config", "run.toml", "--output", output, "--json"]
    return subprocess.Popen(
        [*command, *quantize], cwd=place, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def kill_when(process: subprocess.Popen[str], ready: Path, rank: int, number: int) -> None:
    """Send a signal to one of the processes that the launcher started, once a file is there."""
    limit = time.monotonic() + 120
    while not ready.exists():
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    task = Path(f"/proc/{process.pid}/task")
    children = [p for t in task.iterdir() for p in (t / "children").read_text().split()]
    for child in children:
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
            os.kill(int(child), number)
            return
    pytest.fail(f"no process {rank}")


def rows(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found]


def complete(run: Path, one: Path) -> None:
    """Every step once, by the schedule of one process.

    The losses are compared in tests/training/test_distributed.py: this network, of random weights
    on stripes, turns a rounding error in its first layer into percents of its loss.
    """
    for key in ("step", "epoch", "lr"):
        assert [row[key] for row in rows(run)] == [row[key] for row in rows(one)]
    summaries = [json.loads((r / "summary.json").read_text()) for r in (run, one)]
    assert summaries[0]["fp_top1"] == summaries[1]["fp_top1"]
    assert summaries[0]["images"] == summaries[1]["images"] == 16


def test_after_a_kill_torchrun_starts_again_and_the_run_goes_on(place: Path) -> None:
    process = launched(place, *TORCHRUN, "--standalone", "--max-restarts", "1", output="killed")
    ready = place / "killed" / "checkpoints" / "step-00000004.safetensors"
    kill_when(process, ready, 1, signal.SIGKILL)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "another process of this run ended" in err
    summary = json.loads(out)  # of one process: the other one is silent
    assert summary["processes"] == 2
    assert summary["resumed_at"] >= 4
    complete(place / "killed", place / "one")


def test_a_restarted_run_is_the_one_that_nobody_stopped(place: Path) -> None:
    whole = launched(place, *TORCHRUN, "--standalone", output="whole")
    assert whole.wait(timeout=200) == 0
    process = launched(place, *TORCHRUN, "--max-restarts", "2", output="again")
    kill_when(process, place / "again" / "checkpoints" / "step-00000002.safetensors", 0, 9)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert rows(place / "again") == rows(place / "whole")
    for name in ("model.safetensors", "config.toml"):
        assert (place / "again" / name).read_bytes() == (place / "whole" / name).read_bytes()


def test_without_restarts_the_job_ends_and_one_process_goes_on(place: Path) -> None:
    """By each signal; then with another number of processes."""
    for number, said in ((signal.SIGKILL, "another process"), (signal.SIGTERM, "stopped after")):
        output = number.name
        process = launched(place, *TORCHRUN, "--standalone", output=output)
        ready = place / output / "checkpoints" / "step-00000002.safetensors"
        kill_when(process, ready, 1, number)
        out, err = process.communicate(timeout=200)
        assert process.returncode == 1
        assert out == ""
        assert said in err
        assert sum(line.startswith("interrupted:") for line in err.splitlines()) <= 1
        done = mecq("quantize", "--resume", "--output", output, "--json", cwd=place)
        assert 2 <= done.document["resumed_at"] < 8
        complete(place / output, place / "one")


def test_accelerate_launch(place: Path) -> None:
    process = launched(
        place, *ACCELERATE, "--multi_gpu", "--num_processes", "2", output="accelerate"
    )
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert json.loads(out)["processes"] == 2
    complete(place / "accelerate", place / "one")
    process = launched(place, *ACCELERATE, "--cpu", "--num_processes", "2", output="cpu")
    out, err = process.communicate(timeout=200)
    assert "accelerate launch --cpu starts one process" in err
    assert json.loads(out)["processes"] == 1
    assert rows(place / "cpu") == rows(place / "one")
    process = launched(place, *ACCELERATE, "--use_fsdp", "--num_processes", "2", output="fsdp")
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert sum(line.startswith("error: FSDP is not supported") for line in err.splitlines()) == 1
