from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mecq_cli.data import (
    find_splits,
    hold_out,
    limit_per_class,
    open_evaluation,
    open_split,
    open_training,
)
from mecq_cli.errors import DataError, MecqError, UsageError


def make(root: Path, *names: str) -> Path:
    """Empty files: opening a folder looks at names only."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    train = [f"train/{c}/{i:02}.png" for c in ("cat", "a dog") for i in range(10)]
    return make(tmp_path / "set", *train, "val/cat/1.JPEG", "val/a dog/deep/er/2.webp")


def test_lists_classes_and_nested_images_in_order(root: Path) -> None:
    make(root, "train/cat/.hidden.png", "train/cat/Thumbs.db", "train/.cache/x.png", "train/notes")
    train, val = open_training(root)
    assert find_splits(root) == ("train", "val")
    assert train.classes == val.classes == ("a dog", "cat")
    assert val.paths == ("val/a dog/deep/er/2.webp", "val/cat/1.JPEG")
    assert val.labels.tolist() == [0, 1]
    assert val.labels.dtype == np.int64
    assert len(train) == 20
    assert train.paths[:10] == tuple(f"train/a dog/{i:02}.png" for i in range(10))
    assert Path(str(train.file(3))).is_file()


@pytest.mark.parametrize(
    ("present", "taken"),
    [(("test", "validation"), "validation"), (("test",), "test"), (("val", "test"), "val")],
)
def test_evaluation_takes_the_first_of_val_validation_test(
    tmp_path: Path, present: tuple[str, ...], taken: str
) -> None:
    make(tmp_path, *(f"{name}/cat/1.png" for name in present))
    assert open_evaluation(tmp_path).name == taken  # train/ is not needed for it
    assert open_evaluation(tmp_path, present[0]).name == present[0]


def test_held_out_part_is_stratified_and_depends_on_the_seed_only(root: Path) -> None:
    train = open_split(root, "train")
    rest, held = hold_out(train, 0.3, seed=5)
    assert np.bincount(rest.labels).tolist() == [7, 7]
    assert np.bincount(held.labels).tolist() == [3, 3]
    assert sorted((*rest.paths, *held.paths)) == sorted(train.paths)
    assert hold_out(train, 0.3, seed=5)[1].paths == held.paths
    assert hold_out(train, 0.3, seed=6)[1].paths != held.paths
    # Pinned: a run that is continued by a later version must hold out the same images.
    assert [path[-6:-4] for path in held.paths] == ["00", "03", "05", "01", "02", "06"]
    assert np.bincount(hold_out(train, 0.001, seed=0)[1].labels).tolist() == [1, 1]
    assert np.bincount(hold_out(train, 0.999, seed=0)[0].labels).tolist() == [1, 1]


def test_one_folder_with_val_split(root: Path, tmp_path: Path) -> None:
    flat = make(tmp_path / "flat", *(f"{c}/{i}.png" for c in "ab" for i in range(10)))
    train, val = open_training(flat, val_split=0.2)
    assert (len(train), len(val), val.classes) == (16, 4, ("a", "b"))
    assert not set(train.paths) & set(val.paths)
    only_train = make(tmp_path / "only", *(f"train/{c}/{i}.png" for c in "ab" for i in range(10)))
    assert len(open_training(only_train, val_split=0.1)[1]) == 2
    with pytest.raises(UsageError, match="leave out --val-split"):
        open_training(root, val_split=0.1)


def test_limit_per_class(root: Path) -> None:
    limited = limit_per_class(open_split(root, "train"), 2)
    assert [path[-6:] for path in limited.paths] == ["00.png", "01.png"] * 2
    assert limited.labels.tolist() == [0, 0, 1, 1]


def test_links(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)  # the whole data folder may be elsewhere
    assert len(open_split(tmp_path / "link", "train")) == 20
    (root / "val/cat/again.png").symlink_to(root / "train/cat/00.png")
    (root / "val/cat/more").symlink_to("../../train/cat")
    assert len(open_split(root, "val")) == 2 + 1 + 10


def link(root: Path, name: str, target: str) -> None:
    (root / name).symlink_to(target)


def rename(root: Path, old: str, new: str) -> Path:
    return (root / old).rename(root / new)


def a_file(root: Path) -> None:
    rename(root, "", "../gone")
    root.touch()


def empty_train(root: Path) -> None:
    rename(root, "train", "x")
    (root / "train").mkdir()


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda r: rename(r, "", "../gone"), "no data folder"),
    "a file": (a_file, "is a file"),
    "no train": (lambda r: rename(r, "train", "tarin"), "no folder 'train'"),
    "no val": (lambda r: rename(r, "val", "eval"), "--val-split"),
    "empty train": (empty_train, "no class"),
    "empty class": (lambda r: (r / "train/fox").mkdir(), "'train/fox'.*holds no image"),
    "other class": (
        lambda r: make(r, "train/ant/1.png", "val/bee/1.png"),
        "1 only in train: 'ant'; 1 only in val: 'bee'",
    ),
    "no image": (lambda r: make(r, "train/cat/b.txt", "train/cat/a.npy"), "2 files.*cat/a.npy"),
    "loose": (lambda r: make(r, "train/1.png"), "outside of any class folder.*'train/1.png'"),
    "pipe": (lambda r: os.mkfifo(r / "train/cat/x.png"), "'train/cat/x.png'"),
    "link out": (lambda r: link(r, "train/cat/x.png", "/etc/hostname"), "outside of the data"),
    "folder out": (lambda r: link(r, "val/cat/x", "../../.."), "outside of the data"),
    "class out": (lambda r: link(r, "val/fox", "/"), "outside of the data"),
    "dangling": (lambda r: link(r, "val/cat/x.png", "gone.png"), "leads nowhere"),
    "circle": (lambda r: link(r, "val/cat/x", "../cat"), "circle"),
    "own circle": (lambda r: link(r, "val/cat/x", "x"), "leads nowhere"),
    "strange name": (lambda r: make(r, "val/cat/a\nb\udcff.exe"), r"'val/cat/a\\nb\\udcff.exe'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_get_one_line(root: Path, case: str) -> None:
    spoil, message = BAD[case]
    spoil(root)
    with pytest.raises(DataError, match=message) as caught:
        open_training(root)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    str(caught.value).encode()  # a terminal can print it


def test_no_permission(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def deny(path: str | Path) -> object:  # chmod would not do: root may read everything
        if str(path).endswith("train/cat"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(DataError, match=r"no permission.*train/cat"):
        open_training(root)


@pytest.mark.parametrize("name", ["..", "", "train/cat", "/etc"])
def test_a_split_is_a_plain_name(root: Path, name: str) -> None:
    with pytest.raises(UsageError, match="not the name of a folder"):
        open_split(root, name)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_fraction_out_of_range(root: Path, fraction: float) -> None:
    with pytest.raises(MecqError, match="between 0 and 1"):
        hold_out(open_split(root, "train"), fraction, 0)


def counted(call: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def wrapper(*args: Any, **options: Any) -> Any:
        calls.append(call.__name__)
        return call(*args, **options)

    return wrapper


def test_opening_looks_at_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, *(f"train/c{i % 10}/{i}.png" for i in range(2000)))

    calls: list[str] = []
    for name in ("stat", "lstat", "open", "readlink"):
        monkeypatch.setattr(os, name, counted(getattr(os, name), calls))
    assert len(open_split(tmp_path, "train")) == 2000
    assert len(calls) < 50
