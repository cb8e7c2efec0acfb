"""What was measured."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType

from mecq_cli.cli.live import duration
from mecq_cli.cli.render import Document
from mecq_cli.cli.views.cells import pairs, percent, plain, title
from mecq_cli.tasks.figures import DETECT, figures_of


def evaluation(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq eval``."""
    yield title(document["target"])
    table = pairs()
    table.add_row("kind", plain(document["kind"]))
    of = figures_of(document)
    for key, label in {of.key: of.label, **of.others}.items():
        if key != "top5" or document.get("num_classes", 1000) > 5:  # else 100 %, whatever it does
            table.add_row(label, percent(document[key]))
    if of.by_class:
        key, label = of.by_class
        for name, value in zip(document["classes"], document[key], strict=True):
            if value is not None:
                table.add_row(f"{label} of {plain(name)}", percent(value))
            elif document["task"] != DETECT:  # of COCO's classes most are not there
                table.add_row(f"{label} of {plain(name)}", "not there")
    table.add_row("measured on", f"{document['images']} images of {plain(document['split'])}")
    table.add_row("time", duration(document["seconds"]))
    yield table
