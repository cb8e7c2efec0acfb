"""Runs that are made once and looked at by many tests, each through the real command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import mecq_cli.workflow.demo as demo
from tests.e2e.command import mecq
from tests.realdata import real_data

# On busy cores the threads of one operation wait for each other, many times as long as they work.
torch.set_num_threads(1)

QUICK_SETTINGS = "bn_images = 512\ncalibration_images = 256\n"
"""What a run needs to be good, and no more: the tests share two cores."""


@dataclass(frozen=True)
class Run:
    """A run folder of `mecq quantize`.

    Attributes:
        place: the folder the command was started in.
        folder: the run.
        data: its images.
        checkpoint: its float weights.
        summary: what the command printed with --json.
    """

    place: Path
    folder: Path
    data: Path
    checkpoint: Path
    summary: dict[str, Any]


def make(place: Path, data: Path, checkpoint: Path, *arguments: object) -> Run:
    settings = place / "quick.toml"
    settings.write_text(QUICK_SETTINGS)
    summary = mecq(
        "quantize", "resnet20_cifar", *arguments, "--checkpoint", checkpoint, "--data", data,
        "--config", settings, "--device", "cpu", "--compile", "off", "--json", cwd=place,
    ).document  # fmt: skip
    return Run(place, place / summary["run"], data, checkpoint, summary)


@pytest.fixture(scope="session")
def some_cifar10() -> Path:
    """100 real images a class in train/ and in val/."""
    return real_data("cifar10", 100)


@pytest.fixture(scope="session")
def resnet20(weights: Callable[[str], Path]) -> Path:
    """The real ResNet-20."""
    return weights("cifar10-resnet20-12fca82f.pth")


@pytest.fixture(scope="session")
def calibrated(some_cifar10: Path, resnet20: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """W4A4 without training, as the latest run of its folder."""
    place = tmp_path_factory.mktemp("calibrated")
    return make(place, some_cifar10, resnet20, "--wbits", 4, "--abits", 4, "--epochs", 0)


@pytest.fixture(scope="session")
def trained(some_cifar10: Path, resnet20: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """W2A2, trained for 40 steps."""
    place = tmp_path_factory.mktemp("trained")
    return make(
        place, some_cifar10, resnet20, "--wbits", 2, "--abits", 2, "--epochs", 8,
        "--batch-size", 64, "--max-steps", 40, "--lr", 0.02, "--output", "w2a2",
    )  # fmt: skip


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which a short `mecq demo` ran; its run is the latest."""
    place = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "FP_EPOCHS", 4)
        patch.setattr(demo, "QAT_EPOCHS", 3)
        done = mecq("demo", "--json", cwd=place)
    (place / "demo.json").write_text(json.dumps(done.document))
    return place
