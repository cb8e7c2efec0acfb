"""A value times one number: no product that many elements share lies on a half."""

from __future__ import annotations

import numpy as np
import pytest

from mecq_cli.integer.ir import Grid
from mecq_cli.sites.ties import away_from_halves

SOURCE = Grid(0.013215141370892525, 0, 8, 0, 255)
TARGET = Grid(0.14686313271522522, 0, 4, 0, 15)


def _tensors(scales: list[float]) -> dict[str, np.ndarray]:
    count = len(scales)
    return {
        "weight": np.full((count, 1, 1, 1), 127, np.int8),
        "weight_scale": np.array(scales, np.float32),
        "bias": np.zeros(count, np.int32),
    }


def _nearest(scale: float) -> float:
    steps = 127.0 * np.arange(256) * scale * SOURCE.scale / TARGET.scale
    return float((np.abs(steps - np.floor(steps) - 0.5) / np.maximum(steps, 1)).min())


def test_a_tie_is_avoided_by_a_change_that_is_not_felt() -> None:
    scale = 0.007721108  # 17 times it is one and a half steps of the output, but for 1e-7
    before = _tensors([scale] * 3)
    assert _nearest(float(before["weight_scale"][0])) < 2e-7
    after = away_from_halves(before, 1, SOURCE, TARGET)
    found = after["weight_scale"]
    assert (found == found[0]).all()
    assert float(found[0]) == pytest.approx(scale, rel=7e-5)
    assert _nearest(float(found[0])) > 4e-7
    np.testing.assert_array_equal(after["weight"], before["weight"])


def test_channels_of_their_own_and_what_has_no_tie_stay_as_they_are() -> None:
    mixed = _tensors([0.007721108, 0.0075])
    assert away_from_halves(mixed, 1, SOURCE, TARGET) is mixed
    plain = _tensors([0.0071, 0.0071])
    np.testing.assert_array_equal(
        away_from_halves(plain, 1, SOURCE, TARGET)["weight_scale"], plain["weight_scale"]
    )
