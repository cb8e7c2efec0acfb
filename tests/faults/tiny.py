"""A network so small that a whole run of it takes a fraction of a second.

Importing this module registers it with timm as ``tiny_for_faults``. It has what a checkpoint must
carry: batch norm, a residual add, dropout (which draws random numbers in every step).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn


class Tiny(nn.Module):
    """[N, 3, H, W] -> [N, num_classes]."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(x + self.bn2(self.conv2(x)))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        logits: Tensor = self.fc(self.dropout(x))
        return logits


default_cfgs = generate_default_cfgs(
    {
        "tiny_for_faults": {
            "input_size": (3, 16, 16),
            "num_classes": 10,
            "classifier": "fc",
            "first_conv": "conv1",
            "crop_pct": 1.0,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.25, 0.25, 0.25),
        }
    }
)


@register_model
def tiny_for_faults(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The network; it has no published weights."""
    return build_model_with_cfg(Tiny, "tiny_for_faults", pretrained, **kwargs)
