"""What quantization changed in the answers, as HTML: figures, confusion, classes, images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mecq_cli.report import html
from mecq_cli.report.html import percent, signed, text
from mecq_cli.report.predictions import WORST

Document = Mapping[str, Any]

MOST_ROWS = 20
"""Classes in the table."""


def answers_section(answers: Document, thumbnails: Mapping[int, Sequence[str]]) -> Iterator[str]:
    """The section, piece by piece."""
    yield _overview(answers)
    yield from _confusion(answers)
    yield _classes(answers)
    yield from _examples(answers, thumbnails)


def measured_on(answers: Document) -> str:
    """Which images were looked at: how the first sentence of a section begins."""
    images, total = answers["images"], answers["of"]
    part = f"all {images:,}" if images == total else f"{images:,} of {total:,}, evenly chosen,"
    return f"Measured anew for this report on {part} images of {text(answers['split'])}: "


def _overview(answers: Document) -> str:
    said = measured_on(answers)
    if answers["fp_top1"] is None:
        return f"<p>{said}the integer network is right on {percent(answers['integer_top1'])}.</p>"
    return (
        f"<p>{said}float {percent(answers['fp_top1'])}, integer "
        f"{percent(answers['integer_top1'])}. Both give the same answer on "
        f"{percent(answers['agreement'])}. Quantization lost {answers['lost']:,} images that the "
        f"float network had right, and won {answers['won']:,} that it had wrong.</p>"
    )


def _confusion(answers: Document) -> Iterator[str]:
    matrix = answers["confusion"]
    names, after, before = matrix["classes"], matrix["integer"], matrix["fp"]
    title = "Confusion, and its change" if before else "Confusion"
    yield f"<h3>{title}</h3>"
    shown = "" if len(names) == matrix["of"] else f"The {len(names)} classes that change most. "
    yield (
        f"<p>{shown}Rows are the true classes, columns the answers. "
        + (
            "Each cell is how many images more (+) or fewer (−) than the float network the "
            "integer network puts there; orange is for the worse, blue for the better."
            if before
            else "Each cell is a number of images."
        )
        + "</p>"
    )
    largest = max((abs(c) for c in _cells(after, before)), default=0) or 1
    head = "".join(f'<th scope="col"><span>{text(name)}</span></th>' for name in names)
    rows = "\n".join(
        f'<tr><th scope="row">{text(name)}</th>'
        + "".join(_cell(i, j, after, before, largest) for j in range(len(names)))
        + "</tr>"
        for i, name in enumerate(names)
    )
    label = "Change of the confusion matrix" if before else "Confusion matrix"
    drawn = (
        f'<div class="scroll" tabindex="0" role="group" aria-label="{label}">'
        f'<table class="matrix"><caption>{label}</caption><thead><tr><th scope="col">true</th>'
        f"{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>"
    )
    pairs = ""
    if answers["pairs"]:
        pairs = html.table(
            ["true class", "answer", "float", "integer"],
            [
                (text(p["class"]), text(p["said"]), _count(p["fp"]), _count(p["integer"]))
                for p in answers["pairs"]
            ],
            caption="Mistakes that grew most, in images" if before else "Mistakes, in images",
            numbers=(2, 3),
        )
    yield html.beside(drawn, pairs)


def _cells(after: list[list[int]], before: list[list[int]] | None) -> Iterator[int]:
    """The numbers that colours are measured by: changes, or else mistakes."""
    for i, row in enumerate(after):
        for j, count in enumerate(row):
            if before:
                yield count - before[i][j]
            elif i != j:
                yield count


def _cell(
    i: int, j: int, after: list[list[int]], before: list[list[int]] | None, largest: int
) -> str:
    count = after[i][j]
    value = count - before[i][j] if before else count
    worse = value < 0 if i == j else value > 0
    strength = 0.0 if not before and i == j else min(abs(value) / largest, 1.0) * 0.65
    colour = f' style="background:rgb(var(--{"bad" if worse else "good"})/{strength:.2f})"'
    marks = ' class="same"' if i == j else ""
    said = f"{value:+d}".replace("-", "−") if before and value else "0" if before else f"{count}"
    title = f' title="float {before[i][j]}, integer {count}"' if before else ""
    return f"<td{marks}{colour if value else ''}{title}>{said}</td>"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _classes(answers: Document) -> str:
    rows = answers["classes"]
    cells = []
    for row in rows[:MOST_ROWS]:
        drop = "–" if row["fp"] is None else signed(row["integer"] - row["fp"], 1)
        cells.append(
            (
                text(row["class"]),
                f"{row['images']:,}",
                percent(row["fp"], 1),
                percent(row["integer"], 1),
                drop,
            )
        )
    shown = f", the worst {MOST_ROWS} of {len(rows)}" if len(rows) > MOST_ROWS else ""
    return "<h3>Classes</h3>" + html.table(
        ["class", "images", "float", "integer", "change"],
        cells,
        caption=f"Top-1 by class, the worst first{shown}",
        numbers=(1, 2, 3, 4),
    )


def _examples(answers: Document, thumbnails: Mapping[int, Sequence[str]]) -> Iterator[str]:
    examples = answers["examples"]
    if not examples:
        return
    both = answers["fp_top1"] is not None
    yield "<h3>What went wrong in the worst classes</h3>"
    yield (
        "<p>Images that the float network had right and the integer network has wrong, the "
        "surest mistakes first.</p>"
        if both
        else "<p>Images that the integer network has wrong, the surest mistakes first.</p>"
    )
    for row in answers["classes"][:WORST]:
        mine = [e for e in examples if e["label"] == row["index"]]
        if mine:
            yield f"<h4>{text(row['class'])}, {percent(row['integer'], 1)}</h4>"
            items = "".join(_example(e, thumbnails.get(e["index"], ())) for e in mine)
            yield f'<ul class="images">{items}</ul>'


def _example(example: Document, pictures: Sequence[str]) -> str:
    said = f"{example['class']} taken for {example['integer']}"
    image = "".join(f'<img src="{picture}" alt="{text(said)}">' for picture in pictures)
    return (
        f'<li title="{text(example["path"])}">{image}{text(example["integer"])}<br>'
        f"{_sure(example['confidence'])}</li>"
    )


def _sure(confidence: float) -> str:
    return "over 99 %" if confidence > 0.99 else f"{100 * confidence:.0f} %"
