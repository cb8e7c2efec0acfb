"""The site table: layer by layer bits, scales and bytes, and the totals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mecq_cli.cli.errors import one_line
from mecq_cli.cli.live import duration
from mecq_cli.cli.render import Document
from mecq_cli.cli.views.cells import headed, megabytes, or_dash, pairs, plain, title
from mecq_cli.cli.views.run import add_allotment, add_sizes


def sites(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq inspect`` and of ``mecq quantize --dry-run``."""
    if document.get("model"):
        yield title(f"{document['model']}, W{document['wbits']} A{document['abits']}")
    rows = document["sites"]
    shown = [column for column in _SITE_COLUMNS if any(column.cell(row) for row in rows)]
    numbers = ("W/A", *(column.title for column in shown))
    table = headed("layer", "type", "shape", numbers=numbers)
    table.columns[0].min_width = 12
    for row in rows:
        shape = "x".join(str(size) for size in row.get("shape") or ())
        bits = f"{or_dash(row.get('wbits'))}/{or_dash(row.get('abits'))}"
        cells = [column.cell(row) for column in shown]
        table.add_row(plain(row["layer"]), plain(row.get("type", "")), shape, bits, *cells)
    yield table
    yield from _site_notes(rows)
    totals = pairs()
    add_allotment(totals, document.get("allotment"))
    add_sizes(totals, document.get("totals") or document.get("sizes"))
    if document.get("forecast"):
        _add_forecast(totals, document)
    if document.get("disk"):
        needed, free = document["disk"]["needed_bytes"], document["disk"]["free_bytes"]
        totals.add_row("disk of a run", f"{megabytes(needed)} ({megabytes(free)} are free)")
    yield totals
    if document.get("entropy"):
        yield _entropy(document["entropy"])


class _SiteColumn:
    """A column of the site table that is left out where no layer has it."""

    def __init__(self, title: str, cell: Callable[[Document], str]) -> None:
        self.title, self.cell = title, cell


def _weight_scales(row: Document) -> str:
    low, high = row.get("weight_scale_min"), row.get("weight_scale_max")
    if low is None or high is None:
        return ""
    return f"{low:.1e}" if low == high else f"{low:.1e}..{high:.1e}"


def _activation_scale(row: Document) -> str:
    scale = row.get("activation_scale")
    return "" if scale is None else f"{scale:.1e}"


def _thresholds(row: Document) -> str:
    """The first and the last, in steps of what is compared."""
    places = row.get("thresholds") or ()
    return "..".join(str(place) for place in sorted({*places[:1], *places[-1:]}))


def _packed_bytes(row: Document) -> str:
    size = row.get("packed_bytes")
    return "" if size is None else f"{size:,}"


def _sensitivity(row: Document) -> str:
    value = row.get("sensitivity")
    return "" if value is None else f"{value:.1e}"


_SITE_COLUMNS = (
    _SiteColumn("weight scales", _weight_scales),
    _SiteColumn("act. scale", _activation_scale),
    _SiteColumn("thresholds", _thresholds),
    _SiteColumn("bytes", _packed_bytes),
    _SiteColumn("sensitivity", _sensitivity),
)


def _site_notes(rows: Sequence[Document]) -> Iterable[RenderableType]:
    """Each remark once, with the layers that it is about."""
    layers: dict[str, list[str]] = {}
    for row in rows:
        if row.get("note"):
            layers.setdefault(one_line(str(row["note"])), []).append(one_line(str(row["layer"])))
    for note, names in layers.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        yield Text(f"{note}: {', '.join(names[:4])}{more}", style="dim")


def _add_forecast(table: Table, document: Document) -> None:
    """What the training will take, and what that is known from."""
    expected = document["forecast"]
    steps = f"{document['steps']} steps of {document['batch_size']} images"
    epochs = document["epochs"]
    table.add_row("training", f"{epochs} epoch{'s' * (epochs != 1)}, {steps}")
    table.add_row(
        "time",
        f"about {duration(expected['training_seconds'])}, from a measured step of "
        f"{expected['measured_images']} images, not compiled; images not read",
    )
    if document.get("compile") == "model":
        table.add_row("", "the first step compiles the network: a minute or two more, once")
    available = expected["available_bytes"]
    free = "" if available is None else f", {megabytes(available)} are free"
    memory, kept = (megabytes(expected[k]) for k in ("memory_bytes", "batch_bytes"))
    table.add_row("memory", f"at least {memory}, {kept} of it for a batch, from that step{free}")


def _entropy(rows: Sequence[Document]) -> Table:
    table = headed("coding length, nats", numbers=("first steps", "last steps"))
    for row in rows:
        table.add_row(plain(row["site"]), f"{row['first']:.2f}", f"{row['last']:.2f}")
    return table
