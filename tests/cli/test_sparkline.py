"""Curves in a line of text."""

from __future__ import annotations

import pytest

from mecq_cli.cli.sparkline import BLOCKS, Sparkline


@pytest.mark.parametrize("count", [0, 1, 2, 7, 511, 512, 513, 100_000])
def test_any_number_of_values_fits_and_keeps_its_shape(count: int) -> None:
    line = Sparkline()
    for number in range(count):
        line.add(float(number))
        line.add(float("nan"))
    text = line.text(20)
    if count < 2:
        assert text == ""
        return
    assert len(text) == min(count, 20)
    assert list(text) == sorted(text, key=BLOCKS.index)
    assert (text[0], text[-1]) == (BLOCKS[0], BLOCKS[-1])


def test_a_level_line_is_level() -> None:
    line = Sparkline()
    for _ in range(30):
        line.add(2.0)
    assert line.text(5) == BLOCKS[0] * 5
