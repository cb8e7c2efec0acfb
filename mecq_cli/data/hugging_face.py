"""Data sets of the library `datasets`: saved ones, folders of Parquet files, names on the Hub.

They are read by row, so that the order of an epoch and its continuation are exact.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mecq_cli.data.split import Encoded, Indices, Split
from mecq_cli.errors import DataError, EnvironmentFailure
from mecq_cli.layout import EVALUATION, FLAT, TRAIN


@dataclass(frozen=True)
class Rows:
    """The images in a column of a data set.

    Attributes:
        where: the data set is, for messages: a run knows its images wherever that is.
        split: of the data set.
        dataset: a `datasets.Dataset` whose column ``column`` is not decoded.
    """

    where: str
    split: str
    dataset: Any
    column: str

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"{self.split}[{index}]"

    def file(self, index: int) -> Encoded:
        def read() -> BinaryIO:
            image = self.dataset[index][self.column]
            if not image or not (image.get("bytes") or image.get("path")):
                raise DataError("the row has no image")
            if image.get("bytes"):
                return io.BytesIO(image["bytes"])
            return open(image["path"], "rb")

        return Encoded(f"{self.where} {self.name(index)}", read)


class HuggingFace:
    """A data set by its name on the Hub, or the folder it lies in."""

    def __init__(self, where: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise EnvironmentFailure(
                f"--data hfds/{where} needs the package datasets: pip install 'mecq[hfds]'"
            ) from error
        self.where, self._library = where, datasets
        self._loaded: Any = None

    def splits(self) -> tuple[str, ...]:
        """Which of train, val, validation and test are there, in this order."""
        names = self._names()
        return tuple(name for name in (TRAIN, *EVALUATION) if name in names)

    def open(self, split: str) -> Split:
        """The rows of ``split``; `FLAT` means all, where the data set has no splits."""
        if split != FLAT and split not in self._names():
            there = ", ".join(self._names()) or "none"
            raise DataError(f"{self.where!r} has no split {split!r} (it has {there})")
        dataset = self._guarded(lambda: self._rows(split))
        if not len(dataset):
            raise DataError(f"split {split!r} of {self.where!r} has no rows")
        image, label = self._columns(dataset)
        labels, classes = self._labels(dataset, label)
        dataset = dataset.select_columns([image])
        dataset = dataset.cast_column(image, self._library.Image(decode=False))
        rows = np.arange(len(dataset), dtype=np.int64)
        files = Rows(self.where, split, dataset, image)
        return Split(self.where, split, classes, files, rows, labels)

    def _names(self) -> list[str]:
        """All splits there are, also of other names."""

        def names() -> list[str]:
            if self._saved():
                loaded = self._load()
                return list(loaded) if isinstance(loaded, dict) else []
            return list(map(str, self._library.get_dataset_split_names(self.where)))

        found: list[str] = self._guarded(names)
        return found

    def _rows(self, split: str) -> Any:
        if self._saved():
            loaded = self._load()
            if split != FLAT:
                return loaded[split]
            if isinstance(loaded, dict):
                return self._library.concatenate_datasets(list(loaded.values()))
            return loaded
        if split == FLAT:
            return self._library.concatenate_datasets(
                list(self._library.load_dataset(self.where).values())
            )
        return self._library.load_dataset(self.where, split=split)

    def _saved(self) -> bool:
        """Whether ``where`` was written by save_to_disk."""
        marks = ("dataset_dict.json", "state.json")
        return any((Path(self.where).expanduser() / mark).is_file() for mark in marks)

    def _load(self) -> Any:
        if self._loaded is None:
            self._loaded = self._library.load_from_disk(str(Path(self.where).expanduser()))
        return self._loaded

    def _columns(self, dataset: Any) -> tuple[str, str]:
        """The image column and the label column, by type where the usual names are absent."""
        features = dataset.features
        images = [k for k, v in features.items() if isinstance(v, self._library.Image)]
        classes = [k for k, v in features.items() if isinstance(v, self._library.ClassLabel)]
        image = "image" if "image" in images else next(iter(images), None)
        label = "label" if "label" in features else classes[0] if len(classes) == 1 else None
        if image is None or label is None:
            raise DataError(
                f"{self.where!r} has the columns {', '.join(features)}: needed are one of type "
                "Image, and 'label' or a single one of type ClassLabel"
            )
        return image, label

    def _labels(self, dataset: Any, column: str) -> tuple[Indices, tuple[str, ...]]:
        feature = dataset.features[column]
        rows = dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
        if any(row is None or isinstance(row, (list, dict)) for row in rows):
            raise DataError(
                f"column {column!r} of {self.where!r} has rows without a label or with several; "
                "choose another split, or drop those rows"
            )
        values = np.array(rows)
        if getattr(feature, "dtype", "") == "string":
            names, numbers = np.unique(values, return_inverse=True)
            return numbers.astype(np.int64), tuple(map(str, names))
        if values.dtype.kind not in "iu" or values.min() < 0:
            raise DataError(
                f"column {column!r} of {self.where!r} has rows without a label (empty or -1), or "
                "values that are no whole numbers; choose another split, or drop those rows"
            )
        given = getattr(feature, "names", None)
        classes = tuple(given) if given else tuple(map(str, range(int(values.max()) + 1)))
        if values.max() >= len(classes):
            raise DataError(
                f"column {column!r} of {self.where!r} has label {values.max()}, of "
                f"{len(classes)} classes, 0 to {len(classes) - 1}"
            )
        return values.astype(np.int64), classes

    def _guarded(self, call: Any) -> Any:
        """What the library raises, in one line."""
        bars = self._library.is_progress_bar_enabled()
        self._library.disable_progress_bars()  # they would be drawn over the live view
        try:
            return call()
        except (DataError, MemoryError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"cannot open data set {self.where!r}: {reason[:300]}") from error
        finally:
            if bars:
                self._library.enable_progress_bars()
