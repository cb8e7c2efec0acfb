"""metrics.jsonl -> curves: a few hundred points each, however long the training was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mecq_cli.tasks.figures import FIGURES

POINTS = 300
"""Of a curve; where there are more steps, each point is the mean of neighbouring ones."""

SMOOTHED = 0.05
"""Share of the steps that a smoothed value looks back on."""

KEYS = {
    "loss_task": "task loss",
    "loss_mec": "entropy term",
    **{of.train_key: of.train_label for of in FIGURES.values()},
    **{of.eval_key: f"{of.label} on evaluation images" for of in FIGURES.values()},
    "lr": "learning rate",
    "seconds": "seconds of a step",
}
"""What is drawn of a row, and its name."""

PANELS = (
    ("loss_task", "Task loss", ""),
    ("loss_mec", "Entropy term", ""),
    *((of.train_key, of.train_title, "%") for of in FIGURES.values()),
    *((of.eval_key, f"{of.label} on evaluation images", "%") for of in FIGURES.values()),
    ("lr", "Learning rate", ""),
    ("seconds", "Time of a step", "s"),
)
"""The pictures of them: key, title, unit."""

_EXACT = ("lr", *(of.eval_key for of in FIGURES.values()))
"""Without noise, so there is nothing to smooth."""

Floats = NDArray[np.float64]


def gather(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Curves of a training.

    Returns:
        "steps" and "epochs" that were done; "curves": for each of `KEYS` that the rows have, and
        under "coding_length" for each coded site, {"step": [...], "value": [...],
        "smooth": [...]} where steps count from 1; {} without rows.
    """
    if not rows:
        return {}
    curves: dict[str, Any] = {}
    for key in KEYS:
        curve = _curve(rows, [row.get(key) for row in rows], smooth=key not in _EXACT)
        if curve is not None:
            curves[key] = curve
    sites = dict.fromkeys(site for row in rows for site in row.get("coding_length") or {})
    lengths = {
        site: _curve(rows, [(row.get("coding_length") or {}).get(site) for row in rows])
        for site in sites
    }
    curves["coding_length"] = {site: curve for site, curve in lengths.items() if curve is not None}
    return {
        "steps": len(rows),
        "epochs": 1 + int(rows[-1].get("epoch") or 0),
        "seconds": sum(row.get("seconds") or 0.0 for row in rows),
        "data_seconds": sum(row.get("data_seconds") or 0.0 for row in rows),
        "curves": curves,
    }


def _curve(
    rows: Sequence[Mapping[str, Any]], values: Sequence[Any], *, smooth: bool = True
) -> dict[str, Any] | None:
    """The points of one column; None where it has no number."""
    known = [
        (row["step"] + 1, float(value))
        for row, value in zip(rows, values, strict=True)
        if isinstance(value, (int, float)) and np.isfinite(value)
    ]
    if not known:
        return None
    steps, numbers = (np.array(column, np.float64) for column in zip(*known, strict=True))
    followed = smoothed(numbers) if smooth else numbers
    return {
        "step": _means(steps),
        "value": _means(numbers),
        "smooth": _means(followed),
        "first": float(numbers[0]),
        "last": float(followed[-1]),
    }


def smoothed(values: Floats) -> Floats:
    """The mean of each value and those before it, `SMOOTHED` of all."""
    width = max(int(len(values) * SMOOTHED), 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    means: Floats = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def _means(values: Floats) -> list[float]:
    """At most `POINTS` of them, each the mean of its neighbours; six digits are drawn at most."""
    parts = np.array_split(values, min(len(values), POINTS))
    return [float(f"{part.mean():.6g}") for part in parts]
