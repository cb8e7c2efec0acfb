"""The results of the support matrix: docs/support.json, its page, and the list in the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mecq_cli.models.supported import FILE
from tests.studies.support.models import MODELS

DOCS = Path(__file__).parents[3] / "docs"
RESULTS, PAGE = DOCS / "support.json", DOCS / "support.md"
STEPS = ("quantize", "evaluate", "onnx", "safetensors")
HEAD = """\
# Supported models

Each row is a network with random weights that was taken through all steps on a CPU: two training
steps of 8 images, evaluation as integers, export as ONNX (profile ort) and as safetensors. Each
file was compared with the simulator, the ONNX file without optimizations too, layer by layer. So a
row says that every operation of the network has an exact integer form; it says nothing about its
accuracy after training.

`mecq models [PATTERN]` lists these networks, refused ones included.

Made by `python -m tests.studies.support`; the results are in `support.json` beside this page.
"""


def load() -> dict[str, Any]:
    """All results: `models` by name, and `captured`."""
    if not RESULTS.exists():
        return {"models": {}, "captured": {}}
    document: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return document


def store(part: str, name: str, found: dict[str, Any]) -> None:
    """Keep a result."""
    document = load()
    document[part][name] = found
    RESULTS.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def fill() -> None:
    """Make the page and the list from the results."""
    document = load()
    PAGE.write_text(_page(document["models"]), encoding="utf-8")
    listed: dict[str, list[str]] = {}
    for name, found in document["captured"].items():
        listed[name] = ["captured", ""] if found["capture"] is True else ["no", found["capture"]]
    for name, found in document["models"].items():
        reason = _reason(found)
        if reason is None:
            listed[name] = ["verified", ""]
        elif found["quantize"] is not True:
            listed[name] = ["no", reason]
        else:
            listed[name] = ["captured", reason]
    text = json.dumps(listed, indent=0, sort_keys=True)
    FILE.write_text(text + "\n", encoding="utf-8")


def _reason(found: dict[str, Any]) -> str | None:
    return next((found[step] for step in STEPS if isinstance(found.get(step), str)), None)


def _page(models: dict[str, Any]) -> str:
    good = sum(_reason(found) is None for found in models.values())
    lines = [HEAD, f"{good} of {len(models)} go all the way.", ""]
    lines += ["| model | kind | input | bits | quantize | evaluate | ONNX | safetensors |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    reasons = []
    for model in MODELS:
        found = models.get(model.name)
        if found is None:
            continue
        marks = [
            {True: "yes"}.get(found.get(step), "no" if step in found else "") for step in STEPS
        ]
        first = [
            f"`{model.name}`",
            model.kind,
            f"{found['size']} px",
            f"W{found['bits']} A{found['bits']}",
        ]
        lines.append("| " + " | ".join([*first, *marks]) + " |")
        reason = _reason(found)
        if reason is not None:
            reasons.append(f"* `{model.name}`: {reason}")
    if reasons:
        lines += ["", "## Why not", "", *reasons]
    return "\n".join(lines) + "\n"
