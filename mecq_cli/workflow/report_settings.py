"""Settings of `mecq report` and `mecq compare`; light, so that a wrong one is told at once."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mecq_cli.settings import Count, DataName, Name, Settings, UserPath

IMAGES = 5000
"""Looked at where nothing else is asked for."""


class ReportConfig(Settings):
    """What ``mecq report`` does.

    Attributes:
        run: run folder; None is the latest run.
        output: the page; None is report.html in the run.
        data: images; None are those of the run.
        images: how many at most, evenly from all classes.
        force: replace a file that is no report.
    """

    run: str | None = None
    output: UserPath | None = None
    data: DataName | None = None
    images: Count = IMAGES
    force: bool = False


class CompareConfig(Settings):
    """What ``mecq compare`` does.

    Attributes:
        runs: run folders, two or more.
        html: a page to write, with curves over each other.
        force: replace a file that is no page of ours.
    """

    runs: Annotated[tuple[Name, ...], Field(strict=False)]
    html: UserPath | None = None
    force: bool = False
