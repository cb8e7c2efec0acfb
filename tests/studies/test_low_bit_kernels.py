from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.studies.low_bit_kernels import (
    ARMS,
    Shape,
    Unavailable,
    compile_kernels,
    gathered,
    prepare,
)

SHAPES = ((1, 64, 6), (7, 64, 576), (49, 128, 250), (13, 256, 1152), (5, 64, 4608))


@pytest.fixture(scope="module")
def lib(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    try:
        return compile_kernels(tmp_path_factory.mktemp("kernels"))
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_are_exact(lib: ctypes.CDLL, arm: str, shape: Shape) -> None:
    product, right = prepare(lib, arm, shape)
    product.run()
    np.testing.assert_array_equal(product.sums, right)


@pytest.mark.parametrize(("size", "stride", "width"), [(3, 1, 8), (3, 2, 22), (1, 2, 86)])
def test_gather(lib: ctypes.CDLL, size: int, stride: int, width: int) -> None:
    side, outs = 12 + size - 1, 12 // stride
    picture = np.random.default_rng(0).integers(0, 256, (2, side, side, width)).astype(np.uint8)
    run, out = gathered(lib, picture, outs, stride, size)
    run()
    windows = np.lib.stride_tricks.sliding_window_view(picture, (size, size), axis=(1, 2))
    right = windows[:, ::stride, ::stride][:, :outs, :outs].transpose(0, 1, 2, 4, 5, 3)
    np.testing.assert_array_equal(out, right)
