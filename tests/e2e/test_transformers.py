"""Transformers of timm with random weights, through the command line, from quantize to verify."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.command import mecq

NAMES = {
    "vit_tiny_patch16_224": 32,
    "deit_tiny_distilled_patch16_224": 32,
    "swin_tiny_patch4_window7_224": 56,
    "convnext_atto": 32,
}


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", NAMES)
def test_a_transformer_goes_all_the_way(name: str, some_cifar10: Path, tmp_path: Path) -> None:
    settings = tmp_path / "quick.toml"
    settings.write_text("bn_images = 64\ncalibration_images = 64\n")
    summary = mecq(
        "quantize", name, "--no-pretrained", "--data", some_cifar10, "--img-size", NAMES[name],
        "--wbits", 4, "--abits", 4, "--max-steps", 2, "--batch-size", 8, "--config", settings,
        "--device", "cpu", "--compile", "off", "--json", cwd=tmp_path,
    ).document  # fmt: skip
    run = tmp_path / summary["run"]
    assert summary["simulator_top1"] == pytest.approx(summary["top1"], abs=0.5)
    assert mecq("eval", run, "--json", cwd=tmp_path).document["images"] == summary["images"]
    for profile in ("ort", "portable"):
        found = mecq(
            "export", run, "--profile", profile, "--verify", "--json", "--images", 32, cwd=tmp_path
        ).document
        assert found["verified"]
        assert found["top1_agreement"] == 100.0
    table = mecq("inspect", run, "--json", cwd=tmp_path).document
    notes = {row["type"]: row["note"] for row in table["sites"]}
    assert notes["layer_norm"].startswith("float")
