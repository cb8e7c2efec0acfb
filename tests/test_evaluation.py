"""Top-1 and top-5, counted on images whose classes are known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mecq_cli.data import ImageDataset, open_evaluation
from mecq_cli.evaluation import evaluate
from mecq_cli.models.preprocessing import Preprocessing
from tests.e2e.command import write_patterns


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    root = write_patterns(tmp_path_factory.mktemp("data"), {"val": 3}, classes=7, size=8)
    preprocessing = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "center")
    return ImageDataset(open_evaluation(root), preprocessing)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_ranks_are_counted(dataset: ImageDataset, batch_size: int) -> None:
    """Image i has its class at rank i mod 7."""
    labels = iter(dataset.labels.tolist())
    seen = [0]

    def predict(images: Tensor) -> Tensor:
        assert images.dtype == torch.float32
        assert not torch.is_grad_enabled()
        logits = torch.zeros(len(images), 7)
        for row in logits:
            label = next(labels)
            order = [c for c in range(7) if c != label]
            order.insert(seen[0] % 7, label)
            row[order] = torch.arange(7.0).flip(0)
            seen[0] += 1
        return logits.bfloat16()

    accuracy = evaluate(predict, dataset, batch_size=batch_size, device=torch.device("cpu"))
    assert accuracy.images == 21
    assert accuracy.figures["top1"] == pytest.approx(100 * 3 / 21)
    assert accuracy.figures["top5"] == pytest.approx(100 * 15 / 21)


def test_fewer_than_five_classes(dataset: ImageDataset) -> None:
    def predict(images: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.0, 0.5]]).expand(len(images), 3)

    accuracy = evaluate(predict, dataset, batch_size=8, device=torch.device("cpu"))
    assert accuracy.figures["top1"] == pytest.approx(100 * 3 / 21)
    assert accuracy.figures["top5"] == pytest.approx(100 * 9 / 21)


def test_products_are_those_of_float32(dataset: ImageDataset) -> None:
    places: list[Any] = [torch.backends.cudnn, torch.backends.cuda.matmul]
    before = [place.allow_tf32 for place in places]

    def predict(images: Tensor) -> Tensor:
        assert not any(place.allow_tf32 for place in places)
        return torch.zeros(len(images), 7)

    try:
        for _ in range(2):
            for place in places:
                place.allow_tf32 = True
            evaluate(predict, dataset, batch_size=8, device=torch.device("cpu"))
            assert all(place.allow_tf32 for place in places)
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value
