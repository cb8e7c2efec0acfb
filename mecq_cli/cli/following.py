"""What to type next, or to open: said on stderr, so that stdout holds the result alone."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from mecq_cli.cli.render import Document
from mecq_cli.errors import MecqError, UsageError
from mecq_cli.tasks.figures import figures_of

if TYPE_CHECKING:
    from mecq_cli.runs import RunFolder


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
    if document.get("allotment"):
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


def after_look(target: str, data: str | None = None) -> list[str] | None:
    """What follows on a look at a run: its export, or, where that is done, its report.

    Args:
        target: the run.
        data: images that were given for it; None: its own are used, if they are there.
    """
    from mecq_cli.runs import RunFolder

    run = RunFolder(Path(target))
    if not run.artifact.is_file():
        return None
    command = about_run("report" if run.onnx.is_file() else "export", target)
    if _has_images(run):
        return command
    return None if data is None else [*command, "--data", data]


def _has_images(run: RunFolder) -> bool:
    """Whether the images that a run was made with are still where they were, as far as is known."""
    from mecq_cli.config import from_toml
    from mecq_cli.settings import OWN, split_data_name

    try:
        data = from_toml(run.config).data
    except MecqError:
        return False
    prefix, where = split_data_name(data)
    return not data.startswith(OWN) and (bool(prefix) or Path(where).exists())
