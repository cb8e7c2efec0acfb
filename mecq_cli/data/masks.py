"""Images with masks: read, augmented and put into batches together.

A mask is a PNG of 8 bits, with a palette or grey, that holds the index of a class in each pixel;
255 is ignored. It goes through the same resizing, cropping and flipping as its image, by nearest
neighbours. As everywhere in this package, what is random about a sample is drawn from one word that
depends on seed, epoch and index alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.transforms_factory import create_transform
from torchvision.transforms import InterpolationMode, v2

from mecq_cli.data.augmentation import (
    Pixels,
    check_preprocessing,
    eval_transform,
    random_crops,
)
from mecq_cli.data.folder import FolderFiles
from mecq_cli.data.images import in_channels, open_rgb, opened, pixels_of
from mecq_cli.data.loader import Batch, ImageDataset
from mecq_cli.data.split import Indices, Names
from mecq_cli.errors import DataError, UsageError
from mecq_cli.models.preprocessing import Preprocessing

IGNORED = 255
"""The index of a pixel that does not count."""

Mask = NDArray[np.uint8]


@runtime_checkable
class Pairs(Protocol):
    """Images with masks by number."""

    def name(self, index: int) -> str:
        """Which image this is, within the data set."""

    def mask_name(self, index: int) -> str:
        """Which mask this is."""

    def pair(self, index: int) -> tuple[Image.Image, Mask]:
        """Image (RGB) and mask."""


@dataclass(frozen=True)
class PairFiles(FolderFiles):
    """Image files and, at the same number, their masks; all paths are relative to ``root``."""

    masks: Names

    def mask_name(self, index: int) -> str:
        """Which mask this is, within the data set."""
        return self.masks[index]

    def pair(self, index: int) -> tuple[Image.Image, Mask]:
        """Image (RGB) and mask."""
        return open_rgb(self.file(index)), read_mask(f"{self.root}/{self.masks[index]}")


def read_mask(path: str | os.PathLike[str]) -> Mask:
    """Class indices uint8 [H, W].

    Raises:
        DataError: it cannot be read, or holds no class indices.
    """
    with opened(path) as image:
        kind = f"a {image.format} of mode {image.mode}"
        if image.format == "PNG" and image.mode in ("P", "L"):
            tiles = getattr(image, "tile", ())
            raw = str(tiles[0].args) if tiles else ""
            if image.mode == "P" or ";" not in raw:
                return np.array(image, dtype=np.uint8)
            # Pillow stretches such values over 0 to 255.
            kind = f"a grey PNG of {raw.partition(';')[2]} bits"
    raise DataError(
        f"mask {os.fspath(path)!r} is {kind}; a mask is a PNG of 8 bits, with a palette or grey, "
        "that holds the index of a class in each pixel (255: ignored)"
    )


class MaskDataset(ImageDataset):
    """Images and masks of a split; labels of a batch are uint8 [N, H, W].

    Raises:
        UsageError: a preprocessing that cannot be done to masks.
    """

    def _prepare(self) -> None:
        self.in_memory, self.small = False, False
        self._decoded = np.zeros(len(self), dtype=bool)
        self._image = eval_transform(self.preprocessing)
        self._mask = _eval_mask(self.preprocessing)
        self._both = _random_crop_of_both(self.preprocessing)

    def batch(self, indices: Indices) -> Batch:
        """The images at ``indices``, and their masks.

        Raises:
            DataError: one of them is unreadable, or they do not belong together.
        """
        images, masks = zip(*(self._pair(int(index)) for index in indices), strict=True)
        return Batch(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks)))

    def _pair(self, index: int) -> tuple[Pixels, Mask]:
        image, mask = self._read(index)
        if self.train:
            return self._both(image, mask, int(self._words[index]))
        return self._image(image), self._mask(mask)

    def _read(self, index: int) -> tuple[Image.Image, Mask]:
        files, row = self.split.files, int(self.split.rows[index])
        assert isinstance(files, Pairs)
        image, mask = files.pair(row)
        names = {"mask_name": files.mask_name(row), "image_name": files.name(row)}
        check_mask(mask, image.size, len(self.split.classes), **names)
        return image, mask


def check_mask(
    mask: Mask, size: tuple[int, int], classes: int, *, mask_name: str, image_name: str
) -> None:
    """Whether a mask fits its image and the classes.

    Args:
        mask: uint8 [H, W].
        size: (width, height) of the image.
        classes: how many there are.
        mask_name, image_name: for the message.

    Raises:
        DataError: it does not.
    """
    height, width = mask.shape
    if size != (width, height):
        raise DataError(
            f"mask {mask_name!r} is {width} x {height} pixels and its image {image_name!r} is "
            f"{size[0]} x {size[1]}; they must be of one size"
        )
    counted = mask[mask != IGNORED]
    if not len(counted):
        raise DataError(
            f"every pixel of the mask {mask_name!r} is ignored (255); there is nothing to learn "
            "from: remove it and its image"
        )
    if int(counted.max()) >= classes:
        raise DataError(
            f"mask {mask_name!r} holds the label {int(counted.max())}, but there are {classes} "
            f"classes, 0 to {classes - 1} (255: ignored); correct the mask, or add the class "
            "to classes.txt"
        )


def _eval_mask(preprocessing: Preprocessing) -> Callable[[Mask], Mask]:
    """What `eval_transform` does to an image, by nearest neighbours."""
    if preprocessing.crop_mode == "border":
        raise UsageError("preprocessing: crop_mode 'border' cannot be done to masks; use squash")
    transform = create_transform(
        preprocessing.input_size,
        is_training=False,
        interpolation="nearest",
        mean=(0.0,),
        std=(1.0,),
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
        use_prefetcher=True,
    )

    def apply(mask: Mask) -> Mask:
        resized: Mask = np.asarray(transform(Image.fromarray(mask)))[0]
        return resized

    return apply


def _random_crop_of_both(
    preprocessing: Preprocessing,
) -> Callable[[Image.Image, Mask, int], tuple[Pixels, Mask]]:
    """One random part of image and mask, resized, flipped half of the time.

    Pillow resizes both: of a tensor torch takes the nearest value from another place.
    """
    check_preprocessing(preprocessing)
    channels = preprocessing.input_size[0]
    crop_of = random_crops(preprocessing)
    kinds = (InterpolationMode(preprocessing.interpolation), InterpolationMode.NEAREST)

    def apply(image: Image.Image, mask: Mask, word: int) -> tuple[Pixels, Mask]:
        # torchvision draws from torch's global generator: borrow it, and give it back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(word)
            crop = crop_of(*image.size)
            place = crop.make_params([image])
            flip = bool(torch.rand(()) < 0.5)
        both = (in_channels(image, channels), Image.fromarray(mask))
        pixels, (labels,) = (
            pixels_of(v2.functional.resized_crop(one, **place, size=crop.size, interpolation=how))
            for one, how in zip(both, kinds, strict=True)
        )
        return (pixels[..., ::-1], labels[:, ::-1]) if flip else (pixels, labels)

    return apply
