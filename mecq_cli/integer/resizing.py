"""Where bilinear resizing finds its values, for `mecq_cli.integer.reference`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mecq_cli.integer.ir import Node


def resize(node: Node, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """[N, C, H, W] to the size of the node: rows are mixed, then columns, in float32."""
    height, width = node.attributes["size"]
    corners = bool(node.attributes["align_corners"])
    for axis, size in ((2, height), (3, width)):
        low, high, share = places(x.shape[axis], size, align_corners=corners)
        share = share.reshape(-1, *[1] * (3 - axis))
        x = np.take(x, low, axis) * (np.float32(1) - share) + np.take(x, high, axis) * share
    return x


def places(
    before: int, after: int, *, align_corners: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Which two values each new one lies between, and the share of the second one.

    Pixel centres lie at half numbers, and the outer ones are the border: torch's
    ``align_corners=False`` and ONNX's ``half_pixel``. With ``align_corners`` the centres of the
    outer pixels fall together, before and after.
    """
    index = np.arange(after, dtype=np.float64)
    if align_corners:
        place = index * (before - 1) / max(after - 1, 1)
    else:
        place = np.clip((index + 0.5) * before / after - 0.5, 0, before - 1)
    low = np.floor(place).astype(np.int64)
    return low, np.minimum(low + 1, before - 1), (place - low).astype(np.float32)
