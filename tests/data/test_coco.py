"""Images with boxes: where they are found, what is refused, and that both are cut alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mecq_cli.data import dataset_of, eval_batches, train_batches
from mecq_cli.data.boxes import BOX, CROWD, LABEL, BoxDataset
from mecq_cli.data.coco import open_evaluation, open_training, require_no_boxes
from mecq_cli.errors import DataError, MecqError, UsageError
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.workflow.identity import digest_of_images
from tests.scenes import CLASSES, drawn, write_boxes, write_scenes

PREPROCESSING = Preprocessing(
    (3, 16, 24), (0.5,) * 3, (0.5,) * 3, "bilinear", crop_pct=1.0, crop_mode="squash"
)
Document = dict[str, Any]


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    return write_boxes(tmp_path / "scenes", {"train": 6, "val": 3}, 32)


def edit(scenes: Path, change: Callable[[Document], object], split: str = "val") -> None:
    """Change the annotations of a split."""
    file = scenes / "annotations" / f"instances_{split}.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def everything(dataset: BoxDataset) -> list[bytes]:
    return [
        batch.images.numpy().tobytes() + batch.labels.numpy().tobytes()
        for batch in eval_batches(dataset, batch_size=2)
    ]


def test_all_layouts_hold_the_same(scenes: Path, tmp_path: Path) -> None:
    official, beside = tmp_path / "official", tmp_path / "beside"
    for split, other in (("train", "train"), ("val", "valid")):
        file = scenes / "annotations" / f"instances_{split}.json"
        for target in (
            official / "annotations" / f"instances_{split}2017.json",
            beside / other / "_annotations.coco.json",
        ):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        shutil.copytree(scenes / split, official / "images" / f"{split}2017")
        shutil.copytree(scenes / split, beside / other, dirs_exist_ok=True)
    found = []
    for folder in (scenes, official, beside):
        train, val = open_training(str(folder), None, 0)
        assert (len(train), len(val), train.classes) == (6, 3, CLASSES[1:])
        dataset = dataset_of(val, PREPROCESSING)
        assert isinstance(dataset, BoxDataset)
        found.append(everything(dataset))
    assert found[0] == found[1] == found[2]


def test_boxes_are_around_what_is_seen_and_scaled_with_the_image(scenes: Path) -> None:
    val = open_evaluation(str(scenes))
    (batch,) = eval_batches(dataset_of(val, PREPROCESSING, [1, 2, 3]), batch_size=3)
    assert batch.images.shape == (3, 3, 16, 24)
    seen = 0
    for number, rows in enumerate(batch.labels):
        _, shapes = drawn(1, number, 32)
        shapes = [(label, shape) for label, shape in shapes if shape.sum() >= 40]
        rows = rows[rows[:, LABEL] >= 0]
        assert len(rows) == len(shapes)
        for row, (label, shape) in zip(rows, shapes, strict=True):
            y, x = np.nonzero(shape)
            corners = [x.min() * 24, y.min() * 16, (x.max() + 1) * 24, (y.max() + 1) * 16]
            assert row[BOX].tolist() == pytest.approx([corner / 32 for corner in corners])
            assert (int(row[LABEL]), float(row[CROWD])) == (label, 0)
            seen += 1
    assert seen > 3


def test_what_is_cut_out_moves_its_boxes_along(tmp_path: Path) -> None:
    """A white square on black: wherever it is in the input, its box is around it."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train").mkdir()
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[20:44, 30:50] = 255
    Image.fromarray(pixels).save(tmp_path / "train/a.png")
    document = {
        "images": [{"id": 7, "file_name": "a.png", "width": 64, "height": 64}],
        "categories": [{"id": 3, "name": "square"}],
        "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [30, 20, 20, 24]}],
    }
    for split in ("train", "val"):
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(document))
    shutil.copytree(tmp_path / "train", tmp_path / "val")
    train, _ = open_training(str(tmp_path), None, 0)
    size = Preprocessing((3, 96, 96), (0.5,) * 3, (0.5,) * 3, "nearest", 1.0, "squash")
    dataset, places = dataset_of(train, size, train=True), set()
    for epoch in range(20):
        (batch,) = train_batches(dataset, batch_size=1, epoch=epoch)
        (again,) = train_batches(dataset, batch_size=1, epoch=epoch)
        assert torch.equal(batch.images, again.images)
        (row,) = batch.labels[0]
        y, x = np.nonzero(batch.images[0, 0].numpy() > 127)
        around = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert row[BOX].tolist() == pytest.approx(around, abs=2.5)
        places.add(tuple(around))
    assert len(places) > 5


def test_images_without_boxes_teach_that_nothing_is_there(scenes: Path) -> None:
    def remove(document: Document) -> None:
        rows = document["annotations"]
        document["annotations"] = [row for row in rows if row["image_id"] != 1]
        document["annotations"][0]["iscrowd"] = 1

    edit(scenes, remove)
    edit(scenes, remove, "train")
    train, val = open_training(str(scenes), None, 0)
    (batch,) = eval_batches(dataset_of(val, PREPROCESSING), batch_size=3)
    assert (batch.labels[1, :, LABEL] == -1).all()
    assert float(batch.labels[0, 0, CROWD]) == 1
    for one in train_batches(dataset_of(train, PREPROCESSING, train=True), batch_size=3, epoch=0):
        assert one.labels.shape[0] == 3


def test_boxes_without_an_area_are_left_out(scenes: Path) -> None:
    """COCO's own train set has two."""
    (before,) = eval_batches(dataset_of(open_evaluation(str(scenes)), PREPROCESSING), batch_size=3)
    edit(scenes, annotation(bbox=[3, 4, 0, 8]))
    (after,) = eval_batches(dataset_of(open_evaluation(str(scenes)), PREPROCESSING), batch_size=3)
    counts = [int((batch.labels[:, :, LABEL] >= 0).sum()) for batch in (before, after)]
    assert counts[1] == counts[0] - 1


def test_a_run_is_not_continued_on_other_boxes(scenes: Path) -> None:
    before = digest_of_images(open_evaluation(str(scenes)))
    assert before == digest_of_images(open_evaluation(str(scenes)))
    edit(scenes, lambda d: d["annotations"][0].update(bbox=[1, 1, 5, 5]))
    assert before != digest_of_images(open_evaluation(str(scenes)))


def test_images_are_held_out(scenes: Path) -> None:
    (scenes / "annotations/instances_val.json").unlink()
    train, val = open_training(str(scenes), 0.3, 0)
    assert (len(train), len(val), val.name) == (4, 2, "train (held out)")
    assert not {*train.paths} & {*val.paths}
    with pytest.raises(DataError, match=r"has no val.json, .* in annotations/ to evaluate on"):
        open_training(str(scenes), None, 0)
    with pytest.raises(DataError, match=r"has no val.json, .* in annotations/ to evaluate on"):
        open_evaluation(str(scenes))


def annotation(**changes: object) -> Callable[[Document], object]:
    return lambda document: document["annotations"][0].update(changes)


def image(**changes: object) -> Callable[[Document], object]:
    return lambda document: document["images"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (annotation(category_id=9), "has the label 9, but the categories are 1, 2, 3"),
        (annotation(category_id=[1]), "has the label .1., but the categories are 1, 2, 3"),
        (annotation(image_id=77), "of image 77, which is not listed"),
        (annotation(image_id=None), "of image None, which is not listed"),
        (annotation(image_id={}), "of image {}, which is not listed"),
        (annotation(bbox=[True, "4", 1, 1]), "has no bbox of four numbers"),
        (annotation(bbox=[20, 4, 14, 8]), "reaches outside of the image, which is 32 x 32"),
        (annotation(bbox=[-3, 4, 14, 8]), "reaches outside of the image"),
        (annotation(bbox=[3, 4, -2, 8]), "has a negative side"),
        (annotation(bbox=[3, 4, 5]), "has no bbox of four numbers"),
        (annotation(bbox=[3, 4, 5, float("nan")]), "has no bbox of four numbers"),
        (lambda d: d.update(annotations=[]), "has no annotations: nothing could be learned"),
        (lambda d: d.update(images=[]), "lists no images"),
        (lambda d: d.update(categories=[]), "has no categories"),
        (lambda d: d.pop("annotations"), "has no list of annotations"),
        (lambda d: d["categories"].append({"id": 9, "name": "disc"}), "'disc' .9. is there twice"),
        (lambda d: d["categories"].append({"id": 9}), "no id or no name"),
        (image(file_name="gone.png"), "lists 1 images that are not there, the first 'val/gone"),
        (image(file_name="../train/0000.png"), "lies outside of the folder"),
        (image(width=None), "no width and height"),
        (image(id=1), "two images have the id 1"),
        (lambda d: d["images"].append(None), "has no list of images"),
        (
            lambda d: d["images"].append({**d["images"][0], "id": 99}),
            "0 and 99 are both '0000.png'",
        ),
        (image(width=10**30), "no width and height in whole pixels"),
        (image(width=True), "no width and height in whole pixels"),
        (image(file_name="a" * 300), "lists 1 images that are not there"),
        (annotation(bbox=[3, 4, 10**400, 8]), "has no bbox of four numbers"),
        (annotation(bbox=[True, 4, 5, 8]), "has no bbox of four numbers"),
        (annotation(iscrowd=2), "has iscrowd 2; it is 0 or 1"),
        (annotation(iscrowd="1"), "has iscrowd '1'; it is 0 or 1"),
        (annotation(category_id=True), "has the label True, but the categories are"),
        (
            lambda d: [a.update(bbox=[3, 4, 0, 0]) for a in d["annotations"]],
            "none of its [0-9]+ boxes has an area",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(
    scenes: Path, change: Callable[[Document], object], message: str
) -> None:
    edit(scenes, change)
    with pytest.raises(DataError, match=message) as raised:
        open_evaluation(str(scenes))
    assert "\n" not in str(raised.value)


def test_json_too_deep_is_refused(scenes: Path) -> None:
    (scenes / "annotations" / "instances_val.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="is no JSON"):
        open_evaluation(str(scenes))


def test_crowds_alone_are_nothing_to_learn(scenes: Path) -> None:
    edit(scenes, lambda d: [a.update(iscrowd=1) for a in d["annotations"]], "train")
    with pytest.raises(DataError, match="all boxes are of crowds"):
        open_training(str(scenes), None, 0)


def test_networks_of_one_channel_get_grey_images(scenes: Path) -> None:
    train, val = open_training(str(scenes), None, 0)
    grey = Preprocessing((1, 16, 24), (0.5,), (0.5,), "bilinear", 1.0, "squash")
    (batch,) = train_batches(dataset_of(train, grey, train=True), batch_size=6, epoch=0)
    (other,) = eval_batches(dataset_of(val, grey), batch_size=3)
    assert batch.images.shape == (6, 1, 16, 24)
    assert other.images.shape == (3, 1, 16, 24)


def test_rounded_boxes_are_cut_at_the_edge(scenes: Path) -> None:
    edit(scenes, annotation(bbox=[20, 4, 12.6, 8]))
    (batch,) = eval_batches(dataset_of(open_evaluation(str(scenes)), PREPROCESSING), batch_size=3)
    assert float(batch.labels[0, 0, 3]) == 24


def test_an_image_of_another_size_is_refused(scenes: Path) -> None:
    Image.open(scenes / "val/0000.png").resize((20, 32)).save(scenes / "val/0000.png")
    dataset = dataset_of(open_evaluation(str(scenes)), PREPROCESSING)
    with pytest.raises(DataError, match="is 20 x 32 pixels, and its annotations are for 32 x 32"):
        next(eval_batches(dataset, batch_size=3))


def test_other_folders_are_refused(scenes: Path, tmp_path: Path) -> None:
    def fails(kind: type[MecqError], message: str, data: Path | str) -> None:
        with pytest.raises(kind, match=message):
            open_training(str(data), None, 0)

    fails(DataError, "no data folder", tmp_path / "gone")
    fails(UsageError, "boxes are read from a folder", f"wds/{scenes}")
    masks = write_scenes(tmp_path / "masks", {"train": 2, "val": 2}, 32)
    fails(DataError, "holds no images with boxes; it looks like data for another task", masks)
    with pytest.raises(DataError, match="has no file 'test' in annotations"):
        open_evaluation(str(scenes), "test")
    with pytest.raises(DataError, match="which is data for detection"):
        require_no_boxes(str(scenes))
    require_no_boxes(str(masks))
    other = json.loads((scenes / "annotations/instances_val.json").read_text())
    (scenes / "annotations/val.json").write_text(json.dumps(other))
    fails(DataError, "two files for 'val'", scenes)
    (scenes / "annotations/val.json").unlink()
    edit(scenes, lambda d: d["categories"].append({"id": 9, "name": "star"}))
    fails(DataError, "the classes of train and val", scenes)
    (scenes / "annotations/instances_val.json").write_text("{")
    fails(DataError, "is no JSON", scenes)


def test_preprocessing_that_cuts_something_off_is_refused(scenes: Path) -> None:
    cut = Preprocessing((3, 16, 16), (0.5,) * 3, (0.5,) * 3, crop_pct=0.9, crop_mode="center")
    with pytest.raises(UsageError, match="cuts parts of the image off"):
        dataset_of(open_evaluation(str(scenes)), cut)
