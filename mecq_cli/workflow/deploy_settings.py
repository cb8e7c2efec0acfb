"""Settings of `mecq bench deploy`; light, so that a wrong one is told before torch is loaded."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator

from mecq_cli.settings import Bits, Count, DataName, Positive, ResidualBits, Settings, UserPath

MODEL_ONLY = (
    *("wbits", "abits", "first_last_bits", "residual_bits"),
    *("checkpoint", "img_size"),
)
"""What an artifact says for itself."""


def _numbers(text: object) -> object:
    """1,8 -> (1, 8)."""
    if not isinstance(text, str):
        return text
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and 1 <= int(part) <= 1024 for part in parts):
        raise ValueError("whole numbers from 1 to 1024 with commas, as in 1,8")
    return tuple(dict.fromkeys(int(part) for part in parts))


Counts = Annotated[tuple[int, ...], BeforeValidator(_numbers)]


class DeployConfig(Settings):
    """What ``mecq bench deploy`` does.

    Attributes:
        target: run folder, integer artifact or model name; None is the latest run.
        wbits, abits, first_last_bits, residual_bits: of a model that is named.
        checkpoint: its weights; None: random ones.
        img_size: its input; None: its own.
        data: images to calibrate with; None: synthetic ones.
        calibration_images: how many.
        threads: within an operation of onnxruntime.
        batch_sizes: images at a time.
        seconds: for each combination of threads and batch size.
        repeats: rounds of each combination instead.
        plot: an .svg file to write.
        force: replace it.
    """

    target: str | None = None
    wbits: Bits | None = None
    abits: Bits | None = None
    first_last_bits: Bits | None = None
    residual_bits: ResidualBits | None = None
    checkpoint: UserPath | None = None
    img_size: Count | None = None
    data: DataName | None = None
    calibration_images: Count = 32
    threads: Counts = (1, 2)
    batch_sizes: Counts = (1, 8)
    seconds: Positive | None = None
    repeats: Count | None = None
    plot: UserPath | None = None
    force: bool = False
