"""The pictures of a report, drawn by matplotlib (extra ``report``) for any colour scheme."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mecq_cli.errors import EnvironmentFailure
from mecq_cli.report.svg import inline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES = 8
"""Colours for lines; further ones begin again, dashed."""

_TEXT, _GRID, _FP, _INTEGER = "#010101", "#010102", "#010103", "#010104"
_STYLES = (("-", ""), ("--", ".4em"), (":", ".15em"))
"""Of lines whose colours begin again: for Matplotlib, and how long a dash is in a legend."""
_LINES = [f"#0202{number:02x}" for number in range(1, SERIES + 1)]
_CSS = {
    _TEXT: "currentColor",
    _GRID: "var(--line)",
    _FP: "var(--fp)",
    _INTEGER: "var(--integer)",
    **{told: f"var(--c{number})" for number, told in enumerate(_LINES, 1)},
}
"""What matplotlib is told, and the CSS it becomes."""

_PANEL = (4.3, 2.3)
_LAYER = (4.3, 1.45)
"""Inches; narrow enough for a telephone without shrinking the letters."""

_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "mecq",  # the same picture, the same bytes
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "text.color": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def require(what: str) -> None:
    """Check that a picture can be drawn.

    Args:
        what: the command or option that needs it, for the message.

    Raises:
        EnvironmentFailure: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise EnvironmentFailure(
            f"{what}: matplotlib is not installed; pip install 'mecq[report]'"
        ) from error


_MARKED = 30
"""Points of a curve that are marked: of one point there is no line."""


def curve(name: str, title: str, curve: Mapping[str, Any], unit: str = "") -> str:
    """One curve: every point thin, and smoothed."""

    def draw(axes: Axes) -> None:
        if curve["value"] != curve["smooth"]:
            axes.plot(curve["step"], curve["value"], color=_INTEGER, linewidth=0.7, alpha=0.4)
        axes.plot(
            curve["step"], curve["smooth"], color=_INTEGER, linewidth=1.8, marker=_marker(curve),
            ms=3,
        )  # fmt: skip
        _axes(axes, unit)

    said = f"{title}: from {curve['first']:.4g} to {curve['last']:.4g}"
    return _drawn(name, said, _PANEL, draw)


def curves(
    name: str,
    title: str,
    series: Mapping[str, Mapping[str, Any]],
    unit: str = "",
    order: Sequence[str] | None = None,
) -> str:
    """Several smoothed curves over each other.

    Args:
        name, title: see `inline`.
        series: curves by their names.
        unit: of the values.
        order: names whose places decide the colours, as in `legend`; None: those of ``series``.
    """
    places = list(series) if order is None else list(order)

    def draw(axes: Axes) -> None:
        for label, one in series.items():
            number = places.index(label)
            style, _ = _STYLES[number // SERIES % len(_STYLES)]
            colour = _LINES[number % SERIES]
            axes.plot(
                one["step"], one["smooth"], style, color=colour, linewidth=1.6, marker=_marker(one),
                ms=3,
            )  # fmt: skip
        _axes(axes, unit)

    ends = ", ".join(f"{label} {one['last']:.4g}" for label, one in list(series.items())[:12])
    return _drawn(name, f"{title}; at the end: {ends}", _PANEL, draw)


def _marker(curve: Mapping[str, Any]) -> str:
    return "o" if len(curve["step"]) <= _MARKED else ""


def _axes(axes: Axes, unit: str) -> None:
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.set_xlabel("step")
    if unit:
        axes.set_ylabel(unit)


def layer(name: str, title: str, row: Mapping[str, Any]) -> str:
    """Histograms of a layer, weights on the left and inputs on the right, before and after."""
    parts = [("weights", row.get("weights")), ("inputs", row.get("activations"))]
    known = [(label, part) for label, part in parts if part is not None]

    def draw(*panels: Axes) -> None:
        for axes, (label, part) in zip(panels, known, strict=True):
            _histogram(axes, part)
            axes.set_title(label, fontsize=9, pad=3)

    return _drawn(name, title, _LAYER, draw, columns=len(known))


def _histogram(axes: Axes, part: Mapping[str, Any]) -> None:
    """Bars of the codes, and the FP values as an outline, cut off where it would dwarf them."""
    bars = part["bars"]
    lefts, widths, heights = zip(*bars, strict=True)
    gap = 0.82 if part["codes"] <= 32 else 1.0
    inner = [left + width * (1 - gap) / 2 for left, width in zip(lefts, widths, strict=True)]
    axes.bar(
        inner, heights, [gap * width for width in widths], align="edge", color=_INTEGER, alpha=0.75
    )
    top = max(heights)
    if part["before"]:
        edges, density = zip(*part["before"], strict=True)
        step = edges[1] - edges[0]
        axes.stairs(density, [*edges, edges[-1] + step], color=_FP, linewidth=1.3)
        top = max(top, min(max(density), 1.6 * top))
        axes.set_xlim(edges[0], edges[-1] + step)
    axes.set_ylim(0, 1.06 * top)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    first, last = bars[0], bars[-1]
    codes = part["codes"]
    spacing = (last[0] + last[1] - first[0]) / codes
    low, high = first[0] + spacing / 2, last[0] + last[1] - spacing / 2
    ticks = [low + spacing * i for i in range(codes)] if codes <= 4 else [low, high]
    axes.set_xticks(ticks, [f"{round(tick)}".replace("-", "\u2212") for tick in ticks])


def legend(names: Sequence[str]) -> list[tuple[str, str]]:
    """(CSS background, name) for a legend in HTML of lines drawn by `curves`."""
    found = []
    for number, name in enumerate(names):
        colour, (_, on) = f"var(--c{number % SERIES + 1})", _STYLES[number // SERIES % len(_STYLES)]
        parts = f"{colour} 0 {on},transparent {on} calc({on} + .15em)"
        found.append((f"repeating-linear-gradient(90deg,{parts})" if on else colour, name))
    return found


def _drawn(
    name: str, title: str, size: tuple[float, float], draw: Callable[..., None], columns: int = 1
) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0.0)
        panels = figure.subplots(1, columns, squeeze=False)[0]
        for axes in panels:
            axes.patch.set_alpha(0.0)
        draw(*panels)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return inline(buffer.getvalue(), name, title, _CSS)
