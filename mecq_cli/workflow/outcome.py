"""The end of a run: its artifact, its figures, its summary."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from mecq_cli.export import safetensors
from mecq_cli.insertion import QuantizedModel
from mecq_cli.integer.ir import IntegerModel
from mecq_cli.integerize import IntegerModule, integerize
from mecq_cli.runs import RunFolder
from mecq_cli.sizes import fp32_bytes, totals
from mecq_cli.storage import atomic_write
from mecq_cli.tasks.base import Measured
from mecq_cli.training import tracking
from mecq_cli.training.loop import Trainer
from mecq_cli.training.metrics import read_rows
from mecq_cli.workflow import allot
from mecq_cli.workflow.common import artifact_metadata
from mecq_cli.workflow.float_model import knows_classes
from mecq_cli.workflow.job import Job
from mecq_cli.workflow.machine import facts


def finish(
    job: Job,
    run: RunFolder,
    trainer: Trainer,
    model: QuantizedModel,
    resumed_at: int | None,
    started: float,
) -> dict[str, Any]:
    """Write the integer model, measure it, and write and return the summary.

    Args:
        job, run: the run.
        trainer: which is done.
        model: what it trained, in evaluation mode.
        resumed_at: step that the run was continued at; None if it was not.
        started: when this process began, as ``time.perf_counter`` has it.
    """
    with job.phases("writing"):
        sizes = job.processes.from_first(lambda: _write_artifact(job, run, model))
        trainer.save()
    with job.phases("evaluation"):
        simulated = job.measured(model)
        measured = _of_artifact(job, run.artifact)
    key = job.task.figures.key
    summary = {
        "run": str(run.path),
        "model": job.config.model,
        "wbits": allot.shown_wbits(job.config, model),
        "abits": job.config.abits,
        **allot.document_of(job.config, model),
        "task": job.task.name,
        f"fp_{key}": trainer.progress.facts[f"fp_{key}"],
        "fp_trained": knows_classes(job.loaded, job.config),
        f"simulator_{key}": simulated.figures[key],
        key: measured.figures[key],
        "images": simulated.images,
        "images_sha256": trainer.progress.facts["images"],
        "sizes": sizes,
        "steps": trainer.progress.step,
        "mec_weight": trainer.recipe.mec_weight,
        "seconds": round(time.perf_counter() - started, 1),
        "seconds_by_phase": job.phases.seconds(),
        "resumed_at": resumed_at,
        "again": job.again,
        "processes": job.processes.count,
        "machine": facts(),
        "finished": True,
    }
    if job.processes.first:
        atomic_write(run.summary, (json.dumps(summary, indent=2) + "\n").encode(), force=True)
        if job.config.log == "tensorboard":
            tracking.write_results(run.tensorboard, summary, read_rows(run.metrics))
    return summary


def _write_artifact(job: Job, run: RunFolder, model: QuantizedModel) -> dict[str, Any]:
    """Write the integer model; returns its sizes."""
    wbits = allot.shown_wbits(job.config, model)
    metadata = artifact_metadata(job.loaded, job.classes, job.config, wbits)
    fp32 = fp32_bytes(job.loaded.module)
    metadata["fp32_bytes"] = fp32
    integer = integerize(model, job.loaded.preprocessing.input_size, metadata)
    safetensors.save(integer, run.artifact, force=True)
    return totals(integer, fp32, run.artifact.stat().st_size)


def _of_artifact(job: Job, path: Path) -> Measured:
    """The figures of what was written, read back."""
    stored: IntegerModel = job.processes.from_first(lambda: safetensors.load(path))
    return job.measured(IntegerModule(stored).to(job.device))
