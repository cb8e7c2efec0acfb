"""How near the loader comes to what decoding alone allows.

    python -m tests.studies.loading DATA [--size 224] [--seconds 5]

Rates in images a second. "decode" is the limit of one core: read, decode, and nothing else;
"with transform" adds the resizing and cropping that the model asks for. The loader's rows give
whole batches as the training loop gets them, from memory where the images are small.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch

from mecq_cli.data import ImageDataset, eval_batches, open_evaluation, open_split, train_batches
from mecq_cli.data.images import open_rgb
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.workflow.machine import cores, cpu_name

BATCH = 64


def rate(batches: Iterable[int], seconds: float) -> float:
    """Images a second; the first batch, with the start of the workers, is not counted."""
    counts = iter(batches)
    next(counts)
    begin, images = time.perf_counter(), 0
    for count in counts:
        images += count
        if time.perf_counter() - begin > seconds:
            break
    return images / (time.perf_counter() - begin)


def study(data: str, size: int, seconds: float) -> dict[str, float]:
    """All rates by name."""
    preprocessing = Preprocessing((3, size, size), (0.5,) * 3, (0.5,) * 3, "bilinear", 0.875)
    train, val = open_split(data, "train"), open_evaluation(data)
    order = np.random.default_rng(0).permutation(len(train))
    plain = ImageDataset(train, preprocessing)
    augmented = ImageDataset(train, preprocessing, train=True)

    def single(call: Callable[[int], object]) -> Iterable[int]:
        for start in itertools.count(0, BATCH):
            for index in order[np.arange(start, start + BATCH) % len(order)]:
                call(int(index))
            yield BATCH

    def endless(dataset: ImageDataset, workers: int) -> Iterable[int]:
        for epoch in itertools.count():
            for batch in (
                train_batches(dataset, batch_size=BATCH, epoch=epoch, workers=workers)
                if dataset.train
                else eval_batches(dataset, batch_size=BATCH, workers=workers)
            ):
                yield len(batch.labels)

    found = {
        "decode": rate(single(lambda i: open_rgb(train.file(i)).load()), seconds),
        "with transform, evaluation": rate(
            single(lambda i: plain._eval(open_rgb(train.file(i)))), seconds
        ),
        "with transform, training": rate(
            single(lambda i: augmented._crop(open_rgb(train.file(i)), i)), seconds
        ),
    }
    for workers in (0, 1, 2):
        for name, dataset in (
            ("evaluation", ImageDataset(val, preprocessing)),
            ("training", ImageDataset(train, preprocessing, train=True)),
        ):
            found[f"loader, {name}, {workers} workers"] = rate(endless(dataset, workers), seconds)
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{cpu_name()}, {cores()} cores, torch {torch.__version__}")  # noqa: T201
    rates = study(options.data, options.size, options.seconds)
    for name, value in rates.items():
        print(f"{name:36} {value:8.0f} images/s")  # noqa: T201


if __name__ == "__main__":
    main()
