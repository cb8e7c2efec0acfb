"""``mecq doctor``: is everything here that mecq needs?"""

from __future__ import annotations

import typer

from mecq_cli.cli.common import DebugFlag, JsonFlag, QuietFlag, working


def doctor(as_json: JsonFlag = False, quiet: QuietFlag = False, debug: DebugFlag = False) -> None:
    """Example: [bold]mecq doctor[/bold]

    Look for what mecq needs and could use: versions, CPU, GPU, compiler, disk,
    extras. Exit code 6 where something is missing that it cannot do without.
    """
    from mecq_cli.cli import render
    from mecq_cli.cli.views import lists

    with working(quiet=quiet):
        from mecq_cli.workflow.doctor import doctor as examine

        document = examine()
    render.show(document, lists.doctor, as_json=as_json)
    if not document["ok"]:
        raise typer.Exit(6)
