"""Data sets of a program that give (image, mask) by number.

Images are those of `items`. A mask is a Pillow image of 8 bits, with a palette or grey, or a
tensor or array of integers [H, W], of the size of its image: the index of a class in each pixel,
255 where it is ignored. Beside an image that mecq resizes and augments it goes the same way; beside
a float tensor, which is the input of the model already, it stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from mecq_cli.data.items import (
    FloatDataset,
    FloatFiles,
    ItemFiles,
    described,
    float_shape,
    items_of,
    pair,
    require_image,
)
from mecq_cli.data.loader import Batch
from mecq_cli.data.masks import Mask, check_mask
from mecq_cli.data.split import Indices, Split
from mecq_cli.errors import DataError
from mecq_cli.settings import OWN


@dataclass(frozen=True)
class MaskItems(ItemFiles):
    """Images that mecq makes the input of a model, with their masks."""

    def mask_name(self, index: int) -> str:
        """Which mask this is."""
        return self.name(index)

    def pair(self, index: int) -> tuple[Image.Image, Mask]:
        """Image (RGB) and mask."""
        image, mask = pair(self, index)
        return self.picture(index, image), mask_of(mask, self.name(index))


@dataclass(frozen=True)
class FloatMaskItems(FloatFiles):
    """Images that are the input of a model, with their masks."""


class FloatMaskDataset(FloatDataset):
    """Float images and masks as a program's data set makes them."""

    def batch(self, indices: Indices) -> Batch:
        images, masks = zip(*(self._both(int(index)) for index in indices), strict=True)
        return Batch(torch.stack(images), torch.from_numpy(np.stack(masks)))

    def _both(self, index: int) -> tuple[torch.Tensor, Mask]:
        image, given = self._made(index)
        name = self.split.files.name(int(self.split.rows[index]))
        mask = mask_of(given, name)
        size = image.shape[2], image.shape[1]
        check_mask(mask, size, len(self.split.classes), mask_name=name, image_name=name)
        return image, mask


def mask_of(given: Any, name: str) -> Mask:
    """Class indices uint8 [H, W] of what a data set gives.

    Raises:
        DataError: it is no mask.
    """
    if isinstance(given, Image.Image) and given.mode in ("P", "L"):
        return np.array(given, dtype=np.uint8)
    values = given.numpy() if isinstance(given, torch.Tensor) else given
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu" and values.ndim == 2:
        if values.size and (values.min() < 0 or values.max() > 255):
            raise DataError(
                f"{name}: the mask holds {int(values.min())} to {int(values.max())}; classes count "
                "from 0, and 255 is ignored"
            )
        return values.astype(np.uint8)
    kind = f"a Pillow image of mode {given.mode}" if isinstance(given, Image.Image) else ""
    raise DataError(
        f"{name}: the mask is {kind or described(given)}; give a tensor of integers [H, W], or a "
        "Pillow image of 8 bits with a palette or grey, with the index of a class in each pixel "
        "(255: ignored)"
    )


def masked_split_of(data: Any, name: str, classes: tuple[str, ...]) -> Split:
    """A data set or DataLoader of images with masks as a split; the masks are read when needed.

    Raises:
        UsageError: see `mecq_cli.data.items.items_of`.
        DataError: it is empty, or its first pair is no image with a mask.
    """
    items = items_of(data)
    shape = float_shape(items)
    files = MaskItems(items, name) if shape is None else FloatMaskItems(items, name, shape)
    require_image(files)
    mask_of(pair(files, 0)[1], files.name(0))
    rows = np.arange(len(items), dtype=np.int64)
    return Split(f"{OWN}datasets", name, classes, files, rows, np.zeros(len(rows), np.int64))
