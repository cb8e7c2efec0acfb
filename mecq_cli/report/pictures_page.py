"""What quantization changed in answers that are drawn, as HTML: figures, classes, images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mecq_cli.report import html
from mecq_cli.report.answers_page import measured_on
from mecq_cli.report.html import percent, signed, text

Document = Mapping[str, Any]

MOST_ROWS = 30
"""Classes in the table."""

TITLES = ("picture", "true", "float", "integer")
"""Of the pictures of an example; without the FP network there is no third one."""


def pictures_section(answers: Document, pictures: Mapping[int, Sequence[str]]) -> Iterator[str]:
    """The section, piece by piece.

    Args:
        answers: what `pictures.gather` made.
        pictures: data URIs by the "index" of an example, in the order of `TITLES`.
    """
    yield _overview(answers)
    if answers["classes"]:
        yield _classes(answers)
    yield from _examples(answers, pictures)


def _overview(answers: Document) -> str:
    figure, said = text(answers["figure"]), measured_on(answers)
    if answers["fp"] is None:
        return f"<p>{said}integer {percent(answers['integer'])} {figure}.</p>"
    return (
        f"<p>{said}float {percent(answers['fp'])} {figure}, integer "
        f"{percent(answers['integer'])}. Image by image, with the {figure} of that image alone: "
        f"quantization made {answers['worse']:,} worse and {answers['better']:,} better; "
        f"{answers['same']:,} stayed as they were.</p>"
    )


def _classes(answers: Document) -> str:
    rows, name = answers["classes"], answers["by_class"]
    cells = [
        (
            _swatch(row["colour"]) + text(row["class"]),
            percent(row["fp"], 1),
            percent(row["integer"], 1),
            "–" if row["fp"] is None else signed(row["integer"] - row["fp"], 1),
        )
        for row in rows[:MOST_ROWS]
    ]
    shown = f", the worst {MOST_ROWS} of {len(rows)}" if len(rows) > MOST_ROWS else ""
    return "<h3>Classes</h3>" + html.table(
        ["class", "float", "integer", "change"],
        cells,
        caption=f"{name} by class, the worst first{shown}",
        numbers=(1, 2, 3),
    )


def _swatch(colour: str | None) -> str:
    """The colour that a class is drawn in; an empty place for one that is not drawn."""
    filled = f' style="background:{text(colour)}"' if colour else ""
    return f'<i class="swatch"{filled}></i>'


def _examples(answers: Document, pictures: Mapping[int, Sequence[str]]) -> Iterator[str]:
    examples = [e for e in answers["examples"] if pictures.get(e["index"])]
    if not examples:
        return
    yield "<h3>The worst images</h3>"
    yield (
        f"<p>By the {text(answers['figure'])} of the integer network on each image alone, the "
        "worst first. Where the float network does no better, the picture is hard; where it does, "
        "quantization is to blame.</p>"
    )
    rows = "\n".join(_example(e, pictures[e["index"]]) for e in examples)
    yield f'<ul class="answers">\n{rows}\n</ul>'


def _example(example: Document, pictures: Sequence[str]) -> str:
    known = TITLES if example["fp"] is not None else (*TITLES[:2], TITLES[3])
    figures = {
        "picture": text(example["path"]),
        "float": f"float, {percent(example['fp'], 1)}",
        "integer": f"integer, {percent(example['integer'], 1)}",
    }
    shown = "".join(
        f'<figure><img src="{uri}" alt="{text(example["path"])}: {title}">'
        f'<figcaption class="soft">{figures.get(title, title)}</figcaption></figure>'
        for title, uri in zip(known, pictures, strict=True)
    )
    return f"<li>{shown}</li>"
