"""What detection learns and counts, against the same worked out by hand or by torchvision."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD

from mecq_cli.distributed import ALONE
from mecq_cli.errors import DataError, EnvironmentFailure, UsageError
from mecq_cli.models.detection import BACKGROUND, coco_names, detector_of, outputs_only
from mecq_cli.tasks.base import Metric
from mecq_cli.tasks.detection import Detection
from mecq_cli.tasks.registry import choose, task_named
from tests.detectors import small_ssd, tiny_retinanet
from tests.exactness import random_images

SIZE = 64
KINDS = pytest.mark.parametrize("kind", ["ssd", "retinanet"])


def made(kind: str) -> tuple[Any, Detection]:
    torch.manual_seed(0)
    own = small_ssd(SIZE, widths=(8, 8, 8, 8, 8)) if kind == "ssd" else tiny_retinanet()
    net = outputs_only(own.eval())
    return net, Detection(detector_of(net, (SIZE, SIZE)), net)


LABELS = torch.tensor(
    [
        [[1, 10, 10, 30, 34, 0], [3, 20, 30, 60, 50, 0], [2, 0, 0, 64, 64, 1]],
        [[-1, 0, 0, 0, 0, 0]] * 3,
    ],
    dtype=torch.float32,
)
"""Two boxes and a crowd; an image with nothing in it."""


@KINDS
def test_the_loss_is_that_of_the_whole_network_in_training(kind: str) -> None:
    """The class that torchvision made, with its own forward pass, on the same images."""
    net, task = made(kind)
    images = random_images(2, SIZE)
    mine = task.loss(net(images), LABELS).detach()
    whole = SSD if kind == "ssd" else RetinaNet
    net.transform.image_mean, net.transform.image_std = [0.0] * 3, [1.0] * 3
    net.transform.min_size, net.transform.max_size = (SIZE,), SIZE
    targets = [
        {"boxes": LABELS[0, :2, 1:5], "labels": LABELS[0, :2, 0].long()},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    net.training = True  # of the module alone: its batch norms stay as they are
    losses = whole.forward(net, list(images), targets)
    assert float(mine) == pytest.approx(float(sum(losses.values()).detach()), rel=1e-5)


@KINDS
def test_crowds_and_rows_that_are_left_over_are_not_learned(kind: str) -> None:
    net, task = made(kind)
    outputs = net(random_images(2, SIZE)).detach()
    without = LABELS[:, :2]
    assert torch.equal(task.loss(outputs, LABELS), task.loss(outputs, without))
    assert task.counts(outputs, LABELS) == task.counts(outputs, without)
    assert torch.isfinite(task.loss(outputs[1:], LABELS[1:]))


@KINDS
def test_counted_are_anchors_on_objects(kind: str) -> None:
    net, task = made(kind)
    outputs = torch.full_like(net(random_images(2, SIZE)), -5.0)
    outputs[:, 1] = 5.0
    right, count = task.counts(outputs, LABELS)
    outputs[:, 3] = 9.0
    other, same = task.counts(outputs, LABELS)
    assert count == same == right + other
    assert min(right, other) > 0


def answers(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows + [[0.0] * 6] * (5 - len(rows)))[None]


def truth(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows + [[-1.0] + [0.0] * 5] * (4 - len(rows)))[None]


Pair = tuple[list[list[float]], list[list[float]]]


def precision(pairs: list[Pair]) -> Metric:
    metric = Detection().metric(4)
    for found, there in pairs:
        metric.update(answers(found), truth(there))
    return metric


BOX = [10.0, 10.0, 30.0, 30.0]
THERE: list[list[float]] = [[1, *BOX, 0], [2, 40, 40, 60, 60, 0]]


def test_precision_of_what_can_be_counted_by_hand() -> None:
    """One class is found at once; of the other a wrong box comes first: its precision is 1/2."""
    found = [[*BOX, 0.9, 1], [0, 0, 9, 9, 0.8, 2], [40, 40, 60, 60, 0.7, 2]]
    metric = precision([(found, THERE)])
    metric.gather(ALONE)
    measured = metric.measured(1, metric.sums())
    assert measured.figures["map"] == pytest.approx(75)
    assert measured.details["ap"][0] is None
    assert measured.details["ap"][1:3] == pytest.approx([100, 50])
    assert measured.details["ap"][3] is None


def test_an_overlap_of_seven_tenths_counts_at_four_of_ten_thresholds() -> None:
    found = [[10, 10, 30, 24.1, 0.9, 1]]
    metric = precision([(found, [[1, *BOX, 0]])])
    measured = metric.measured(1, metric.sums())
    assert measured.figures == pytest.approx({"map": 50, "map_50": 100, "map_75": 0})


def test_crowds_neither_count_nor_harm() -> None:
    there: list[list[float]] = [[1, *BOX, 0], [1, 32, 0, 64, 64, 1]]
    metric = precision([([[*BOX, 0.9, 1], [34, 8, 44, 18, 0.95, 1]], there)])
    assert metric.measured(1, metric.sums()).figures["map"] == pytest.approx(100)


@pytest.mark.parametrize("seed", range(3))
def test_precision_is_that_of_pycocotools(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten true boxes of a class make recalls of exactly k/10, where the thresholds lie."""
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    rng = np.random.default_rng(seed)
    metric = Detection().metric(4)
    known, found = list[dict[str, Any]](), list[dict[str, Any]]()
    for image in range(10):
        there, said = [], []
        for label in (1, 2, 3):
            left, top, width, height = rng.uniform((0, 0, 15, 15), (30, 30, 30, 30))
            there.append([label, left, top, left + width, top + height, 0])
            box = {"image_id": image, "category_id": label, "bbox": [left, top, width, height]}
            known.append({**box, "id": len(known) + 1, "iscrowd": 0, "area": width * height})
            move, score = rng.uniform(-6, 6), float(np.float32(rng.uniform()))
            said.append([left + move, top, left + move + width, top + height, score, label])
            found.append({**box, "bbox": [left + move, top, width, height], "score": score})
        rows = torch.tensor(said)[None]
        metric.update(rows, torch.tensor(there)[None])
    truth_of = coco.COCO()
    truth_of.dataset = {
        "images": [{"id": image} for image in range(10)],
        "categories": [{"id": label} for label in (1, 2, 3)],
        "annotations": known,
    }
    truth_of.createIndex()
    judge = cocoeval.COCOeval(truth_of, truth_of.loadRes(found), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    capsys.readouterr()
    figures = metric.measured(10, metric.sums()).figures
    wanted = {"map": judge.stats[0], "map_50": judge.stats[1], "map_75": judge.stats[2]}
    assert figures == pytest.approx({key: 100 * value for key, value in wanted.items()}, abs=1e-3)


class Several:
    """What `Processes` is to one of two."""

    def __init__(self, rank: int, others: list[Tensor]) -> None:
        self.rank, self.others = rank, others

    def largest(self, number: int) -> int:
        return 2

    def rows(self, mine: Tensor) -> Tensor:
        return torch.cat([mine, self.others.pop(0)])


def test_images_of_several_processes_stay_apart() -> None:
    pairs: list[Pair] = [
        ([[*BOX, 0.9, 1]], THERE),
        ([[*BOX, 0.5, 2]], THERE),
        ([[*BOX, 0.7, 1]], []),
    ]
    alone = precision(pairs)
    parts: list[Any] = [precision(pairs[:2]), precision(pairs[2:])]
    second = Several(1, [torch.zeros(0, 7).double()] * 2)
    parts[1].gather(second)
    theirs = [torch.cat(parts[1]._answers), torch.cat(parts[1]._boxes)]
    parts[0].gather(Several(0, theirs))
    assert parts[0].measured(3, []) == alone.measured(3, [])


def test_images_without_any_box_cannot_be_measured() -> None:
    metric = precision([([[*BOX, 0.9, 1]], [])])
    with pytest.raises(DataError, match="no boxes in the 1 images"):
        metric.measured(1, [])


def test_images_with_crowds_alone_cannot_be_measured() -> None:
    metric = precision([([[*BOX, 0.9, 1]], [[1, *BOX, 1]])])
    with pytest.raises(DataError, match="no boxes in the 1 images"):
        metric.measured(1, [])


def test_a_library_that_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(**_: object) -> None:
        raise ModuleNotFoundError("pycocotools")

    module = sys.modules["mecq_cli.tasks.detection"]
    monkeypatch.setattr(module, "MeanAveragePrecision", missing)
    with pytest.raises(EnvironmentFailure, match=r"pip install 'mecq\[detection\]'"):
        Detection().metric(4)


@KINDS
def test_divergence_is_zero_at_the_target_and_grows(kind: str) -> None:
    net, task = made(kind)
    target = net(random_images(2, SIZE)).detach()
    assert float(task.divergence(target, target, 2.0)) == pytest.approx(0, abs=1e-5)
    distances = [float(task.divergence(target * (1 + step), target)) for step in (0.1, 0.3, 0.9)]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_divergence_by_hand() -> None:
    """One anchor of an SSD, in which the float network is sure that something is there."""
    _, task = made("ssd")
    target, mine = torch.tensor([0.0, 2, 1, 0]), torch.tensor([1.0, 1, 1, 1])
    goal, moves = torch.tensor([0.5, 0, 0, 3]), torch.tensor([0.0, 0, 0, 0])
    there = float(1 - torch.softmax(target, 0)[0])
    far = float(
        F.kl_div(mine.log_softmax(0), target.log_softmax(0), reduction="sum", log_target=True)
    )
    wanted = far + there * (0.125 + 2.5)
    found = task.divergence(
        torch.cat([mine, moves])[None, :, None], torch.cat([target, goal])[None, :, None]
    )
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_classes_fit_or_are_refused() -> None:
    task, (_, retinanet), (_, ssd) = Detection(), made("retinanet"), made("ssd")
    assert task.match_classes(("disc", "box"), 3).names == (BACKGROUND, "disc", "box")
    assert task.match_classes(("disc", "box"), 3).indices == (1, 2)
    assert retinanet.match_classes(("disc", "box"), 2).indices == (0, 1)
    with pytest.raises(UsageError, match="2 outputs, the background among them, and the data 2"):
        ssd.match_classes(("disc", "box"), 2)
    found = task.match_classes(("cat", "person"), 91)
    assert found.names == coco_names()
    assert [found.names[i] for i in found.indices] == ["cat", "person"]
    with pytest.raises(UsageError, match="COCO has no 'disc'"):
        task.match_classes(("cat", "disc"), 91)
    assert task.outputs_for(("a", "b")) == 3
    assert task.same_classes(found, coco_names())
    assert not task.same_classes(found, (BACKGROUND, "cat", "person"))


def test_the_task_is_that_of_the_model() -> None:
    assert choose("detect", "detect", "net").name == task_named("detect").name == "detect"
    with pytest.raises(UsageError, match="--task segment: net is made to detect"):
        choose("segment", "detect", "net")
