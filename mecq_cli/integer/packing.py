"""Integers of 1 to 8 bits as a dense stream of bits.

Value i takes the bits i*b to i*b + b - 1 of the stream, and bit k of the stream is bit k % 8
(0 is the lowest) of byte k // 8: the first value lies in the low bits of the first byte. What
is left of the last byte is zero. A value v is stored as the unsigned code v + offset.

Weights of b >= 2 bits have the offset 2^(b-1), so that -2^(b-1) becomes 0, as in the
``pack-quantized`` layout of compressed-tensors; ONNX's INT2 and INT4 store two's complement
instead, which is the same code with its highest bit flipped. Weights on a mid-rise grid, which
has no zero (see `mecq_cli.integer.ir`), are 2 c - (2^b - 1) for the code c; those of 1 bit always
are: -1 and +1, stored as 0 and 1.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that ``count`` values of ``bits`` bits take."""
    _check_bits(bits)
    return (count * bits + 7) // 8


def layer_bytes(weights: int, channels: int, bits: int) -> int:
    """Bytes of a layer: its weights, packed or in float32, and a scale and a bias a channel."""
    return (4 * weights if bits == 32 else packed_bytes(weights, bits)) + 8 * channels


def pack(values: NDArray[Any], bits: int, offset: int = 0) -> NDArray[np.uint8]:
    """Integers of any shape, in C order, as uint8 [packed_bytes(values.size, bits)].

    Raises:
        ValueError: ``values`` are no integers, or not in [-offset, 2^bits - 1 - offset].
    """
    size = packed_bytes(values.size, bits)
    if values.dtype.kind not in "iu":
        raise ValueError(f"only integers can be packed, not {values.dtype}")
    if not values.size:
        return np.zeros(0, np.uint8)
    lowest, highest = int(values.min()), int(values.max())
    if lowest < -offset or highest > 2**bits - 1 - offset:
        raise ValueError(
            f"values lie in [{lowest}, {highest}], "
            f"{bits} bits hold [{-offset}, {2**bits - 1 - offset}]"
        )
    # Modulo 256 the sum is right even where it overflows the narrow type of the values.
    flat = values.ravel().astype(np.uint8) + np.uint8(offset % 256)
    if bits == 8:
        return flat
    # Eight codes fill exactly `bits` bytes: build them in one 64-bit word and keep those bytes.
    groups = np.zeros((-(-flat.size // 8), 8), np.uint8)
    groups.ravel()[: flat.size] = flat
    words = np.zeros(len(groups), np.dtype("<u8"))
    for i in range(8):
        words |= groups[:, i].astype(np.uint64) << np.uint64(i * bits)
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, 8)[:, :bits]).ravel()[:size]


def unpack(packed: NDArray[np.uint8], bits: int, count: int, offset: int = 0) -> NDArray[np.int16]:
    """The inverse of `pack`: ``count`` values, one-dimensional.

    Raises:
        ValueError: a wrong number of bytes, or bits after the last value that are not zero.
    """
    return _codes(packed, bits, count).astype(np.int16) - np.int16(offset)


def _codes(packed: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint8]:
    size = packed_bytes(count, bits)
    if packed.dtype != np.uint8 or packed.shape != (size,):
        raise ValueError(
            f"{count} values of {bits} bits take {size} bytes of uint8, "
            f"not {packed.dtype} {list(packed.shape)}"
        )
    if bits == 8:
        return packed
    if count * bits % 8 and packed[-1] >> (count * bits % 8):
        raise ValueError("the bits after the last value are not zero")
    words = np.zeros((-(-count // 8), 8), np.uint8)
    full, rest = divmod(size, bits)
    words[:full, :bits] = packed[: full * bits].reshape(full, bits)
    if rest:
        words[full, :rest] = packed[full * bits :]
    stream = words.view(np.dtype("<u8")).ravel()
    codes = np.empty((stream.size, 8), np.uint8)
    mask = np.uint64(2**bits - 1)
    for i in range(8):
        codes[:, i] = (stream >> np.uint64(i * bits)) & mask
    return codes.ravel()[:count]


def pack_weights(
    weight: NDArray[np.int8], bits: int, *, mid_rise: bool = False
) -> NDArray[np.uint8]:
    """An integer weight of any shape as a stream of bits; encoding as said above.

    Raises:
        ValueError: values that are not on the grid.
    """
    if bits > 1 and not mid_rise:
        return pack(weight, bits, 2 ** (bits - 1))
    top = 2**bits - 1
    if not (weight % 2).all():
        allowed = "-1 and +1" if bits == 1 else f"odd numbers from {-top} to {top}"
        raise ValueError(f"{bits}-bit weights are {allowed}, other values were found")
    return pack((weight.astype(np.int16) + top) // 2, bits)


def unpack_weights(
    packed: NDArray[np.uint8], bits: int, shape: tuple[int, ...], *, mid_rise: bool = False
) -> NDArray[np.int8]:
    """The inverse of `pack_weights`: int8 of ``shape``.

    Raises:
        ValueError: as `unpack`.
    """
    codes = _codes(packed, bits, math.prod(shape))
    if bits == 1 or mid_rise:
        weight = codes.view(np.int8) * np.int8(2) - np.int8(2**bits - 1)
    else:
        # Modulo 256 again: 8-bit codes wrap into the sign.
        weight = (codes - np.uint8(2 ** (bits - 1))).view(np.int8)
    return weight.reshape(shape)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"values have 1 to 8 bits, not {bits}")
