"""An export that computes something else is not called verified."""

from __future__ import annotations

import numpy as np
import pytest

from mecq_cli.errors import VerificationError
from mecq_cli.verify import Comparison, compare

LOGITS = np.random.default_rng(0).normal(0, 3, (1000, 10)).astype(np.float32)


def compared(got: np.ndarray) -> Comparison:
    result = Comparison()
    result.add(LOGITS[:600], got[:600])
    result.add(LOGITS[600:], got[600:])
    return result


def test_the_last_rounding_may_differ() -> None:
    result = compared(LOGITS * np.float32(1 + 1e-6))
    result.require("net.onnx", exact=True)
    assert (result.images, result.agree) == (1000, 1000)
    assert 0 < result.largest_difference < 1e-5


def flipped(count: int) -> np.ndarray:
    """``count`` images lose their class."""
    got = LOGITS.copy()
    for i in range(count):
        got[700 + i, LOGITS[700 + i].argmax()] = -9
    return got


def test_mismatches_are_listed_with_their_margin() -> None:
    with pytest.raises(VerificationError) as caught:
        compared(flipped(2)).require("net.onnx", exact=False)
    message = str(caught.value)
    top = np.sort(LOGITS[700])[-2:]
    assert f"#700 (margin {top[1] - top[0]:.2g})" in message
    assert "998 of 1000 images" in message
    assert message.startswith("net.onnx: ")


def test_one_in_a_thousand_may_flip_where_floats_lie_between() -> None:
    compared(flipped(1)).require("net.onnx", exact=False)
    with pytest.raises(VerificationError):
        compared(flipped(1)).require("net.onnx", exact=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("index", [0, 5])
def test_nan_is_a_difference(value: float, index: int) -> None:
    got = LOGITS.copy()
    got[3, index] = value
    with pytest.raises(VerificationError):
        compared(got).require("net.onnx", exact=True)


def test_small_differences_of_a_wrong_file_are_seen() -> None:
    with pytest.raises(VerificationError, match="logits differ by up to"):
        compared(LOGITS + np.float32(0.01)).require("net.onnx", exact=True)


def test_nothing_compared_is_nothing_shown() -> None:
    with pytest.raises(VerificationError):
        compare(lambda x: x, lambda x: x, []).require("net.onnx", exact=True)
