"""What quantization changed in the answers: by class, in the confusion matrix, image by image."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MOST_CLASSES = 20
"""Of a confusion matrix; of more, those with the largest changes are shown."""

WORST = 6
"""Classes that are shown with images."""

EXAMPLES = 6
"""Images of each."""

THUMBNAIL = 64
"""Pixels of the longer side that is stored; smaller images stay as they are."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Answers:
    """What the networks said.

    Attributes:
        labels: int64 [N], the right outputs.
        integer: int64 [N], the integer network's first choice.
        fp: the same of the FP network; None where it could not be run.
        confidence: float [N], the softmax of the integer network's first choice.
    """

    labels: Ints
    integer: Ints
    fp: Ints | None
    confidence: NDArray[np.float64]


def gather(answers: Answers, names: Sequence[str], paths: Sequence[str]) -> dict[str, Any]:
    """Accuracies, classes, confusion and examples.

    Args:
        answers: of both networks.
        names: of the outputs.
        paths: of the images, within the data set.

    Returns:
        images, integer_top1; fp_top1, agreement, lost and won (images) where the FP network was
        run; "classes": a row each, the worst first; "confusion" and its "pairs" that grew most;
        "examples": rows of images that quantization lost, or, without the FP network, that are
        wrong.
    """
    labels, integer, fp = answers.labels, answers.integer, answers.fp
    right = integer == labels
    document: dict[str, Any] = {
        "images": len(labels),
        "integer_top1": _percent(right),
        "fp_top1": None if fp is None else _percent(fp == labels),
    }
    if fp is not None:
        document["agreement"] = _percent(fp == integer)
        document["lost"] = int(((fp == labels) & ~right).sum())
        document["won"] = int(((fp != labels) & right).sum())
    classes = _classes(answers, names)
    document["classes"] = classes
    document |= _confusion(answers, names)
    document["examples"] = [
        {"index": int(i), "path": paths[i], "label": int(labels[i]), "class": names[labels[i]],
         "integer": names[integer[i]], "fp": None if fp is None else names[fp[i]],
         "confidence": float(answers.confidence[i])}
        for row in classes[:WORST]
        for i in _examples(answers, row["index"])
    ]  # fmt: skip
    return document


def _percent(hits: NDArray[np.bool_]) -> float:
    return 100.0 * int(hits.sum()) / max(len(hits), 1)


def _classes(answers: Answers, names: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for label in np.unique(answers.labels):
        mine = answers.labels == label
        row = {
            "class": names[label],
            "index": int(label),
            "images": int(mine.sum()),
            "integer": _percent(answers.integer[mine] == label),
            "fp": None if answers.fp is None else _percent(answers.fp[mine] == label),
        }
        rows.append(row)
    return sorted(rows, key=lambda row: (row["integer"], row["index"]))


def _examples(answers: Answers, label: int) -> list[int]:
    """Images of a class that quantization lost, the surest mistakes first."""
    wrong = (answers.labels == label) & (answers.integer != label)
    if answers.fp is not None:
        wrong &= answers.fp == label
    found = np.flatnonzero(wrong)
    order = np.argsort(-answers.confidence[found], kind="stable")
    return [int(i) for i in found[order][:EXAMPLES]]


def _matrix(labels: Ints, said: Ints, count: int) -> Ints:
    joined: Ints = np.bincount(labels * count + said, minlength=count * count)
    return joined.reshape(count, count)


def _confusion(answers: Answers, names: Sequence[str]) -> dict[str, Any]:
    """Of the classes that change most: counts of the integer network, and of the FP network."""
    present = np.unique(np.concatenate([answers.labels, answers.integer]))
    place = {int(label): i for i, label in enumerate(present)}
    labels, integer = (
        np.array([place[int(x)] for x in column], np.int64)
        for column in (answers.labels, answers.integer)
    )
    count = len(present)
    after = _matrix(labels, integer, count)
    if answers.fp is None:
        before = None
        change = after - np.diag(np.diag(after))
    else:
        # Answers that are no class of the data and that the integer network never gave.
        fp = np.array([place.get(int(x), count) for x in answers.fp], np.int64)
        before = _matrix(labels, fp, count + 1)[:count, :count]
        change = after - before
    size = np.abs(change)
    weight = size.sum(0) + size.sum(1)
    shown = np.sort(np.argsort(-weight, kind="stable")[:MOST_CLASSES])
    off = change - np.diag(np.diag(change))
    order = np.argsort(-off, axis=None, kind="stable")[:10]
    pairs = [divmod(int(flat), count) for flat in order]
    return {
        "confusion": {
            "classes": [names[present[i]] for i in shown],
            "of": count,
            "integer": after[np.ix_(shown, shown)].tolist(),
            "fp": None if before is None else before[np.ix_(shown, shown)].tolist(),
        },
        "pairs": [
            {
                "class": names[present[i]],
                "said": names[present[j]],
                "integer": int(after[i, j]),
                "fp": None if before is None else int(before[i, j]),
            }
            for i, j in pairs
            if off[i, j] > 0
        ],
    }


def thumbnail(image: Image.Image, side: int = THUMBNAIL) -> str:
    """A small JPEG as a data URI, of an image of mode RGB; ``side`` is the longer one, at most."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
