"""A split: images by number, their labels, and the names of the classes.

Where the images come from (a folder, tar files, a Hugging Face data set) is the matter of their
`Files`. All of them give any image by its number, so that the order of an epoch can be exact, and
a run continued at any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mecq_cli.data.order import Purpose, permutation
from mecq_cli.errors import DataError, UsageError
from mecq_cli.layout import FLAT

Indices = NDArray[np.int64]


class Encoded(NamedTuple):
    """An image file that is no file of its own.

    Attributes:
        name: for messages.
        open: its bytes; OSError or DataError where that fails.
    """

    name: str
    open: Callable[[], BinaryIO]


class Files(Protocol):
    """Encoded images by number; may be pickled, and used in any process."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Which image this is, within the data set."""

    def file(self, index: int) -> str | Encoded:
        """What `images.open_rgb` opens."""


class Names:
    """A million names as two arrays, which forked processes share and a pickle copies at once.

    Args:
        joined: UTF-8, each name but the last followed by a zero byte: no name of a file has one.
        count: how many names these are.
    """

    def __init__(self, joined: bytes, count: int) -> None:
        self._bytes = np.frombuffer(joined, np.uint8)
        ends = np.append(np.flatnonzero(self._bytes == 0), len(joined))[:count]
        assert len(ends) == count, (len(ends), count)
        self._ends = ends.astype(np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) + 1 if index else 0
        name = self._bytes[start : self._ends[index]].tobytes()
        return name.decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


class NameList:
    """Gathers `Names`, a part at a time."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._count = 0

    def extend(self, names: Collection[str]) -> None:
        """Add ``names`` at the end."""
        if names:
            self._parts.append("\0".join(names).encode("utf-8", "surrogateescape"))
            self._count += len(names)

    def packed(self) -> Names:
        """All of them."""
        return Names(b"\0".join(self._parts), self._count)


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one split; nothing is opened yet.

    Attributes:
        root: the data set, as messages name it.
        name: "train", "val", ...
        classes: their names, in the order of the labels.
        files: the images.
        rows: int64 [len], which of the files; an image may come twice.
        labels: int64 [len], indices into ``classes``.
    """

    root: str
    name: str
    classes: tuple[str, ...]
    files: Files
    rows: Indices
    labels: Indices

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def paths(self) -> tuple[str, ...]:
        """The name of every image, within the data set."""
        return tuple(self.files.name(int(row)) for row in self.rows)

    def file(self, index: int) -> str | Encoded:
        """One image: its absolute path, or the part of a file that it is."""
        return self.files.file(int(self.rows[index]))

    def take(self, indices: Iterable[int], name: str | None = None) -> Split:
        """The images at ``indices``, in that order, of the same classes."""
        chosen = np.fromiter(indices, dtype=np.int64)
        rows, labels = self.rows[chosen], self.labels[chosen]
        return replace(self, name=name or self.name, rows=rows, labels=labels)

    def evenly(self, count: int) -> Split:
        """``count`` of the images, or all: evenly from all classes, which follow each other."""
        return self.take(evenly(len(self), count))


def evenly(total: int, count: int) -> list[int]:
    """``count`` of ``total`` places, or all, from the first to the last."""
    places: list[int] = np.linspace(0, total - 1, min(count, total)).astype(int).tolist()
    return places


def check_same_classes(train: Split, val: Split) -> None:
    """Raise DataError unless both splits have the same classes."""
    if train.classes == val.classes:
        return
    only_train = [name for name in train.classes if name not in set(val.classes)]
    only_val = [name for name in val.classes if name not in set(train.classes)]
    parts = [
        f"{len(names)} only in {split.name}: {', '.join(map(repr, names[:3]))}"
        + (", ..." if len(names) > 3 else "")
        for split, names in ((train, only_train), (val, only_val))
        if names
    ] or ["the same names in another order"]
    raise DataError(
        f"the classes of {train.name} and {val.name} in {train.root!r} differ "
        f"({'; '.join(parts)}); both must have the same"
    )


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Set a part of every class aside: (what stays, what is held out).

    Of n images of a class round(fraction n) are held out, at least one, and at least one stays.
    The choice depends on ``seed`` and the images of that class only.

    Raises:
        UsageError: ``fraction`` is not between 0 and 1.
        DataError: a class has a single image, or none.
    """
    if not 0 < fraction < 1:
        raise UsageError(
            f"--val-split must lie between 0 and 1, got {fraction}; 0.1 holds out a tenth"
        )
    held = np.zeros(len(split), dtype=bool)
    for label, (name, members) in enumerate(zip(split.classes, _members(split), strict=True)):
        if len(members) < 2:
            raise DataError(
                f"class {name!r} of {split.root!r} has {len(members)} image; "
                "holding images out needs at least 2 in every class"
            )
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held[members[permutation(len(members), Purpose.HOLD_OUT, seed, label)[:count]]] = True
    rest, aside = np.flatnonzero(~held), np.flatnonzero(held)
    name = "held out" if split.name == FLAT else f"{split.name} (held out)"
    return split.take(rest), split.take(aside, name)


def limit_per_class(split: Split, limit: int) -> Split:
    """The first ``limit`` images of every class (all of a smaller class)."""
    if limit < 1:
        raise UsageError(f"the number of images per class must be at least 1, got {limit}")
    return split.take(np.concatenate([members[:limit] for members in _members(split)]))


def _members(split: Split) -> list[Indices]:
    """The indices of the images of each class, ascending."""
    counts = np.bincount(split.labels, minlength=len(split.classes))
    return np.split(np.argsort(split.labels, kind="stable"), np.cumsum(counts)[:-1])
