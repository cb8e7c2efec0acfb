"""Where images with boxes are found: the layout of COCO, or one file beside the images of a split.

    DATA/annotations/instances_{train,val}2017.json     the year may be left out
    DATA/{train,val}2017/*                              or DATA/images/{train,val}2017/*

    DATA/{train,valid}/_annotations.coco.json           with the images beside it

Such a file lists ``images`` (id, file_name, width, height), ``categories`` (id, name) and
``annotations`` (image_id, category_id, bbox: left, top, width, height in pixels; iscrowd). Images
without annotations show nothing to be found, which is learned, too. Whatever contradicts itself is
an error: nothing is skipped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np

from mecq_cli import layout
from mecq_cli.data.annotated import folder_of, hold_out_any, is_laid_out, to_evaluate_on
from mecq_cli.data.boxes import BoxFiles
from mecq_cli.data.split import NameList, Split, check_same_classes
from mecq_cli.errors import DataError
from mecq_cli.layout import COCO, EVALUATION, TRAIN, BoxSource, readable
from mecq_cli.storage import read_bytes_limited

_MOST_BYTES = 2**31
_LARGEST = 2**31
"""Pixels."""
_ROUNDED = 1.0
"""Pixels that a box may reach over the edge: those of COCO do, where they were rounded."""


def require_no_boxes(data: str) -> None:
    """Raise DataError where a folder is one of images with boxes: nothing to classify by."""
    if is_laid_out(data, COCO):
        raise DataError(
            f"{data!r} holds images with boxes, which is data for detection: give a model that "
            "detects (ssdlite320_mobilenet_v3_large, retinanet_resnet50_fpn, ...), or other data"
        )


def open_training(data: str, val_split: float | None, seed: int) -> tuple[Split, Split]:
    """The images to train on and those to evaluate on.

    Args:
        data: the folder.
        val_split: share of the training images to hold out where there is no second split.
        seed: of the choice of those.

    Raises:
        DataError: a part of the layout is missing, or annotations contradict themselves.
        UsageError: ``val_split`` although there is a second split, or data that is no folder.
    """
    root, sources = _found(data)
    layout.check_splits(str(root), sources, val_split, COCO)
    train = _open(root, TRAIN, sources[TRAIN])
    assert isinstance(train.files, BoxFiles)
    if train.files.crowds.all():
        raise DataError(
            f"{str(sources[TRAIN].file)!r}: all boxes are of crowds (iscrowd), which are not "
            "learned; nothing is left to train on"
        )
    if val_split is not None:
        return hold_out_any(train, val_split, seed)
    second = next(name for name in sources if name in EVALUATION)
    val = _open(root, second, sources[second])
    check_same_classes(train, val)
    return train, val


def open_evaluation(data: str, split: str | None = None) -> Split:
    """The split to evaluate on: ``split``, or the first present of val, valid, validation, test.

    Raises:
        DataError, UsageError: as `open_training`.
    """
    root, sources = _found(data)
    chosen = to_evaluate_on(root, COCO, sources, split)
    return _open(root, chosen, sources[chosen])


def _found(data: str) -> tuple[Path, Mapping[str, BoxSource]]:
    """The folder, and the splits that it has."""
    root = folder_of(data, "boxes", COCO.expected)
    with readable(root):
        names = sorted(entry.name for entry in root.iterdir())
    sources = layout.find_boxes(root)
    if not sources:
        hint = "it looks like data for another task: " if TRAIN in names else ""
        raise DataError(f"{data!r} holds no images with boxes; {hint}{COCO.expected}")
    return root, sources


def _open(root: Path, name: str, source: BoxSource) -> Split:
    document = _read(source.file)
    file = str(source.file)
    classes = _classes(document["categories"], file)
    images = _images(document["images"], file)
    if not document["annotations"]:
        raise DataError(
            f"{file!r} has no annotations: nothing could be learned or measured; images without "
            "boxes are fine, but not all of them"
        )
    rows = _rows(document["annotations"], images, classes, file)
    paths = [f"{source.folder}/{image['file_name']}" for image in images.values()]
    missing = [path for path in paths if not _is_file(root / path)]
    if missing:
        raise DataError(
            f"{file!r} lists {len(missing)} images that are not there, the first {missing[0]!r} in "
            f"{str(root)!r}; add them, or correct the list"
        )
    names = NameList()
    names.extend(paths)
    count = len(paths)
    own = [row for image in images for row in rows.get(image, ())]
    if not own:
        raise DataError(
            f"{file!r}: none of its {len(document['annotations'])} boxes has an area; a bbox is "
            "left, top, width, height in pixels: correct them"
        )
    counts = [len(rows.get(image, ())) for image in images]
    files = BoxFiles(
        str(root),
        names.packed(),
        np.array([[image["width"], image["height"]] for image in images.values()], np.int64),
        np.cumsum([0, *counts], dtype=np.int64),
        np.array([row[1:5] for row in own], np.float32).reshape(-1, 4),
        np.array([row[0] for row in own], np.int64),
        np.array([row[5] for row in own], np.bool_),
    )
    index = np.arange(count, dtype=np.int64)
    return Split(str(root), name, tuple(classes.values()), files, index, np.zeros(count, np.int64))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # no name that a file may have
        return False


def _read(path: Path) -> dict[str, Any]:
    data = read_bytes_limited(path, _MOST_BYTES, error=DataError)
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{str(path)!r} is no JSON ({error}); export the annotations again") from (
            error
        )
    wanted = ("images", "categories", "annotations")
    missing = [
        key
        for key in wanted
        if not isinstance(document, dict)
        or not isinstance(document.get(key), list)
        or not all(isinstance(entry, dict) for entry in document[key])
    ]
    if missing:
        raise DataError(
            f"{str(path)!r} has no list of {' and '.join(missing)}; a file of COCO has "
            f"{', '.join(wanted)}"
        )
    return dict(document)


def _classes(entries: Sequence[Mapping[str, Any]], file: str) -> dict[Any, str]:
    """Names by id, in the order of the ids."""
    found: dict[Any, str] = {}
    for entry in entries:
        number, name = entry.get("id"), entry.get("name")
        if not _is_whole(number) or not isinstance(name, str) or not name.strip():
            raise DataError(f"{file!r}: a category has no id or no name ({str(entry)[:60]})")
        if number in found or name in found.values():
            raise DataError(f"{file!r}: the category {name!r} ({number}) is there twice")
        found[number] = name
    if not found:
        raise DataError(f"{file!r} has no categories; there is nothing to tell apart")
    return {number: found[number] for number in sorted(found)}


def _images(entries: Sequence[Mapping[str, Any]], file: str) -> dict[Any, Mapping[str, Any]]:
    """Images by id, in their order."""
    found: dict[Any, Mapping[str, Any]] = {}
    places = dict[PurePosixPath, Any]()
    for entry in entries:
        number, name = entry.get("id"), entry.get("file_name")
        sizes = (entry.get("width"), entry.get("height"))
        if not isinstance(number, (int, str)) or not isinstance(name, str):
            raise DataError(f"{file!r}: an image has no id or no file_name ({str(entry)[:60]})")
        if not all(_is_whole(size) and 0 < size <= _LARGEST for size in sizes):
            raise DataError(
                f"{file!r}: image {name!r} has no width and height in whole pixels; add them"
            )
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts:
            raise DataError(f"{file!r}: image {name!r} lies outside of the folder of its split")
        if number in found:
            raise DataError(f"{file!r}: two images have the id {number!r}; give each its own")
        if place in places:
            raise DataError(
                f"{file!r}: images {places[place]!r} and {number!r} are both {name!r}; put their "
                "annotations together"
            )
        found[number], places[place] = entry, number
    if not found:
        raise DataError(f"{file!r} lists no images; {COCO.expected}")
    return found


def _rows(
    entries: Sequence[Mapping[str, Any]],
    images: Mapping[Any, Mapping[str, Any]],
    classes: Mapping[Any, str],
    file: str,
) -> dict[Any, list[tuple[float, ...]]]:
    """The boxes of each image: class, left, top, right, bottom, crowd."""
    places = {number: place for place, number in enumerate(classes)}
    rows: dict[Any, list[tuple[float, ...]]] = {}
    for entry in entries:
        what = f"{file!r}: annotation {entry.get('id')!r}"
        image, label = entry.get("image_id"), entry.get("category_id")
        if not isinstance(image, (int, str)) or image not in images:
            raise DataError(f"{what} is of image {image!r}, which is not listed; correct it")
        if not _is_whole(label) or label not in places:
            raise DataError(
                f"{what} has the label {label!r}, but the categories are "
                f"{', '.join(map(str, [*classes][:5]))}{', ...' if len(classes) > 5 else ''}; "
                "correct it, or add the category"
            )
        size = (images[image]["width"], images[image]["height"])
        box = _box(entry.get("bbox"), size, f"{what} of {images[image]['file_name']!r}")
        crowd = entry.get("iscrowd", 0)
        if not isinstance(crowd, int) or crowd not in (0, 1):
            raise DataError(f"{what} has iscrowd {crowd!r}; it is 0 or 1")
        if box is not None:
            rows.setdefault(image, []).append((places[label], *box, crowd == 1))
    return rows


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or (
        _is_whole(value) and abs(value) <= _LARGEST
    )


def _box(given: Any, size: tuple[int, int], what: str) -> tuple[float, float, float, float] | None:
    """Left, top, right, bottom of a bbox, which is left, top, width, height.

    None where it has no area: COCO's own train set has two such, with nothing to be found in them.
    """
    if not isinstance(given, list) or len(given) != 4 or not all(_is_number(n) for n in given):
        raise DataError(f"{what} has no bbox of four numbers; it is left, top, width, height")
    left, top, width, height = (float(n) for n in given)
    right, bottom = left + width, top + height
    if width == 0 or height == 0:
        return None
    if width < 0 or height < 0:
        raise DataError(f"{what}: the box {given} has a negative side; correct it")
    over = max(-left, -top, right - size[0], bottom - size[1])
    if over > _ROUNDED:
        raise DataError(
            f"{what}: the box {given} (left, top, width, height) reaches outside of the image, "
            f"which is {size[0]} x {size[1]}; correct it"
        )
    box = (max(left, 0.0), max(top, 0.0), min(right, size[0]), min(bottom, size[1]))
    if box[2] <= box[0] or box[3] <= box[1]:
        raise DataError(f"{what}: the box {given} lies outside of the image; correct it")
    return box
