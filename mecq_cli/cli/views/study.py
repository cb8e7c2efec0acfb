"""Arms and seeds of a study."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType

from mecq_cli.cli.render import Document
from mecq_cli.cli.views.cells import headed


def tables(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq bench mec``."""
    yield (
        f"{document['model']} W{document['wbits']} A{document['abits']}, "
        f"{document['epochs']} epochs of {document['train_images']} images, evaluated on "
        f"{document['images']} of {document['evaluated_on']}"
    )
    table = headed("arm", numbers=("mean", "spread", "seeds", "seconds"))
    for row in document["rows"]:
        spread = "-" if row["spread"] is None else f"{row['spread']:.2f}"
        seeds = " ".join(f"{value:.2f}" for value in row["top1"])
        table.add_row(row["arm"], f"{row['mean']:.2f}", spread, seeds, f"{row['seconds']:.0f}")
    yield table


def arms(document: Document) -> Iterable[RenderableType]:
    """Settings of all arms, as ``mecq bench arms`` shows them."""
    table = headed("arm", "settings")
    for name, settings in document["arms"].items():
        flags = " ".join(_flag(key.replace("_", "-"), value) for key, value in settings.items())
        table.add_row(name, flags or "the default recipe")
    yield table


def _flag(name: str, value: object) -> str:
    return f"--no-{name}" if value is False else f"--{name} {value}"
