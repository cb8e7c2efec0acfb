"""What is in images."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType

from mecq_cli.cli.render import Document
from mecq_cli.cli.views.cells import pairs, plain, title

_SHOWN_BOXES = 10
"""Of an image; the others are in its file."""


def predictions(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq predict``."""
    for prediction in document["predictions"]:
        yield title(prediction["image"])
        table = pairs()
        for found in prediction.get("classes", ()):
            table.add_row(f"{found['share']:6.2f} %", f"{plain(found['class'])} ({found['index']})")
        for found in prediction.get("detections", ())[:_SHOWN_BOXES]:
            corners = ", ".join(f"{corner:.0f}" for corner in found["box"])
            table.add_row(
                f"{100 * found['score']:6.2f} %",
                f"{plain(found['class'])} ({found['index']}) at {corners}",
            )
        for key in ("mask", "boxes", "overlay"):
            if key in prediction:
                table.add_row(key, plain(prediction[key]))
        for candidate in prediction.get("top5", ()):
            probability = f"{100 * candidate['probability']:6.2f} %"
            table.add_row(probability, f"{plain(candidate['class'])} ({candidate['index']})")
        yield table
