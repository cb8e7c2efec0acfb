"""A data set folder becomes batches of images: folder, images, augmentation, loader."""

from __future__ import annotations

from mecq_cli.data.datasets import dataset_of
from mecq_cli.data.images import read_image
from mecq_cli.data.item_masks import masked_split_of
from mecq_cli.data.items import split_of
from mecq_cli.data.loader import (
    Batch,
    ImageDataset,
    Part,
    batches_per_epoch,
    eval_batches,
    normalize,
    train_batches,
)
from mecq_cli.data.sources import find_splits, open_evaluation, open_split, open_training
from mecq_cli.data.split import Split, evenly, hold_out, limit_per_class

__all__ = [
    "Batch",
    "ImageDataset",
    "Part",
    "Split",
    "batches_per_epoch",
    "dataset_of",
    "eval_batches",
    "evenly",
    "find_splits",
    "hold_out",
    "limit_per_class",
    "masked_split_of",
    "normalize",
    "open_evaluation",
    "open_split",
    "open_training",
    "read_image",
    "split_of",
    "train_batches",
]
