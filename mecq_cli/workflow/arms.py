"""The arms of a study: what `mecq bench mec` may compare. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _one(weight: float, on: str, **others: Any) -> dict[str, Any]:
    given = {"mec_weight": weight, "mec_on": on, "mec_views": "quantized", "mec_align": 0.0}
    return {**given, "mec_term": "entropy", **others}


def _two(weight: float, on: str, **others: Any) -> dict[str, Any]:
    given = {"mec_weight": weight, "mec_on": on, "mec_views": "fp+quantized", "mec_align": 1.0}
    return {**given, "mec_term": "entropy", **others}


def _both(weight: float = 10.0, on: str = "stages", **others: Any) -> dict[str, Any]:
    given = {"mec_term": "divergence", "mec_align": 0.1}
    return _two(weight, on, **{**given, **others})


ARMS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "none": {"mec_weight": 0.0},
    "none, no distillation": {"mec_weight": 0.0, "distill": False},
    "none, float residual": {"mec_weight": 0.0, "residual_bits": 32},
    "penultimate 0.1": _one(0.1, "penultimate"),
    "stages 1": _one(1.0, "stages"),
    "layers 1": _one(1.0, "layers"),
    "weights 0.1": _one(0.1, "weights"),
    "centring, stages 1": _one(1.0, "stages", mec_term="centring"),
    "FP coding length, stages 1": _two(1.0, "stages", mec_term="target"),
    "two views, stages 1": _two(1.0, "stages"),
    "two views, stages 1, exact": _two(1.0, "stages", mec_estimator="exact"),
    "two views, stages 1, no distillation": _two(1.0, "stages", distill=False),
    "two views, stages 1, entropy only": _two(1.0, "stages", mec_align=0.0),
    "two views, stages 1, alignment only": _two(1.0, "stages", mec_term="alignment"),
    "two views, stages 3, alignment only": _two(3.0, "stages", mec_term="alignment"),
    "two views, stages 10, alignment only": _two(10.0, "stages", mec_term="alignment"),
    "two views, stages 30, alignment only": _two(30.0, "stages", mec_term="alignment"),
    "two views, stages 1, grid": _two(1.0, "stages", mec_grid=4),
    "two views, stages 1, grid, alignment only": _two(
        1.0, "stages", mec_grid=4, mec_term="alignment"
    ),
    "two views, layers 1": _two(1.0, "layers"),
    "two views, layers 1, grid": _two(1.0, "layers", mec_grid=4),
    "two views, layers 1, alignment only": _two(1.0, "layers", mec_term="alignment"),
    "two views, layers 1, grid, alignment only": _two(
        1.0, "layers", mec_grid=4, mec_term="alignment"
    ),
    "divergence, stages 10": _both(mec_align=0.0),
    "divergence, layers 10": _both(on="layers", mec_align=0.0),
    "divergence and alignment, stages 3": _both(3.0),
    "divergence and alignment, stages 10": _both(),
    "divergence and alignment, stages 30": _both(30.0),
    "divergence and alignment, stages 100": _both(100.0),
    "divergence and alignment, stages 300": _both(300.0),
    "divergence and alignment, stages 1000": _both(1000.0),
    "divergence and alignment, stages 100, grid": _both(100.0, mec_grid=4),
    "divergence and alignment, layers 100": _both(100.0, "layers"),
    "divergence and alignment, penultimate 10": _both(on="penultimate"),
    "divergence and alignment, stages 300, exact": _both(300.0, mec_estimator="exact"),
    "divergence and alignment, stages 300, taylor": _both(300.0, mec_estimator="taylor"),
    "divergence and alignment, stages 300, no distillation": _both(300.0, distill=False),
    "divergence and alignment, stages 300, float residual": _both(300.0, residual_bits=32),
}
"""Settings of each arm; all else is the default recipe."""
