"""Quantizers by name: one algorithm a file, one contract in base.py."""

from __future__ import annotations

from mecq_cli.quantizers.base import (
    MIN_SCALE,
    ActivationQuantizer,
    Kernels,
    Quantizer,
    WeightQuantizer,
    round_backward,
    round_forward,
)
from mecq_cli.quantizers.lsq import LsqActivation, LsqWeight

__all__ = [
    "MIN_SCALE",
    "ActivationQuantizer",
    "Kernels",
    "LsqActivation",
    "LsqWeight",
    "Quantizer",
    "WeightQuantizer",
    "round_backward",
    "round_forward",
]
