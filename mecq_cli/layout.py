"""What lies in a data folder, by the names of its folders alone.

Needs no torch, so what is wrong with --data is said at once, not after the seconds in which torch
is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mecq_cli.errors import CheckpointError, DataError, UsageError
from mecq_cli.settings import OWN, split_data_name

TRAIN = "train"
EVALUATION = ("val", "valid", "validation", "test")
"""Names of the folder to evaluate on; the first one present is taken."""
FLAT = "."
"""Name of the split of a folder that holds the class folders itself."""
IMAGES, MASKS = "images", "masks"
"""What a split of images with masks holds."""
VOC_IMAGES, VOC_MASKS, VOC_LISTS = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"
"""What Pascal VOC has instead; in the last one a list of names for each split."""
COCO_FOLDER = "annotations"
"""Where COCO has a file of annotations for each split, of images with boxes."""
COCO_BESIDE = "_annotations.coco.json"
"""Such a file, where it lies beside the images of its split."""
LAYOUT = "expected train/ and val/ in it, each with one folder of images per class"


@dataclass(frozen=True)
class Layout:
    """How a data folder is split, in the words of messages.

    Attributes:
        part, ending: what a split is, and how its name ends.
        holding: what makes it one, beside its name.
        expected: what should be there.
        may_be_flat: whether the folder itself can be one split.
    """

    part: str
    ending: str
    holding: str
    expected: str
    may_be_flat: bool = False

    def names(self) -> str:
        """Of the splits to evaluate on."""
        *others, last = (f"{name}{self.ending}" for name in EVALUATION)
        return f"{', '.join(others)} or {last}{self.holding}"


CLASS_FOLDERS = Layout(
    "folder",
    "/",
    "",
    f"{LAYOUT}, or class folders directly in it with --val-split 0.1",
    may_be_flat=True,
)
PAIRS = Layout(
    "folder",
    "/",
    f" with {IMAGES}/ and {MASKS}/",
    f"expected train/ and val/ in it, each with {IMAGES}/ and {MASKS}/, or these directly in it "
    "with --val-split 0.1",
    may_be_flat=True,
)
VOC = Layout(
    "list", ".txt", f" in {VOC_LISTS}/", f"expected {VOC_LISTS}/train.txt and val.txt in it"
)
COCO = Layout(
    "file",
    ".json",
    f" in {COCO_FOLDER}/",
    f"expected {COCO_FOLDER}/instances_train.json and {COCO_FOLDER}/instances_val.json in it, and "
    "the images in train/ and val/, as COCO has them, or train alone with --val-split 0.1",
)

_COCO_NAME = re.compile(rf"(?:instances_)?({'|'.join((TRAIN, *EVALUATION))})(\d*)\.json")
_LIKE_SPLITS = frozenset((TRAIN, *EVALUATION, "training", "testing", "eval"))


_PACKED = (".gz", ".tgz", ".xz", ".bz2", ".zst", ".zip")


# fmt: off
EXTENSIONS = frozenset((
    "avif", "bmp", "gif", "j2k", "jfif", "jp2", "jpe", "jpeg", "jpg",
    "pbm", "pgm", "png", "pnm", "ppm", "tif", "tiff", "webp",
))
# fmt: on
"""Endings of the images that are looked for."""


def is_image(name: str) -> bool:
    """Whether the ending of a file's name is that of an image."""
    return name.rpartition(".")[2].lower() in EXTENSIONS


@contextmanager
def readable(folder: str | Path) -> Iterator[None]:
    """Turn what the system says of a folder into one line."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"no data folder {str(folder)!r}; {LAYOUT}") from error
    except NotADirectoryError as error:
        packed = Path(folder).suffix.lower() in _PACKED
        hint = "unpack it, or give .tar files that are not compressed" if packed else LAYOUT
        raise DataError(f"{str(folder)!r} is a file, not a data folder; {hint}") from error
    except PermissionError as error:
        raise DataError(f"no permission to read the folder {str(folder)!r}") from error
    except OSError as error:
        raise DataError(f"cannot read the folder {str(folder)!r}: {error.strerror}") from error


def folders_in(root: Path) -> tuple[str, ...]:
    """Names of the folders in ``root``, sorted, without hidden ones.

    Raises:
        DataError: ``root`` is missing, no folder, or not readable.
    """
    with readable(root), os.scandir(root) as entries:
        return tuple(sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".")))


def find_splits(root: Path) -> tuple[str, ...]:
    """Which of train, val, valid, validation and test are there, in this order.

    Raises:
        DataError: as `folders_in`.
    """
    folders = set(folders_in(root))
    return tuple(name for name in (TRAIN, *EVALUATION) if name in folders)


def find_layout(root: Path) -> tuple[Layout, tuple[str, ...]]:
    """How a folder is laid out, and its splits: `FLAT` of images with masks directly in it.

    Raises:
        DataError: as `folders_in`.
    """
    with readable(root):
        is_voc = all((root / part).is_dir() for part in (VOC_IMAGES, VOC_MASKS, VOC_LISTS))
    if is_voc:
        lists = root / VOC_LISTS
        return VOC, tuple(n for n in (TRAIN, *EVALUATION) if (lists / f"{n}.txt").is_file())
    splits = find_splits(root)
    pairs = tuple(name for name in splits if _has_pairs(root / name))
    if pairs or _has_pairs(root):
        return PAIRS, pairs or (FLAT,)
    boxes = find_boxes(root)
    return (COCO, tuple(boxes)) if boxes else (CLASS_FOLDERS, splits)


@dataclass(frozen=True)
class BoxSource:
    """A split of images with boxes.

    Attributes:
        file: its annotations.
        folder: where its images are, relative to the root.
    """

    file: Path
    folder: str


def find_boxes(root: Path) -> dict[str, BoxSource]:
    """The splits with annotations that a folder has, train first.

    Raises:
        DataError: there are two files for one of them.
    """
    found: dict[str, BoxSource] = {}
    folder = root / COCO_FOLDER
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        match = _COCO_NAME.fullmatch(file.name)
        if match is None:
            continue
        name, images = match.group(1), "".join(match.groups())
        if name in found:
            raise DataError(
                f"{str(folder)!r} has two files for {name!r}, {found[name].file.name!r} and "
                f"{file.name!r}; move one of them away"
            )
        within = f"images/{images}" if (root / "images" / images).is_dir() else images
        found[name] = BoxSource(file, within)
    for name in (TRAIN, *EVALUATION):
        if name not in found and (root / name / COCO_BESIDE).is_file():
            found[name] = BoxSource(root / name / COCO_BESIDE, name)
    return {name: found[name] for name in (TRAIN, *EVALUATION) if name in found}


def _has_pairs(folder: Path) -> bool:
    with readable(folder):
        return (folder / IMAGES).is_dir() and (folder / MASKS).is_dir()


def check_splits(
    data: str,
    splits: Collection[str],
    val_split: float | None,
    layout: Layout = CLASS_FOLDERS,
) -> None:
    """Whether these splits are enough to train on and to evaluate on.

    Args:
        data: as ``--data`` has it.
        splits: that are there.
        val_split: share to hold out, as ``--val-split`` has it.
        layout: of the folder.

    Raises:
        DataError: no train, or nothing to evaluate on.
        UsageError: ``val_split`` although there is a split to evaluate on.
    """
    second = next((name for name in EVALUATION if name in splits), None)
    if TRAIN not in splits and (second or val_split is None or not layout.may_be_flat):
        raise DataError(
            f"{data!r} has no {layout.part} 'train'{layout.holding}{_hint(Path(data))}; "
            f"{layout.expected}"
        )
    if val_split is not None and second is not None:
        raise UsageError(
            f"--val-split {val_split} was given, but {data!r} has a {layout.part} {second!r}; "
            f"leave out --val-split, or move that {layout.part} away"
        )
    if val_split is None and second is None:
        raise nothing_to_evaluate_on(data, layout)


def nothing_to_evaluate_on(data: str, layout: Layout = CLASS_FOLDERS) -> DataError:
    """There is no split for it."""
    flat = " (. is the folder itself)" if layout.may_be_flat else ""
    return DataError(
        f"{data!r} has no {layout.names()} to evaluate on; add one, name another {layout.part} "
        f"with --split{flat}, or, to quantize, hold images out with --val-split 0.1"
    )


def check_classes(root: str, classes: Collection[str], *, flat: bool) -> None:
    """Whether the class folders are what they look like.

    Args:
        root: of the data, for the message.
        classes: names of the class folders.
        flat: they lie in the data folder itself, where folders like Train and Val are no classes.

    Raises:
        DataError: a single class, or folders that are splits by other names.
    """
    if flat:
        splits = sorted(name for name in classes if name.lower() in _LIKE_SPLITS)
        if splits:
            raise DataError(
                f"{root!r} has no folder 'train', but {' and '.join(map(repr, splits[:3]))}, which "
                "would be taken for classes; rename to 'train' and 'val', in small letters"
            )
    if len(classes) == 1:
        raise DataError(
            f"{root!r} has a single class folder, {next(iter(classes))!r}; to tell classes apart "
            "takes at least two: is --data the folder that holds the class folders?"
        )


def layout_if_folder(data: str) -> tuple[Layout, tuple[str, ...]] | None:
    """`find_layout` where ``--data`` names a folder of images; None for other data sets.

    Raises:
        DataError: as `folders_in`.
    """
    prefix, where = split_data_name(data)
    root = Path(where)
    if prefix or data.startswith((OWN, "pipe:")) or "://" in where:
        return None
    if root.suffix == ".tar" and root.is_file():
        return None
    layout, splits = find_layout(root)
    return None if holds_shards(root, splits) else (layout, splits)


def holds_shards(root: Path, splits: Collection[str]) -> bool:
    """Whether the images are in tar files: in the folder itself, or in all of its splits."""
    places = [root / name for name in splits] or [root]
    return all(any(p.glob("*.tar")) and not (splits and folders_in(p)) for p in places)


def check_weight_file(path: Path) -> None:
    """Whether a weight file is there.

    Raises:
        CheckpointError: it is not, or it is no file.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; --checkpoint takes the weight file in it")
    if not path.exists():
        raise CheckpointError(
            f"{path}: no such weight file; --checkpoint takes .pth, .pt or .safetensors"
        )
    if path.suffix == ".onnx":
        raise CheckpointError(
            f"{path} is an ONNX file; --checkpoint takes weights to train on from: .pth, .pt or "
            ".safetensors"
        )


def _hint(root: Path) -> str:
    """What is there instead of train/, in brackets; nothing where that does not help."""
    if not root.is_dir():
        return ""
    folders = folders_in(root)
    alike = [name for name in folders if name.lower() in _LIKE_SPLITS]
    if alike:
        return f" (but {', '.join(map(repr, alike[:3]))}; the names are train and val)"
    for name in folders[:20]:
        if (root / name / TRAIN).is_dir():
            return f" (did you mean {str(root / name)!r}?)"
    if root.absolute().name in (TRAIN, *EVALUATION) and (root.absolute().parent / TRAIN).is_dir():
        return f" (did you mean {os.path.normpath(root / '..')!r}?)"
    if not folders:
        return " (and no other)"
    more = ", ..." if len(folders) > 3 else ""
    return f" ({len(folders)} others: {', '.join(map(repr, folders[:3]))}{more})"
