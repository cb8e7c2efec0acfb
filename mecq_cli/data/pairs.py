"""Where images with masks are found: a folder of pairs, or the layout of Pascal VOC.

    DATA/{train,val}/images/*       any image; folders inside are kept apart
    DATA/{train,val}/masks/*.png    of the same name
    DATA/classes.txt                a class a line, in the order of the indices

    DATA/JPEGImages/*, DATA/SegmentationClass/*.png
    DATA/ImageSets/Segmentation/{train,val}.txt     a name a line, without ending

Without classes.txt the classes are numbers, up to the largest one in any mask, which takes a look
at all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mecq_cli import layout
from mecq_cli.data.annotated import folder_of, hold_out_any, is_laid_out, to_evaluate_on
from mecq_cli.data.folder import Scanner
from mecq_cli.data.masks import IGNORED, PairFiles, read_mask
from mecq_cli.data.split import NameList, Split
from mecq_cli.errors import DataError
from mecq_cli.layout import (
    EVALUATION,
    FLAT,
    IMAGES,
    MASKS,
    PAIRS,
    TRAIN,
    VOC,
    VOC_IMAGES,
    VOC_LISTS,
    VOC_MASKS,
    Layout,
)

CLASS_NAMES = "classes.txt"
LAYOUT = (
    f"expected train/ and val/ in it, each with {IMAGES}/ and {MASKS}/, or {VOC_IMAGES}/, "
    f"{VOC_MASKS}/ and {VOC_LISTS}/ as in Pascal VOC"
)
_MOST_CLASSES = 255

Pair = tuple[str, str]
"""Paths of an image and its mask, relative to the data folder."""


def is_numbered(names: Sequence[str]) -> bool:
    """Whether classes have no names but their numbers."""
    return tuple(names) == tuple(map(str, range(len(names))))


def require_no_masks(data: str) -> None:
    """Raise DataError where a folder is one of images with masks: nothing to classify by."""
    if is_laid_out(data, PAIRS, VOC):
        raise DataError(
            f"{data!r} holds images with masks, which is data for segmentation, and the model "
            "classifies: give one that segments (lraspp_mobilenet_v3_large, deeplabv3_resnet50, "
            "...), or a folder with a folder of images per class"
        )


def open_training(data: str, val_split: float | None, seed: int) -> tuple[Split, Split]:
    """The pairs to train on and those to evaluate on.

    Args:
        data: the folder.
        val_split: share of the training pairs to hold out where there is no second split.
        seed: of the choice of those.

    Raises:
        DataError: a part of the layout is missing, or a file is no image or mask.
        UsageError: ``val_split`` although there is a second split, or data that is no folder.
    """
    root, kind, splits = _found(data)
    layout.check_splits(str(root), splits, val_split, kind)
    if val_split is not None:
        whole = TRAIN if TRAIN in splits else FLAT
        return hold_out_any(_open(root, kind, whole, (whole,)), val_split, seed)
    both = (TRAIN, next(name for name in splits if name in EVALUATION))
    train, val = (_open(root, kind, name, both) for name in both)
    return train, val


def open_evaluation(data: str, split: str | None = None) -> Split:
    """The split to evaluate on: ``split``, or the first present of val, valid, validation, test.

    Raises:
        DataError, UsageError: as `open_training`.
    """
    root, kind, splits = _found(data)
    chosen = to_evaluate_on(root, kind, splits, split)
    return _open(root, kind, chosen, (chosen,))


def _found(data: str) -> tuple[Path, Layout, tuple[str, ...]]:
    """The folder, how it is laid out, and the splits that it has."""
    root = folder_of(data, "masks", LAYOUT)
    kind, splits = layout.find_layout(root)
    if kind in (PAIRS, VOC):
        return root, kind, splits
    hint = "it looks like data for classification, and the model segments: " if splits else ""
    raise DataError(f"{data!r} holds no images with masks; {hint}{LAYOUT}")


def _open(root: Path, kind: Layout, name: str, of_classes: Iterable[str]) -> Split:
    """One split, with the classes of all ``of_classes``."""
    pairs = {split: _pairs(root, kind, split) for split in dict.fromkeys((name, *of_classes))}
    names = _class_names(root)
    if names is None:
        names = _numbers(root, [mask for found in pairs.values() for _, mask in found])
    images, masks = NameList(), NameList()
    images.extend([image for image, _ in pairs[name]])
    masks.extend([mask for _, mask in pairs[name]])
    count = len(pairs[name])
    files = PairFiles(str(root), images.packed(), masks.packed())
    rows = np.arange(count, dtype=np.int64)
    return Split(str(root), name, names, files, rows, np.zeros(count, np.int64))


def _pairs(root: Path, kind: Layout, split: str) -> list[Pair]:
    pairs = _voc_pairs(root, split) if kind is VOC else _folder_pairs(root, split)
    if not pairs:
        raise DataError(f"{str(root)!r} has no images in {split!r}; {LAYOUT}")
    return pairs


def _folder_pairs(root: Path, split: str) -> list[Pair]:
    prefix = "" if split == FLAT else f"{split}/"
    images, masks = (_listed(root, f"{prefix}{kind}") for kind in (IMAGES, MASKS))
    there = set(masks)
    pairs = []
    for image in images:
        stem = image.rpartition(".")[0].removeprefix(f"{prefix}{IMAGES}/")
        pairs.append((image, f"{prefix}{MASKS}/{stem}.png"))
    _require_masks(root, pairs, there)
    by_mask = dict[str, str]()
    for image, mask in pairs:
        if mask in by_mask:
            raise DataError(
                f"{by_mask[mask]!r} and {image!r} in {str(root)!r} have one mask, {mask!r}; give "
                "one of them another name, and a mask of its own"
            )
        by_mask[mask] = image
    lonely = sorted(there - {mask for _, mask in pairs})
    if lonely:
        raise DataError(
            f"{len(lonely)} masks in {str(root)!r} have no image, the first {lonely[0]!r}; add "
            "the images, or move the masks away"
        )
    return pairs


def _voc_pairs(root: Path, split: str) -> list[Pair]:
    images = {path.rpartition(".")[0]: path for path in _listed(root, VOC_IMAGES)}
    listed = root / VOC_LISTS / f"{split}.txt"
    stems = [line.strip() for line in _lines(listed) if line.strip()]
    missing = [stem for stem in stems if f"{VOC_IMAGES}/{stem}" not in images]
    if missing:
        raise DataError(
            f"{str(listed)!r} names {len(missing)} images that are not in {VOC_IMAGES}/, the first "
            f"{missing[0]!r}; correct the list"
        )
    pairs = [(images[f"{VOC_IMAGES}/{stem}"], f"{VOC_MASKS}/{stem}.png") for stem in stems]
    _require_masks(root, pairs, set(_listed(root, VOC_MASKS)))
    return pairs


def _listed(root: Path, folder: str) -> list[str]:
    """Images in a folder, relative to the root."""
    scanner = Scanner(root)
    found = scanner.images(folder)
    if scanner.others:
        raise DataError(
            f"{len(scanner.others)} files in {folder!r} of {str(root)!r} are no images, the first "
            f"{min(scanner.others)!r}; move them away"
        )
    return found


def _require_masks(root: Path, pairs: list[Pair], there: set[str]) -> None:
    missing = [pair for pair in pairs if pair[1] not in there]
    if missing:
        image, mask = missing[0]
        raise DataError(
            f"{len(missing)} images in {str(root)!r} have no mask: there is no {mask!r} for "
            f"{image!r}; add the masks, or move the images away"
        )


def _class_names(root: Path) -> tuple[str, ...] | None:
    """Those of classes.txt; None without it."""
    path = root / CLASS_NAMES
    if not path.is_file():
        return None
    names = [line.strip() for line in _lines(path)]
    while names and not names[-1]:
        names.pop()
    if not names or "" in names or len({*names}) < len(names) or len(names) > _MOST_CLASSES:
        raise DataError(
            f"{str(path)!r} names {len(names)} classes; it must have 1 to {_MOST_CLASSES} "
            "different names, one a line, in the order of the indices"
        )
    return tuple(names)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r} as text: {error}") from error


def _numbers(root: Path, masks: Iterable[str]) -> tuple[str, ...]:
    """Numbers up to the largest index in any mask."""
    largest = -1
    for mask in masks:
        indices = read_mask(f"{root}/{mask}")
        counted = indices[indices != IGNORED]
        largest = max(largest, int(counted.max()) if counted.size else -1)
    if largest < 0:
        raise DataError(
            f"every pixel of the masks in {str(root)!r} is ignored (255); a mask holds the index "
            "of a class in each pixel that counts"
        )
    return tuple(map(str, range(largest + 1)))
