"""What is coded: features as rows, centred and normalised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def as_rows(features: Tensor) -> Tensor:
    """Features [N, d, ...] as float32 rows [N, d]; positions are averaged."""
    if features.dim() > 2:
        features = features.flatten(2).mean(2)
    return features.float()


def centre(z: Tensor) -> Tensor:
    """Rows [m, d] minus their mean: the large common part of ReLU features carries nothing."""
    return z - z.mean(0, keepdim=True)


def normalise(z: Tensor) -> Tensor:
    """Rows [m, d] at unit length; a row of zeros stays one."""
    return F.normalize(z, dim=1, eps=1e-6)


def standardise(z: Tensor, eps: float = 1e-5) -> Tensor:
    """Columns [m, d] at mean 0 and variance 1, as a batch norm without affine part does."""
    centred = centre(z)
    return centred * torch.rsqrt(centred.square().mean(0, keepdim=True) + eps)
