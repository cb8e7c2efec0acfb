"""What the commands share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mecq_cli.config import QuantizeConfig, to_toml
from mecq_cli.errors import ArtifactError, EnvironmentFailure, UsageError
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.runs import RunFolder
from mecq_cli.workflow.artifacts import preprocessing_of
from mecq_cli.workflow.common import eval_batch_size, pick_device
from mecq_cli.workflow.evaluation_images import evaluation_split
from mecq_cli.workflow.targets import (
    open_simulator,
    require_artifact,
    run_config,
    settings_of,
)


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("meta", "gpu", "cuda:x", ""):
        with pytest.raises(UsageError, match=r"--device .*not a device; try auto, cpu, cuda"):
            pick_device(name)
    with pytest.raises(EnvironmentFailure, match="--device cuda:99: not usable here"):
        pick_device("cuda:99")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_cannot_compute_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for which this build of PyTorch has no code; here its driver is missing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(EnvironmentFailure, match=r"--device cuda: not usable here \(.+\); try"):
        pick_device("auto")


@pytest.mark.parametrize(("size", "batch"), [(32, 256), (224, 39), (4096, 1)])
def test_large_images_come_in_small_batches(size: int, batch: int) -> None:
    assert eval_batch_size(Preprocessing((3, size, size), (0.5,) * 3, (0.5,) * 3)) == batch


def test_a_folder_says_what_it_lacks(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert settings_of(None) is settings_of(run) is None
    with pytest.raises(UsageError, match=r"no config\.toml"):
        run_config(run)
    with pytest.raises(ArtifactError, match="--resume --output"):
        require_artifact(run)
    with pytest.raises(UsageError, match="--data DIR"):
        evaluation_split(run, None)


SOUND = {"input_size": [3, 4, 4], "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"preprocessing": 3},
        {"preprocessing": {"size": 3}},
        *(
            {"preprocessing": SOUND | wrong}
            for wrong in (
                {"input_size": "abc"}, {"input_size": None}, {"input_size": [4, 4]},
                {"mean": None}, {"mean": [0.5] * 2}, {"mean": ["a"] * 3}, {"std": [0.0] * 3},
                {"crop_pct": "a"}, {"crop_pct": 0}, {"crop_mode": 1},
            )
        ),
    ],
)  # fmt: skip
def test_an_artifact_without_preprocessing(metadata: dict[str, object]) -> None:
    with pytest.raises(ArtifactError, match=r"a\.onnx: does not say how images are prepared"):
        preprocessing_of(metadata, Path("a.onnx"))


def test_a_simulator_with_bits_that_are_not_lowered_yet_is_refused(tmp_path: Path) -> None:
    config = QuantizeConfig(model="resnet20_cifar", wbits=2, abits=2, data="d", lower_from=4)
    (tmp_path / "config.toml").write_text(to_toml(config))
    with pytest.raises(UsageError, match=r"lowered step by step .* finish it by"):
        open_simulator(RunFolder(tmp_path), ("a", "b"))
