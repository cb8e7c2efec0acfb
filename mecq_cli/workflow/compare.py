"""`mecq compare`: runs side by side, from what they wrote down."""

from __future__ import annotations

from typing import Any

from mecq_cli import __version__
from mecq_cli.config import FLAG_ONLY, CompareConfig, QuantizeConfig
from mecq_cli.errors import UsageError
from mecq_cli.events import Listener
from mecq_cli.report import comparison, curves, figures
from mecq_cli.runs import RunFolder, read_summary
from mecq_cli.storage import atomic_write
from mecq_cli.target import resolve_target
from mecq_cli.tasks.figures import FIGURES, figures_of
from mecq_cli.training.metrics import read_rows
from mecq_cli.workflow.report import may_replace
from mecq_cli.workflow.targets import settings_of

# Nor what follows from the others.
_NOT_COMPARED = FLAG_ONLY | {"output", "allotted", "allotment", "chosen"}


def compare(config: CompareConfig, listener: Listener) -> dict[str, Any]:
    """Put runs beside each other; nothing is measured anew.

    Returns:
        "runs": for each its name, results, final losses and whether it is finished; "differing":
        a row a setting that is not the same in all, with its value in each; "unknown": runs whose
        settings are not known; "html" and "bytes", where a page was written.

    Raises:
        UsageError: fewer than two runs, one that is none, or a file that is in the way.
        EnvironmentFailure: matplotlib is missing for the page.
        MecqError: see mecq_cli.errors.
    """
    if len(config.runs) < 2:
        raise UsageError(f"RUN: got {len(config.runs)}; give two or more run folders to compare")
    if config.html is not None:
        figures.require("--html")
        force = may_replace(config.html, force=config.force)
    folders = [_run(name) for name in config.runs]
    settings = [settings_of(run) for run in folders]
    rows = [read_rows(run.metrics) for run in folders]
    document: dict[str, Any] = {
        "runs": [
            _one(name, run, own, steps)
            for name, run, own, steps in zip(config.runs, folders, settings, rows, strict=True)
        ],
        "differing": differing(settings),
        "unknown": [n for n, own in zip(config.runs, settings, strict=True) if own is None],
    }
    if config.html is not None:
        listener.note("drawing")
        trainings = [curves.gather(steps) for steps in rows]
        data = comparison.render(document, trainings, __version__).encode()
        atomic_write(config.html, data, force=force)
        document |= {"html": str(config.html), "bytes": len(data)}
    return document


def _run(name: str) -> RunFolder:
    target = resolve_target(name)
    if target.run is None:
        raise UsageError(f"{name}: is no run folder; give run folders to compare")
    return target.run


def _one(
    name: str, run: RunFolder, config: QuantizeConfig | None, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    summary = read_summary(run)
    sizes = summary.get("sizes") or {}
    of = figures_of(summary)
    if not summary.get("fp_trained", True):  # what such a network knows is no measure
        summary = {key: value for key, value in summary.items() if not key.startswith("fp_")}
    fp, reached = summary.get(f"fp_{of.key}"), summary.get(of.key)
    keys = [key for o in FIGURES.values() for key in (f"fp_{o.key}", o.key)]
    training = curves.gather(rows)
    found = training.get("curves", {})
    lengths = found.get("coding_length", {})
    ends = {key: curve["last"] for key, curve in found.items() if key in curves.KEYS}
    return {
        "run": name,
        "finished": bool(summary.get("finished")),
        "model": summary.get("model") or (config.model if config else None),
        "wbits": summary.get("wbits") or (config.wbits if config else None),
        "abits": summary.get("abits") or (config.abits if config else None),
        **{key: summary.get(key) for key in keys},
        "drop": None if fp is None or reached is None else reached - fp,
        "images": summary.get("images"),
        "packed_bytes": sizes.get("packed_bytes"),
        "ratio": sizes.get("ratio"),
        "steps": training.get("steps") if summary.get("steps") is None else summary["steps"],
        "seconds": summary.get("seconds"),
        "step_seconds": ends.get("seconds"),
        "loss_task": ends.get("loss_task"),
        "loss_mec": ends.get("loss_mec"),
        **{o.train_key: ends.get(o.train_key) for o in FIGURES.values()},
        "coding_length": {site: curve["last"] for site, curve in lengths.items()},
    }


def differing(settings: list[QuantizeConfig | None]) -> list[dict[str, Any]]:
    """The settings that are not the same in all runs, with their values; None: not known."""
    documents = [
        None if config is None else config.model_dump(mode="json", exclude=set(_NOT_COMPARED))
        for config in settings
    ]
    rows = []
    for key in QuantizeConfig.model_fields:
        if key in _NOT_COMPARED:
            continue
        values = [None if document is None else document[key] for document in documents]
        known = [v for v, document in zip(values, documents, strict=True) if document is not None]
        if any(value != known[0] for value in known[1:]):
            rows.append({"setting": key, "values": values})
    return rows
