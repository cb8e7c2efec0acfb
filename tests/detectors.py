"""Small networks that detect, of torchvision's classes around backbones of our own."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD

from tests.blocks import Block, layer


class Stages(nn.Module):
    """Residual stages; maps of an eighth of the size and, one after the other, of half of that."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.stem, self.low = layer(3, widths[0], 2), Block(widths[0], widths[1])
        self.stages = nn.ModuleList(Block(a, b) for a, b in pairwise(widths[1:]))
        self.out_channels = list(widths[2:])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x, found = self.low(self.stem(x)), {}
        for number, stage in enumerate(self.stages):
            x = stage(x)
            found[str(number)] = x
        return found


def small_ssd(
    size: int = 96, classes: int = 4, widths: tuple[int, ...] = (16, 32, 48, 64, 96)
) -> SSD:
    """An SSD of 0.3 M weights with three maps, for shapes of a fifth to half of the image."""
    anchors = DefaultBoxGenerator([[2], [2], [2]], scales=[0.18, 0.3, 0.42, 0.55])
    return SSD(
        Stages(widths), anchors, (size, size), classes, score_thresh=0.02, topk_candidates=100
    )


class Levels(nn.Module):
    """The same maps with one number of channels each, as heads that are shared need them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body, self.out_channels = Stages((8, 16, 16, 16)), width
        self.sides = nn.ModuleList(nn.Conv2d(16, width, 1) for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body(x).items()
        return {key: side(m) for side, (key, m) in zip(self.sides, maps, strict=True)}


def tiny_retinanet(classes: int = 4, width: int = 16) -> RetinaNet:
    """A RetinaNet with two maps, whose heads are shared."""
    anchors = AnchorGenerator(((12, 16), (24, 32)), ((0.5, 1.0, 2.0),) * 2)
    return RetinaNet(Levels(width), classes, anchor_generator=anchors, topk_candidates=50)
