"""The layers of a run, as HTML: a table, and histograms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mecq_cli.report import figures, html
from mecq_cli.report.html import text

Document = Mapping[str, Any]

MOST_DRAWN = 1_100_000
"""Characters of all histograms together; a page is to stay below 2 MB."""

_CONVERSIONS = ("quantize", "requantize", "threshold")
"""What they put out is what the layers behind them read, which is told there."""


def layers_section(document: Document) -> Iterator[str]:
    """The site table with entropy and clipping."""
    rows = document["layers"]
    images = document["watched_images"]
    counted = f"Codes of activations were counted on {images:,} images. " if images else ""
    yield (
        f"<p>{counted}Entropy is that of the codes in bits: as many as the grid has means that all "
        "codes are equally frequent. Of a layer with weights, activations are what it reads; of "
        "any other, what it puts out.</p>"
        '<p class="soft">Clipped are weights more than half a step, and activations that would '
        "be rounded, beyond the last code; values that a ReLU makes zero do not count. "
        "Weight scales have the batch norm folded in. A dash: not measured, or nothing to "
        "measure.</p>"
    )
    if any("sensitivity" in row for row in rows):
        yield (
            '<p class="soft">Below the bits: the sensitivity, which is what rounding the weights '
            "of this layer alone to its bits cost before the training. By that a target gave the "
            "layers their bits.</p>"
        )
    yield html.table(
        [
            "layer", "operation", "bits W/A", "bytes", "weight scale", "activation scale",
            "weight entropy", "weights clipped", "activation entropy", "activations clipped",
        ],
        [_row(row) for row in rows if row["type"] not in _CONVERSIONS],
        caption="Layers in the order of execution",
        numbers=range(2, 10),
        kind="wide",
    )  # fmt: skip
    notes = list(dict.fromkeys(row["note"] for row in rows if row.get("note")))
    for note in notes:
        names = ", ".join(row["layer"] for row in rows if row.get("note") == note)
        yield f'<p class="soft">{text(note)}: {text(names)}</p>'


def _row(row: Document) -> tuple[str, ...]:
    shape = "×".join(str(n) for n in row.get("shape") or ())
    wbits, abits = row.get("wbits"), row.get("abits")
    weights, activations = row.get("weights"), row.get("activations")
    cost = row.get("sensitivity")
    below = "" if cost is None else f'<br><span class="soft">{cost:.1e}</span>'
    return (
        text(row["layer"]),
        f'{text(row["type"])} <span class="soft">{shape}</span>',
        f"{_or_dash(wbits)}/{_or_dash(abits)}{below}",
        f"{row['packed_bytes']:,}" if row["packed_bytes"] else "–",
        _range(row.get("weight_scale_min"), row.get("weight_scale_max")),
        _or_dash(row.get("activation_scale"), ".3g"),
        _entropy(weights, wbits),
        _clipped(weights),
        _entropy(activations, abits),
        _clipped(activations),
    )


def _or_dash(value: Any, form: str = "") -> str:
    return "–" if value is None else format(value, form)


def _range(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return "–"
    return f"{low:.2g}" if low == high else f"{low:.2g} to {high:.2g}"


def _entropy(part: Document | None, bits: int | None) -> str:
    if part is None or not bits:
        return "–"
    share = min(part["entropy"] / bits, 1.0)
    meter = (
        f'<span class="meter" aria-hidden="true"><i style="width:{100 * share:.0f}%"></i></span>'
    )
    return f"{meter}{part['entropy']:.2f} of {bits}"


def _clipped(part: Document | None) -> str:
    if part is None or part["clipped"] is None:
        return "–"
    return f"{100 * part['clipped']:.2f} %"


def histograms_section(document: Document) -> Iterator[str]:
    """Weights and inputs of each layer, before and after; as many as there is room for."""
    rows = [
        (number, row)
        for number, row in enumerate(document["layers"])
        if row.get("shape") and (row.get("weights") or row.get("activations"))
    ]
    yield (
        "<p>One axis for both: the codes of the grid. Bars are the integers. Lines are the float "
        "network's weights and activations before quantization, divided by the steps that were "
        "learned; they are left out where they could not be measured. Heights are densities, "
        "cut off where the line would dwarf the bars.</p>"
    )
    yield html.legend([("var(--fp)", "before, float"), ("var(--integer)", "after, integers")])
    drawn: list[str] = []
    room = MOST_DRAWN
    for number, row in rows:
        said = [_said("weights", row.get("weights")), _said("inputs", row.get("activations"))]
        title = f"{row['layer']}: {'; '.join(said)}"
        picture = figures.layer(f"layer-{number}", title, row)
        room -= len(picture)
        if room < 0:
            break
        bits = f"W{_or_dash(row['wbits'])} A{_or_dash(row['abits'])}"
        drawn.append(html.figure(picture, row["layer"], bits))
    yield html.grid(drawn)
    if len(drawn) < len(rows):
        yield (
            f'<p class="note">The first {len(drawn)} of {len(rows)} layers are drawn, to keep '
            "the page small; <code>mecq report --json</code> has the numbers of all.</p>"
        )


def _said(what: str, part: Document | None) -> str:
    if part is None:
        return f"{what} not measured"
    return f"{what} use {part['used']} of {part['codes']} codes, entropy {part['entropy']:.2f} bits"
