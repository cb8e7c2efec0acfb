"""The figures of anything that turns images into logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mecq_cli.data import ImageDataset, eval_batches, normalize
from mecq_cli.distributed import ALONE, Processes
from mecq_cli.events import Listener
from mecq_cli.tasks.base import Measured, Task
from mecq_cli.tasks.registry import CLASSIFICATION


@contextmanager
def full_precision() -> Iterator[None]:
    """Within the ``with`` block GPUs multiply float32 as it is, not by TF32's mantissa of 10 bits.

    PyTorch allows that in convolutions by default, and programs often in matrix products; integers
    of a simulator, as multiples of a step, are not what they should be there.
    """
    changed: list[Any] = []
    places: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    for place in places:
        try:
            if place.allow_tf32:
                place.allow_tf32 = False
                changed.append(place)
        except RuntimeError:  # of a program that says it by the newer fp32_precision: its choice
            continue
    try:
        yield
    finally:
        for place in changed:
            place.allow_tf32 = True


@full_precision()
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
    task: Task = CLASSIFICATION,
    outputs: int = 0,
) -> Measured:
    """Evaluate on every image, in float32, without autocast.

    Args:
        predict: normalised images [N, C, H, W] on ``device`` -> what the metric of the task takes,
            logits [N, classes, ...] or what `Task.answers` makes of the outputs.
        dataset: without augmentation.
        batch_size: images at a time.
        device: where the images go.
        workers: loader processes.
        listener: hears of the progress.
        processes: each takes batches of its own; the result is that of all.
        task: decides what is measured.
        outputs: classes that the logits have; by default those of the data.
    """
    listener = listener or Listener()
    listener.start("evaluate", len(dataset))
    metric, images = task.metric(outputs or len(dataset.split.classes)), 0
    mine = {"first": processes.rank, "every": processes.count}
    for batch in eval_batches(dataset, batch_size=batch_size, workers=workers, **mine):
        answers = predict(normalize(batch.images, dataset.preprocessing, device)).float().cpu()
        metric.update(answers, batch.labels)
        images += len(batch.labels)
        listener.advance("evaluate", min(images * processes.count, len(dataset)))
    listener.finish("evaluate")
    metric.gather(processes)
    total, *sums = processes.sums([images, *metric.sums()])
    return metric.measured(int(total), sums)
