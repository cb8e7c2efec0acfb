"""Quantizers by name: one algorithm a file, one contract in base.py."""

from __future__ import annotations

from mecq_cli.quantizers.base import ActivationQuantizer, Quantizer, WeightQuantizer
from mecq_cli.quantizers.lsq import LsqActivation, LsqWeight

__all__ = ["ActivationQuantizer", "LsqActivation", "LsqWeight", "Quantizer", "WeightQuantizer"]
