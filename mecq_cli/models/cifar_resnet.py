"""The ResNets that He et al. (arXiv 1512.03385, section 4.2) made for CIFAR, known to timm.

A 3x3 stem of 16 channels, three stages of n basic blocks with 16, 32 and 64 channels at full,
half and quarter resolution, global average pooling and one linear layer: 6n + 2 layers with
weights. Where a stage halves the resolution the shortcut has no weights (the paper's option A):
every second pixel, and zeros for the channels that are new.

Importing this module registers ``resnet20_cifar`` and its kin with timm. The weights have the
names that are in common use for these nets: ``conv1``, ``bn1``, ``layer{1,2,3}.{i}.conv1``,
``bn1``, ``conv2``, ``bn2``, and ``linear``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

STEM_CHANNELS = 16


class ZeroPadShortcut(nn.Module):
    """Option A: [N, C, H, W] -> [N, C + extra, H/2, W/2], without weights.

    Half of the zero channels come before the old ones and half behind: published weights of
    these nets count on it.

    Args:
        extra: how many channels to add.
    """

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.before = extra // 2
        self.behind = extra - self.before

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.before, self.behind))


class CifarBasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [N, C, H, W] -> [N, channels, H/stride, W/stride].

    Args:
        in_channels: C.
        channels: of both convolutions.
        stride: 1, or 2 where a stage begins at half the resolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = ZeroPadShortcut(channels - in_channels)
        self.act2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.act2(out + self.shortcut(x))  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """ResNet-(6n + 2) for small images: [N, in_chans, H, W] -> [N, num_classes] logits.

    Args:
        blocks: n, the basic blocks of each of the three stages.
        num_classes: of the classifier; 0 leaves it out, as timm's models do.
        in_chans: channels of the image.
    """

    def __init__(self, blocks: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = 4 * STEM_CHANNELS
        self.conv1 = nn.Conv2d(in_chans, STEM_CHANNELS, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.act1 = nn.ReLU()
        self.layer1 = _stage(blocks, STEM_CHANNELS, STEM_CHANNELS, stride=1)
        self.layer2 = _stage(blocks, STEM_CHANNELS, 2 * STEM_CHANNELS, stride=2)
        self.layer3 = _stage(blocks, 2 * STEM_CHANNELS, 4 * STEM_CHANNELS, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear: nn.Module
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.linear

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh last layer with ``num_classes`` outputs."""
        self.num_classes = num_classes
        self.linear = (
            nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """[N, in_chans, H, W] -> [N, 64, H/4, W/4], before pooling."""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[N, 64, H/4, W/4] -> [N, num_classes] logits, or [N, 64] pooled features."""
        x = torch.flatten(self.pool(x), 1)
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _stage(blocks: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
    first = CifarBasicBlock(in_channels, channels, stride)
    return nn.Sequential(
        first, *(CifarBasicBlock(channels, channels, stride=1) for _ in range(blocks - 1))
    )


_CFG: dict[str, Any] = {
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (8, 8),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "conv1",
    "classifier": "linear",
}

default_cfgs = generate_default_cfgs(
    {f"resnet{depth}_cifar": dict(_CFG) for depth in (20, 32, 44, 56, 110)}
)


def _build(depth: int, pretrained: bool, **kwargs: Any) -> nn.Module:
    variant = f"resnet{depth}_cifar"
    return build_model_with_cfg(CifarResNet, variant, pretrained, blocks=(depth - 2) // 6, **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20 for CIFAR, 0.27 M parameters."""
    return _build(20, pretrained, **kwargs)


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32 for CIFAR, 0.46 M parameters."""
    return _build(32, pretrained, **kwargs)


@register_model
def resnet44_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-44 for CIFAR, 0.66 M parameters."""
    return _build(44, pretrained, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56 for CIFAR, 0.85 M parameters."""
    return _build(56, pretrained, **kwargs)


@register_model
def resnet110_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-110 for CIFAR, 1.7 M parameters."""
    return _build(110, pretrained, **kwargs)
