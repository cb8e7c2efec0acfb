"""A file that was exported, and how it was compared."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType

from mecq_cli.cli.render import Document
from mecq_cli.cli.views.cells import few, megabytes, pairs, plain, title


def exported(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq export``."""
    yield title(document["path"])
    table = pairs()
    table.add_row("format", _format(document))
    table.add_row("size", megabytes(document["bytes"]))
    table.add_row("verified", _verified(document))
    for way in document.get("replay", {}).get("ways", ()):
        table.add_row(plain(way["way"]), _differing(way, document["replay"]))
    saturation = document.get("saturation")
    if saturation:
        table.add_row("8-bit sums", plain(saturation["cpu_text"]))
        if saturation["layers"]:
            where = few(saturation["layers"])
            table.add_row("", f"{where} may saturate on CPUs without VNNI: see --reduce-range")
    if document.get("config"):
        table.add_row("described by", plain(document["config"]))
    if document.get("snippet"):
        table.add_row("use it with", plain(document["snippet"]))
    yield table


def _format(document: Document) -> str:
    if not document.get("profile"):
        return plain(document["format"])
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
    if not way["compared"]:
        return "no integers to compare: what the layers put out is float"
    text = f"{way['differing']:,} of {way['compared']:,} integers differ"
    if way["left_out"]:
        text += f" ({way['left_out']:,} left out: float32 cannot resolve them)"
    if way["differing"]:
        text += f", by one step ({few(way['differing_layers'])})"
    return f"{text}; {replay['layers']} layers, {replay['images']} images"
