"""The documents that the library returns, as JSON or as tables of at most 80 columns."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mecq_cli.cli.errors import one_line
from mecq_cli.cli.live import duration
from mecq_cli.errors import UsageError
from mecq_cli.tasks.figures import DETECT, figures_of

Document = Mapping[str, Any]
View = Callable[[Document], Iterable[RenderableType]]

_SHOWN_BOXES = 10
"""Of an image; the others are in its file."""
# Where no terminal sets a width, nothing is cut or folded.
_UNLIMITED = 1000


def show(document: Document, view: View, *, as_json: bool) -> None:
    """Print the result on stdout, and see that it arrived."""
    text = _as_json(document) if as_json else _as_tables(document, view)
    try:
        # By the line: where stdout is unbuffered, Python takes a large write that was cut short
        # by a closed pipe for a success.
        sys.stdout.writelines(text.splitlines(keepends=True))
        sys.stdout.flush()
    except BrokenPipeError as error:
        # The reader went away. What is still buffered must not fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from error


def _as_json(document: Document) -> str:
    return json.dumps(_finite(document), indent=2, allow_nan=False) + "\n"


def _as_tables(document: Document, view: View) -> str:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _UNLIMITED)
    with console.capture() as capture:
        for part in view(document):
            console.print(part)
    # rich fills the last column up.
    return "".join(line.rstrip() + "\n" for line in capture.get().splitlines())


def next_command(*commands: Sequence[str]) -> None:
    """Say on stderr what to type next: one command, or one of several."""
    console = Console(stderr=True, highlight=False)
    for number, words in enumerate(commands):
        lead = "  or: " if number else "next: "
        console.print(Text.assemble(lead, (shlex.join(words), "bold")), soft_wrap=True)


def next_page(path: str) -> None:
    """Say on stderr where to look at a page; terminals make a link of it."""
    console = Console(stderr=True, highlight=False)
    console.print(Text.assemble("open: ", (Path(path).absolute().as_uri(), "bold")), soft_wrap=True)


def after_quantize(document: Document) -> list[str]:
    """The command that follows on a run: its export, or its continuation."""
    run = str(document["run"])
    if document.get("finished") is False:
        return ["mecq", "quantize", "--resume", "--output", run]
    return about_run("export", run)


LARGE_DROP = 5.0
"""Points below the float model from which on advice is given."""


def advice(document: Document) -> None:
    """Where much accuracy was lost, say on stderr what to try."""
    of = figures_of(document)
    reference, value = document.get(f"fp_{of.key}"), document.get(of.key)
    if not document.get("fp_trained", True) or reference is None or value is None:
        return
    if reference - value < LARGE_DROP:
        return
    ways = ["--recipe best or more --epochs"]
    if document["abits"] < 4:
        ways.append("--abits 4 (the file stays as small)")
    wbits = document["wbits"]
    if not isinstance(wbits, int):  # the average of a target
        ways.append("a larger target")
    elif wbits < 4:
        ways.append(f"--wbits {wbits + 1}, or --target-avg-bits {wbits}.5")
    text = f"{reference - value:.1f} points below float; to lose less: {', '.join(ways)}"
    Console(stderr=True, highlight=False).print(Text(text), soft_wrap=True)


def about_run(command: str, run: str) -> list[str]:
    """A command on a run; the latest one need not be named."""
    from mecq_cli.runs import latest_run

    try:
        is_latest = latest_run().path.absolute() == Path(run).absolute()
    except UsageError:
        is_latest = False
    return ["mecq", command] if is_latest else ["mecq", command, run]


def after_look(target: str) -> list[str] | None:
    """What follows on a look at a run: its export, or, where that is done, its report."""
    from mecq_cli.runs import RunFolder

    run = RunFolder(Path(target))
    if not run.artifact.is_file():
        return None
    return about_run("report" if run.onnx.is_file() else "export", target)


def summary(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq quantize``."""
    yield _title(f"{document['model']}, W{document['wbits']} A{document['abits']}")
    table = _pairs()
    of = figures_of(document)
    reference = document.get(f"fp_{of.key}")
    if document.get("fp_trained", True):
        table.add_row(f"float {of.label}", _percent(reference))
    else:
        table.add_row(f"float {of.label}", f"{_percent(reference)}  (untrained: no measure)")
        reference = None
    for key, label in (
        (f"simulator_{of.key}", "quantized, simulator"),
        (of.key, "quantized, integer"),
    ):
        table.add_row(label, _percent(document.get(key)) + _drop(document.get(key), reference))
    _add_allotment(table, document.get("allotment"))
    _add_sizes(table, document.get("sizes"))
    if document.get("images"):
        table.add_row("measured on", f"{document['images']} images")
    if document.get("resumed_at") is not None:
        table.add_row("resumed at", f"step {document['resumed_at']}")
    if document.get("seconds") is not None:
        table.add_row("time", duration(document["seconds"]))
    table.add_row("run", _plain(document["run"]))
    yield table


def evaluation(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq eval``."""
    yield _title(document["target"])
    table = _pairs()
    table.add_row("kind", _plain(document["kind"]))
    of = figures_of(document)
    for key, label in {of.key: of.label, **of.others}.items():
        if key != "top5" or document.get("num_classes", 1000) > 5:  # else 100 %, whatever it does
            table.add_row(label, _percent(document[key]))
    if of.by_class:
        key, label = of.by_class
        for name, value in zip(document["classes"], document[key], strict=True):
            if value is not None:
                table.add_row(f"{label} of {_plain(name)}", _percent(value))
            elif document["task"] != DETECT:  # of COCO's classes most are not there
                table.add_row(f"{label} of {_plain(name)}", "not there")
    table.add_row("measured on", f"{document['images']} images of {_plain(document['split'])}")
    table.add_row("time", duration(document["seconds"]))
    yield table


def exported(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq export``."""
    yield _title(document["path"])
    table = _pairs()
    table.add_row("format", _format(document))
    table.add_row("size", _megabytes(document["bytes"]))
    table.add_row("verified", _verified(document))
    for way in document.get("replay", {}).get("ways", ()):
        table.add_row(_plain(way["way"]), _differing(way, document["replay"]))
    saturation = document.get("saturation")
    if saturation:
        table.add_row("8-bit sums", _plain(saturation["cpu_text"]))
        if saturation["layers"]:
            where = _few(saturation["layers"])
            table.add_row("", f"{where} may saturate on CPUs without VNNI: see --reduce-range")
    if document.get("config"):
        table.add_row("described by", _plain(document["config"]))
    if document.get("snippet"):
        table.add_row("use it with", _plain(document["snippet"]))
    yield table


def predictions(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq predict``."""
    for prediction in document["predictions"]:
        yield _title(prediction["image"])
        table = _pairs()
        for found in prediction.get("classes", ()):
            table.add_row(
                f"{found['share']:6.2f} %", f"{_plain(found['class'])} ({found['index']})"
            )
        for found in prediction.get("detections", ())[:_SHOWN_BOXES]:
            corners = ", ".join(f"{corner:.0f}" for corner in found["box"])
            table.add_row(
                f"{100 * found['score']:6.2f} %",
                f"{_plain(found['class'])} ({found['index']}) at {corners}",
            )
        for key in ("mask", "boxes", "overlay"):
            if key in prediction:
                table.add_row(key, _plain(prediction[key]))
        for candidate in prediction.get("top5", ()):
            probability = f"{100 * candidate['probability']:6.2f} %"
            table.add_row(probability, f"{_plain(candidate['class'])} ({candidate['index']})")
        yield table


def sites(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq inspect`` and of ``mecq quantize --dry-run``."""
    if document.get("model"):
        yield _title(f"{document['model']}, W{document['wbits']} A{document['abits']}")
    rows = document["sites"]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("layer", overflow="fold", min_width=12)
    table.add_column("type", overflow="fold")
    table.add_column("shape", overflow="fold")
    table.add_column("W/A", justify="right", no_wrap=True)
    shown = [column for column in _SITE_COLUMNS if any(column.cell(row) for row in rows)]
    for column in shown:
        table.add_column(column.title, justify="right", no_wrap=True)
    for row in rows:
        shape = "x".join(str(size) for size in row.get("shape") or ())
        bits = f"{_or_dash(row.get('wbits'))}/{_or_dash(row.get('abits'))}"
        cells = [column.cell(row) for column in shown]
        table.add_row(_plain(row["layer"]), _plain(row.get("type", "")), shape, bits, *cells)
    yield table
    yield from _site_notes(rows)
    totals = _pairs()
    _add_allotment(totals, document.get("allotment"))
    _add_sizes(totals, document.get("totals") or document.get("sizes"))
    if document.get("forecast"):
        _add_forecast(totals, document)
    if document.get("disk"):
        needed, free = document["disk"]["needed_bytes"], document["disk"]["free_bytes"]
        totals.add_row("disk of a run", f"{_megabytes(needed)} ({_megabytes(free)} are free)")
    yield totals
    if document.get("entropy"):
        yield _entropy(document["entropy"])


def models(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq models``."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for title in ("model", "level", "reason"):
        table.add_column(title, overflow="fold")
    for row in document["models"]:
        table.add_row(_plain(row["model"]), row["level"], _plain(row["reason"]))
    yield table
    yield Text(
        "verified: quantized, exported, compared; captured: gets its quantizers; no: is refused",
        style="dim",
    )


def _add_forecast(table: Table, document: Document) -> None:
    """What the training will take, and what that is known from."""
    expected = document["forecast"]
    steps = f"{document['steps']} steps of {document['batch_size']} images"
    table.add_row("training", f"{document['epochs']} epochs, {steps}")
    table.add_row(
        "time",
        f"about {duration(expected['training_seconds'])}, from a measured step of "
        f"{expected['measured_images']} images, not compiled; images not read",
    )
    available = expected["available_bytes"]
    free = "" if available is None else f", {_megabytes(available)} are free"
    memory, kept = (_megabytes(expected[k]) for k in ("memory_bytes", "batch_bytes"))
    table.add_row("memory", f"at least {memory}, {kept} of it for a batch, from that step{free}")


def doctor(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq doctor``."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("", "what", "found", "needed"):
        table.add_column(title, overflow="fold")
    signs = {"ok": "ok", "missing": "MISSING", "absent": "-"}
    for row in document["checks"]:
        table.add_row(signs[row["state"]], *(_plain(row[k]) for k in ("what", "found", "needed")))
    yield table
    missing = [row["what"] for row in document["checks"] if row["state"] == "missing"]
    enough = "everything that is needed is here"
    yield Text(f"missing or too old: {', '.join(missing)}" if missing else enough)


def settings(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq config show``."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("setting", "value", "origin"):
        table.add_column(title, overflow="fold")
    for key, row in document["settings"].items():
        value = "(not given)" if row["value"] is None else json.dumps(row["value"])
        if row["origin"] == "missing":
            value = "(must be given)"
        table.add_row(key, _plain(value), row["origin"])
    yield table


def _entropy(rows: Sequence[Document]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("coding length, nats", overflow="fold")
    for title in ("first steps", "last steps"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(_plain(row["site"]), f"{row['first']:.2f}", f"{row['last']:.2f}")
    return table


def reported(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq report``."""
    yield _title(document["path"])
    table = _pairs()
    table.add_row("size", _megabytes(document["bytes"]))
    table.add_row("about", _plain(document["run"]))
    for line in document["left_out"]:
        table.add_row("left out", _plain(line))
    yield table


def demo(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq demo``: of the run, and of each file that was exported."""
    yield from summary(document)
    for export in document.get("exports", ()):
        yield from exported(export)


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


def _title(text: object) -> Text:
    return Text(one_line(str(text)), style="bold")


def _pairs() -> Table:
    """A table of names and values."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _add_sizes(table: Table, sizes: Document | None) -> None:
    """What is None is not known, as the float size of a lone artifact may be."""
    if not sizes:
        return
    size = _megabytes(sizes["packed_bytes"])
    if sizes.get("fp32_bytes") and sizes.get("ratio"):
        size = f"{_megabytes(sizes['fp32_bytes'])} -> {size}, {sizes['ratio']:.1f} times smaller"
    table.add_row("size", size)
    if sizes.get("ideal_bytes"):
        over = 100 * (sizes["packed_bytes"] / sizes["ideal_bytes"] - 1)
        table.add_row("ideal size", f"{_megabytes(sizes['ideal_bytes'])} ({over:+.1f} %)")


def _add_allotment(table: Table, allotment: Document | None) -> None:
    """What a target came to: average and bytes, and how it was met."""
    if not allotment:
        return
    bits = str(allotment["target_avg_bits"]).removesuffix(".0")
    asked = allotment["target_size"] or f"{bits} bits"
    reached = f"{allotment['average_bits']:.2f} bits a weight on average, "
    reached += f"{_megabytes(allotment['weight_bytes'])} with scales and biases"
    table.add_row("weights", f"{reached} (target: {_plain(asked)})")
    if allotment.get("seconds") is None:
        return
    proven = "the optimum" if allotment["optimal"] else f"within {100 * allotment['gap']:.2g} %"
    table.add_row(
        "allotted by",
        f"{allotment['sensitivity']}, {proven}; {allotment['images']} images, "
        f"{duration(allotment['seconds'])}",
    )


def _format(document: Document) -> str:
    if not document.get("profile"):
        return _plain(document["format"])
    return f"{document['format']}, profile {document['profile']}, opset {document['opset']}"


def _verified(document: Document) -> str:
    if not document["verified"]:
        return "no"
    images, agreement = document["images"], document.get("top1_agreement", 100.0)
    if document.get("profile") == "qonnx":
        return f"by layers; top-1 as in the simulator on {agreement:.2f} % of {images} images"
    many = next((key for key in ("pixels", "anchors") if document.get(key)), None)
    if agreement < 100.0 and many:
        return f"same class as in the simulator for {agreement:.4f} % of {many}, {images} images"
    return f"equal to the simulator on {images} images"


def _differing(way: Document, replay: Document) -> str:
    """How many integers of a way of running the file are not the reference's."""
    text = f"{way['differing']:,} of {way['compared']:,} integers differ"
    if way["left_out"]:
        text += f" ({way['left_out']:,} left out: float32 cannot resolve them)"
    if way["differing"]:
        text += f", by one step ({_few(way['differing_layers'])})"
    return f"{text}; {replay['layers']} layers, {replay['images']} images"


def _few(names: Sequence[str]) -> str:
    """The first names of a list."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return _plain(", ".join(names[:3])) + more


def _megabytes(size: int) -> str:
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _drop(value: float | None, reference: float | None) -> str:
    return "" if value is None or reference is None else f"  ({value - reference:+.2f})"


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _plain(value: object) -> str:
    """For a table's cell, where text is markup; class and file names may hold anything."""
    return escape(one_line(str(value)))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; null says that there is no number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
