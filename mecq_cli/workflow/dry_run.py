"""``mecq quantize --dry-run``: what a run would be."""

from __future__ import annotations

from typing import Any

import numpy as np

from mecq_cli.data.split import evenly
from mecq_cli.export import safetensors
from mecq_cli.integerize import integerize
from mecq_cli.runs import RUNS
from mecq_cli.sizes import fp32_bytes, site_rows, totals
from mecq_cli.training.lowering import require_lowering
from mecq_cli.training.oscillation import require_freezing
from mecq_cli.training.recipe import make_optimizer
from mecq_cli.workflow import allot
from mecq_cli.workflow.chosen import describe
from mecq_cli.workflow.common import insert_quantizers
from mecq_cli.workflow.disk import disk_need
from mecq_cli.workflow.faithful import require_faithful
from mecq_cli.workflow.forecast import forecast
from mecq_cli.workflow.job import Job

SAMPLE = 16
"""Images of each split that are read: files that are no images are seldom so alone."""


def dry_run(job: Job) -> dict[str, Any]:
    """The site table, with sizes, and what the training takes; nothing is written.

    Raises:
        MecqError: what the run would fail by, as far as this can be told.
    """
    for split in (job.train, job.val):
        split.batch(np.array(evenly(len(split), SAMPLE)))
    shape = job.loaded.preprocessing.input_size
    model = insert_quantizers(job.loaded, job.config)
    require_lowering(model, job.recipe)
    if job.asks_to_freeze:
        require_freezing(model)
    require_faithful(model, job.loaded.module, shape)
    describe(job, model)
    expected = None
    if job.recipe.total_steps:
        images = sum(d.pixel_bytes for d in (job.train, job.val))
        expected = forecast(
            job.loaded, job.config, job.recipe, job.device, job.processes.count, images,
            job.listener,
        )  # fmt: skip
    integer = integerize(model, shape, {})
    packed = len(safetensors.to_bytes(integer))
    rows = site_rows(integer)
    for row in rows:  # of activations they would be those of a network that has seen no image
        row["activation_scale"] = None
        row.pop("thresholds", None)
    return {
        "sites": allot.with_sensitivities(rows, job.config),
        **allot.document_of(job.config, model),
        "sizes": totals(integer, fp32_bytes(job.loaded.module), packed),
        "steps": job.recipe.total_steps,
        "epochs": job.recipe.epochs,
        "batch_size": job.recipe.batch_size,
        "optimizer": job.recipe.optimizer,
        "lr": job.recipe.lr,
        "reasons": list(job.recipe.reasons),
        "compile": job.recipe.compile if job.recipe.total_steps else "off",
        "forecast": expected,
        "disk": disk_need(
            job.config, job.recipe, model, make_optimizer(model, job.recipe)[0]
        ).document(job.config.output or RUNS),
    }
