"""What the features of networks are like."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import RenderableType

from mecq_cli.cli.render import Document
from mecq_cli.cli.views.cells import headed


def tables(document: Document) -> Iterable[RenderableType]:
    """The result of ``mecq bench features``."""
    yield f"{document['model']}, {document['images']} images"
    accuracy = headed("network", numbers=("train", "eval", "gap", "worst class"))
    for network in document["networks"]:
        worst = min(network["by_class"].items(), key=lambda item: item[1])
        numbers = (f"{network[key]:.2f}" for key in ("train_top1", "top1", "gap"))
        accuracy.add_row(network["name"], *numbers, f"{worst[0]} {worst[1]:.1f}")
    yield accuracy
    sites = headed("site", "network", numbers=("rank", "nats", "largest", "cosine", "CKA"))
    for i, first in enumerate(document["networks"][0]["sites"]):
        for network in document["networks"]:
            site = network["sites"][i]
            sites.add_row(
                first["site"],
                network["name"],
                f"{site['effective_rank']:.1f}",
                f"{site['coding_length']:.2f}",
                f"{100 * site['eigenvalues'][0]:.1f} %",
                f"{site['cosine']:.3f}",
                f"{site['cka']:.3f}",
            )
    yield sites
