"""How far the outputs of a quantized network are from the float model's, on images it never saw.

Where accuracies of arms differ by less than their spread over the seeds, this tells them apart: it
counts how sure each answer is, and not only whether it changed.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mecq_cli.config import QuantizeConfig
from mecq_cli.data import Split, dataset_of, eval_batches, normalize
from mecq_cli.export import safetensors
from mecq_cli.integerize import IntegerModule
from mecq_cli.tasks.divergence import divergence
from mecq_cli.workflow.common import eval_batch_size
from mecq_cli.workflow.float_model import load_float

CPU = torch.device("cpu")


@torch.no_grad()
def divergence_of(artifact: Path, config: QuantizeConfig, split: Split) -> float:
    """The mean Kullback-Leibler divergence of an artifact's classes from the float model's, nats.

    Args:
        artifact: of a run.
        config: its settings, which name the float model.
        split: images to look at.
    """
    loaded, classes = load_float(config, split.classes)
    plain, integers = loaded.module.eval(), IntegerModule(safetensors.load(artifact))
    dataset = dataset_of(split, loaded.preprocessing, classes.indices)
    total = 0.0
    batch_size = eval_batch_size(loaded.preprocessing)
    for batch in eval_batches(dataset, batch_size=batch_size, workers=0):
        images = normalize(batch.images, loaded.preprocessing, CPU)
        total += float(divergence(integers(images), plain(images))) * len(images)
    return total / len(dataset)
