"""`mecq report`: what there is to say about a run, as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mecq_cli import __version__
from mecq_cli.config import QuantizeConfig, ReportConfig
from mecq_cli.errors import UsageError
from mecq_cli.events import Listener
from mecq_cli.report import curves, figures, html, layers, page
from mecq_cli.runs import RunFolder
from mecq_cli.settings import OWN
from mecq_cli.sizes import site_rows, totals
from mecq_cli.storage import atomic_write, read_bytes_limited, require_writable
from mecq_cli.target import resolve_target
from mecq_cli.training.metrics import read_rows
from mecq_cli.workflow.allot import with_sensitivities
from mecq_cli.workflow.machine import facts
from mecq_cli.workflow.report_answers import answer
from mecq_cli.workflow.report_material import Material, open_material
from mecq_cli.workflow.report_runtime import look_at_runtime
from mecq_cli.workflow.report_seen import Seen

_LARGEST_PAGE = 64 * 2**20


def report(config: ReportConfig, listener: Listener) -> dict[str, Any]:
    """Measure what there is of a run and write RUN/report.html (or ``output``).

    Returns:
        The numbers of the page (see mecq_cli.report), "path" and "bytes" of the file.

    Raises:
        UsageError: the target is no run, or the file exists and is no report.
        EnvironmentFailure: matplotlib is missing.
        MecqError: see mecq_cli.errors.
    """
    figures.require("mecq report")
    run = _run(config.run)
    output = config.output or run.report
    force = may_replace(output, force=config.force)
    require_writable(output)
    material = open_material(run, config)
    document, pictures = _gathered(material, config, listener)
    listener.note("drawing")
    data = page.render(document, pictures).encode()
    atomic_write(output, data, force=force)
    return {**document, "path": str(output), "bytes": len(data)}


def may_replace(path: Path, *, force: bool) -> bool:
    """Whether a page may take the place of what is at ``path``: of an older page it may.

    Raises:
        UsageError: there is something else, or it has another name than pages have.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{path}: a page is a file that ends in .html; give such a name")
    if force or not path.exists():
        return force
    if path.is_file() and html.is_ours(read_bytes_limited(path, _LARGEST_PAGE)):
        return True
    raise UsageError(
        f"{path} exists and is no page that mecq wrote; --force overwrites it, or give another name"
    )


def _run(name: str | None) -> RunFolder:
    target = resolve_target(name)
    if target.run is None:
        raise UsageError(f"{target.name}: is no run folder; a report is about a run")
    return target.run


def _gathered(
    material: Material, asked: ReportConfig, listener: Listener
) -> tuple[dict[str, Any], dict[int, tuple[str, ...]]]:
    """The numbers of the page, and its pictures of images."""
    run, config, summary = material.run, material.config, material.summary
    maker = _maker(config, summary)
    document: dict[str, Any] = {
        "mecq": __version__,
        "run": str(run.path),
        "model": summary.get("model") or (config.model if config else None),
        "wbits": summary.get("wbits") or (config.wbits if config else None),
        "abits": summary.get("abits") or (config.abits if config else None),
        "finished": bool(summary.get("finished")),
        "summary": summary,
        "training": curves.gather(read_rows(run.metrics)),
        "machine": facts(),
        "maker": maker,
        "command": None
        if config is None or maker is not None
        else ["mecq", "quantize", "--config", str(run.config), "--output", f"{run.path}-again"],
        "settings": run.config.read_text(encoding="utf-8") if run.config.exists() else None,
        "left_out": material.left_out,
    }
    model = material.model
    if model is None:
        return document, {}
    for key in ("model", "wbits", "abits"):
        document[key] = model.metadata.get(key, document[key])
    fp32 = int(model.metadata.get("fp32_bytes", 0))
    document["sizes"] = totals(model, fp32, run.artifact.stat().st_size)
    seen = Seen(material, model, asked.images)
    seen.look(listener)
    document["layers"] = layers.gather(
        with_sensitivities(site_rows(model), config),
        model,
        seen.watched,
        seen.floats,
        material.simulator,
        seen.fp_weights,
    )
    document["watched_images"] = seen.watched_images
    answered = None
    if seen.dataset is not None:
        answered = answer(material, model, seen.dataset, seen.places, listener)
    document["answers"] = answered and answered.document
    document["runtime"] = look_at_runtime(run, model, material.fp, seen.some, listener)
    return document, answered.shown if answered else {}


def _maker(config: QuantizeConfig | None, summary: Mapping[str, Any]) -> str | None:
    """What alone can make the run again, where its images or its network are a program's own."""
    again: str | None = summary.get("again")
    if again is None and config and (config.model.startswith(OWN) or config.data.startswith(OWN)):
        return "the program that made it"
    return again
