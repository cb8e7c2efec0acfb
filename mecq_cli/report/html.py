"""Pieces of a page. Whatever comes from outside goes through `text`."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from mecq_cli.report.style import CSS

GENERATOR = '<meta name="generator" content="mecq '
"""In the head of every page of ours."""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Nothing is loaded and nothing runs, whatever may have been smuggled in."""


def text(value: object) -> str:
    """Escaped, with control characters made visible."""
    return html.escape(visible(str(value)))


def visible(value: str) -> str:
    """Control characters as their escapes; lines stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in value)


def page(title: str, version: str, body: Iterable[str]) -> str:
    """A whole document."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'{GENERATOR}{text(version)}">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{text(title)}</title>",
            f"<style>{CSS}</style>",
            "</head>",
            "<body>",
            *body,
            "</body>",
            "</html>",
            "",
        ]
    )


def is_ours(data: bytes) -> bool:
    """Whether a file is a page that mecq wrote, and may write anew."""
    return GENERATOR.encode() in data[:1000]


def section(name: str, title: str, body: Iterable[str]) -> str:
    """A part with a heading of the second order; ``name`` is what links lead to."""
    inner = "\n".join(body)
    heading = f'<h2 id="{name}-h">{text(title)}</h2>'
    return f'<section id="{name}" aria-labelledby="{name}-h">\n{heading}\n{inner}\n</section>'


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    numbers: Iterable[int] = (),
    kind: str = "",
) -> str:
    """A table whose first column names the rows.

    Args:
        columns: titles, as text.
        rows: cells, as HTML.
        caption: as text.
        numbers: columns that are set to the right.
        kind: a class for the table.
    """
    right = set(numbers)

    def style(index: int) -> str:
        return ' class="number"' if index in right else ""

    head = "".join(
        f'<th scope="col"{style(i)}>{text(title)}</th>' for i, title in enumerate(columns)
    )
    body = []
    for first, *others in rows:
        cells = "".join(f"<td{style(i)}>{cell}</td>" for i, cell in enumerate(others, 1))
        body.append(f'<tr><th scope="row"{style(0)}>{first}</th>{cells}</tr>')
    titled = f"<caption>{text(caption)}</caption>" if caption else ""
    top = f"<thead><tr>{head}</tr></thead>" if any(columns) else ""
    named = f' class="{kind}"' if kind else ""
    lines = "\n".join(body)
    # A region that scrolls must be reachable by the keyboard.
    return (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{text(caption or columns[0])}">'
        f"<table{named}>{titled}{top}<tbody>\n{lines}\n</tbody></table></div>"
    )


def figure(picture: str, caption: str, aside: str = "") -> str:
    """A picture (HTML) under its caption (text)."""
    more = f' <span class="soft">{text(aside)}</span>' if aside else ""
    return f"<figure><figcaption>{text(caption)}{more}</figcaption>{picture}</figure>"


def grid(figures: Iterable[str]) -> str:
    """Figures beside each other, as many as there is room for."""
    return '<div class="grid">\n' + "\n".join(figures) + "\n</div>"


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """(CSS background, text) of each line or bar."""
    items = "".join(
        f'<li><i style="background:{colour}"></i>{text(name)}</li>' for colour, name in entries
    )
    return f'<ul class="legend">{items}</ul>'


def beside(*parts: str) -> str:
    """Next to each other where there is room, else below."""
    return '<div class="beside">' + "\n".join(parts) + "</div>"


def column(inner: str) -> str:
    """A part of `beside` that grows to half of the page."""
    return f'<div class="column">{inner}</div>'


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """(what, figure, remark) as cards."""
    cards = "".join(
        f'<div class="tile"><dt>{text(what)}</dt><dd>{text(value)}'
        + (f"<small>{text(remark)}</small>" if remark else "")
        + "</dd></div>"
        for what, value, remark in entries
    )
    return f'<dl class="tiles">{cards}</dl>'


def details(summary: str, body: str) -> str:
    """What is shown when asked for."""
    return f"<details><summary>{text(summary)}</summary>\n{body}\n</details>"


def code(lines: str) -> str:
    """As it would be typed."""
    return f"<pre><code>{text(lines)}</code></pre>"


def percent(value: float | None, digits: int = 2) -> str:
    """With its sign, or a dash."""
    return "–" if value is None else f"{value:.{digits}f} %"


def signed(value: float, digits: int = 2) -> str:
    """With plus or minus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def size(value: float | None) -> str:
    """Bytes, as people say them."""
    if value is None:
        return "–"
    return f"{value / 1e6:.2f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB"


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}".replace("-", "−")
