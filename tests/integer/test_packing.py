"""Bit streams against a slow definition in plain Python, and what they must refuse."""

from __future__ import annotations

import time

import numpy as np
import pytest

from mecq_cli.integer.packing import pack, pack_weights, packed_bytes, unpack, unpack_weights


def bits_by_definition(codes: list[int], bits: int) -> bytes:
    """Value i at bits i*b ...: one huge integer, written from its low end."""
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    return number.to_bytes((len(codes) * bits + 7) // 8, "little")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 63, 64, 65, 1000])
def test_stream_is_what_the_definition_says(bits: int, count: int) -> None:
    rng = np.random.default_rng(bits * 1000 + count)
    codes = rng.integers(0, 2**bits, count)
    offset = 2 ** (bits - 1)
    packed = pack(codes - offset, bits, offset)
    assert packed.tobytes() == bits_by_definition(codes.tolist(), bits)
    assert packed.size == packed_bytes(count, bits)
    assert (unpack(packed, bits, count, offset) == codes - offset).all()


def test_first_value_lies_in_the_low_bits() -> None:
    assert pack_weights(np.array([-2, -1, 0, 1, 1], np.int8), 2).tolist() == [0b11_10_01_00, 0b11]
    assert pack_weights(np.array([1, -1, -1, 1], np.int8), 1).tolist() == [0b1001]
    assert pack_weights(np.array([-128, 127], np.int8), 8).tolist() == [0, 255]


@pytest.mark.parametrize("bits", range(1, 9))
def test_weights_come_back_in_their_shape(bits: int) -> None:
    rng = np.random.default_rng(bits)
    shape = (5, 3, 3, 3)
    if bits == 1:
        weight = rng.choice([-1, 1], shape).astype(np.int8)
    else:
        weight = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, np.int8)
    # A transposed view: the stream follows the C order of the shape, not of the memory.
    weight = np.moveaxis(np.ascontiguousarray(np.moveaxis(weight, 1, 3)), 3, 1)
    back = unpack_weights(pack_weights(weight, bits), bits, shape)
    assert back.dtype == np.int8
    assert (back == weight).all()


@pytest.mark.parametrize(
    ("values", "bits", "offset"),
    [([4], 2, 0), ([-1], 2, 0), ([2], 2, 2), ([-3], 2, 2), ([256], 8, 0), ([2**40], 8, 0)],
)
def test_values_out_of_range_are_refused(values: list[int], bits: int, offset: int) -> None:
    with pytest.raises(ValueError, match=f"{bits} bits hold"):
        pack(np.array(values), bits, offset)


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="only integers"):
        pack(np.zeros(3), 2)
    with pytest.raises(ValueError, match="1 to 8 bits, not 9"):
        pack(np.zeros(3, np.int8), 9)
    with pytest.raises(ValueError, match=r"-1 and \+1"):
        pack_weights(np.array([0, 1], np.int8), 1)
    with pytest.raises(ValueError, match="take 2 bytes"):
        unpack(np.zeros(3, np.uint8), 3, 4)


@pytest.mark.parametrize("bits", range(1, 8))
def test_bits_after_the_last_value_must_be_zero(bits: int) -> None:
    packed = pack(np.zeros(3, np.int8), bits)
    for unused in range(3 * bits, 8 * packed.size):
        dirty = packed.copy()
        dirty[unused // 8] |= 1 << unused % 8
        with pytest.raises(ValueError, match="not zero"):
            unpack(dirty, bits, 3)


@pytest.mark.parametrize("bits", range(1, 9))
def test_millions_of_values_take_well_under_a_second(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, 4_000_003, np.uint8)
    start = time.process_time()
    assert (unpack(pack(codes, bits), bits, codes.size) == codes).all()
    assert time.process_time() - start < 1
