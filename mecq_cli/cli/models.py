"""``mecq models``: which models are known to work."""

from __future__ import annotations

from typing import Annotated

import typer

from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag


def models(
    pattern: Annotated[
        str | None,
        typer.Argument(
            metavar="PATTERN",
            help="Part of a name, or a pattern such as 'resnet*'. Default: all.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Example: [bold]mecq models efficientnet[/bold]

    Models that were tried, and how far each goes: verified (quantized,
    exported, compared), captured (it gets its quantizers), or not, and why.
    Others may work too; what tells: mecq quantize NAME --no-pretrained
    --data DIR --wbits 4 --abits 4 --dry-run
    """
    from mecq_cli.cli import render
    from mecq_cli.cli.views import lists
    from mecq_cli.errors import UsageError
    from mecq_cli.models.supported import matching, near, supported

    known = supported()
    names = sorted(known) if pattern is None else matching(pattern, sorted(known))
    if not names:
        _tell_of_other_tasks(str(pattern))
        close = near(str(pattern), list(known), "torchvision/")
        hint = f"did you mean {', '.join(close)}? " if close else ""
        raise UsageError(
            f"no model that was tried fits {pattern!r}; {hint}others may work, which is told by "
            "mecq quantize NAME --no-pretrained --data DIR --wbits 4 --abits 4 --dry-run"
        )
    rows = [{"model": n, "level": known[n][0], "reason": known[n][1]} for n in names]
    render.show({"models": rows}, lists.models, as_json=as_json)


def _tell_of_other_tasks(pattern: str) -> None:
    """Networks of torchvision's that segment or detect, of which no list was made."""
    from mecq_cli.errors import UsageError
    from mecq_cli.models.detection import detection_names
    from mecq_cli.models.segmentation import segmentation_names
    from mecq_cli.models.supported import matching

    for verb, names, page in (
        ("segment", segmentation_names(), "segmentation"),
        ("detect", detection_names(), "detection"),
    ):
        fitting = list(names) if pattern.startswith(verb) else matching(pattern, names)
        if fitting:
            raise UsageError(
                f"the list is of models that classify; those that {verb} are "
                f"{', '.join(fitting)} (docs/{page}.md)"
            )
