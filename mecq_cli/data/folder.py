"""A data set on disk: train/ and val/ (or validation/, test/), each with one folder per class.

Only names are looked at here, so a million files open in seconds; pixels are read by `images`.
Hidden files and what file managers leave behind are passed over; anything else that is no image
is an error, since a silently smaller data set gives silently different figures.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mecq_cli.data.order import Purpose, permutation
from mecq_cli.errors import DataError, UsageError

TRAIN = "train"
EVALUATION = ("val", "validation", "test")
"""Names of the folder to evaluate on; the first one present is taken."""
FLAT = "."
"""Name of the split of a folder that holds the class folders itself."""

# fmt: off
EXTENSIONS = frozenset((
    "avif", "bmp", "gif", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg",
    "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp",
))
# fmt: on
_JUNK = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "$recycle.bin"))
_LAYOUT = "expected train/ and val/ in it, each with one folder of images per class"


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one split; nothing is opened yet.

    Attributes:
        root: folder of the data set, absolute; no path leads out of it.
        name: "train", "val", ...
        classes: names of the class folders, sorted.
        paths: of the images, relative to ``root``, with "/"; sorted by class, then by name.
        labels: int64 [len(paths)], indices into ``classes``.
    """

    root: Path
    name: str
    classes: tuple[str, ...]
    paths: Sequence[str]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> str:
        """Absolute path of one image."""
        return f"{self.root}/{self.paths[index]}"

    def take(self, indices: Iterable[int], name: str | None = None) -> Split:
        """The images at ``indices``, in that order, of the same classes."""
        chosen = np.fromiter(indices, dtype=np.int64)
        paths = tuple(self.paths[i] for i in chosen)
        return Split(self.root, name or self.name, self.classes, paths, self.labels[chosen])


def find_splits(root: Path) -> tuple[str, ...]:
    """Which of train, val, validation and test are there, in this order.

    Raises:
        DataError: ``root`` is missing, no folder, or not readable.
    """
    with _readable(root), os.scandir(root) as entries:
        folders = {entry.name for entry in entries if entry.is_dir()}
    return tuple(name for name in (TRAIN, *EVALUATION) if name in folders)


def open_split(root: Path, split: str) -> Split:
    """List the images of ``root/split``; `FLAT` means that ``root`` holds the class folders.

    Folders inside a class folder belong to the class. Symbolic links are followed inside of
    ``root``; ``root`` itself may be one.

    Raises:
        DataError: a folder is missing, empty or not readable, a file is no image, a link leads
            outside of ``root`` or in a circle.
    """
    if split in ("", "..") or "/" in split or os.sep in split:
        raise UsageError(f"split {split!r} is not the name of a folder in {str(root)!r}")
    root = root.absolute()
    splits = find_splits(root)
    if not (root / split).is_dir():
        there = ", ".join(splits) or "neither train nor val"
        raise DataError(f"{str(root)!r} has no folder {split!r} (it has {there}); {_LAYOUT}")
    scanner = _Scanner(root)
    classes = scanner.class_folders("" if split == FLAT else split)
    prefix = "" if split == FLAT else f"{split}/"
    per_class = [scanner.images(f"{prefix}{name}") for name in classes]
    scanner.check_no_others(split)
    for name, images in zip(classes, per_class, strict=True):
        if not images:
            raise DataError(
                f"class folder {prefix + name!r} of {str(root)!r} holds no image; "
                "add images to it or remove it"
            )
    labels = np.repeat(np.arange(len(classes)), [len(images) for images in per_class])
    paths = tuple(path for images in per_class for path in images)
    return Split(root, split, classes, paths, labels.astype(np.int64))


def open_evaluation(root: Path, split: str | None = None) -> Split:
    """The split to evaluate on: ``split``, or the first present of val, validation, test.

    Raises:
        DataError: there is none, or as `open_split`.
    """
    if split is None:
        split = next((name for name in find_splits(root) if name in EVALUATION), None)
    if split is None:
        raise DataError(
            f"{str(root)!r} has no val/, validation/ or test/ to evaluate on; add one, name "
            "another folder with --split, or, to quantize, hold images out with --val-split 0.1"
        )
    return open_split(root, split)


def open_training(root: Path, val_split: float | None = None, seed: int = 0) -> tuple[Split, Split]:
    """The images to train on and those to evaluate on, with the same classes.

    Args:
        root: holds train/ and val/, validation/ or test/; with ``val_split`` train/ alone, or
            the class folders themselves.
        val_split: fraction of each class to hold out where there is no second folder.
        seed: of the choice of the images held out.

    Raises:
        DataError: as `open_split`, no train or no val folder, or their classes differ.
        UsageError: ``val_split`` although there is a second folder, or not between 0 and 1.
    """
    splits = find_splits(root)
    second = next((name for name in splits if name in EVALUATION), None)
    if TRAIN not in splits and (second or val_split is None):
        raise DataError(
            f"{str(root)!r} has no folder 'train'; {_LAYOUT}, "
            "or class folders directly in it with --val-split 0.1"
        )
    if val_split is not None:
        if second is not None:
            raise UsageError(
                f"--val-split {val_split} was given, but {str(root)!r} has a folder {second!r}; "
                "leave out --val-split, or move that folder away"
            )
        return hold_out(open_split(root, TRAIN if splits else FLAT), val_split, seed)
    train, val = open_split(root, TRAIN), open_evaluation(root)
    check_same_classes(train, val)
    return train, val


def check_same_classes(train: Split, val: Split) -> None:
    """Raise DataError unless both splits have the same class folders."""
    if train.classes == val.classes:
        return
    only_train = [name for name in train.classes if name not in set(val.classes)]
    only_val = [name for name in val.classes if name not in set(train.classes)]
    parts = [
        f"{len(names)} only in {split.name}: {', '.join(map(repr, names[:3]))}"
        + (", ..." if len(names) > 3 else "")
        for split, names in ((train, only_train), (val, only_val))
        if names
    ]
    raise DataError(
        f"the class folders of {train.name} and {val.name} in {str(train.root)!r} differ "
        f"({'; '.join(parts)}); both must have the same"
    )


def hold_out(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Set a part of every class aside: (what stays, what is held out).

    Of n images of a class round(fraction n) are held out, at least one, and at least one stays.
    The choice depends on ``seed`` and the images of that class only.

    Raises:
        UsageError: ``fraction`` is not between 0 and 1.
        DataError: a class has a single image.
    """
    if not 0 < fraction < 1:
        raise UsageError(
            f"--val-split must lie between 0 and 1, got {fraction}; 0.1 holds out a tenth"
        )
    held = np.zeros(len(split), dtype=bool)
    for label, (name, members) in enumerate(zip(split.classes, _members(split), strict=True)):
        if len(members) < 2:
            raise DataError(
                f"class {name!r} of {str(split.root)!r} has {len(members)} image; "
                "holding images out needs at least 2 in every class"
            )
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held[members[permutation(len(members), Purpose.HOLD_OUT, seed, label)[:count]]] = True
    rest, aside = np.flatnonzero(~held), np.flatnonzero(held)
    return split.take(rest), split.take(aside, f"{split.name} (held out)")


def limit_per_class(split: Split, limit: int) -> Split:
    """The first ``limit`` images of every class (all of a smaller class)."""
    if limit < 1:
        raise UsageError(f"the number of images per class must be at least 1, got {limit}")
    return split.take(np.concatenate([members[:limit] for members in _members(split)]))


def _members(split: Split) -> list[NDArray[np.int64]]:
    """The indices of the images of each class, ascending."""
    counts = np.bincount(split.labels, minlength=len(split.classes))
    return np.split(np.argsort(split.labels, kind="stable"), np.cumsum(counts)[:-1])


class _Scanner:
    """Lists folders below one root and remembers what does not belong there."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.real_root = root.resolve()
        self.others: list[str] = []

    def class_folders(self, folder: str) -> tuple[str, ...]:
        """Names of the folders in ``folder``, sorted. Images beside them have no class."""
        self._check_link(folder)
        names, loose = [], []
        for entry in self._entries(folder):
            path = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_symlink():
                self._check_link(path)
            if entry.is_dir():
                names.append(entry.name)
            elif _is_image(entry.name):
                loose.append(path)
        if loose:
            raise DataError(
                f"{len(loose)} images lie outside of any class folder in {self.root!r}, "
                f"the first {min(loose)!r}; put each into the folder of its class"
            )
        if not names:
            where = str(Path(self.root, folder))
            raise DataError(f"{where!r} has no class folders; expected one folder per class")
        return tuple(sorted(names))

    def images(self, folder: str) -> list[str]:
        """Paths of all the images below ``folder``, relative to the root, sorted."""
        found: list[str] = []
        # Each pending folder comes with the links followed to reach it, to notice a circle.
        pending: list[tuple[str, tuple[str, ...]]] = [(folder, ())]
        while pending:
            current, followed = pending.pop()
            for entry in self._entries(current):
                path = f"{current}/{entry.name}"
                links = followed
                if entry.is_symlink():
                    target = self._check_link(path)
                    if target in followed:
                        raise DataError(f"link {path!r} in {self.root!r} leads in a circle")
                    links = (*followed, target)
                if entry.is_dir():
                    pending.append((path, links))
                elif _is_image(entry.name) and entry.is_file():
                    found.append(path)
                else:
                    self.others.append(path)
        return sorted(found)

    def check_no_others(self, split: str) -> None:
        """Raise DataError where `images` met files that are none."""
        if self.others:
            raise DataError(
                f"{len(self.others)} files in the class folders of {split!r} in {self.root!r} "
                f"are no images, the first {min(self.others)!r}; move them away "
                "(known are .jpg, .png, .webp, .bmp, .tif, .ppm, .gif and their kin)"
            )

    def _entries(self, folder: str) -> Iterator[os.DirEntry[str]]:
        where = f"{self.root}/{folder}" if folder else self.root
        with _readable(where), os.scandir(where) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name.lower() not in _JUNK:
                    yield entry

    def _check_link(self, path: str) -> str:
        """Where a path leads; DataError unless that exists inside of the root."""
        try:
            target = Path(self.root, path).resolve(strict=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: a circle, up to Python 3.12
            raise DataError(f"link {path!r} in {self.root!r} leads nowhere; remove it") from error
        if not target.is_relative_to(self.real_root):
            raise DataError(
                f"{path!r} in {self.root!r} is a link to {str(target)!r}, outside of the data "
                "folder; copy the files into it, or link the whole data folder"
            )
        return str(target)


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in EXTENSIONS


@contextmanager
def _readable(folder: str | Path) -> Iterator[None]:
    """Turn what the system says of a folder into one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"no data folder {str(folder)!r}; {_LAYOUT}") from error
    except NotADirectoryError as error:
        raise DataError(f"{str(folder)!r} is a file, not a data folder; {_LAYOUT}") from error
    except PermissionError as error:
        raise DataError(f"no permission to read the folder {str(folder)!r}") from error
    except OSError as error:
        raise DataError(f"cannot read the folder {str(folder)!r}: {error.strerror}") from error
