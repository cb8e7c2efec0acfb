"""Pictures as SVG, by matplotlib, which is an extra."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mecq_cli.errors import UsageError
from mecq_cli.report.figures import require
from mecq_cli.storage import atomic_write, require_writable


def figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes [rows, columns], in inches.

    Raises:
        EnvironmentFailure: matplotlib is missing.
    """
    require("--plot")
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "mecq"  # the same picture, the same bytes
    drawn = Figure(figsize=(width, height), layout="constrained")
    return drawn, drawn.subplots(rows, columns, squeeze=False)


def require_place(path: Path, *, force: bool) -> None:
    """Whether a picture can be drawn and written there, asked before the work.

    Raises:
        UsageError: the file exists, and ``force`` is False; or it has another ending.
        EnvironmentFailure: no permission, or matplotlib is missing.
    """
    if path.suffix != ".svg":
        raise UsageError(f"--plot {path}: it is drawn as SVG; give a name that ends in .svg")
    if path.exists() and not force:
        raise UsageError(f"--plot {path}: exists already; give --force to replace it")
    require("--plot")
    require_writable(path)


def save(drawn: Any, path: Path, *, force: bool) -> None:
    """Write a figure; its bytes depend neither on time nor on the machine."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    atomic_write(path, buffer.getvalue(), force=force)


def spectra(document: Mapping[str, Any], path: Path, *, force: bool) -> None:
    """Eigenvalues of the features of each network in ``document``, and beside the FP network's."""
    networks = document["networks"]
    sites = [[site["site"] for site in network["sites"]] for network in networks]
    drawn, axes = figure(2, len(sites[0]), 3.2 * len(sites[0]), 5.0)
    for i, name in enumerate(sites[0]):
        first = networks[0]["sites"][i]["eigenvalues"]
        for network in networks:
            values = network["sites"][i]["eigenvalues"]
            index = range(1, len(values) + 1)
            axes[0][i].plot(index, values, label=network["name"], linewidth=1.2)
            ratio = [a / b if b > 0 else float("nan") for a, b in zip(values, first, strict=True)]
            axes[1][i].plot(index, ratio, linewidth=1.2)
        axes[0][i].set_yscale("log")
        axes[0][i].set_title(name, fontsize=9)
        axes[1][i].set_xlabel("eigenvalue", fontsize=8)
        for panel in axes[:, i]:
            panel.set_xscale("log")
            panel.tick_params(labelsize=7)
    axes[0][0].set_ylabel("share of the variance", fontsize=8)
    axes[1][0].set_ylabel("beside the FP network's", fontsize=8)
    handles, labels = axes[0][0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    save(drawn, path, force=force)
