"""Data sets in tar files, read in place: nothing is unpacked, and any image can be reached.

Two layouts, told apart by what is inside of a file:

* class folders, as a data folder packed by `tar`: ``train/cat/1.jpg``, or ``cat/1.jpg``, or loose
  images where the tar file itself is named after its class (``train/cat.tar``);
* WebDataset: samples ``KEY.jpg`` with ``KEY.cls`` beside it, a number or a name, or ``KEY.json``
  with "cls" or "label". Numbers are named by ``classnames.txt`` (a line each) if there is one.

The heads of all members are read once, which tells where each image lies; the images themselves
are read when they are needed. So the order of an epoch is as random as with a folder, and a run
continues at the very image it stopped at, which streaming readers cannot do.
"""

from __future__ import annotations

import glob
import io
import json
import re
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from mecq_cli.data.folder import is_passed_over
from mecq_cli.data.split import Encoded, Indices, NameList, Names, Split
from mecq_cli.errors import DataError, UsageError
from mecq_cli.layout import EVALUATION, FLAT, TRAIN, is_image, readable

CLASS_NAMES = "classnames.txt"
_SPLITS = (TRAIN, *EVALUATION)
_LABEL_BYTES = 2**20
"""The largest .cls or .json that is read."""
_LABELS = ("cls", "json")
_PADDING = 2**20
"""The most zero bytes at the end of a tar file; `tar` writes up to 10,240."""


@dataclass(frozen=True)
class TarFiles:
    """Images inside of tar files.

    Attributes:
        paths: of the tar files, absolute.
        names: of the members.
        tars: int64 [len], which of the tar files.
        offsets, sizes: int64 [len], bytes.
    """

    paths: tuple[str, ...]
    names: Names
    tars: Indices
    offsets: Indices
    sizes: Indices

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return f"{Path(self.paths[self.tars[index]]).name}:{self.names[index]}"

    def file(self, index: int) -> Encoded:
        path = self.paths[self.tars[index]]

        def read() -> BinaryIO:
            # Opened each time: shards may be more than the files a process may hold open.
            return io.BytesIO(_read(path, int(self.offsets[index]), int(self.sizes[index])))

        return Encoded(f"{path}:{self.names[index]}", read)


@dataclass
class Shards:
    """A data set of tar files: one file, a folder of them, or a pattern.

    Which split a file belongs to is said by a word in its name (``train.tar``,
    ``imagenet-val-0003.tar``), by its folder (``train/0003.tar``), or by folders inside of it.
    """

    where: str
    _paths: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._paths = tuple(_find(self.where))

    @cached_property
    def _inner(self) -> set[str]:
        """Splits inside of a lone file; they tell more than its name."""
        return _inner_splits(_members(self._paths[0])) if len(self._paths) == 1 else set()

    def splits(self) -> tuple[str, ...]:
        """Which of train, val, validation and test are there, in this order."""
        named = {_split_of(path) for path in self._paths}
        return tuple(name for name in _SPLITS if name in (self._inner or named))

    def open(self, split: str) -> Split:
        """List the images of ``split``; `FLAT` means all, where no splits are told apart."""
        inner = split in self._inner
        paths = [
            path
            for path in self._paths
            if split == FLAT or (inner if self._inner else split == _split_of(path))
        ]
        if not paths:
            there = ", ".join(self.splits()) or "no file named after one"
            raise DataError(f"{self.where!r} has no split {split!r} (it has {there})")
        index = _Index(self.where)
        for number, path in enumerate(paths):
            index.add(number, path, split if inner else None)
        return index.split(paths, split, _class_names(paths[0]))


class _Member(NamedTuple):
    """A file in a tar file; ``folders`` and ``base`` are the parts of its path."""

    name: str
    offset: int
    size: int
    folders: tuple[str, ...]
    base: str


class _Index:
    """Gathers the images of a split over its tar files."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.names: list[str] = []
        self.places: list[tuple[int, int, int]] = []
        self.labels: list[str | int] = []
        self._starts: dict[str, int] = {}
        self._folders: set[tuple[str, ...]] = set()

    def add(self, number: int, path: str, inner: str | None) -> None:
        """Read the heads of one tar file; of the split ``inner`` alone if that is given."""
        members = _members(path)
        if not members:
            raise DataError(f"tar file {path!r} holds no files; add images to it or remove it")
        if inner is not None:
            members = [member for member in members if _inner_split(member) == inner]
        if any(_ending(member) in _LABELS for member in members):
            labelled = _samples(path, members)
        else:
            labelled = _by_folder(path, members)
            folders = {member.folders for member in members if _inner_split(member) is None}
            self._starts |= {path: _common_depth(folders)} if folders else {}
            self._folders |= folders
        for member, label in labelled:
            self.names.append(member.name)
            self.places.append((number, member.offset, member.size))
            self.labels.append(label)

    def split(self, paths: list[str], name: str, known: tuple[str, ...] | None) -> Split:
        """All that was added, in the order of a folder where the labels are folders."""
        self._require_one_root()
        kinds = {type(label) for label in self.labels}
        if len(kinds) != 1:
            raise DataError(f"the labels in {self.where!r} are numbers and names; use one of them")
        if int in kinds:
            highest = max(int(label) for label in self.labels)
            classes = known or tuple(map(str, range(highest + 1)))
            labels = np.array(self.labels, dtype=np.int64)
            if highest >= len(classes):
                raise DataError(
                    f"{self.where!r} has label {highest}, but its {CLASS_NAMES} names "
                    f"{len(classes)} classes, 0 to {len(classes) - 1}"
                )
            rows = np.arange(len(labels), dtype=np.int64)
        else:
            classes = tuple(sorted({str(label) for label in self.labels}))
            numbers = {label: n for n, label in enumerate(classes)}
            labels = np.array([numbers[str(label)] for label in self.labels], dtype=np.int64)
            order = sorted(range(len(labels)), key=lambda i: (labels[i], self.names[i]))
            rows = np.array(order, dtype=np.int64)
        names = NameList()
        names.extend(self.names)
        tars, offsets, sizes = np.array(self.places, dtype=np.int64).T
        files = TarFiles(tuple(paths), names.packed(), tars, offsets, sizes)
        return Split(self.where, name, classes, files, rows, labels[rows])

    def _require_one_root(self) -> None:
        """Whether each file by itself says what all together say of where the class folders are.

        Else what lies below the only class of a file would be taken for classes.
        """
        start = _common_depth(self._folders)
        for path, own in self._starts.items():
            if own != start:
                raise DataError(
                    f"tar file {path!r}: which of its folders name the classes is not what the "
                    "other files say; give each file the same folders around the class folders, "
                    "and none below those"
                )


def _find(where: str) -> Iterator[str]:
    """The tar files, sorted by path."""
    if "{" in where and not Path(where).exists():
        raise UsageError(f"{where!r}: braces are not expanded here; use * or name the folder")
    if glob.has_magic(where) and not Path(where).exists():
        place = Path(where)
        found = Path(place.anchor).glob(str(place.relative_to(place.anchor)))
        paths = [path.absolute() for path in found]
        if not paths:
            raise DataError(f"no file matches {where!r}")
    elif Path(where).is_dir():
        with readable(where):
            paths = [*Path(where).absolute().glob("*.tar"), *Path(where).absolute().glob("*/*.tar")]
        if not paths:
            raise DataError(f"{where!r} holds no .tar files; mecq reads uncompressed tar files")
    else:
        paths = [Path(where).absolute()]
    return iter(sorted(str(path) for path in paths))


def _split_of(path: str) -> str | None:
    """The split that a word of the name says, or else the folder."""
    said = (*_words(path), Path(path).parent.name)
    return next((word for word in said if word in _SPLITS), None)


def _members(path: str) -> list[_Member]:
    """The regular files in a tar file, those passed over left out.

    Raises:
        DataError: unreadable, compressed, damaged, truncated; or it holds links or devices.
    """
    found: list[_Member] = []
    seen: set[str] = set()
    try:
        length = Path(path).stat().st_size
        with tarfile.open(path, "r:") as tar:
            last = -1
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
                end = member.offset_data + member.size
                if member.offset <= last or member.size < 0 or end > length:
                    raise _damaged(path, f"at {member.name!r}")
                last = member.offset
                # Nothing is unpacked, so that a path that leads out of the file is just a name.
                parts = [p for p in member.name.split("/") if p not in ("", ".", "..")]
                if member.isdir() or any(map(is_passed_over, parts)):
                    continue
                if not member.isreg() or member.issparse():
                    raise DataError(
                        f"tar file {path!r}: {member.name!r} is no plain file (a link, a device or "
                        "a sparse file); pack the files themselves"
                    )
                if member.name in seen:
                    raise DataError(f"tar file {path!r} holds {member.name!r} twice; remove one")
                seen.add(member.name)
                *folders, base = parts or [member.name]
                found.append(
                    _Member(member.name, member.offset_data, member.size, tuple(folders), base)
                )
            # tarfile takes a damaged head for the end; at the true end there are zeros alone.
            rest = _read(path, tar.offset, min(length - tar.offset, _PADDING + 1))
            if not rest or rest.strip(b"\0") or len(rest) > _PADDING:
                raise _damaged(path, "behind its last file")
    except (tarfile.TarError, EOFError, ValueError, RecursionError) as error:
        raise DataError(
            f"{path!r} is no uncompressed tar file, or damaged ({' '.join(str(error).split())})"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read tar file {path!r}: {error.strerror or error}") from error
    return found


def _damaged(path: str, where: str) -> DataError:
    return DataError(
        f"tar file {path!r} is damaged or incomplete {where} (or several were joined); make or "
        "fetch it again"
    )


def _samples(path: str, members: list[_Member]) -> Iterator[tuple[_Member, str | int]]:
    """The images of WebDataset samples and their labels."""
    samples: dict[str, dict[str, _Member]] = {}
    for member in members:
        key = "/".join((*member.folders, member.base.partition(".")[0]))
        samples.setdefault(key, {})[_ending(member)] = member
    for key, parts in samples.items():
        images = [ending for ending in parts if is_image(f".{ending}")]
        label = next((parts[ending] for ending in _LABELS if ending in parts), None)
        if len(images) != 1 or label is None:
            raise DataError(
                f"tar file {path!r}: sample {key!r} has {len(images)} images and "
                f"{'no' if label is None else 'a'} label (.cls or .json); one of each is needed"
            )
        yield parts[images[0]], _label(path, label)


def _label(path: str, member: _Member) -> str | int:
    if member.size > _LABEL_BYTES:
        raise DataError(f"tar file {path!r}: {member.name!r} is too large for a label")
    content = _read(path, member.offset, member.size)
    try:
        text = content.decode("utf-8").strip()
        value = json.loads(text) if _ending(member) == "json" else text
        if isinstance(value, dict):
            value = next(value[key] for key in ("cls", "label") if key in value)
    except (ValueError, StopIteration, RecursionError):
        value = None
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
        value = int(value)
    named = isinstance(value, str) and value.isprintable() and value != ""
    numbered = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**6
    if not (named or numbered):
        raise DataError(
            f"tar file {path!r}: {member.name!r} is no label; expected a number from 0 on, or a "
            'name, in .json under "cls" or "label"'
        )
    assert isinstance(value, (str, int))
    return value


def _by_folder(path: str, members: list[_Member]) -> Iterator[tuple[_Member, str]]:
    """The images below class folders; the path of a class begins behind the split's folder."""
    start = _common_depth({member.folders for member in members})
    for member in members:
        parts = member.folders
        split = _inner_split(member)
        below = parts[start:] if split is None else parts[parts.index(split) + 1 :]
        if not is_image(member.base):
            raise DataError(f"tar file {path!r}: {member.name!r} is no image; leave it out")
        if below:
            yield member, below[0]
        elif split is None and _split_of(path) not in (None, *_words(path)):
            yield member, Path(path).stem
        else:
            raise DataError(
                f"tar file {path!r}: {member.name!r} lies outside of any class folder and has no "
                ".cls beside it; give each image a class"
            )


def _words(path: str) -> list[str]:
    return re.split(r"[^a-z]+", Path(path).stem.lower())


def _common_depth(folders: Collection[tuple[str, ...]]) -> int:
    """How many folders all images share, less those that must stay to name a class."""
    if not folders:
        return 0
    shared = min(folders, key=len)
    depth = max(len(shared) - 1, 0)
    while depth and any(parts[:depth] != shared[:depth] for parts in folders):
        depth -= 1
    return depth


def _inner_splits(members: list[_Member]) -> set[str]:
    """The splits that the files lie in; none where some lie elsewhere: a class may be "train"."""
    names = {_inner_split(member) for member in members}
    return set() if None in names else {str(name) for name in names}


def _inner_split(member: _Member) -> str | None:
    """The first part of its path that is the name of a split."""
    return next((part for part in member.folders if part in _SPLITS), None)


def _class_names(path: str) -> tuple[str, ...] | None:
    """Those that lie beside the tar file, or in the folder above."""
    for folder in Path(path).parents[:2]:
        file = folder / CLASS_NAMES
        if file.is_file():
            try:
                names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"cannot read {str(file)!r}: {error}") from error
            while names and not names[-1]:
                names.pop()
            if "" in names or len({*names}) < len(names):
                raise DataError(
                    f"{str(file)!r} must have different names, one a line, in the order of the "
                    "numbers; an empty line is none"
                )
            return tuple(names)
    return None


def _ending(member: _Member) -> str:
    """What follows the key of a WebDataset sample, such as "jpg"."""
    return member.base.partition(".")[2].lower()


def _read(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        content = file.read(size)
    if len(content) != size:
        raise DataError(f"tar file {path!r} has become shorter since it was opened")
    return content
