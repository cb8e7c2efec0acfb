"""Runs side by side, as HTML: results, settings that differ, curves over each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mecq_cli.report import figures, html
from mecq_cli.report.curves import PANELS
from mecq_cli.report.html import percent, signed, size, text
from mecq_cli.tasks.figures import FIGURES

Document = Mapping[str, Any]


def _minus(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")


ROWS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    *((of.key, f"integer {of.label}", percent) for of in FIGURES.values()),
    *((f"fp_{of.key}", f"float {of.label}", percent) for of in FIGURES.values()),
    ("drop", "change, in points", signed),
    ("images", "images", "{:,}".format),
    ("packed_bytes", "artifact", size),
    ("ratio", "times smaller than float", "{:.1f}".format),
    ("steps", "steps", "{:,}".format),
    ("seconds", "time, s", "{:,.1f}".format),
    ("step_seconds", "step at the end, s", "{:.3f}".format),
    ("loss_task", "task loss at the end", "{:.3f}".format),
    ("loss_mec", "entropy term at the end", _minus),
    *((of.train_key, f"{of.train_label}, at the end", percent) for of in FIGURES.values()),
)
"""What is said of each run: its key, its name, and how it is written."""


def written(key: str, value: Any) -> str:
    """A value of `ROWS` as text; a dash where it is not known."""
    form = next(form for name, _, form in ROWS if name == key)
    return "–" if value is None else form(value)


def names(runs: Sequence[Document]) -> list[str]:
    """A short and unique name for each run: what its path does not share with all others."""
    paths = [str(run["run"]).rstrip("/").split("/") for run in runs]
    shared = 0
    while paths and all(len(p) > shared + 1 and p[shared] == paths[0][shared] for p in paths):
        shared += 1
    short = ["/".join(path[shared:]) for path in paths]
    return [
        name if short.count(name) == 1 else f"{name} ({number})"
        for number, name in enumerate(short, 1)
    ]


def render(document: Document, trainings: Sequence[Document], version: str) -> str:
    """The whole page.

    Args:
        document: what `mecq_cli.workflow.compare` gathered.
        trainings: of each run, what `curves.gather` gives.
        version: of mecq.
    """
    called = names(document["runs"])
    title = f"{len(called)} runs compared"
    body = [
        f"<header><h1>{text(title)}</h1></header>",
        "<main>",
        html.section("results", "Results", _results(document["runs"], called)),
        html.section("settings", "Settings that differ", _settings(document, called)),
    ]
    if any(trainings):
        body.append(html.section("training", "Training", _training(trainings, called)))
    return html.page(title, version, [*body, "</main>"])


def _results(runs: Sequence[Document], called: Sequence[str]) -> Iterator[str]:
    rows = [
        (text(label), *(written(key, run[key]) for run in runs))
        for key, label, _ in ROWS
        if any(run[key] is not None for run in runs)
    ]
    yield html.table(["figure", *called], rows, numbers=range(1, len(called) + 1))
    unfinished = [name for name, run in zip(called, runs, strict=True) if not run["finished"]]
    if unfinished:
        yield f'<p class="note">Not finished: {text(", ".join(unfinished))}</p>'


def _settings(document: Document, called: Sequence[str]) -> Iterator[str]:
    rows = document["differing"]
    if document["unknown"]:
        yield f"<p>Not known of: {text(', '.join(document['unknown']))}</p>"
    if not rows:
        yield "" if document["unknown"] else "<p>None: all runs have the same settings.</p>"
        return
    cells = [
        (text(row["setting"]), *(text(setting(value)) for value in row["values"])) for row in rows
    ]
    yield html.table(["setting", *called], cells)


def setting(value: Any) -> str:
    """As a person would say it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _training(trainings: Sequence[Document], called: Sequence[str]) -> Iterator[str]:
    yield html.legend(figures.legend(called))
    known = [training.get("curves", {}) for training in trainings]
    drawn = []
    for key, title, unit in PANELS:
        series = {n: c[key] for n, c in zip(called, known, strict=True) if key in c}
        if series:
            picture = figures.curves(f"curve-{key.replace('_', '-')}", title, series, unit, called)
            drawn.append(html.figure(picture, title))
    sites = dict.fromkeys(site for c in known for site in c.get("coding_length", {}))
    for number, site in enumerate(sites):
        series = {
            n: c["coding_length"][site]
            for n, c in zip(called, known, strict=True)
            if site in c.get("coding_length", {})
        }
        title = f"Coding length, {site}"
        picture = figures.curves(f"curve-coding-{number}", title, series, "nats", called)
        drawn.append(html.figure(picture, title))
    yield html.grid(drawn)
