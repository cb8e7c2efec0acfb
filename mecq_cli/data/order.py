"""Random numbers that depend on a key and a position only, never on who asks, or when.

They are the raw words of numpy's PCG64, a stream numpy keeps the same in all versions (which it
does not promise of ``Generator.permutation`` and its kin).
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """First part of every key, so that no two uses of one seed share a stream."""

    HOLD_OUT = 1
    ORDER = 2
    AUGMENT = 3


def random_words(count: int, purpose: Purpose, *key: int) -> NDArray[np.uint64]:
    """``count`` words of 64 bits; word ``i`` depends on ``(purpose, *key, i)`` alone.

    Args:
        count: how many.
        purpose: what they are for.
        key: non-negative integers, such as (seed, epoch).
    """
    words = np.random.PCG64(np.random.SeedSequence([purpose, *key])).random_raw(count)
    return np.asarray(words, dtype=np.uint64)


def permutation(count: int, purpose: Purpose, *key: int) -> NDArray[np.int64]:
    """The numbers 0 to ``count - 1`` in an order given by the key."""
    return np.argsort(random_words(count, purpose, *key), kind="stable").astype(np.int64)
