"""A data set in a folder: train/ and val/ (or another name), each with one folder per class.

Only names are looked at here, so a million files open in seconds; pixels are read by `images`.
Hidden files and what file managers leave behind are passed over; anything else that is no image
is an error, since a silently smaller data set gives silently different figures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mecq_cli.data.split import NameList, Names, Split
from mecq_cli.errors import DataError, UsageError
from mecq_cli.layout import EXTENSIONS, FLAT, LAYOUT, find_splits, is_image, readable

_JUNK = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "$recycle.bin"))


@dataclass(frozen=True)
class FolderFiles:
    """Image files below ``root``; ``paths`` are relative to it, with "/"."""

    root: str
    paths: Names

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def file(self, index: int) -> str:
        return f"{self.root}/{self.paths[index]}"


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
        raise DataError(f"{str(root)!r} has no folder {split!r} (it has {there}); {LAYOUT}")
    scanner = Scanner(root)
    classes = scanner.class_folders("" if split == FLAT else split)
    prefix = "" if split == FLAT else f"{split}/"
    names = NameList()
    counts = []
    for name in classes:
        images = scanner.images(f"{prefix}{name}")
        counts.append(len(images))
        names.extend(images)
    scanner.check_no_others()
    for name, count in zip(classes, counts, strict=True):
        if not count:
            raise DataError(
                f"class folder {prefix + name!r} of {str(root)!r} holds no image; "
                "add images to it or remove it"
            )
    labels = np.repeat(np.arange(len(classes)), counts)
    files = FolderFiles(str(root), names.packed())
    rows = np.arange(len(files), dtype=np.int64)
    return Split(str(root), split, classes, files, rows, labels.astype(np.int64))


class Scanner:
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
            elif is_image(entry.name):
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
            where = f"{self.root}/{current}"
            with readable(where), os.scandir(where) as listed:
                entries = list(listed)
            names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
            if len(names) == len(entries) and _are_all_images(names):
                found += [f"{current}/{name}" for name in names]
                continue
            for entry in entries:
                if not is_passed_over(entry.name):
                    self._add(entry, f"{current}/{entry.name}", followed, found, pending)
        found.sort()
        return found

    def _add(
        self,
        entry: os.DirEntry[str],
        path: str,
        followed: tuple[str, ...],
        found: list[str],
        pending: list[tuple[str, tuple[str, ...]]],
    ) -> None:
        """Put an entry where it belongs: an image, a folder, or something that must not be."""
        if entry.is_symlink():
            target = self._check_link(path)
            if target in followed:
                raise DataError(f"link {path!r} in {self.root!r} leads in a circle")
            followed = (*followed, target)
        if entry.is_dir():
            pending.append((path, followed))
        elif is_image(entry.name) and entry.is_file():
            found.append(path)
        else:
            self.others.append(path)

    def check_no_others(self) -> None:
        """Raise DataError where `images` met files that are none."""
        if not self.others:
            return
        first, count = min(self.others), len(self.others)
        found = (
            f"{first!r} in {self.root!r} is no image that can be read; move it away, or convert it"
            if count == 1
            else f"{count} files in the class folders of {self.root!r} are no images that can be "
            f"read, the first {first!r}; move them away, or convert them"
        )
        raise DataError(f"{found} (known are .jpg, .png, .webp, .bmp, .tif, .gif and their kin)")

    def _entries(self, folder: str) -> Iterator[os.DirEntry[str]]:
        where = f"{self.root}/{folder}" if folder else self.root
        with readable(where), os.scandir(where) as entries:
            for entry in entries:
                if not is_passed_over(entry.name):
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


def _are_all_images(names: list[str]) -> bool:
    """Whether none is hidden or of another kind; for many names at once."""
    endings = {name.rpartition(".")[2].lower() for name in names}
    return endings <= EXTENSIONS and "/." not in "/".join(("", *names))


def is_passed_over(name: str) -> bool:
    """Whether a file or folder is hidden, or left behind by a file manager."""
    return name.startswith(".") or name.lower() in _JUNK
