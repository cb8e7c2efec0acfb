from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mecq_cli.data import loader
from mecq_cli.data.folder import open_split
from mecq_cli.data.images import open_rgb, read_image
from mecq_cli.data.loader import (
    Batch,
    ImageDataset,
    batches_per_epoch,
    eval_batches,
    normalize,
    train_batches,
)
from mecq_cli.data.split import Split, limit_per_class
from mecq_cli.errors import DataError, EnvironmentFailure, UsageError
from mecq_cli.models.preprocessing import Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = Preprocessing((3, 32, 32), MEAN, STD, "bilinear", 1.0)
LARGE = Preprocessing((3, 96, 96), MEAN, STD, "bicubic", 0.875)

fork = pytest.mark.skipif(
    multiprocessing.get_start_method() != "fork", reason="needs workers that inherit a patch"
)


@pytest.fixture
def small(cifar10: Path) -> Split:
    return limit_per_class(open_split(cifar10, "train"), 20)


@pytest.fixture
def large(imagenette: Path) -> Split:
    return limit_per_class(open_split(imagenette, "train"), 4)


def same(left: list[Batch], right: list[Batch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for a, b in zip(left, right, strict=True)
    )


def epoch(dataset: ImageDataset, number: int, start: int = 0, workers: int = 0) -> list[Batch]:
    return list(
        train_batches(dataset, batch_size=8, epoch=number, start_batch=start, workers=workers)
    )


@pytest.mark.parametrize("kind", ["small", "large"])
def test_samples_depend_on_seed_epoch_and_index_alone(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = request.getfixturevalue(kind)
    preprocessing = SMALL if kind == "small" else LARGE
    dataset = ImageDataset(split, preprocessing, train=True, seed=1)
    first, second = epoch(dataset, 0), epoch(dataset, 1)
    assert len(first) == len(split) // 8
    assert first[0].images.dtype == torch.uint8
    assert first[0].images.shape == (8, *preprocessing.input_size)
    assert not same(first, second)
    assert same(epoch(dataset, 0), first)
    other = ImageDataset(split, preprocessing, train=True, seed=2)
    assert not same(epoch(other, 0), first)
    # Another process that continues, with workers, and without anything in memory.
    monkeypatch.setattr(loader, "MEMORY_BUDGET", 0)
    fresh = ImageDataset(split, preprocessing, train=True, seed=1)
    assert not fresh.in_memory
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    assert same(epoch(fresh, 1, 2, workers=2), second[2:])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(epoch(fresh, 1, 3), second[3:])
    assert epoch(fresh, 1, len(second)) == []


def test_an_epoch_shows_every_image_once(small: Split) -> None:
    dataset = ImageDataset(small, SMALL, seed=1)  # not augmented: pixels identify the image
    batches = list(train_batches(dataset, batch_size=32, epoch=0, drop_last=False))
    shown = [image.numpy().tobytes() for batch in batches for image in batch.images]
    files = [read_image(small.file(i)).transpose(2, 0, 1).tobytes() for i in range(len(small))]
    assert [len(batch.labels) for batch in batches] == [32] * 6 + [8]
    assert shown != files
    assert sorted(shown) == sorted(files)
    label_of = dict(zip(files, small.labels.tolist(), strict=True))
    assert [label_of[s] for s in shown] == torch.cat([b.labels for b in batches]).tolist()


def test_evaluation_keeps_order_and_maps_labels(small: Split, large: Split) -> None:
    wordnet = [100 + i for i in range(10)]
    dataset = ImageDataset(large, LARGE, wordnet)
    alone = list(eval_batches(dataset, batch_size=16))
    assert [len(batch.labels) for batch in alone] == [16, 16, 8]
    assert torch.cat([b.labels for b in alone]).tolist() == (large.labels + 100).tolist()
    assert same(list(eval_batches(dataset, batch_size=16, workers=2)), alone)
    (whole,) = eval_batches(ImageDataset(small, SMALL), batch_size=500)
    np.testing.assert_array_equal(
        whole.images[7].numpy(), read_image(small.file(7)).transpose(2, 0, 1)
    )
    with pytest.raises(UsageError, match=r"3 label indices.*10 class folders"):
        ImageDataset(small, SMALL, [1, 2, 3])


def test_number_of_batches(small: Split) -> None:
    assert batches_per_epoch(100, 32) == 3
    assert batches_per_epoch(100, 32, drop_last=False) == 4
    assert batches_per_epoch(20, 32) == 1  # the one smaller batch rather than none
    few = small.take(range(20))
    (batch,) = train_batches(ImageDataset(few, SMALL, train=True), batch_size=32, epoch=0)
    assert len(batch.labels) == 20
    with pytest.raises(UsageError, match="--batch-size"):
        batches_per_epoch(20, 0)


def test_small_images_are_decoded_once(small: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def noted(path: str) -> Image.Image:
        opened.append(path)
        return open_rgb(path)

    monkeypatch.setattr(loader, "open_rgb", noted)
    dataset = ImageDataset(small, SMALL, train=True)
    lazy = [epoch(dataset, 0), epoch(dataset, 1)]
    assert sorted(opened) == sorted(small.file(i) for i in range(len(small)))
    eager = ImageDataset(small, SMALL, train=True)
    eager.preload(workers=2)
    opened.clear()
    assert same(epoch(eager, 1), lazy[1])
    assert opened == []


def test_an_epoch_of_small_images_is_cheap(small: Split) -> None:
    many = small.take(np.tile(np.arange(len(small)), 50))
    dataset = ImageDataset(many, SMALL, train=True)
    dataset.preload()
    begin = time.process_time()
    images = sum(len(b.labels) for b in train_batches(dataset, batch_size=128, epoch=0))
    seconds = time.process_time() - begin
    assert seconds * 50_000 / images < 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["small", "large"])
def test_an_unreadable_image_is_one_line_from_any_process(
    tmp_path: Path, kind: str, workers: int, request: pytest.FixtureRequest
) -> None:
    split = request.getfixturevalue(kind).take(range(8))
    shutil.copytree(Path(split.root, "train"), tmp_path / "train")
    bad = tmp_path / split.paths[5]
    bad.write_bytes(bad.read_bytes()[:-200])
    dataset = ImageDataset(
        replace(split, files=open_split(tmp_path, "train").files),
        SMALL if kind == "small" else LARGE,
        train=True,
    )
    with pytest.raises(DataError, match=bad.name) as caught:
        list(train_batches(dataset, batch_size=4, epoch=0, workers=workers))
    assert "\n" not in str(caught.value)
    if kind == "small":
        with pytest.raises(DataError, match=bad.name):
            dataset.preload(workers)


def test_workers_outlive_the_signals_of_their_group(large: Split) -> None:
    dataset = ImageDataset(large, LARGE, train=True)
    batches = train_batches(dataset, batch_size=4, epoch=0, workers=2)
    first = [next(batches) for _ in range(2)]  # one of each worker: both are ready
    for child in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(child.pid or 0, number)
    assert same([*first, *batches], list(train_batches(dataset, batch_size=4, epoch=0)))
    assert not multiprocessing.active_children()


@fork
def test_a_killed_worker_is_named(large: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "open_rgb", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    batches = eval_batches(ImageDataset(large, LARGE), batch_size=4, workers=1)
    with pytest.raises(EnvironmentFailure, match="--workers 0") as caught:
        list(batches)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_workers_are_children_of_this_process_whatever_the_default(large: Split) -> None:
    """They end where their parent is another one, such as the server that forks in Python 3.14."""
    dataset, before = ImageDataset(large, LARGE), multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        found = list(eval_batches(dataset, batch_size=4, workers=1))
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert same(found, list(eval_batches(dataset, batch_size=4)))


def test_normalize_is_the_plain_formula_bit_for_bit() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    out = normalize(every, SMALL)
    mean = np.array(MEAN, dtype=np.float32)[None, :, None, None]
    std = np.array(STD, dtype=np.float32)[None, :, None, None]
    expected = (every.numpy().astype(np.float32) / np.float32(255) - mean) / std
    np.testing.assert_array_equal(out.numpy(), expected)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert every.dtype == torch.uint8
