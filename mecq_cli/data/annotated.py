"""What folders of images with masks and of images with boxes have in common."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np

from mecq_cli import layout
from mecq_cli.data.order import Purpose, permutation
from mecq_cli.data.split import Split
from mecq_cli.errors import DataError, UsageError
from mecq_cli.layout import EVALUATION, FLAT, Layout
from mecq_cli.settings import OWN, split_data_name


def is_laid_out(data: str, *layouts: Layout) -> bool:
    """Whether ``data`` names a folder with one of these layouts."""
    prefix, where = split_data_name(data)
    if prefix or data.startswith(OWN) or not Path(where).is_dir():
        return False
    return layout.find_layout(Path(where))[0] in layouts


def folder_of(data: str, what: str, expected: str) -> Path:
    """The folder that ``data`` names, which nothing else can be here.

    Args:
        data: as the user gave it.
        what: is read from it: masks, boxes.
        expected: the layout, for the message.

    Raises:
        DataError: the images came from a program.
        UsageError: it names something else than a folder.
    """
    prefix, where = split_data_name(data)
    if data.startswith(OWN):
        raise DataError(
            "the images of this run were data sets of the program that started it; give others "
            "with --data DIR"
        )
    root = Path(where).absolute()
    if prefix or root.suffix == ".tar":
        raise UsageError(f"--data {data}: {what} are read from a folder; {expected}")
    return root


def to_evaluate_on(root: Path, kind: Layout, splits: Collection[str], asked: str | None) -> str:
    """``asked``, or the first present of val, valid, validation and test.

    Raises:
        DataError: there is none, or not this one.
    """
    chosen = asked or next((name for name in EVALUATION if name in splits), None)
    if chosen is None:
        raise layout.nothing_to_evaluate_on(str(root), kind)
    if chosen not in splits:
        raise DataError(
            f"{str(root)!r} has no {kind.part} {chosen!r}{kind.holding} (it has "
            f"{', '.join(splits)}); name another one with --split"
        )
    return chosen


def hold_out_any(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Some images to evaluate on, of whatever classes: at least one, and at least one stays."""
    if len(split) < 2:
        raise DataError(f"{split.root!r} has {len(split)} image; holding some out needs 2 or more")
    count = min(max(round(fraction * len(split)), 1), len(split) - 1)
    order = permutation(len(split), Purpose.HOLD_OUT, seed, 0)
    aside, rest = np.sort(order[:count]), np.sort(order[count:])
    name = "held out" if split.name == FLAT else f"{split.name} (held out)"
    return split.take(rest), replace(split.take(aside), name=name)
