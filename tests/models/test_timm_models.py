"""Saved models of timm's, which say themselves what they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from timm.models import save_for_hf
from torch import nn

from mecq_cli.errors import CheckpointError, EnvironmentFailure, MecqError, UsageError
from mecq_cli.models.loading import load_model

ARCHITECTURE = "vit_tiny_patch16_224"
"""It has arguments that its weights depend on."""


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    module = timm.create_model(ARCHITECTURE, num_classes=3, img_size=64, patch_size=8, depth=2)
    folder = tmp_path / "my net"
    data = {"mean": (0.4, 0.4, 0.4), "std": (0.2, 0.2, 0.2), "interpolation": "bilinear"}
    save_for_hf(
        module, str(folder), {"pretrained_cfg": {**data, "crop_pct": 1.0}}, safe_serialization=True
    )
    return folder, module.eval()


def test_a_saved_model_needs_no_flags(saved: tuple[Path, nn.Module]) -> None:
    folder, module = saved
    loaded = load_model(f"local-dir:{folder}")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded.module(images), module(images))
    p = loaded.preprocessing
    assert (p.input_size, p.mean, p.std) == ((3, 64, 64), (0.4,) * 3, (0.2,) * 3)
    assert (p.interpolation, p.crop_pct) == ("bilinear", 1.0)
    assert (loaded.num_classes, loaded.weights, loaded.classifiers) == (3, "library", ("head",))


def test_its_last_layer_and_its_weights_can_be_others(saved: tuple[Path, nn.Module]) -> None:
    folder, module = saved
    name = f"local-dir:{folder}"
    with pytest.raises(CheckpointError, match=r"3 classes and 5 are wanted.*--reset-classifier"):
        load_model(name, num_classes=5)
    new = load_model(name, num_classes=5, reset_classifier=True).module
    body = {k: v for k, v in module.state_dict().items() if not k.startswith("head.")}
    assert all(torch.equal(new.state_dict()[k], v) for k, v in body.items())
    assert new(torch.zeros(1, 3, 64, 64)).shape == (1, 5)
    other = {k: torch.full_like(v, 0.01) for k, v in module.state_dict().items()}
    torch.save(other, folder / "other.pth")
    given = load_model(name, checkpoint=folder / "other.pth").module.state_dict()
    assert all(torch.equal(given[k], v) for k, v in other.items())
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has none of model.safetensors, .*--no-pretrained"):
        load_model(name)
    assert load_model(name, pretrained=False).weights == "random"


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "config.json"
        document = json.loads(file.read_text())
        change(document)
        file.write_text(json.dumps(document))

    return edit


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda f: (f / "config.json").unlink(), UsageError, "has no config.json; expected"),
        (lambda f: (f / "config.json").write_text("[1]"), CheckpointError, "does not describe"),
        (lambda f: (f / "config.json").write_text("{"), CheckpointError, "does not describe"),
        (edited(lambda d: d.update(architecture="bert")), CheckpointError, "no model 'bert'"),
        (edited(lambda d: d.update(num_classes="3")), CheckpointError, "num_classes is '3'"),
        (edited(lambda d: d["pretrained_cfg"].update(mean=[1])), CheckpointError, "mean has 1"),
        (
            edited(lambda d: d["model_args"].update(unheard_of=1)),
            CheckpointError,
            "timm cannot make the model it describes .*unheard_of",
        ),
        (
            edited(lambda d: d["model_args"].update(embed_dim=96)),
            CheckpointError,
            "model.safetensors",
        ),
    ],
)
def test_what_is_wrong_with_a_saved_model_is_said_in_a_line(
    saved: tuple[Path, nn.Module],
    spoil: Callable[[Path], None],
    error: type[MecqError],
    said: str,
) -> None:
    folder, _ = saved
    spoil(folder)
    with pytest.raises(error, match=said) as caught:
        load_model(f"local-dir:{folder}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["hf-hub:someone/net@v1", "hf_hub:someone/net@v1"])
def test_a_model_of_the_hub_comes_from_the_cache(
    name: str, saved: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, module = saved
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFailure, match=r"hf.hub:someone/net@v1 cannot .* local-dir:FOL"):
        load_model(name)
    with pytest.raises(UsageError, match="has no such model"):
        load_model("hf-hub:a/b/c")
    repository = tmp_path / "hf" / "models--someone--net"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text("abc")
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / "abc")
    loaded = load_model(name)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded.module(images), module(images))
