from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.studies.low_bit_kernels import ARMS, Shape, Unavailable, compile_kernels, prepare

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
