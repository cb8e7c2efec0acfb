"""Fixtures for the whole suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.realdata import real_data, real_weights


@pytest.fixture(scope="session")
def cifar10(request: pytest.FixtureRequest) -> Path:
    """Real CIFAR-10: train/ and val/ with 200 images a class.

    Another number, or None for all (5,000 and 500 a class):
    ``@pytest.mark.parametrize("cifar10", [50], indirect=True)``.
    """
    return real_data("cifar10", getattr(request, "param", 200))


@pytest.fixture(scope="session")
def imagenette(request: pytest.FixtureRequest) -> Path:
    """Ten real ImageNet classes at 224 x 224: 20 images a class; other numbers as `cifar10`."""
    return real_data("imagenette224", getattr(request, "param", 20))


@pytest.fixture(scope="session")
def weights() -> Callable[[str], Path]:
    """``weights(name)``: path of a file of real pretrained weights."""
    return real_weights
