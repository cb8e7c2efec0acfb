"""What quantization changed in answers that are drawn: by class, and image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mecq_cli.tasks.base import Measured
from mecq_cli.tasks.figures import Figures

WORST = 10
"""Images that are shown."""


@dataclass(frozen=True)
class Scores:
    """How good the answers of one network are.

    Attributes:
        whole: on all images together.
        images: the figure that counts, of each image alone; None where it has none.
    """

    whole: Measured
    images: Sequence[float | None]


def gather(
    integer: Scores,
    fp: Scores | None,
    of: Figures,
    names: Sequence[str],
    colours: Sequence[str | None],
    paths: Sequence[str],
) -> dict[str, Any]:
    """Figures, classes, and the images with the worst answers.

    Args:
        integer: of the integer network.
        fp: of the FP network; None where it could not be run.
        of: what the figures are called.
        names: of the classes.
        colours: in which their answers are drawn, in CSS.
        paths: of the images, within the data set.

    Returns:
        "images", "figure" (its name), and the whole "integer" and "fp"; "worse", "better" and
        "same": of how many images the figure fell, rose or stayed; "classes": a row each, the
        worst first, of those that are there, in the figure named "by_class"; "examples": rows of
        images, the worst first.
    """
    key = of.key
    document: dict[str, Any] = {
        "images": len(integer.images),
        "figure": of.label,
        "integer": integer.whole.figures[key],
        "fp": None if fp is None else fp.whole.figures[key],
        "by_class": of.by_class and of.by_class[1],
        "classes": _classes(integer, fp, of, names, colours),
    }
    if fp is not None:
        pairs = zip(integer.images, fp.images, strict=True)
        changes = [a - b for a, b in pairs if a is not None and b is not None]
        document["worse"] = sum(change < 0 for change in changes)
        document["better"] = sum(change > 0 for change in changes)
        document["same"] = sum(change == 0 for change in changes)
    known = [(value, i) for i, value in enumerate(integer.images) if value is not None]
    document["examples"] = [
        {"index": i, "path": paths[i], "integer": value, "fp": None if fp is None else fp.images[i]}
        for value, i in sorted(known)[:WORST]
    ]
    return document


def _classes(
    integer: Scores,
    fp: Scores | None,
    of: Figures,
    names: Sequence[str],
    colours: Sequence[str | None],
) -> list[dict[str, Any]]:
    if of.by_class is None:
        return []
    after = integer.whole.details[of.by_class[0]]
    before = [None] * len(after) if fp is None else fp.whole.details[of.by_class[0]]
    rows = [
        {"class": names[i], "index": i, "colour": colours[i], "integer": a, "fp": b}
        for i, (a, b) in enumerate(zip(after, before, strict=True))
        if a is not None
    ]
    return sorted(rows, key=lambda row: (row["integer"], row["index"]))
