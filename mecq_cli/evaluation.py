"""Top-1 and top-5 of anything that turns images into logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mecq_cli.data import ImageDataset, eval_batches, normalize
from mecq_cli.distributed import ALONE, Processes
from mecq_cli.events import Listener


@dataclass(frozen=True)
class Accuracy:
    """In percent, over ``images`` images."""

    images: int
    top1: float
    top5: float


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Tensor],
    dataset: ImageDataset,
    *,
    batch_size: int,
    device: torch.device,
    workers: int = 0,
    listener: Listener | None = None,
    processes: Processes = ALONE,
) -> Accuracy:
    """Evaluate on every image, in float32, without autocast.

    Args:
        predict: normalised images [N, C, H, W] on ``device`` -> logits [N, classes].
        dataset: without augmentation.
        batch_size: images at a time.
        device: where the images go.
        workers: loader processes.
        listener: hears of the progress.
        processes: each takes batches of its own; the result is that of all.
    """
    listener = listener or Listener()
    listener.start("evaluate", len(dataset))
    images = top1 = top5 = 0
    mine = {"first": processes.rank, "every": processes.count}
    for batch in eval_batches(dataset, batch_size=batch_size, workers=workers, **mine):
        logits = predict(normalize(batch.images, dataset.preprocessing, device)).float().cpu()
        ranked = logits.topk(min(5, logits.shape[1]), 1).indices
        hits = ranked == batch.labels[:, None]
        images += len(batch.labels)
        top1 += int(hits[:, 0].sum())
        top5 += int(hits.any(1).sum())
        listener.advance("evaluate", min(images * processes.count, len(dataset)))
    listener.finish("evaluate")
    images, top1, top5 = (int(total) for total in processes.sums([images, top1, top5]))
    return Accuracy(images, 100.0 * top1 / images, 100.0 * top5 / images)
