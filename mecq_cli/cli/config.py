"""``mecq config``: the settings, and where each of them comes from."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any, get_type_hints

import typer

from mecq_cli.cli.common import flags_of
from mecq_cli.cli.quantize import quantize
from mecq_cli.errors import UsageError

config = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich")


@config.callback()
def start() -> None:
    """Example: mecq config show --wbits 2

    Look at settings before a run, or at those of a run.
    """


def show(ctx: typer.Context, **given: Any) -> None:
    """Example: [bold]mecq config show resnet18 --wbits 2 --config my.toml[/bold]

    Every setting of mecq quantize with its value and origin: default, file, or
    flag. MODEL may be a run folder: then its settings, as the file and these
    flags would change them.
    """
    from mecq_cli.cli import render
    from mecq_cli.cli.views import lists
    from mecq_cli.config import explain
    from mecq_cli.target import resolve_target

    file: Path | None = given["config"]
    flags = flags_of(ctx, "config")
    run = None
    if flags.get("model"):
        run = resolve_target(flags["model"]).run
        if run is not None:
            del flags["model"]
        elif "/" in flags["model"] and not flags["model"].startswith("torchvision/"):
            raise UsageError(f"{flags['model']}: no such run, nor the name of a model")
    document = explain(file, flags, None if run is None else run.config)
    render.show(document, lists.settings, as_json=given["as_json"])


# The same flags as `mecq quantize`, of which there is one list.
show.__signature__ = inspect.signature(quantize, eval_str=True)  # type: ignore[attr-defined]
show.__annotations__ = get_type_hints(quantize, include_extras=True)
config.command("show", short_help="Every setting, its value and its origin.")(show)
