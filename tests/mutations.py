"""Ways in which a file goes bad. Used by the tests of every format that must notice."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path


def mutations(data: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """``count`` damaged copies of a safetensors file, each with a name that tells what was done;
    all differ from ``data``."""
    rng = random.Random(seed)
    ways = (bit_flip, header_bit_flip, bytes_replaced, zeroed, cut, appended, swapped, inserted)
    made = 0
    while made < count:
        way = rng.choice(ways)
        damaged = way(data, rng)
        if damaged != data:
            made += 1
            yield f"{way.__name__} {made} (seed {seed})", damaged


def overwrite(path: Path, data: bytes) -> None:
    """New content for a file that exists; much faster than to make it anew each time."""
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


def header_end(data: bytes) -> int:
    return 8 + int(struct.unpack_from("<Q", data)[0])


def bit_flip(data: bytes, rng: random.Random, end: int | None = None) -> bytes:
    at = rng.randrange(end or len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def header_bit_flip(data: bytes, rng: random.Random) -> bytes:
    return bit_flip(data, rng, header_end(data))


def bytes_replaced(data: bytes, rng: random.Random) -> bytes:
    """A digit, a bracket or a letter of the header becomes another one: often still JSON."""
    at = rng.randrange(8, header_end(data))
    return data[:at] + bytes([rng.choice(b'0123456789-.e"[]{},:tn aF')]) + data[at + 1 :]


def zeroed(data: bytes, rng: random.Random) -> bytes:
    at, length = rng.randrange(len(data)), rng.choice((1, 8, 64, 512))
    run = data[at : at + length]
    return data[:at] + bytes(len(run)) + data[at + length :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((rng.randrange(len(data)), len(data) - rng.randrange(1, 16)))]


def appended(data: bytes, rng: random.Random) -> bytes:
    return data + rng.choice((b"\0", b" ", b"\n", rng.randbytes(rng.randrange(1, 100))))


def swapped(data: bytes, rng: random.Random) -> bytes:
    """Two stretches of the body change places, as two tensors would."""
    size = rng.randrange(1, 64)
    a = rng.randrange(header_end(data), len(data) - 2 * size)
    b = rng.randrange(a + size, len(data) - size + 1)
    return (
        data[:a] + data[b : b + size] + data[a + size : b] + data[a : a + size] + data[b + size :]
    )


def inserted(data: bytes, rng: random.Random) -> bytes:
    """Something goes into the header, and its length is put right again."""
    end = header_end(data)
    at = rng.choice((end, 9, rng.randrange(8, end + 1)))
    junk = rng.choice((b" ", b"        ", b'"x":1,', b"\n", b"0", b'"__metadata__":{},'))
    return struct.pack("<Q", end - 8 + len(junk)) + data[8:at] + junk + data[at:]
