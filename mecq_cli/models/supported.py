"""Which models are known to work: a list that was made by trying (docs/support.md). No torch."""

from __future__ import annotations

import difflib
import fnmatch
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

FILE = Path(__file__).with_name("supported.json")
"""By name: the level, and a reason where it is not ``verified``."""

Level = Literal["verified", "captured", "no"]


def supported() -> dict[str, tuple[Level, str]]:
    """Level and reason of every model that was tried, by name.

    ``verified``: it went all the way, exports compared with the simulator. ``captured``: it gets
    its quantizers, and the rest was not tried or did not work. ``no``: why it is refused.
    """
    document = json.loads(FILE.read_text(encoding="utf-8"))
    return {name: (level, reason) for name, (level, reason) in document.items()}


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Names that fit a pattern with wildcards, or that hold it where it has none."""
    wanted = pattern.lower()
    if not any(mark in wanted for mark in "*?["):
        wanted = f"*{wanted}*"
    return [name for name in names if fnmatch.fnmatchcase(name.lower(), wanted)]


def near(name: str, names: list[str], library: str) -> list[str]:
    """Up to three names that may have been meant; the same one of another library comes first."""
    wanted = name.lower()
    elsewhere = [n for n in (wanted, library + wanted) if n in names]
    longer = sorted((n for n in names if n.startswith(f"{wanted}_")), key=len)[:1]
    close = difflib.get_close_matches(wanted, names, 3)
    return list(dict.fromkeys([*elsewhere, *longer, *close]))[:3]
