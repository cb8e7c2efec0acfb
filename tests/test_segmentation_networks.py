"""Networks that segment, from the float module to integers and ONNX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mecq_cli.capture import capture
from mecq_cli.errors import UsageError
from mecq_cli.insertion import BitPlan, assign_bits, insert, tapped_layers
from mecq_cli.models.segmentation import logits_only
from tests.exactness import check, quantized, random_images


def block(inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Pyramid(nn.Module):
    """What heads for segmentation do: dilation, a pooled branch, two resolutions, two outputs."""

    def __init__(self, classes: int = 3, corners: bool = False) -> None:
        super().__init__()
        self.corners = corners
        self.stem, self.low, self.high = block(3, 8, 2), block(8, 8, 2), block(8, 12, 2)
        self.wide = block(12, 8, dilation=2)
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(12, 8, 1), nn.Hardswish())
        self.project, self.dropout = block(16, 8), nn.Dropout(0.1)
        self.from_low, self.from_high = nn.Conv2d(8, classes, 1), nn.Conv2d(8, classes, 1)
        self.aux_classifier = nn.Conv2d(8, classes, 1)

    def resized(self, x: Tensor, like: Tensor) -> Tensor:
        size = like.shape[-2:]
        return F.interpolate(x, size=size, mode="bilinear", align_corners=self.corners)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        low = self.low(self.stem(x))
        high = self.high(low)
        pooled = self.resized(self.pooled(high), high)
        both = self.dropout(self.project(torch.cat([self.wide(high), pooled], 1)))
        logits = self.from_low(low) + self.from_high(self.resized(both, low))
        return {"out": self.resized(logits, x), "aux": self.resized(self.aux_classifier(low), x)}


def network(corners: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return logits_only(Pyramid(corners=corners))


@pytest.mark.parametrize(("bits", "size"), [(4, 32), (2, 32), (4, 40)])
def test_every_way_gives_the_same_integers(bits: int, size: int, tmp_path: Path) -> None:
    """Of 40 pixels the maps are of 10 and 5: powers of two all the same."""
    images = random_images(4, size)
    model = quantized(network(), BitPlan(bits, bits), images)
    assert model(images).shape == (4, 3, size, size)
    counts = check(model, images, tmp_path)
    assert counts["off"] <= 5
    assert counts["alive"] > 10


class Joined(nn.Module):
    """A map that is resized by four, beside another one."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = block(3, 16, 4), block(16, 32, 4)
        self.join, self.classifier = block(48, 16), nn.Conv2d(16, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        high = F.interpolate(self.high(low), low.shape[-2:], mode="bilinear")
        logits = self.classifier(self.join(torch.cat([low, high], 1)))
        return F.interpolate(logits, x.shape[-2:], mode="bilinear")


def test_a_resized_map_is_joined_to_another(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = random_images(4, 64)
    counts = check(quantized(Joined(), BitPlan(4, 4), images), images, tmp_path)
    assert counts["off"] <= 5


def test_resizing_by_another_factor_stays_within_a_step(tmp_path: Path) -> None:
    """The places of aligned corners are thirds and sevenths: floats differ in their last bit."""
    images = random_images(4, 32)
    model = quantized(network(corners=True), BitPlan(4, 4), images)
    counts = check(model, images, tmp_path)
    assert counts["off"] <= 5


def test_heads_that_make_the_logits_are_the_last_layers() -> None:
    layers = capture(network(), (3, 32, 32))
    kinds = {layer.name: layer.kind for layer in layers}
    assert "aux_classifier" not in kinds
    assert [kind for kind in kinds.values() if kind == "resize"] == ["resize"] * 2
    assert "upsample" in kinds.values()  # of a single value: integers all the way
    bits, lasts, _ = assign_bits(layers, BitPlan(2, 3))
    assert lasts == ["from_low", "from_high"]
    assert (bits["from_low"].wbits, bits["from_high"].abits) == (8, 8)
    assert (bits["project.0"].wbits, bits["project.0"].abits) == (2, 3)
    stages = tapped_layers(layers, ["stages"])
    assert not {"from_low", "from_high", "add"} & set(stages)
    assert stages[0] == "stem.0"
    assert len(stages) == 3


def test_logits_and_what_they_are_summed_of_stay_in_float() -> None:
    model = insert(network(), (3, 32, 32), BitPlan(2, 2))
    sites = {site.name: site for site in model.sites()}
    for name in ("from_low", "from_high", "add", "resize_2" if "resize_2" in sites else "resize"):
        assert sites[name].output_quantizer is None


def test_what_bilinear_resizing_cannot_be() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.interpolate(self.conv(x), scale_factor=1.3, mode="bilinear")

    with pytest.raises(UsageError, match=r"resizing of \[16, 16\] by \[1.3, 1.3\]"):
        capture(Odd(), (3, 16, 16))
