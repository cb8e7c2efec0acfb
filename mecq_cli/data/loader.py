"""Batches of uint8 images in an order that can be continued at any batch.

The order of an epoch and the augmentation of each image depend on (seed, epoch, index) alone:
the number of worker processes, an interruption, and what is kept in memory change nothing.

Small inputs (CIFAR) are decoded once and stay in memory, where a whole batch is augmented at
once by the main process: worker processes would only slow this down. Larger ones are decoded,
and put together to batches, by the workers.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from mecq_cli.data.augmentation import (
    SMALL,
    Pixels,
    eval_transform,
    pad_crop_flip,
    random_resized_crop,
)
from mecq_cli.data.images import open_rgb
from mecq_cli.data.order import Purpose, permutation, random_words
from mecq_cli.data.split import Split
from mecq_cli.errors import DataError, EnvironmentFailure, UsageError, first_line
from mecq_cli.events import Listener
from mecq_cli.models.preprocessing import Preprocessing

MEMORY_BUDGET = 2**30
"""Bytes of small decoded images that a data set keeps."""
_PRELOAD_BATCH = 256
_PR_SET_PDEATHSIG = 1
"""Of linux/prctl.h: the signal a process gets when its parent ends."""

Indices = NDArray[np.int64]
Part = Callable[[Indices], Indices]
"""What one of several processes takes of a batch."""


class Batch(NamedTuple):
    """``images`` uint8 [N, 3, H, W] and ``labels`` int64 [N], on the CPU.

    Of a program's data set ``images`` may be normalised already, float32 [N, C, H, W].
    """

    images: torch.Tensor
    labels: torch.Tensor


class ImageDataset:
    """The images of a split as a model sees them, not normalized.

    Attributes:
        split, preprocessing, train, seed, epoch: as given.
        labels: int64 [len], indices into the outputs of the model.
        outputs: int64 [classes], the output of each class; None where they are in one order.
        in_memory: decoded images are kept, so that workers have nothing to do.
        small: images are shifted in training; of others a part is taken.

    Args:
        split: the files.
        preprocessing: of the model.
        label_indices: output of the model that belongs to each class folder; None where both
            are in the same order.
        train: augment the images.
        seed: of order and augmentation; not negative.

    Raises:
        UsageError: a preprocessing that cannot be done, or label_indices of another length.
    """

    def __init__(
        self,
        split: Split,
        preprocessing: Preprocessing,
        label_indices: Sequence[int] | None = None,
        train: bool = False,
        seed: int = 0,
    ) -> None:
        if label_indices is not None and len(label_indices) != len(split.classes):
            raise UsageError(
                f"{len(label_indices)} label indices were given for the {len(split.classes)} "
                f"class folders of {split.name}; one for each is needed"
            )
        self.split, self.preprocessing, self.train, self.seed = split, preprocessing, train, seed
        self.outputs: Indices | None = (
            None if label_indices is None else np.asarray(label_indices, dtype=np.int64)
        )
        self.labels: Indices = split.labels if self.outputs is None else self.outputs[split.labels]
        self._prepare()
        self.set_epoch(0)

    def _prepare(self) -> None:
        """What makes the pixels, and the place where they are kept."""
        self._eval = eval_transform(self.preprocessing)
        self._crop = random_resized_crop(self.preprocessing)
        shape = (len(self), *self.preprocessing.input_size)
        self.small = max(self.preprocessing.input_size[1:]) <= SMALL
        self.in_memory = self.small and int(np.prod(shape)) <= MEMORY_BUDGET
        self._pixels: Pixels = np.empty(shape if self.in_memory else (0,), dtype=np.uint8)
        self._decoded = np.zeros(len(self), dtype=bool)

    def __len__(self) -> int:
        return len(self.split)

    @property
    def pixel_bytes(self) -> int:
        """Of the images that are kept in memory."""
        return len(self) * int(np.prod(self.preprocessing.input_size)) if self.in_memory else 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation of that epoch."""
        self.epoch = epoch
        self._words = random_words(len(self), Purpose.AUGMENT, self.seed, epoch)

    def batch(self, indices: Indices) -> Batch:
        """The images at ``indices``.

        Raises:
            DataError: one of them is unreadable.
        """
        if self.train and not self.small:
            cropped = [
                self._crop(open_rgb(self.split.file(i)), int(self._words[i])) for i in indices
            ]
            pixels = np.stack(cropped)
        else:
            pixels = self._resized(indices)
            if self.train:
                pixels = pad_crop_flip(pixels, self._words[indices])
        return Batch(torch.from_numpy(pixels), torch.from_numpy(self.labels[indices]))

    def _resized(self, indices: Indices) -> Pixels:
        """Without augmentation, from memory where they are there."""
        if not self.in_memory:
            return np.stack([self._eval(open_rgb(self.split.file(i))) for i in indices])
        # Threads make this slower: for images this small Pillow hardly lets go of the GIL.
        for i in indices[~self._decoded[indices]]:
            self._pixels[i] = self._eval(open_rgb(self.split.file(i)))
            self._decoded[i] = True
        return self._pixels[indices]

    def preload(self, workers: int = 0, listener: Listener | None = None) -> None:
        """Where images are kept in memory, decode all of them now, in the order of the files.

        Before whole epochs this pays: `train_batches` would read the files in random order,
        which takes a cold disk several times as long, and without the help of workers.

        Raises:
            DataError: an image is unreadable.
            EnvironmentFailure: a worker process died.
        """
        missing = np.flatnonzero(~self._decoded) if self.in_memory else np.arange(0)
        if not len(missing):
            return
        listener = listener or Listener()
        listener.start("read images", len(missing))
        plain = ImageDataset(self.split, self.preprocessing)
        plain.in_memory = False
        done = 0
        for batch in _batches(plain, _chunks(missing, _PRELOAD_BATCH), workers):
            chunk = missing[done : done + len(batch.labels)]
            self._pixels[chunk], self._decoded[chunk] = batch.images.numpy(), True
            done += len(chunk)
            listener.advance("read images", done)
        listener.finish("read images")


def batches_per_epoch(images: int, batch_size: int, drop_last: bool = True) -> int:
    """How many batches `train_batches` yields from its first one on."""
    if batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {batch_size}")
    full, rest = divmod(images, batch_size)
    return full + bool(rest and not (drop_last and full))


def train_batches(
    dataset: ImageDataset,
    *,
    batch_size: int,
    epoch: int,
    start_batch: int = 0,
    workers: int = 0,
    drop_last: bool = True,
    part: Part | None = None,
) -> Iterator[Batch]:
    """One epoch in random order.

    Args:
        dataset: its epoch is set.
        batch_size: images a batch.
        epoch: decides, with the seed of the data set, order and augmentation.
        start_batch: leave out this many, to continue an epoch.
        workers: processes that decode; 0 for this one.
        drop_last: leave out a last, smaller batch, unless it is the only one.
        part: of each batch; None: all of it.

    Raises:
        DataError: an image is unreadable.
        EnvironmentFailure: a worker process died.
    """
    count = batches_per_epoch(len(dataset), batch_size, drop_last)
    order = permutation(len(dataset), Purpose.ORDER, dataset.seed, epoch)
    dataset.set_epoch(epoch)
    chunks = _chunks(order[: count * batch_size], batch_size)[start_batch:]
    return _batches(dataset, chunks if part is None else [part(c) for c in chunks], workers)


def eval_batches(
    dataset: ImageDataset, *, batch_size: int, workers: int = 0, first: int = 0, every: int = 1
) -> Iterator[Batch]:
    """All the images in the order of the split; the last batch may be smaller.

    Of several processes each takes ``every`` so manieth batch, from its ``first`` one on.

    Raises:
        DataError: an image is unreadable.
        EnvironmentFailure: a worker process died.
    """
    order = np.arange(len(dataset), dtype=np.int64)
    return _batches(dataset, _chunks(order, batch_size)[first::every], workers)


def normalize(
    images: torch.Tensor, preprocessing: Preprocessing, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """uint8 [N, 3, H, W] to float32 [N, 3, H, W], channels_last, on ``device``.

    (x / 255 - mean) / std, each operation rounded to float32 on its own, so that the same
    formula in NumPy gives the same bits. Images that are floats are normalised already.
    """
    if images.dtype == torch.float32:
        return images.to(device, memory_format=torch.channels_last, non_blocking=True)

    assert images.dtype == torch.uint8, images.dtype
    moved = images.to(device, non_blocking=True)  # as bytes: a quarter of the traffic
    pixels = moved.to(torch.float32, memory_format=torch.channels_last)
    # Division by a tensor: by a plain number, CUDA multiplies with a rounded reciprocal.
    pixels.div_(_constant((255.0,), device))
    mean, std = (_constant(tuple(v), device) for v in (preprocessing.mean, preprocessing.std))
    return pixels.sub_(mean).div_(std)


@lru_cache(maxsize=16)
def _constant(values: tuple[float, ...], device: torch.device | str) -> torch.Tensor:
    """A number for each channel; kept, since a copy to a GPU waits for it."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)


class _BatchSource(Dataset["Batch | str"]):
    """Whole batches by number, for worker processes."""

    def __init__(self, dataset: ImageDataset, chunks: Sequence[Indices]) -> None:
        self.dataset, self.chunks = dataset, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, number: int) -> Batch | str:
        try:
            return self.dataset.batch(self.chunks[number])
        except DataError as error:
            return str(error)  # raised, it would come back wrapped into a traceback


def _chunks(order: Indices, batch_size: int) -> list[Indices]:
    """The batches of ``order``; the last may be smaller."""
    count = batches_per_epoch(len(order), batch_size, drop_last=False)
    return [order[n * batch_size : (n + 1) * batch_size] for n in range(count)]


def _batches(dataset: ImageDataset, chunks: Sequence[Indices], workers: int) -> Iterator[Batch]:
    """The images at ``chunks``."""
    workers = 0 if dataset.in_memory else min(workers, len(chunks))
    if workers == 0:
        return (dataset.batch(chunk) for chunk in chunks)
    loader = DataLoader(
        _BatchSource(dataset, chunks),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=partial(_begin_worker, os.getpid()),
        # From Python 3.14 on Linux's default would be a server that forks, the workers' parent.
        multiprocessing_context="fork" if sys.platform == "linux" else None,
        # Else a copy to the GPU waits for itself; where none is in use, pinning would open one.
        pin_memory=torch.cuda.is_initialized(),
        generator=torch.Generator(),  # else starting the workers would draw from the global one
    )
    return _checked(loader)


def _checked(loader: DataLoader[Batch | str]) -> Iterator[Batch]:
    """Batches from the workers; their errors are raised here."""
    try:
        for batch in loader:
            if isinstance(batch, str):
                raise DataError(batch)
            yield batch
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise EnvironmentFailure(
            f"a process that loads images died ({first_line(error)}); this is most often a lack of "
            "memory or of /dev/shm: try fewer --workers, or --workers 0"
        ) from error


def _as_it_is(batch: Any) -> Any:
    return batch


def _begin_worker(parent: int, worker: int) -> None:
    """What a worker process does first."""
    # Ctrl-C and a group's SIGTERM reach the workers too, but the main process still needs their
    # batches to finish its step; it ends them itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Where it is killed they must not stay. They look for it themselves, but for one that ended
    # before they did so, or while it held a lock of theirs, they would wait forever.
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
