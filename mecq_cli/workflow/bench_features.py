"""`mecq bench features`: what training has done to the representations of a run.

Spectra, effective rank, coding length and likeness to the FP network at the end of each stage,
accuracy by class, and the gap between training and evaluation images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mecq_cli.config import QuantizeConfig
from mecq_cli.data import ImageDataset, Split, eval_batches, normalize, open_training
from mecq_cli.data.split import evenly
from mecq_cli.entropy import centre, exact_coding_length, normalise
from mecq_cli.errors import UsageError
from mecq_cli.events import Listener
from mecq_cli.insertion import BitPlan, QuantizedModel, insert
from mecq_cli.models.classes import ClassMap
from mecq_cli.models.loading import LoadedModel
from mecq_cli.runs import RunFolder
from mecq_cli.target import resolve_target
from mecq_cli.training import state
from mecq_cli.workflow.common import eval_batch_size, insert_quantizers, taps_of
from mecq_cli.workflow.float_model import load_float
from mecq_cli.workflow.targets import run_config

SITES = "stages"
LENGTH_ROWS = 512
"""Images whose coding length is taken, as if they were one batch: evenly from all classes, which
follow each other."""


@dataclass(frozen=True)
class Looked:
    """What was seen of one network: pooled features by site [N, d], hits [N], labels [N]."""

    features: dict[str, Tensor]
    hits: Tensor
    labels: Tensor


def bench_features(
    targets: Sequence[str], images: int, distortion: float, listener: Listener
) -> dict[str, Any]:
    """Compare runs of one model with its FP network.

    Args:
        targets: finished run folders of the same model and data.
        images: how many of each split, evenly from all classes.
        distortion: eps_d^2 of the coding lengths.
        listener: hears of the progress.

    Returns:
        For the FP network and each run: top-1 on training and evaluation images (without
        augmentation), top-1 by class, and a row a site with eigenvalues (of the covariance of
        centred unit rows, descending, sum 1), effective rank, coding length, cosine (of
        standardised rows) and linear CKA with the FP network.

    Raises:
        UsageError: a target is no finished run, or the runs are not of one model and data.
    """
    runs = [_run(name) for name in targets]
    configs = [run_config(run) for run in runs]
    first = configs[0]
    for name, config in zip(targets, configs, strict=True):
        if _measured_on(config) != _measured_on(first):
            raise UsageError(
                f"{name}: is of another model, checkpoint, data, image size or held out part than "
                f"{targets[0]}"
            )
    splits = open_training(first.data, first.val_split, first.seed)
    torch.manual_seed(first.seed)
    loaded, classes = load_float(first, splits[0].classes, runs[0])
    parts = [_part(split, images, loaded, classes) for split in splits]
    fp = insert(
        loaded.module, loaded.preprocessing.input_size, BitPlan(32, 32), taps_of(_coded(first))
    )
    listener.note("the FP network")
    reference = [_look(fp, part) for part in parts]
    networks = [_described("FP", reference, reference, classes, distortion)]
    for name, run, config in zip(targets, runs, configs, strict=True):
        listener.note(name)
        model = insert_quantizers(load_float(config, splits[0].classes)[0], _coded(config))
        state.load_model(run.checkpoints, model)
        seen = [_look(model, part) for part in parts]
        networks.append(_described(name, seen, reference, classes, distortion))
    return {"model": first.model, "images": len(parts[1]), "networks": networks}


def _run(name: str) -> RunFolder:
    target = resolve_target(name)
    if target.run is None or not target.run.summary.exists():
        raise UsageError(f"{name}: is no finished run")
    return target.run


def _measured_on(config: QuantizeConfig) -> tuple[Any, ...]:
    """What the runs must have in common: the float model and the images."""
    return (
        config.model,
        config.checkpoint,
        config.pretrained or config.seed,  # random weights are drawn by it
        config.data,
        config.img_size,
        config.crop_pct,
        config.val_split and (config.val_split, config.seed),
    )


def _coded(config: QuantizeConfig) -> QuantizeConfig:
    """The settings with the sites looked at here as those of the regularizer."""
    return config.model_copy(update={"mec_on": SITES, "mec_weight": 1.0, "mec_grid": 1})


def _part(split: Split, images: int, loaded: LoadedModel, classes: ClassMap) -> ImageDataset:
    return ImageDataset(split.evenly(images), loaded.preprocessing, classes.indices)


@torch.no_grad()
def _look(model: QuantizedModel, dataset: ImageDataset) -> Looked:
    model.eval()
    rows: dict[str, list[Tensor]] = {name: [] for name in model.taps}
    hits, labels = [], []
    for batch in eval_batches(dataset, batch_size=eval_batch_size(dataset.preprocessing)):
        logits, *taps = model.graph(normalize(batch.images, dataset.preprocessing))
        for name, value in zip(model.taps, taps, strict=True):
            rows[name].append(value)
        hits.append(logits.argmax(1) == batch.labels)
        labels.append(batch.labels)
    features = {name: torch.cat(parts) for name, parts in rows.items()}
    return Looked(features, torch.cat(hits), torch.cat(labels))


def _described(
    name: str,
    seen: Sequence[Looked],
    reference: Sequence[Looked],
    classes: ClassMap,
    distortion: float,
) -> dict[str, Any]:
    train, held_out = (100.0 * float(part.hits.float().mean()) for part in seen)
    by_class = {
        classes.names[int(label)]: 100.0
        * float(seen[1].hits[seen[1].labels == label].float().mean())
        for label in seen[1].labels.unique()
    }
    sites = [
        {"site": site, **_site(rows, reference[1].features[site], distortion)}
        for site, rows in seen[1].features.items()
    ]
    return {
        "name": name,
        "train_top1": train,
        "top1": held_out,
        "gap": train - held_out,
        "by_class": by_class,
        "sites": sites,
    }


def _site(rows: Tensor, fp_rows: Tensor, distortion: float) -> dict[str, Any]:
    rows, fp_rows = rows.double(), fp_rows.double()
    z = normalise(centre(rows))
    eigenvalues = torch.linalg.eigvalsh(z.mT @ z / len(z)).flip(0).clamp(min=0)
    share = eigenvalues / eigenvalues.sum().clamp(min=1e-30)
    return {
        "eigenvalues": [float(value) for value in share],
        "effective_rank": math.exp(float(torch.special.entr(share).sum())),
        "coding_length": float(exact_coding_length(z[evenly(len(z), LENGTH_ROWS)], distortion)),
        "cosine": float(nn.functional.cosine_similarity(_scaled(rows), _scaled(fp_rows)).mean()),
        "cka": float(_cka(centre(rows), centre(fp_rows))),
    }


def _scaled(rows: Tensor) -> Tensor:
    centred = centre(rows)
    return centred / centred.square().mean(0, keepdim=True).sqrt().clamp(min=1e-6)


def _cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA (Kornblith et al., arXiv 1905.00414, Eq. 4 with linear kernels)."""
    cross: Tensor = (x.mT @ y).square().sum()
    scale: Tensor = (x.mT @ x).square().sum().sqrt() * (y.mT @ y).square().sum().sqrt()
    return cross / scale.clamp(min=1e-30)
