"""Models, checks, settings: rows of texts."""

from __future__ import annotations

import json
from collections.abc import Iterable

from rich.console import RenderableType
from rich.text import Text

from mecq_cli.cli.render import Document
from mecq_cli.cli.views.cells import headed, megabytes, pairs, plain, title


def models(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq models``."""
    table = headed("model", "level", "reason")
    for row in document["models"]:
        table.add_row(plain(row["model"]), row["level"], plain(row["reason"]))
    yield table
    yield Text(
        "verified: quantized, exported, compared; captured: gets its quantizers; no: is refused",
        style="dim",
    )


def doctor(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq doctor``."""
    table = headed("", "what", "found", "needed", gap=2)
    signs = {"ok": "ok", "missing": "MISSING", "absent": "-"}
    for row in document["checks"]:
        table.add_row(signs[row["state"]], *(plain(row[k]) for k in ("what", "found", "needed")))
    yield table
    missing = [row["what"] for row in document["checks"] if row["state"] == "missing"]
    enough = "everything that is needed is here"
    yield Text(f"missing or too old: {', '.join(missing)}" if missing else enough)


def settings(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq config show``."""
    table = headed("setting", "value", "origin", gap=2)
    for key, row in document["settings"].items():
        value = "(not given)" if row["value"] is None else json.dumps(row["value"])
        if row["origin"] == "missing":
            value = "(must be given)"
        table.add_row(key, plain(value), row["origin"])
    yield table


def reported(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq report``."""
    yield title(document["path"])
    table = pairs()
    table.add_row("size", megabytes(document["bytes"]))
    table.add_row("about", plain(document["run"]))
    for line in document["left_out"]:
        table.add_row("left out", plain(line))
    yield table
