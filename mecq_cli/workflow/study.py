"""`mecq bench mec`: does the entropy regularizer help? The same recipe with and without it.

Every arm is an ordinary quantization run in a folder of its own, so that the study goes on where
it was stopped. Arms differ in the settings named, in nothing else; seeds are paired. Tuning
happens on a part held out of train, never on val.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mecq_cli.config import QuantizeConfig
from mecq_cli.data import Split, hold_out, limit_per_class, open_evaluation, open_split
from mecq_cli.data.split import check_same_classes
from mecq_cli.errors import UsageError
from mecq_cli.events import Listener
from mecq_cli.storage import atomic_write
from mecq_cli.workflow.quantize import quantize


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

TUNING_PART = 0.1
"""Share of train held out to tune on."""


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        base: settings all arms share; its output is the folder of the study.
        arms: names of `ARMS`.
        seeds: one run each.
        per_class: training images of each class; None: all.
        tune: evaluate on a part held out of train instead of val.
    """

    base: QuantizeConfig
    arms: Sequence[str]
    seeds: Sequence[int]
    per_class: int | None = None
    tune: bool = False


def run_study(study: Study, listener: Listener) -> dict[str, Any]:
    """Run what is missing and tabulate what is there.

    Raises:
        UsageError: an unknown arm, or no folder.
    """
    unknown = [name for name in study.arms if name not in ARMS]
    if unknown:
        raise UsageError(f"unknown arm {unknown[0]!r}; there are {', '.join(map(repr, ARMS))}")
    folder = study.base.output
    if folder is None:
        raise UsageError("a study needs a folder to keep its runs in: --output DIR")
    splits = _splits(study)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in study.arms}
    for seed in study.seeds:  # all arms of one seed first: an unfinished study is still paired
        for name in study.arms:
            listener.note(f"arm {name!r}, seed {seed}")
            results[name].append(_run(study, name, seed, folder, splits, listener))
            document = _document(study, results, splits)
            atomic_write(
                folder / "study.json", (json.dumps(document, indent=2) + "\n").encode(), force=True
            )
    return document


def _splits(study: Study) -> tuple[Split, Split]:
    train = open_split(study.base.data, "train")
    if study.tune:
        train, held_out = hold_out(train, TUNING_PART, seed=0)
    else:
        held_out = open_evaluation(study.base.data)
        check_same_classes(train, held_out)
    if study.per_class is not None:
        train = limit_per_class(train, study.per_class)
    return train, held_out


def _run(
    study: Study,
    name: str,
    seed: int,
    folder: Path,
    splits: tuple[Split, Split],
    listener: Listener,
) -> dict[str, Any]:
    run = folder / f"{name.replace(', ', '-').replace(' ', '_')}-seed{seed}"
    config = study.base.model_copy(
        update={**ARMS[name], "seed": seed, "output": run, "resume": run.exists()}
    )
    return quantize(config, {}, listener, splits=splits)


def _document(
    study: Study, results: Mapping[str, list[dict[str, Any]]], splits: tuple[Split, Split]
) -> dict[str, Any]:
    rows = []
    for name, runs in results.items():
        if not runs:
            continue
        top1 = [float(run["top1"]) for run in runs]
        rows.append(
            {
                "arm": name,
                "top1": top1,
                "mean": statistics.fmean(top1),
                "spread": statistics.stdev(top1) if len(top1) > 1 else None,
                "seconds": statistics.fmean(float(run["seconds"]) for run in runs),
                "fp_top1": float(runs[0]["fp_top1"]),
            }
        )
    base = study.base
    return {
        "model": base.model,
        "wbits": base.wbits,
        "abits": base.abits,
        "epochs": base.epochs,
        "train_images": len(splits[0]),
        "evaluated_on": splits[1].name,
        "images": len(splits[1]),
        "seeds": list(study.seeds),
        "rows": rows,
    }
