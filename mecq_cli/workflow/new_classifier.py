"""A new last layer is fitted before anything is quantized, and kept in the folder of the run."""

from __future__ import annotations

import copy
from dataclasses import replace

import safetensors.torch
import torch
from torch import Tensor

from mecq_cli.data import batches_per_epoch, dataset_of, eval_batches, normalize
from mecq_cli.models.order import channels_last
from mecq_cli.runs import RunFolder
from mecq_cli.storage import atomic_write
from mecq_cli.training.last_layer import fit, inputs_of, last_layer
from mecq_cli.workflow.common import eval_batch_size
from mecq_cli.workflow.float_model import (
    fits_classifier,
    gone,
    read_classifier,
    use_classifier,
)
from mecq_cli.workflow.job import Job

IMAGES = 10_000
"""At most so many training images: it is only where the training begins."""


def prepare_classifier(job: Job, run: RunFolder) -> None:
    """Fit it, or take what a run that goes on has kept.

    Raises:
        MecqError: what was kept cannot be read, or the images cannot.
    """
    if not fits_classifier(job.loaded, job.config):
        return
    # Only the first process may see the folder.
    kept, begun = job.processes.from_first(lambda: (read_classifier(run), run.has_begun))
    if kept is None and begun:
        raise gone(run)
    if kept is None:
        with job.phases("last layer"):
            kept = job.processes.from_first(lambda: _fitted(job))
        if kept is None:
            _leave_random(job)
            return
        if job.processes.first:
            atomic_write(run.classifier, safetensors.torch.save(kept), force=True)
    use_classifier(job.loaded, kept, run)


def _leave_random(job: Job) -> None:
    """Where it cannot be fitted: nothing is distilled then, and a run that goes on knows it."""
    job.listener.note(
        "the new last layer stays random, since its inputs are no features of an image; nothing is "
        "distilled from it"
    )
    job.config = job.config.model_copy(update={"fit_classifier": False, "distill": False})
    job.recipe = replace(job.recipe, distill_weight=0.0)


def _fitted(job: Job) -> dict[str, Tensor] | None:
    """The state of the last layer."""
    network = copy.deepcopy(job.loaded.module).to(job.device).eval().requires_grad_(False)
    channels_last(network)
    layer = last_layer(network, job.loaded.classifiers)
    assert layer is not None
    preprocessing, size = job.train.preprocessing, eval_batch_size(job.train.preprocessing)
    dataset = dataset_of(job.train.split.evenly(IMAGES), preprocessing, job.classes.indices)
    batches = (
        normalize(batch.images, preprocessing, job.device)
        for batch in eval_batches(dataset, batch_size=size, workers=job.workers)
    )
    count = batches_per_epoch(len(dataset), size, drop_last=False)
    features = inputs_of(network, layer, job.told("last layer", batches, count))
    if features is None:
        return None
    target = torch.from_numpy(dataset.labels)
    has_bias = layer.bias is not None
    weight, bias = fit(
        features.to(job.device), target.to(job.device), layer.out_features, bias=has_bias
    )
    weight, bias = weight.cpu(), bias.cpu()
    right = float(((features @ weight.mT + bias).argmax(1) == target).float().mean())
    job.listener.note(
        f"the new last layer is fitted to the float features of {len(dataset)} training images, of "
        f"which it knows {100 * right:.2f} %"
    )
    fitted = {"weight": weight, "bias": bias}
    return {name: fitted[name] for name in layer.state_dict()}
