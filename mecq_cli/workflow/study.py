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
from mecq_cli.config.resolution import CHANGEABLE_ON_RESUME
from mecq_cli.config.run import FLAG_ONLY
from mecq_cli.data import Split, hold_out, limit_per_class, open_evaluation, open_split
from mecq_cli.data.split import check_same_classes
from mecq_cli.errors import UsageError
from mecq_cli.events import Listener
from mecq_cli.layout import check_weight_file
from mecq_cli.settings import label_of, near_match
from mecq_cli.storage import atomic_write, sha256_hex
from mecq_cli.workflow.arms import ARMS
from mecq_cli.workflow.identity import digest_of_images
from mecq_cli.workflow.quantize import quantize

TUNING_PART = 0.1
"""Share of train held out to tune on."""

FILE = "study.json"
"""In the folder of a study: what was asked for, and its table so far."""

AGAIN = "the same mecq bench mec command"
"""Goes on with a run of a study; `mecq quantize` alone would take other images."""


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
        UsageError: an unknown arm, or no folder, or one that holds another study.
    """
    for name in study.arms:
        if name not in ARMS:
            known = near_match(name, ARMS, "mecq bench arms lists them")
            raise UsageError(f"--arms: unknown arm {known}")
    folder = study.base.output
    if folder is None:
        raise UsageError("a study needs a folder to keep its runs in: --output DIR")
    if study.base.checkpoint is not None:
        check_weight_file(study.base.checkpoint)
    splits = _splits(study)
    asked = _asked(study, splits)
    _open(folder, asked)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in study.arms}
    for seed in study.seeds:  # all arms of one seed first: an unfinished study is still paired
        for name in study.arms:
            listener.note(f"arm {name!r}, seed {seed}")
            results[name].append(_run(study, name, seed, folder, splits, listener))
            document = _document(study, results, splits)
            _write(folder, {"asked": asked, **document})
    return document


def _asked(study: Study, splits: tuple[Split, Split]) -> dict[str, Any]:
    """What makes it this study and no other, as JSON has it; its arms and seeds may grow."""
    kept = study.base.model_dump(
        mode="json", exclude={*CHANGEABLE_ON_RESUME, *FLAG_ONLY, "seed", "chosen", "allotment"}
    )
    weights = study.base.checkpoint
    return {
        **kept,
        "per_class": study.per_class,
        "tune": study.tune,
        "checkpoint": None if weights is None else sha256_hex(weights),
        "data": digest_of_images(*splits),
    }


def _open(folder: Path, asked: Mapping[str, Any]) -> None:
    """Begin a study in a new or empty folder, or see that the one in it is this one."""
    file = folder / FILE
    # Of one that stopped before its first run nothing has to stay.
    if not folder.exists() or (folder.is_dir() and not {*folder.iterdir()} - {file}):
        _write(folder, {"asked": asked})
        return
    if not file.exists():
        raise UsageError(
            f"--output {folder}: holds no study to go on with; give an empty or a new folder"
        )
    try:
        before = json.loads(file.read_text(encoding="utf-8"))["asked"]
        changed = [key for key in asked if asked[key] != before[key]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{file}: does not say what the study in it compares; give another --output"
        ) from error
    for key in changed:
        label = label_of(key, "flag")
        if key in ("data", "checkpoint"):
            raise UsageError(
                f"{label}: its content is not what the study in {folder} was started with; give "
                "the same, or another --output"
            )
        raise UsageError(
            f"{label}: got {asked[key]!r}, but the study in {folder} was started with "
            f"{before[key]!r}; give the same (only arms and seeds may be added), or another "
            "--output"
        )


def _write(folder: Path, document: Mapping[str, Any]) -> None:
    atomic_write(folder / FILE, (json.dumps(document, indent=2) + "\n").encode(), force=True)


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
    return quantize(config, {}, listener, splits=splits, again=AGAIN)


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
