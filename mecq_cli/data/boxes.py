"""Images with boxes: read, augmented and put into batches together.

The labels of a batch are float32 [N, M, 6]: for each of up to M boxes of an image its class, left,
top, right, bottom in pixels of the input, and whether it is a crowd; the class is -1 in rows that
are left over. As everywhere in this package, what is random about a sample is drawn from one word
that depends on seed, epoch and index alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from mecq_cli.data.augmentation import Pixels, check_preprocessing, eval_transform
from mecq_cli.data.folder import FolderFiles
from mecq_cli.data.images import in_channels, open_rgb, pixels_of
from mecq_cli.data.loader import Batch, ImageDataset
from mecq_cli.data.split import Indices
from mecq_cli.errors import DataError, UsageError

LABEL, BOX, CROWD = 0, slice(1, 5), 5
"""Columns of a row of labels."""
COLUMNS = 6
_LEAST = 1.0
"""Pixels of the input that what is left of a box must be wide and high, or it is gone."""


@dataclass(frozen=True)
class BoxFiles(FolderFiles):
    """Image files and what lies in them.

    Attributes:
        sizes: int64 [n, 2], width and height of each image.
        starts: int64 [n + 1], where the boxes of each image begin, and the last ones end.
        boxes: float32 [boxes, 4], left, top, right, bottom in pixels of the image.
        labels: int64 [boxes], indices into the classes of the data.
        crowds: bool [boxes], of many things together, which are not learned and do not count.
    """

    sizes: NDArray[np.int64]
    starts: NDArray[np.int64]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    crowds: NDArray[np.bool_]

    def rows(self, index: int) -> NDArray[np.float32]:
        """The boxes of an image, float32 [boxes, 6]."""
        own = slice(int(self.starts[index]), int(self.starts[index + 1]))
        parts = (self.labels[own, None], self.boxes[own], self.crowds[own, None])
        return np.concatenate(parts, 1, dtype=np.float32)


class BoxDataset(ImageDataset):
    """Images and boxes of a split.

    Raises:
        UsageError: a preprocessing that cuts something off.
    """

    def _prepare(self) -> None:
        self.in_memory, self.small = False, False
        self._decoded = np.zeros(len(self), dtype=bool)
        preprocessing = self.preprocessing
        check_preprocessing(preprocessing)
        if preprocessing.crop_mode != "squash" or preprocessing.crop_pct != 1:
            raise UsageError(
                f"preprocessing: crop_mode {preprocessing.crop_mode!r} with crop_pct "
                f"{preprocessing.crop_pct} cuts parts of the image off; to detect takes "
                "crop_mode 'squash' with crop_pct 1"
            )
        size = list(preprocessing.input_size[1:])
        self._image = eval_transform(preprocessing)
        self._both = v2.Compose(
            [
                v2.RandomIoUCrop(),
                v2.Resize(size, InterpolationMode(preprocessing.interpolation)),
                v2.RandomHorizontalFlip(),
                v2.SanitizeBoundingBoxes(min_size=_LEAST),
            ]
        )

    def batch(self, indices: Indices) -> Batch:
        """The images at ``indices``, and their boxes.

        Raises:
            DataError: one of them is unreadable, or has another size than was said.
        """
        images, rows = zip(*(self._pair(int(index)) for index in indices), strict=True)
        labels = torch.zeros(len(rows), max(1, *(len(own) for own in rows)), COLUMNS)
        labels[:, :, LABEL] = -1
        for place, own in zip(labels, rows, strict=True):
            place[: len(own)] = own
        return Batch(torch.from_numpy(np.stack(images)), labels)

    def _pair(self, index: int) -> tuple[Pixels, Tensor]:
        files, row = self.split.files, int(self.split.rows[index])
        assert isinstance(files, BoxFiles)
        image, own = open_rgb(files.file(row)), torch.from_numpy(files.rows(row))
        if image.size != tuple(files.sizes[row]):
            raise DataError(
                f"image {files.name(row)!r} is {image.width} x {image.height} pixels, and its "
                f"annotations are for {' x '.join(map(str, files.sizes[row]))}; correct them"
            )
        if self.outputs is not None:
            own[:, LABEL] = torch.from_numpy(self.outputs[own[:, LABEL].long().numpy()])
        if self.train:
            return self._augmented(image, own, int(self._words[index]))
        height, width = self.preprocessing.input_size[1:]
        across, down = width / image.width, height / image.height
        own[:, BOX] *= torch.tensor([across, down, across, down])
        return self._image(image), own

    def _augmented(self, image: Image.Image, own: Tensor, word: int) -> tuple[Pixels, Tensor]:
        """A part of the image with at least one box, or all of it; flipped half of the time."""
        boxes: Any = tv_tensors.BoundingBoxes(
            own[:, BOX], format="XYXY", canvas_size=(image.height, image.width)
        )
        sample = {"image": image, "boxes": boxes, "labels": own[:, [LABEL, CROWD]]}
        # torchvision draws from torch's global generator: borrow it, and give it back as it was.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(word)
            sample = self._both(sample)
        rest = sample["labels"]
        rows = torch.cat([rest[:, :1], sample["boxes"].as_subclass(Tensor), rest[:, 1:]], 1)
        cut = in_channels(sample["image"], self.preprocessing.input_size[0])
        return pixels_of(cut), rows
