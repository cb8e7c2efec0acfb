"""Quantizers by name: one algorithm a file, one contract in base.py, all names in registry.py."""

from __future__ import annotations

from mecq_cli.quantizers.base import MIN_SCALE, ActivationQuantizer, Quantizer, WeightQuantizer
from mecq_cli.quantizers.lsq import LsqActivation, LsqWeight
from mecq_cli.quantizers.registry import QUANTIZERS, Quantizers, quantizers_named
from mecq_cli.quantizers.rounding import (
    PLAIN,
    SOFT,
    Kernels,
    round_backward,
    round_forward,
    soft_backward,
)
from mecq_cli.quantizers.uniform import UniformWeight

__all__ = [
    "MIN_SCALE",
    "PLAIN",
    "QUANTIZERS",
    "SOFT",
    "ActivationQuantizer",
    "Kernels",
    "LsqActivation",
    "LsqWeight",
    "Quantizer",
    "Quantizers",
    "UniformWeight",
    "WeightQuantizer",
    "quantizers_named",
    "round_backward",
    "round_forward",
    "soft_backward",
]
