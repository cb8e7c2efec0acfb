"""Draws docs/results/curves.svg: how the final models learned, epoch by epoch."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from mecq_cli.storage import atomic_write

PANELS = (
    ("train_top1", "top-1 of the training batches, %"),
    ("loss_task", "task loss"),
    ("loss_mec", "entropy term"),
)
SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "mecq",  # the same figures, the same bytes
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(folder: Path) -> bool:
    """One panel a quantity, one line a model of ``folder``; False where there is none yet."""
    curves = {p.name.split(".")[0]: _read(p) for p in sorted(folder.glob("*.curve.json"))}
    if not curves:
        return False
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(10.5, 3.0), layout="constrained")
        for axes, (key, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
            for name, rows in curves.items():
                epochs = [row["epoch"] + 1 for row in rows]
                axes.plot(epochs, [row[key] for row in rows], label=_label(name))
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("epoch")
            axes.grid(axis="y", linewidth=0.4, color="#cccccc")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
        text = io.BytesIO()
        figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None})
    atomic_write(folder / "curves.svg", text.getvalue(), force=True)
    return True


def _label(name: str) -> str:
    """Of a final model: ``resnet20_cifar-w2a2`` is "ResNet-20 W2 A2"."""
    model, bits = name.rsplit("-", 1)
    depth = model.removeprefix("resnet").removesuffix("_cifar")
    weights, activations = bits.removeprefix("w").split("a")
    return f"ResNet-{depth} W{weights} A{activations}"


def _read(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return rows
