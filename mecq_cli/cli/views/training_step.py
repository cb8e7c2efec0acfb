"""What a training step costs."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType

from mecq_cli.cli.render import Document
from mecq_cli.cli.views.cells import headed


def tables(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq bench train``."""
    machine = document["machine"]
    yield (
        f"{document['model']} W{document['wbits']} A{document['abits']}, batch of "
        f"{document['batch_size']}, compile {document['compile']}, {document['device']}, "
        f"{machine['threads']} threads, torch {machine['torch']}"
    )
    table = headed("step of", numbers=("ms", "x FP", "images/s", "peak MB"))
    for row in document["rows"]:
        peak = "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}"
        cells = (f"{row['step_ms']:.1f}", f"{row['ratio']:.2f}", f"{row['images_per_second']:.0f}")
        table.add_row(row["what"], *cells, peak)
    yield table
    yield f"the regularizer's share of its step: {100 * document['regularizer_share']:.1f} %"
