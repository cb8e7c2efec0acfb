"""What the tables of all commands are made of."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mecq_cli.cli.errors import one_line


def title(text: object) -> Text:
    """The first line."""
    return Text(one_line(str(text)), style="bold")


def pairs() -> Table:
    """A table of names and values."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def headed(*texts: str, numbers: Sequence[str] = (), gap: int = 1) -> Table:
    """A table with headings.

    Args:
        texts: of columns that fold where the terminal is narrow.
        numbers: of those behind them, which do not and stand to the right.
        gap: between two columns.
    """
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for title in texts:
        table.add_column(title, overflow="fold")
    for title in numbers:
        table.add_column(title, justify="right", no_wrap=True)
    return table


def few(names: Sequence[str]) -> str:
    """The first names of a list."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return plain(", ".join(names[:3])) + more


def megabytes(size: int) -> str:
    """A size with its unit."""
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def percent(value: float | None) -> str:
    """A percentage, or that there is none."""
    return "-" if value is None else f"{value:.2f} %"


def drop(value: float | None, reference: float | None) -> str:
    """The distance to a reference, where both are known."""
    return "" if value is None or reference is None else f"  ({value - reference:+.2f})"


def or_dash(value: object) -> str:
    """A number, or that there is none."""
    return "-" if value is None else str(value)


def plain(value: object) -> str:
    """For a table's cell, where text is markup; class and file names may hold anything."""
    return escape(one_line(str(value)))
