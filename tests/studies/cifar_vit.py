"""A small ViT for CIFAR, known to timm as ``cifar_vit``.

Patches of 4 pixels, 64 tokens and one more, six blocks of 96 channels with 3 heads, 0.46 M weights.
"""

from __future__ import annotations

from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import (
    VisionTransformer,
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from torch import nn

NAME = "cifar_vit"

default_cfgs = generate_default_cfgs({
    NAME: {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "fixed_input_size": True,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
})  # fmt: skip


@register_model
def cifar_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """With random weights; timm has none."""
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3}
    given = {**sizes, "mlp_ratio": 2.0, **kwargs}
    made: nn.Module = build_model_with_cfg(VisionTransformer, NAME, pretrained, **given)
    return made
