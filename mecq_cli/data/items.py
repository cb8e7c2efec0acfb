"""Data sets of a program, in the place of a folder: anything that gives (image, label) by number.

Those that give (image, mask) are in `item_masks`.

An image is a Pillow image or a uint8 tensor [3, H, W], which is resized, augmented and normalised
as one from a folder; or a float tensor [C, H, W], which goes to the model as it is. Whatever is
random in a data set of floats is drawn from torch, numpy and random, and these are seeded for each
image by (seed, epoch, index): so a run can be repeated, and continued, as one on a folder.
"""

from __future__ import annotations

import io
import operator
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from mecq_cli.data.images import to_rgb
from mecq_cli.data.loader import Batch, ImageDataset
from mecq_cli.data.split import Encoded, Indices, Split, evenly
from mecq_cli.errors import DataError, UsageError
from mecq_cli.events import Listener
from mecq_cli.settings import OWN

COMPARED = 8
"""Images whose labels are compared with those that the data set has at hand."""


class Items(Protocol):
    """A data set in torch's map style."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True)
class ItemFiles:
    """The images of ``items`` as files; `Split.files` of a program's data set."""

    items: Items
    split: str

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        return f"{self.split}[{index}]"

    def file(self, index: int) -> Encoded:
        return Encoded(self.name(index), partial(self._open, index))

    def picture(self, index: int, image: object) -> Image.Image:
        """What was given as an image, in RGB."""
        if isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and len(image) == 3:
            image = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        if not isinstance(image, Image.Image):
            raise DataError(f"{self.name(index)}: {described(image)} among images of other kinds")
        if image.mode in ("I", "F"):
            raise DataError(
                f"{self.name(index)}: a Pillow image of mode {image.mode}, of unknown range; "
                "convert it to RGB, L or I;16"
            )
        return to_rgb(image)

    def _open(self, index: int) -> BinaryIO:
        file = io.BytesIO()
        self.picture(index, pair(self, index)[0]).save(file, "PPM")
        return file


@dataclass(frozen=True)
class FloatFiles(ItemFiles):
    """The same of float tensors, which are the input of the model already."""

    shape: tuple[int, ...] = ()


class FloatDataset(ImageDataset):
    """Float images as a program's data set makes them; its augmentation is its own."""

    def _prepare(self) -> None:
        self.in_memory, self.small = False, False

    def batch(self, indices: Indices) -> Batch:
        images = [self._made(int(index))[0] for index in indices]
        return Batch(torch.stack(images), torch.from_numpy(self.labels[indices]))

    def _made(self, index: int) -> tuple[torch.Tensor, Any]:
        """An image as its data set makes it in this epoch, and what comes with it."""
        files, row = self.split.files, int(self.split.rows[index])
        assert isinstance(files, FloatFiles)
        with _seeded(int(self._words[index])):
            image, other = pair(files, row)
        if not isinstance(image, torch.Tensor) or tuple(image.shape) != files.shape:
            raise DataError(
                f"{files.name(row)}: {described(image)}, but the first image is a float tensor "
                f"{list(files.shape)}; give all the same shape"
            )
        return image.float(), other

    def preload(self, workers: int = 0, listener: Listener | None = None) -> None:
        """Nothing: what the data set makes may differ from epoch to epoch."""


def pair(files: ItemFiles, index: int) -> tuple[Any, Any]:
    """What the data set gives: two things.

    Raises:
        DataError: it gives something else, or fails.
    """
    try:
        got = files.items[index]
    except MemoryError:
        raise
    except Exception as error:  # whatever a program's data set may raise
        raise DataError(
            f"{files.name(index)}: the data set failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        raise DataError(f"{files.name(index)}: got {described(got)}; give (image, label or mask)")
    return got[0], got[1]


def item(files: ItemFiles, index: int) -> tuple[Any, int]:
    """Image and label.

    Raises:
        DataError: as `pair`, or the label is no number.
    """
    image, label = pair(files, index)
    try:
        return image, operator.index(label)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{files.name(index)}: the label is {label!r}; give the number of a class"
        ) from error


def items_of(data: Any) -> Items:
    """The data set that ``data`` is, or that a DataLoader reads.

    Raises:
        UsageError: it cannot be read at any place, or a DataLoader does more than to read it.
    """
    if isinstance(data, DataLoader):
        if not _is_plain(data):
            raise UsageError(
                "data: a DataLoader with a sampler or a collate_fn of its own; the order and the "
                "batches of a run are mecq's: give its dataset"
            )
        data = data.dataset
    by_number = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if isinstance(data, IterableDataset) or not by_number:
        raise UsageError(
            f"data: got {type(data).__name__}; give a folder, or (train, val) as two data sets "
            "with a length that give (image, label) by number"
        )
    dataset: Items = data
    return dataset


def _is_plain(loader: DataLoader[Any]) -> bool:
    """Whether it only reads each item once, in order or in random order."""
    batches: Any = loader.batch_sampler
    if type(batches) not in (BatchSampler, type(None)) or loader.collate_fn is not default_collate:
        return False
    sampler = loader.sampler if batches is None else batches.sampler
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.num_samples == len(sampler.data_source)
    return type(sampler) is SequentialSampler


def float_shape(data: Any) -> tuple[int, int, int] | None:
    """(C, H, W) of a data set of float tensors, by its first image; None for other images.

    Raises:
        UsageError, DataError: see `split_of`.
    """
    items = items_of(data)
    if not len(items):
        raise DataError("the data set is empty; it needs at least one image")
    image, _ = pair(ItemFiles(items, "train"), 0)
    if isinstance(image, torch.Tensor) and image.is_floating_point() and image.dim() == 3:
        channels, height, width = image.shape
        return channels, height, width
    return None


def split_of(data: Any, name: str, classes: Sequence[str]) -> Split:
    """A data set or DataLoader as a split; its labels are read, once.

    Raises:
        UsageError: see `items_of`.
        DataError: it is empty, or gives something else than images and labels of ``classes``.
    """
    items = items_of(data)
    shape = float_shape(items)
    files = ItemFiles(items, name) if shape is None else FloatFiles(items, name, shape)
    require_image(files)
    labels = _labels(items)
    if labels is None or not _is_true_of(files, labels):
        labels = np.array([item(files, i)[1] for i in range(len(items))], np.int64)
    if labels.min() < 0 or labels.max() >= len(classes):
        wrong = int(labels.min() if labels.min() < 0 else labels.max())
        raise DataError(
            f"{name}: a label is {wrong}; the model has {len(classes)} outputs, so labels are 0 "
            f"to {len(classes) - 1}"
        )
    return Split(
        f"{OWN}datasets",
        name,
        tuple(classes),
        files,
        np.arange(len(labels), dtype=np.int64),
        labels,
    )


def _is_true_of(files: ItemFiles, labels: Indices) -> bool:
    """Whether images come with these labels, by some: a data set may give others than it has."""
    if isinstance(files.items, TensorDataset):
        return True
    return all(item(files, i)[1] == labels[i] for i in evenly(len(labels), COMPARED))


def require_image(files: ItemFiles) -> None:
    """Raise DataError unless the first image is of a kind that is known."""
    first, _ = pair(files, 0)
    if not isinstance(files, FloatFiles) and not (isinstance(first, Image.Image) or _is_rgb(first)):
        raise DataError(
            f"{files.name(0)}: the image is {described(first)}; give a Pillow image, a uint8 "
            "tensor [3, H, W], or a float tensor [C, H, W] as the model takes it"
        )


def _is_rgb(image: object) -> bool:
    return isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and len(image) == 3


def _labels(items: Any) -> Indices | None:
    """All labels, where the data set has them at hand; None where each image has to be made."""
    if isinstance(items, TensorDataset) and len(items.tensors) == 2:
        return _whole(np.asarray(items.tensors[1]), len(items))
    if isinstance(items, Subset):
        whole = _labels(items.dataset)
        return None if whole is None else whole[np.asarray(items.indices, np.int64)]
    # As torchvision has it.
    targets = getattr(items, "targets", None)
    if getattr(items, "target_transform", None) is not None or targets is None:
        return None
    return _whole(np.asarray(targets), len(items))


def _whole(labels: np.ndarray[Any, Any], count: int) -> Indices | None:
    """Labels that are a whole number for each image."""
    fits = labels.shape == (count,) and labels.dtype.kind in "iu"
    return labels.astype(np.int64) if fits else None


@contextmanager
def _seeded(word: int) -> Iterator[None]:
    """The global generators seeded by ``word``, and given back as they were."""
    plain, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # which others draw from
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(word)
            random.seed(word)
            np.random.seed(word % 2**32)  # noqa: NPY002
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numpy)  # noqa: NPY002


def described(value: object) -> str:
    """What a value is, for a message."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return f"of type {type(value).__name__}"
