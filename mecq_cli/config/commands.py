"""Settings of the other commands, which come from flags alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from mecq_cli.settings import (
    Count,
    CountOrZero,
    CropPct,
    DataName,
    Name,
    Settings,
    SettingsModel,
    TaskName,
    UserPath,
    validated,
)


class EvalConfig(Settings):
    """What ``mecq eval`` does. ``target`` None is the latest run, ``data`` None its data."""

    target: str | None = None
    data: DataName | None = None
    task: TaskName = "auto"
    checkpoint: UserPath | None = None
    pretrained: bool = True
    split: Name | None = None
    simulator: bool = False
    img_size: Count | None = None
    crop_pct: CropPct | None = None
    batch_size: Count | None = None
    workers: CountOrZero | None = None
    device: Name = "auto"


class ExportConfig(Settings):
    """What ``mecq export`` does.

    Attributes:
        run: run folder or artifact; None is the latest run.
        format: onnx, compressed-tensors, or a name of mecq_cli.export.formats, checked there.
        profile: form of an ONNX file (see mecq_cli.export.onnx); None is "ort".
        verify: False writes the file unverified, True also replays it layer by layer; None
            compares the logits, and the layers of graphs that compute in float.
        output: the file; None names it after the artifact.
        data: images to verify on; None are those of the run.
        images: how many; None is 256.
        force: replace a file that exists.
    """

    run: str | None = None
    format: Name = "onnx"
    profile: Literal["ort", "portable", "qonnx"] | None = None
    verify: bool | None = None
    output: UserPath | None = None
    data: DataName | None = None
    images: Count | None = None
    force: bool = False


class PredictConfig(Settings):
    """What ``mecq predict`` does.

    Attributes:
        target: run, artifact or ONNX file.
        images: to look at.
        output: folder for the files of a network that segments or detects; None is the current
            one.
        force: replace masks that exist.
    """

    target: Name
    images: Annotated[tuple[UserPath, ...], Field(strict=False)]
    output: UserPath | None = None
    force: bool = False


class InspectConfig(Settings):
    """What ``mecq inspect`` does. ``target`` None is the latest run."""

    target: str | None = None


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
    images: Count = 5000
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


class DemoConfig(Settings):
    """What ``mecq demo`` does. ``output`` None is runs/demo."""

    output: UserPath | None = None
    force: bool = False


def from_flags(kind: type[SettingsModel], flags: Mapping[str, Any]) -> SettingsModel:
    """Settings of a small command. None stands for a flag that was not given.

    Raises:
        UsageError: a value out of its range.
    """
    given = {key: value for key, value in flags.items() if value is not None}
    return validated(kind, given, dict.fromkeys(given, "flag"))
