"""What can be found wrong before torch is loaded: that takes seconds, and a typo should not."""

from __future__ import annotations

from pathlib import Path


def check_training(data: str, val_split: float | None, checkpoint: Path | None) -> None:
    """Whether the images have the folders of a training, and the weight file is there.

    Raises:
        MecqError: as `mecq_cli.layout` says it.
    """
    from mecq_cli import layout

    found = layout.layout_if_folder(data)
    if found is not None:
        kind, splits = found
        layout.check_splits(data, splits, val_split, kind)
    if checkpoint is not None:
        layout.check_weight_file(checkpoint)


def check_target(
    target: str | None, data: str | None = None, checkpoint: Path | None = None
) -> None:
    """Whether what a command is about is there, and the folder of its images.

    Raises:
        MecqError: as `mecq_cli.target.resolve_target` and `mecq_cli.layout` say it.
    """
    from mecq_cli import layout
    from mecq_cli.target import resolve_target

    resolve_target(target)
    if data is not None:
        layout.layout_if_folder(data)
    if checkpoint is not None:
        layout.check_weight_file(checkpoint)
