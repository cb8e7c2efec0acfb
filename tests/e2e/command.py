"""The real command line, run inside of this process (where torch is loaded once)."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mecq_cli.cli.main import run


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """stdout as the JSON document it must be."""
        assert self.code == 0, self.err
        document: dict[str, Any] = json.loads(self.out)
        return document


def mecq(*arguments: object, cwd: Path) -> Done:
    """Run ``mecq ARGUMENTS`` in the folder ``cwd``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return Done(code, out.getvalue(), err.getvalue())


def refused(done: Done, code: int, *parts: str) -> None:
    """One line on stderr (after progress and notes), nothing on stdout."""
    assert done.code == code, done
    assert done.out == ""
    assert "Traceback" not in done.err
    line = done.err.splitlines()[-1]
    assert line.startswith("error: ")
    assert done.err.count("error: ") == 1
    for part in parts:
        assert part in line, line


def write_patterns(folder: Path, splits: dict[str, int], classes: int = 2, size: int = 32) -> Path:
    """An image folder anybody can learn: each class has stripes of its own, and noise."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for label in range(classes):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                wave = np.sin(np.arange(size) * (label + 1) * 0.5 + rng.uniform(0, 6))
                pixels = 128 + 70 * wave[:, None, None] + rng.normal(0, 20, (size, size, 3))
                image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
                image.save(place / f"{number:03d}.png")
    return folder
