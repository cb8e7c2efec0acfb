"""What is said of a wrong --data before torch is loaded, and where to look instead."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mecq_cli.errors import CheckpointError, DataError, MecqError, UsageError
from mecq_cli.layout import (
    check_classes,
    check_splits,
    check_weight_file,
    find_layout,
    layout_if_folder,
)


def folders(root: Path, *names: str) -> str:
    for name in names:
        (root / name).mkdir(parents=True)
    return str(root)


def check(data: str, val_split: float | None = None) -> None:
    found = layout_if_folder(data)
    if found is not None:
        layout, splits = found
        check_splits(data, splits, val_split, layout)


@pytest.mark.parametrize(
    ("names", "below", "said"),
    [
        (("Train/cat", "Val/cat"), "", "(but 'Train', 'Val'; the names are train and val)"),
        (("photos/train/cat", "photos/val/cat"), "", "did you mean '{root}/photos'?"),
        (("train/cat", "val/cat"), "train", "did you mean '{root}'?"),
        (("cat", "dog", "horse", "ship"), "", "(4 others: 'cat', 'dog', 'horse', ...)"),
        ((), "", "(and no other)"),
    ],
)
def test_says_what_lies_there_instead_of_train(
    tmp_path: Path, names: tuple[str, ...], below: str, said: str
) -> None:
    root = folders(tmp_path, *names)
    with pytest.raises(DataError) as caught:
        check(f"{root}/{below}" if below else root)
    assert said.format(root=root) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_each_name_of_the_second_folder_will_do(tmp_path: Path, name: str) -> None:
    data = folders(tmp_path, "train/cat", f"{name}/cat")
    check(data)
    with pytest.raises(UsageError, match=name):
        check(data, 0.1)


def pairs(root: Path, *places: str) -> str:
    return folders(root, *(f"{place}/{kind}" for place in places for kind in ("images", "masks")))


def lists(root: Path, *names: str) -> str:
    folders(root, "JPEGImages", "SegmentationClass", "ImageSets/Segmentation")
    for name in names:
        (root / f"ImageSets/Segmentation/{name}.txt").touch()
    return str(root)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
@pytest.mark.parametrize("made", [pairs, lists])
def test_images_with_masks_are_held_to_the_same_rules(
    tmp_path: Path, made: Callable[..., str], name: str
) -> None:
    check(made(tmp_path / "both", "train", name))
    check(made(tmp_path / "one", "train"), 0.1)
    with pytest.raises(UsageError, match=f"has a (folder|list) '{name}'"):
        check(made(tmp_path / "again", "train", name), 0.1)
    ending = "/" if made is pairs else ".txt"
    with pytest.raises(DataError, match=f"valid{ending}, .*--val-split 0.1"):
        check(made(tmp_path / "alone", "train"))
    with pytest.raises(DataError, match=r"no (folder|list) 'train'"):
        check(made(tmp_path / "other", name), 0.1)


def test_pairs_without_splits(tmp_path: Path) -> None:
    check(pairs(tmp_path / "flat", "."), 0.1)
    with pytest.raises(DataError, match="these directly in it with --val-split"):
        check(pairs(tmp_path / "more", "."))
    # A folder without masks is no split of pairs, whatever its name is.
    data = pairs(tmp_path / "half", "train")
    folders(tmp_path / "half", "val/images")
    with pytest.raises(DataError, match=r"no val/, .* with images/ and masks/ to evaluate on"):
        check(data)


def test_train_alone_needs_a_share_to_hold_out(tmp_path: Path) -> None:
    data = folders(tmp_path, "train/cat")
    check(data, 0.1)
    with pytest.raises(DataError, match="--val-split"):
        check(data)


def test_splits_by_other_names_are_no_classes(tmp_path: Path) -> None:
    root = str(tmp_path)
    check_classes(root, ("cat", "dog"), flat=True)
    check_classes(root, ("test", "dog"), flat=False)
    with pytest.raises(DataError, match="'Training' and 'val', which would be taken for classes"):
        check_classes(root, ("Training", "val"), flat=True)
    with pytest.raises(DataError, match="a single class folder, 'cat'"):
        check_classes(root, ("cat",), flat=False)


def test_weight_files(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    for path in (tmp_path, tmp_path / "none.pth", tmp_path / "model.onnx"):
        with pytest.raises(CheckpointError):
            check_weight_file(path)


def test_data_sets_that_are_no_folder_are_not_looked_at(tmp_path: Path) -> None:
    (tmp_path / "train-000.tar").touch()
    for data in ("hfds/cifar10", "wds/nowhere", str(tmp_path), str(tmp_path / "train-000.tar")):
        assert layout_if_folder(data) is None
    with pytest.raises(MecqError, match="no data folder"):
        layout_if_folder(str(tmp_path / "nowhere"))


def test_a_wrong_folder_is_told_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from mecq_cli.cli.main import run;"
        f"code = run(['quantize', 'resnet18', '--wbits', '4', '--abits', '4', '--data', "
        f"{str(tmp_path / 'none')!r}]);"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "3 False\n", done.stderr
    assert done.stderr.startswith("error: no data folder")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", [".", "train"])
def test_a_folder_without_permission(
    closed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train" / "cat").mkdir(parents=True)
    stat, folder = Path.stat, tmp_path / closed

    def deny(path: Path, **how: bool) -> os.stat_result:  # chmod would not do: root reads all
        if path.parent == folder:
            raise PermissionError(13, "Permission denied")
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", deny)
    with pytest.raises(DataError, match=f"no permission to read the folder '{folder}'"):
        find_layout(tmp_path)
