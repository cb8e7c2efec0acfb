"""The data set that belongs to a split, by the kind of its files."""

from __future__ import annotations

from collections.abc import Sequence

from mecq_cli.data.boxes import BoxDataset, BoxFiles
from mecq_cli.data.item_masks import FloatMaskDataset, FloatMaskItems, MaskItems
from mecq_cli.data.items import FloatDataset, FloatFiles
from mecq_cli.data.loader import ImageDataset
from mecq_cli.data.masks import MaskDataset, PairFiles
from mecq_cli.data.split import Split
from mecq_cli.models.preprocessing import Preprocessing

_KINDS: tuple[tuple[type, type[ImageDataset]], ...] = (
    (FloatMaskItems, FloatMaskDataset),
    (FloatFiles, FloatDataset),
    (MaskItems, MaskDataset),
    (PairFiles, MaskDataset),
    (BoxFiles, BoxDataset),
)


def dataset_of(
    split: Split,
    preprocessing: Preprocessing,
    label_indices: Sequence[int] | None = None,
    train: bool = False,
    seed: int = 0,
) -> ImageDataset:
    """The images of a split as the model sees them, wherever they come from."""
    kind = next((made for files, made in _KINDS if isinstance(split.files, files)), ImageDataset)
    return kind(split, preprocessing, label_indices, train, seed)
