"""Batch norm statistics after a training."""

from __future__ import annotations

import torch
from torch import nn

from mecq_cli.calibration import reestimate_batch_norm
from mecq_cli.insertion import QuantizedModel
from mecq_cli.workflow.job import BN_EPOCH, CALIBRATION_EPOCH, Job

COMPARED_IMAGES = 128


def renew_statistics(job: Job, model: QuantizedModel, plain: nn.Module) -> None:
    """Measure batch norm statistics anew; without training only where that helps.

    A trained network has learned with the statistics of its batches, so they fit it. One that
    was only calibrated may be better off with those of its FP training (8 bits) or not (2 bits):
    what decides is which one agrees better with the FP logits.
    """
    if not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in model.modules()):
        return
    before = {name: t.clone() for name, t in model.state_dict().items() if ".norm." in name}
    distance = None if job.recipe.total_steps else _distance(job, model, plain)
    # Batch norm in training mode is that of all processes: each brings its part.
    images, count = job.some_images(
        BN_EPOCH, job.config.bn_images, job.processes.part, whole=job.task.norms_of_whole_images
    )
    if job.processes.count == 1:
        images = (x for x in images if len(x) > 1)  # one has no variance
    reestimate_batch_norm(model, job.told("batch norm", images, count))
    if distance is None or job.processes.broadcast(_distance(job, model, plain) < distance):
        job.listener.note("batch norm statistics were measured anew")
    else:
        model.load_state_dict(before, strict=False)


@torch.no_grad()
def _distance(job: Job, model: QuantizedModel, plain: nn.Module) -> float:
    """Mean Kullback-Leibler divergence of the quantized from the FP outputs."""
    model.eval()
    images, count = job.some_images(CALIBRATION_EPOCH, COMPARED_IMAGES)
    total = 0.0
    for x in images:
        total += float(job.task.divergence(model(x), plain(x)))
    return total / count
