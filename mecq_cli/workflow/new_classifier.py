"""A new last layer is fitted before anything is quantized, and kept in the folder of the run."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from mecq_cli.data import dataset_of, eval_batches, normalize
from mecq_cli.models.order import channels_last
from mecq_cli.runs import RunFolder
from mecq_cli.storage import atomic_write
from mecq_cli.training.last_layer import fit, inputs_of, last_layer
from mecq_cli.workflow.common import eval_batch_size
from mecq_cli.workflow.float_model import fits_classifier, put_classifier
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
    if job.processes.from_first(lambda: put_classifier(job.loaded, run)):
        put_classifier(job.loaded, run)
        return
    with job.phases("last layer"):
        found = job.processes.from_first(lambda: _fitted(job))
    layer = last_layer(job.loaded.module, job.loaded.classifiers)
    if found is None or layer is None:
        job.listener.note("the new last layer stays random: its inputs are no features of an image")
        return
    layer.load_state_dict(found)
    if job.processes.first:
        atomic_write(run.classifier, safetensors.torch.save(found), force=True)


def _fitted(job: Job) -> dict[str, Tensor] | None:
    """The state of the last layer."""
    network = copy.deepcopy(job.loaded.module).to(job.device).eval().requires_grad_(False)
    channels_last(network)
    layer = last_layer(network, job.loaded.classifiers)
    assert layer is not None
    split, preprocessing = job.train.split, job.train.preprocessing
    count = min(IMAGES, len(split))
    # Folders follow each other class by class: evenly from all of them.
    chosen = split.take(np.linspace(0, len(split) - 1, count).astype(int).tolist())
    dataset = dataset_of(chosen, preprocessing, job.classes.indices)
    labels: list[Tensor] = []

    def images() -> Iterator[Tensor]:
        size, seen = eval_batch_size(preprocessing), 0
        job.listener.start("last layer", count)
        for batch in eval_batches(dataset, batch_size=size, workers=job.workers):
            yield normalize(batch.images, preprocessing, job.device)
            labels.append(batch.labels)
            seen += len(batch.labels)
            job.listener.advance("last layer", seen)
        job.listener.finish("last layer")

    features = inputs_of(network, layer, images())
    if features is None:
        return None
    target = torch.cat(labels)
    weight, bias = fit(features, target, layer.out_features)
    right = float(((features @ weight.mT + bias).argmax(1) == target).float().mean())
    job.listener.note(
        f"the new last layer is fitted to the float features of {count} training images, of which "
        f"it knows {100 * right:.2f} %"
    )
    fitted = {"weight": weight, "bias": bias}
    return {name: fitted[name] for name in layer.state_dict()}
