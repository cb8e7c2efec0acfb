"""The documents that the library returns, as JSON or as tables of at most 80 columns."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import typer
from rich.console import Console, RenderableType

Document = Mapping[str, Any]
View = Callable[[Document], Iterable[RenderableType]]

# Where no terminal sets a width, nothing is cut or folded.
_UNLIMITED = 1000


def show(document: Document, view: View, *, as_json: bool) -> None:
    """Print the result on stdout, and see that it arrived."""
    text = _as_json(document) if as_json else _as_tables(document, view)
    try:
        # By the line: where stdout is unbuffered, Python takes a large write that was cut short
        # by a closed pipe for a success.
        sys.stdout.writelines(text.splitlines(keepends=True))
        sys.stdout.flush()
    except BrokenPipeError as error:
        # The reader went away. What is still buffered must not fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from error


def _as_json(document: Document) -> str:
    return json.dumps(_finite(document), indent=2, allow_nan=False) + "\n"


def _as_tables(document: Document, view: View) -> str:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _UNLIMITED)
    with console.capture() as capture:
        for part in view(document):
            console.print(part)
    # rich fills the last column up.
    return "".join(line.rstrip() + "\n" for line in capture.get().splitlines())


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; null says that there is no number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
