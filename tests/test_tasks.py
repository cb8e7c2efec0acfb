"""What the tasks count, against the same worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mecq_cli.data.masks import IGNORED
from mecq_cli.errors import DataError, UsageError
from mecq_cli.tasks.divergence import divergence
from mecq_cli.tasks.registry import choose, task_named

SEGMENT = task_named("segment")


def answers(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of four classes, of which the last one is in no mask and no answer."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 4, 7, 6, generator=generator)
    logits[:, 3] = -9
    labels = torch.randint(0, 3, (5, 7, 6), generator=generator).to(torch.uint8)
    labels[:, 0] = IGNORED
    return logits, labels


def test_mean_iou_is_over_the_classes_that_are_there() -> None:
    logits, labels = answers()
    metric = SEGMENT.metric(4)
    for part in (slice(0, 2), slice(2, 5)):
        metric.update(logits[part], labels[part])
    measured = metric.measured(5, metric.sums())
    said, counted = logits.argmax(1).numpy(), labels.numpy() != IGNORED
    shares = []
    for label in range(3):
        a, b = (said == label) & counted, (labels.numpy() == label) & counted
        shares.append(100 * (a & b).sum() / (a | b).sum())
    assert measured.details["iou"][:3] == pytest.approx(shares)
    assert measured.details["iou"][3] is None
    assert measured.figures["miou"] == pytest.approx(np.mean(shares))
    right = 100 * (said == labels.numpy())[counted].mean()
    assert measured.figures["pixel_accuracy"] == pytest.approx(right)
    assert SEGMENT.counts(logits, labels) == (round(right * counted.sum() / 100), counted.sum())


def test_several_processes_count_as_one() -> None:
    logits, labels = answers()
    parts = [SEGMENT.metric(4) for _ in range(3)]  # the third one got no batch
    parts[0].update(logits[:1], labels[:1])
    parts[1].update(logits[1:], labels[1:])
    sums = [sum(column) for column in zip(*(part.sums() for part in parts), strict=True)]
    alone = SEGMENT.metric(4)
    alone.update(logits, labels)
    assert parts[2].measured(5, sums) == alone.measured(5, alone.sums())


def test_nothing_that_counts_is_an_error() -> None:
    logits, labels = answers()
    metric = SEGMENT.metric(4)
    metric.update(logits, torch.full_like(labels, IGNORED))
    with pytest.raises(DataError, match="every pixel"):
        metric.measured(5, metric.sums())


def test_losses_are_means_over_pixels() -> None:
    logits, labels = answers()
    rows = logits.permute(0, 2, 3, 1).reshape(-1, 4)
    kept = labels.flatten() != IGNORED
    wanted = F.cross_entropy(rows[kept], labels.flatten()[kept].long())
    assert float(SEGMENT.loss(logits, labels)) == pytest.approx(float(wanted))
    nothing = SEGMENT.loss(logits, torch.full_like(labels, IGNORED))
    assert float(nothing) == 0.0
    other, _ = answers(1)
    others = other.permute(0, 2, 3, 1).reshape(-1, 4)
    mine, theirs = F.log_softmax(rows / 2, 1), F.log_softmax(others / 2, 1)
    distance = 4 * float(F.kl_div(mine, theirs, reduction="batchmean", log_target=True))
    assert float(divergence(rows, others, 2.0)) == pytest.approx(distance)
    assert float(divergence(logits, other, 2.0)) == pytest.approx(distance, rel=1e-4)


def test_classes_fit_or_are_refused() -> None:
    names = ("ground", "disc")
    assert SEGMENT.match_classes(names, 2).names == names
    assert SEGMENT.match_classes(("0", "1"), 4).names == ("0", "1", "2", "3")
    for wrong, outputs in ((names, 3), (("0", "1", "2"), 2)):
        with pytest.raises(UsageError, match="outputs and the masks have"):
            SEGMENT.match_classes(wrong, outputs)
    two = SEGMENT.match_classes(names, 2)
    assert SEGMENT.same_classes(two, names)
    assert not SEGMENT.same_classes(two, ("ground", "box"))


def test_the_task_is_that_of_the_model() -> None:
    assert choose("auto", "segment", "net").name == "segment"
    assert choose("classify", "classify", "net").name == "classify"
    with pytest.raises(UsageError, match=r"--task classify: net is made to segment"):
        choose("classify", "segment", "net")
