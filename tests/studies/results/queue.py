"""Runs what is missing of a table. Each run leaves a record, and can be stopped at any moment.

The records lie in docs/results/runs/ and are part of the project; the run folders, from which a
stopped run goes on, lie wherever there is room. Several workers may run side by side: each run is
locked by the one that has it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mecq_cli.config import QuantizeConfig, whole_bits
from mecq_cli.data import Split, hold_out, limit_per_class, open_evaluation, open_split
from mecq_cli.errors import UsageError
from mecq_cli.events import Listener
from mecq_cli.locks import exclusive_lock
from mecq_cli.storage import atomic_write
from mecq_cli.training.metrics import read_rows
from mecq_cli.workflow.machine import cpu_name
from mecq_cli.workflow.quantize import quantize
from tests.studies.results.divergence import divergence_of
from tests.studies.results.tables import Job, Table, jobs

TUNING_PART = 0.1
"""Share of train that is held out where choices are made."""

FOLDER = Path(__file__).resolve().parents[3] / "docs" / "results"


@dataclass(frozen=True)
class Place:
    """Where things are.

    Attributes:
        data: folder with the data sets.
        weights: folder with the checkpoints.
        work: run folders.
        brevitas: a Python that has Brevitas and PyTorch; None leaves its arms out.
    """

    data: Path
    weights: Path
    work: Path
    brevitas: Path | None = None

    def checkpoint(self, name: str) -> Path:
        """One that is given, or was trained by `tests.studies.train_float`."""
        trained = FOLDER / name
        return trained if trained.exists() else self.weights / name


def record_of(job: Job) -> Path:
    """The record of a run; it exists once the run is finished."""
    return FOLDER / "runs" / f"{job.key}.json"


def work_off(
    table: Table,
    place: Place,
    listener: Listener,
    wanted: Callable[[Job], bool] = lambda job: True,
) -> int:
    """Run what is wanted, has no record and no other worker; how many were."""
    done = 0
    place.work.mkdir(parents=True, exist_ok=True)
    for job in jobs(table):
        if record_of(job).exists() or not wanted(job):
            continue
        if job.arm.peer and place.brevitas is None:
            continue
        try:
            with exclusive_lock(place.work / f"{job.key}.lock"):
                if record_of(job).exists():
                    continue
                listener.note(job.key)
                _keep(job, run(job, place, listener))
                done += 1
        except UsageError as error:
            if "another mecq works" not in str(error):
                raise
    return done


def parts(root: str, *, tune: bool) -> tuple[Split, Split]:
    """Train set and val images; to ``tune``, the train set and what is held out of it."""
    train = open_split(root, "train")
    return hold_out(train, TUNING_PART, seed=0) if tune else (train, open_evaluation(root))


def splits(table: Table, data: Path) -> tuple[Split, Split]:
    """What is trained on, and what is reported on."""
    train, reported = parts(str(data / table.data), tune=table.tune)
    if table.per_class is not None:
        train = limit_per_class(train, table.per_class)
    return train, reported


def config_of(job: Job, place: Place) -> QuantizeConfig:
    """The settings of a run of ours."""
    folder = place.work / job.key
    wbits, abits = job.bits
    return QuantizeConfig.model_validate({
        "model": job.table.model,
        "checkpoint": place.checkpoint(job.table.checkpoint),
        "data": str(place.data / job.table.data),
        "wbits": whole_bits(wbits),
        "abits": abits,
        "epochs": job.epochs,
        "seed": job.seed,
        "output": folder,
        "resume": folder.exists(),
        **job.table.settings,
        **job.arm.settings,
    })  # fmt: skip


def run(job: Job, place: Place, listener: Listener) -> dict[str, Any]:
    """Train and evaluate; top1 on what is reported on, fp_top1 there, seconds."""
    if job.arm.peer:
        return _run_peer(job, place)
    torch._dynamo.reset()  # each run compiles its own network
    config, parts = config_of(job, place), splits(job.table, place.data)
    summary = quantize(config, {}, listener, splits=parts)
    rows = read_rows(place.work / job.key / "metrics.jsonl")
    steps = sum(row["seconds"] + row["data_seconds"] for row in rows)
    summary["seconds"] = max(summary["seconds"], round(steps, 1))  # also of a run that was stopped
    if job.table.finely:
        artifact = place.work / job.key / "model.safetensors"
        summary["divergence"] = divergence_of(artifact, config, parts[1])
    if job.table.keep_artifact and job.seed == job.table.seeds[0]:
        wbits, abits = job.bits
        name = f"{job.table.model}-w{wbits}a{abits}"
        shutil.copyfile(place.work / job.key / "model.safetensors", FOLDER / f"{name}.safetensors")
        curve = _curve(place.work / job.key / "metrics.jsonl")
        atomic_write(FOLDER / f"{name}.curve.json", json.dumps(curve).encode(), force=True)
    return summary


def _run_peer(job: Job, place: Place) -> dict[str, Any]:
    """In a process of its own, whose Python has what the peer needs."""
    wbits, abits = job.bits
    command = [
        str(place.brevitas), "-m", "tests.studies.results.brevitas_arm",
        "--data", str(place.data / job.table.data), "--model", job.table.model,
        "--checkpoint", str(place.checkpoint(job.table.checkpoint)),
        "--wbits", str(wbits), "--abits", str(abits), "--seed", str(job.seed),
        "--epochs", str(job.epochs), "--threads", str(torch.get_num_threads()),
        *([] if job.table.per_class is None else ["--per-class", str(job.table.per_class)]),
    ]  # fmt: skip
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, cwd=FOLDER.parents[1]
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _keep(job: Job, summary: Mapping[str, Any]) -> None:
    wbits, abits = job.bits
    record = {
        "table": job.table.name,
        "model": job.table.model,
        "wbits": wbits,
        "abits": abits,
        "arm": job.arm.name,
        "seed": job.seed,
        "epochs": job.epochs,
        "top1": summary["top1"],
        "fp_top1": summary["fp_top1"],
        "seconds": summary["seconds"],
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "cpu": cpu_name(),
    }
    if job.table.finely:
        record["divergence"] = round(summary["divergence"], 5)
        record["weight_bytes"] = summary["sizes"]["ideal_bytes"]
    path = record_of(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(record, indent=1) + "\n").encode(), force=True)


def _commit() -> str:
    """Of the program that ran."""
    command = ["git", "-C", str(FOLDER), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout.strip()


def _curve(metrics: Path) -> list[dict[str, float]]:
    """One row an epoch: means of what each step wrote."""
    sums: dict[int, dict[str, float]] = {}
    counts: dict[int, int] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        epoch = int(row["epoch"])
        counts[epoch] = counts.get(epoch, 0) + 1
        of_epoch = sums.setdefault(epoch, {})
        for name in ("loss_task", "loss_mec", "train_top1"):
            if name in row:
                of_epoch[name] = of_epoch.get(name, 0.0) + float(row[name])
    return [
        {"epoch": epoch, **{name: value / counts[epoch] for name, value in of_epoch.items()}}
        for epoch, of_epoch in sums.items()
    ]
