"""Error and speed of the entropy estimators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import RenderableType

from mecq_cli.cli.render import Document
from mecq_cli.cli.views.cells import headed


def tables(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq bench entropy``."""
    machine = document["machine"]
    yield f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}"
    titles = ("eps", "exact ms", "taylor", "moe", "alone", "error", "1-cos")
    table = headed("size", "spectrum", numbers=titles)
    table.add_column("answered by", overflow="fold")
    for row in document["rows"]:
        moe = row["moe"]
        table.add_row(
            f"{row['samples']}x{row['features']}",
            row["family"],
            f"{row['distortion']:g}",
            f"{1e3 * row['exact']['seconds']:.1f}",
            *(_times(row[name]) for name in ("taylor", "moe", "moe_alone")),
            f"{moe['value_error']:.0e}",
            f"{max(moe['one_minus_cosine'], 0.0):.0e}",
            _shares(row["experts"]),
        )
    yield table
    yield "times faster than exact, forward and backward; -: the series does not hold"
    yield f"all calls of moe: {_shares(document['experts'])}"


def _times(summary: Mapping[str, float] | None) -> str:
    return "-" if summary is None else f"{summary['speedup']:.1f}x"


def _shares(shares: Mapping[str, float]) -> str:
    if len(shares) == 1:
        return next(iter(shares))
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
