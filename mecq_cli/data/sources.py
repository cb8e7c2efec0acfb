"""Where the images come from: what ``--data`` means.

    photos                    a folder with train/ and val/ (see `folder`)
    photos.tar, shards        a tar file, or a folder of them (see `shards`)
    wds/shards, tar/shards    the same, asked for by name; also a pattern, wds/shards/*-0*.tar
    hfds/NAME_OR_FOLDER       a data set of the library datasets (see `hugging_face`)

Every source gives any image by its number. Those that can only be streamed are refused: the order
of an epoch would depend on buffers, and a stopped run could not be continued where it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mecq_cli import layout
from mecq_cli.data import folder
from mecq_cli.data.hugging_face import HuggingFace
from mecq_cli.data.shards import Shards
from mecq_cli.data.split import Split, check_same_classes, hold_out
from mecq_cli.errors import DataError, UsageError
from mecq_cli.layout import EVALUATION, FLAT, TRAIN
from mecq_cli.settings import OWN, split_data_name


class Source(Protocol):
    """A data set that was found."""

    def splits(self) -> tuple[str, ...]:
        """Which of train, val, valid, validation and test are there, in this order."""

    def open(self, split: str) -> Split:
        """The images of one; `FLAT` for all of a source without splits."""


@dataclass(frozen=True)
class _Folder:
    root: Path

    def splits(self) -> tuple[str, ...]:
        return layout.find_splits(self.root)

    def open(self, split: str) -> Split:
        return folder.open_split(self.root, split)


def _source(data: str | Path) -> Source:
    """Find a data set.

    Raises:
        DataError: there is none.
        UsageError: it is of a kind that can only be streamed.
    """
    prefix, where = split_data_name(str(data))
    if str(data).startswith(OWN):
        raise DataError(
            "the images of this run were data sets of the program that started it; give others "
            "with --data DIR"
        )
    if prefix in ("hfids", "tfds"):
        raise UsageError(
            f"--data {data}: {prefix}/ is a stream, in which no run could be continued exactly; "
            "give hfds/NAME, a folder, or tar files"
        )
    if "://" in where or where.startswith("pipe:"):
        raise UsageError(
            f"--data {data}: only tar files on this machine can be read at any place, as an exact "
            "order and --resume need; fetch them and give their folder"
        )
    if prefix == "hfds":
        return HuggingFace(where)
    if prefix in ("wds", "tar"):
        return Shards(where)
    root = Path(where)
    if root.suffix == ".tar" and root.is_file():
        return Shards(where)
    if root.is_dir() and layout.holds_shards(root, layout.find_splits(root)):
        return Shards(where)
    return _Folder(root)


def find_splits(data: str | Path) -> tuple[str, ...]:
    """Which of train, val, valid, validation and test are there, in this order.

    Raises:
        DataError: ``data`` is missing or not readable.
    """
    return _source(data).splits()


def open_split(data: str | Path, split: str) -> Split:
    """The images of one split; `FLAT` for all of a data set without splits.

    Raises:
        DataError: it is missing, empty or not readable, or has something in it that is no image.
    """
    return _source(data).open(split)


def open_evaluation(data: str | Path, split: str | None = None) -> Split:
    """The split to evaluate on: ``split``, or the first present of val, valid, validation, test.

    Raises:
        DataError: there is none, or as `open_split`.
    """
    return _evaluation(_source(data), data, split)


def _evaluation(source: Source, data: str | Path, split: str | None = None) -> Split:
    if split is None:
        split = next((name for name in source.splits() if name in EVALUATION), None)
    if split is None:
        raise layout.nothing_to_evaluate_on(str(data))
    return source.open(split)


def open_training(
    data: str | Path, val_split: float | None = None, seed: int = 0
) -> tuple[Split, Split]:
    """The images to train on and those to evaluate on, with the same classes.

    Args:
        data: holds train and val, validation or test; with ``val_split`` train alone, or
            images without any split.
        val_split: fraction of each class to hold out where there is no second split.
        seed: of the choice of the images held out.

    Raises:
        DataError: as `open_split`, no train or no val, a single class, or their classes differ.
        UsageError: ``val_split`` although there is a second split, or not between 0 and 1.
    """
    source = _source(data)
    splits = source.splits()
    layout.check_splits(str(data), splits, val_split)
    if val_split is not None:
        whole = source.open(TRAIN if splits else FLAT)
        layout.check_classes(whole.root, whole.classes, flat=not splits)
        return hold_out(whole, val_split, seed)
    train, val = source.open(TRAIN), _evaluation(source, data)
    check_same_classes(train, val)
    layout.check_classes(train.root, train.classes, flat=False)
    return train, val
