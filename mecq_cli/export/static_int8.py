"""onnxruntime's own 8-bit quantization of a float ONNX model, to compare an integer export with."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mecq_cli.errors import ArtifactError, first_line
from mecq_cli.integer.ir import INPUT

Array = NDArray[np.float32]


def static_int8(model: onnx.ModelProto, images: Sequence[Array]) -> bytes:
    """The same network by ``onnxruntime.quantization.quantize_static``.

    Q/DQ pairs around each operation, weights int8 with a scale per channel, activations uint8 with
    the smallest and largest values over the images as their range (its default).

    Args:
        model: with the input "input", float32.
        images: batches [N, C, H, W], normalised.

    Returns:
        the content of an ONNX file.

    Raises:
        ArtifactError: onnxruntime cannot quantize the model.
    """
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch}

    with tempfile.TemporaryDirectory() as folder, _silent():
        source, target = Path(folder) / "float.onnx", Path(folder) / "static.onnx"
        onnx.save_model(model, source)
        try:
            quantization.quantize_static(
                source,
                target,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        except Exception as error:  # onnxruntime has no common base class for its errors
            raise ArtifactError(
                f"onnxruntime cannot quantize this model itself: {first_line(error)}"
            ) from error
        return target.read_bytes()


@contextmanager
def _silent() -> Iterator[None]:
    """It recommends a preparation that has nothing to do in our files: batch norm is folded."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
