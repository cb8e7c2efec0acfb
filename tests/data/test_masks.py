"""Images with masks: where they are found, what is refused, and that both are cut alike."""

from __future__ import annotations

import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mecq_cli.data import dataset_of, eval_batches, train_batches
from mecq_cli.data.images import picture_of
from mecq_cli.data.masks import IGNORED, MaskDataset, read_mask
from mecq_cli.data.pairs import open_evaluation, open_training, require_no_masks
from mecq_cli.errors import DataError, MecqError, UsageError
from mecq_cli.models.preprocessing import Preprocessing
from tests.e2e.command import write_patterns
from tests.scenes import CLASSES, write_scenes

PREPROCESSING = Preprocessing(
    (3, 16, 24), (0.5,) * 3, (0.5,) * 3, "bilinear", crop_pct=1.0, crop_mode="squash"
)


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    return write_scenes(tmp_path / "scenes", {"train": 6, "val": 3}, 32)


def write_mask(path: Path, mask: np.ndarray) -> None:
    Image.fromarray(mask).save(path)


def as_voc(scenes: Path, place: Path) -> Path:
    """The same pairs in the layout of Pascal VOC."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (place / folder).mkdir(parents=True)
    for split in ("train", "val"):
        stems = []
        for image in sorted((scenes / split / "images").iterdir()):
            stem = f"{split}_{image.stem}"
            stems.append(stem)
            shutil.copy(image, place / "JPEGImages" / f"{stem}.png")
            shutil.copy(
                scenes / split / "masks" / image.name, place / f"SegmentationClass/{stem}.png"
            )
        listed = place / "ImageSets/Segmentation" / f"{split}.txt"
        listed.write_text("".join(f"{stem}\n" for stem in stems))
    return place


def pixels(split_of: MaskDataset) -> list[bytes]:
    return [
        batch.images.numpy().tobytes() + batch.labels.numpy().tobytes()
        for batch in eval_batches(split_of, batch_size=2)
    ]


def test_both_layouts_hold_the_same(scenes: Path, tmp_path: Path) -> None:
    found = []
    for folder in (scenes, as_voc(scenes, tmp_path / "voc")):
        train, val = open_training(str(folder), None, 0)
        assert (len(train), len(val), train.name, val.name) == (6, 3, "train", "val")
        dataset = dataset_of(val, PREPROCESSING)
        assert isinstance(dataset, MaskDataset)
        found.append(pixels(dataset))
    assert found[0] == found[1]
    assert open_evaluation(str(scenes)).classes == CLASSES
    batch = next(eval_batches(dataset, batch_size=3))
    assert batch.images.shape == (3, 3, 16, 24)
    assert batch.labels.shape == (3, 16, 24)
    assert {0, IGNORED} < set(np.unique(batch.labels)) <= {0, 1, 2, 3, IGNORED}


def test_valid_is_one_of_the_names(scenes: Path) -> None:
    (scenes / "val").rename(scenes / "valid")
    assert open_evaluation(str(scenes)).name == "valid"
    assert open_training(str(scenes), None, 0)[1].name == "valid"
    with pytest.raises(DataError, match=r"no folder 'val' with .* \(it has train, valid\)"):
        open_evaluation(str(scenes), "val")


def test_classes_without_names_are_numbers_up_to_the_largest(scenes: Path) -> None:
    (scenes / "classes.txt").unlink()
    mask = np.zeros((32, 32), np.uint8)
    mask[3, 3] = 6
    write_mask(scenes / "train/masks/0000.png", mask)
    train, val = open_training(str(scenes), None, 0)
    assert train.classes == val.classes == tuple("0123456")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes_of_any_depth_hold_indices(bits: int, tmp_path: Path) -> None:
    mask = (np.arange(64, dtype=np.uint8) % 2 ** min(bits, 3)).reshape(8, 8)
    image = Image.fromarray(mask).convert("P")
    image.putdata(mask.ravel().tolist())
    image.putpalette([value for index in range(2**bits) for value in (index, 9, 255 - index)])
    image.save(tmp_path / "mask.png", bits=bits)
    assert np.array_equal(read_mask(tmp_path / "mask.png"), mask)


def test_networks_of_one_channel_get_grey_images(scenes: Path) -> None:
    train, val = open_training(str(scenes), None, 0)
    grey = Preprocessing((1, 16, 24), (0.5,), (0.5,), "bilinear", 1.0, "squash")
    (batch,) = train_batches(dataset_of(train, grey, train=True), batch_size=6, epoch=0)
    (other,) = eval_batches(dataset_of(val, grey), batch_size=3)
    assert (batch.images.shape, batch.labels.shape) == ((6, 1, 16, 24), (6, 16, 24))
    assert other.images.shape == (3, 1, 16, 24)
    assert picture_of(other.images[0].numpy()).mode == "RGB"


def test_classes_of_an_editor_that_marks_its_files(scenes: Path) -> None:
    names = (scenes / "classes.txt").read_text().splitlines()
    names[0] = "ground\x0cfloor"
    (scenes / "classes.txt").write_text("\ufeff" + "\r\n".join(names), encoding="utf-8")
    assert open_evaluation(str(scenes)).classes == tuple(names)


def test_some_are_held_out(scenes: Path) -> None:
    shutil.rmtree(scenes / "val")
    train, val = open_training(str(scenes), 0.3, 0)
    assert (len(train), len(val), val.name) == (4, 2, "train (held out)")
    assert not {*train.paths} & {*val.paths}
    assert open_training(str(scenes), 0.3, 0)[1].paths == val.paths
    flat = open_training(str(scenes / "train"), 0.5, 1)
    assert (len(flat[0]), len(flat[1]), flat[1].name) == (3, 3, "held out")


def test_image_and_mask_are_cut_alike_by_seed_epoch_and_index(tmp_path: Path) -> None:
    """Of pictures that are their own masks, as colours: what is cut stays so."""
    place = tmp_path / "train"
    for kind in ("images", "masks"):
        (place / kind).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(4):
        blocks = np.kron(rng.integers(0, 2, (4, 4)), np.ones((16, 16))).astype(np.uint8)
        Image.fromarray(np.repeat(255 * blocks[..., None], 3, 2)).save(
            place / f"images/{number}.png"
        )
        write_mask(place / f"masks/{number}.png", blocks)
    split, _ = open_training(str(tmp_path), 0.25, 0)
    size = Preprocessing((3, 64, 64), (0.5,) * 3, (0.5,) * 3, "nearest", 1.0, "squash")
    runs = {
        (seed, workers): list(
            train_batches(
                dataset_of(split, size, train=True, seed=seed),
                batch_size=1, epoch=2, workers=workers,
            )
        )
        for seed, workers in ((3, 0), (3, 2), (4, 0))
    }  # fmt: skip
    for batches in runs.values():
        for batch in batches:
            assert np.array_equal(batch.images[:, 0] > 127, batch.labels == 1)
    same = [
        [bool((a.images == b.images).all() and (a.labels == b.labels).all()) for a, b in
         zip(runs[3, 0], other, strict=True)]
        for other in (runs[3, 2], runs[4, 0])
    ]  # fmt: skip
    assert all(same[0])
    assert not all(same[1])
    later = list(
        train_batches(
            dataset_of(split, size, train=True, seed=3), batch_size=1, epoch=2, start_batch=2
        )
    )
    assert np.array_equal(later[0].images, runs[3, 0][2].images)


def every_batch(scenes: Path) -> None:
    train, _ = open_training(str(scenes), None, 0)
    list(eval_batches(dataset_of(train, PREPROCESSING), batch_size=2))


def _another_size(scenes: Path) -> None:
    write_mask(scenes / "train/masks/0002.png", np.ones((31, 32), np.uint8))


def _label_beyond(scenes: Path) -> None:
    write_mask(scenes / "train/masks/0002.png", np.full((32, 32), 4, np.uint8))


def _colours(scenes: Path) -> None:
    write_mask(scenes / "train/masks/0002.png", np.ones((32, 32, 3), np.uint8))


def _jpeg(scenes: Path) -> None:
    with (scenes / "train/masks/0002.png").open("wb") as file:
        Image.fromarray(np.ones((32, 32), np.uint8)).save(file, "JPEG")


def _ignored(scenes: Path) -> None:
    write_mask(scenes / "train/masks/0002.png", np.full((32, 32), 255, np.uint8))


def _grey_of_few_bits(bits: int) -> Callable[[Path], None]:
    """Such as some writers make of masks with few classes."""
    return lambda scenes: write_grey(scenes / "train/masks/0002.png", 32, bits)


def write_grey(path: Path, side: int, bits: int) -> None:
    """All pixels 1, ``bits`` each: Pillow writes none of 2 or 4."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        sum_ = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", sum_)

    ones = int("1".rjust(bits, "0") * (8 // bits), 2)
    rows = (b"\0" + bytes([ones] * (side * bits // 8))) * side
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, bits, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def _one_mask_for_two(scenes: Path) -> None:
    Image.open(scenes / "train/images/0002.png").save(scenes / "train/images/0002.jpg")


def _missing(scenes: Path) -> None:
    (scenes / "train/masks/0002.png").unlink()


def _lonely(scenes: Path) -> None:
    (scenes / "train/images/0002.png").unlink()


def _none(scenes: Path) -> None:
    for kind in ("images", "masks"):
        shutil.rmtree(scenes / "train" / kind)
        (scenes / "train" / kind).mkdir()


def _classes_twice(scenes: Path) -> None:
    (scenes / "classes.txt").write_text("ground\ndisc\ndisc\n")


def _text(scenes: Path) -> None:
    (scenes / "train/masks/0002.txt").write_text("no mask")


def _no_val(scenes: Path) -> None:
    shutil.rmtree(scenes / "val")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_another_size, ("0002.png", "32 x 31", "32 x 32", "one size")),
        (_label_beyond, ("0002.png", "label 4", "0 to 3", "classes.txt")),
        (_colours, ("0002.png", "mode RGB", "PNG of 8 bits")),
        (_jpeg, ("0002.png", "JPEG", "PNG of 8 bits")),
        (_ignored, ("0002.png", "every pixel", "255")),
        (_grey_of_few_bits(1), ("0002.png", "PNG of mode 1", "PNG of 8 bits")),
        (_grey_of_few_bits(2), ("0002.png", "a grey PNG of 2 bits", "PNG of 8 bits")),
        (_grey_of_few_bits(4), ("0002.png", "a grey PNG of 4 bits", "PNG of 8 bits")),
        (_one_mask_for_two, ("0002.jpg", "0002.png", "have one mask")),
        (_missing, ("1 images", "no 'train/masks/0002.png'", "train/images/0002.png")),
        (_lonely, ("1 masks", "train/masks/0002.png", "no image")),
        (_none, ("no images in 'train'",)),
        (_classes_twice, ("classes.txt", "3 classes", "different")),
        (_text, ("train/masks", "0002.txt", "move them away")),
        (_no_val, ("no val/, valid/, validation/ or test/", "masks/", "--val-split")),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    scenes: Path, spoil: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    every_batch(scenes)
    spoil(scenes)
    with pytest.raises(DataError) as caught:
        every_batch(scenes)
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


def test_each_task_knows_the_data_of_the_other(scenes: Path, tmp_path: Path) -> None:
    classes = write_patterns(tmp_path / "classes", {"train": 2, "val": 2})
    require_no_masks(str(classes))
    with pytest.raises(DataError, match="data for segmentation, and the model classifies"):
        require_no_masks(str(scenes))
    with pytest.raises(DataError, match="data for classification, and the model segments"):
        open_training(str(classes), None, 0)
    with pytest.raises(DataError, match="no data folder"):
        open_evaluation(str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="masks are read from a folder"):
        open_evaluation("wds/shards")


def test_lists_that_lie(scenes: Path, tmp_path: Path) -> None:
    voc = as_voc(scenes, tmp_path / "voc")
    listed = voc / "ImageSets/Segmentation/val.txt"
    listed.write_text(listed.read_text() + "../../elsewhere\n")
    with pytest.raises(MecqError, match="names 1 images that are not in JPEGImages/"):
        open_evaluation(str(voc))
