"""The same images from a folder, tar files, WebDataset shards and a Hugging Face data set."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from timm.data.readers import create_reader

from mecq_cli.data import ImageDataset, Split, open_evaluation, open_split, open_training
from mecq_cli.data.hugging_face import Rows
from mecq_cli.data.loader import train_batches
from mecq_cli.data.sources import find_splits
from mecq_cli.errors import DataError, EnvironmentFailure, MecqError, UsageError
from mecq_cli.models.preprocessing import Preprocessing
from tests.e2e.command import write_patterns

LARGE = Preprocessing((3, 72, 72), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_patterns(tmp_path_factory.mktemp("sources") / "photos", {"train": 6, "val": 3})


def pack(target: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return target


def images(photos: Path, split: str) -> list[tuple[str, bytes]]:
    """(class/name, content), in an order that is not that of their names."""
    files = sorted((photos / split).rglob("*.png"), key=lambda path: (path.name, path.parent))
    return [(str(path.relative_to(photos / split)), path.read_bytes()) for path in files]


def one_tar(photos: Path, place: Path) -> str:
    both = [(f"set/{s}/{n}", c) for s in ("val", "train") for n, c in images(photos, s)]
    return str(
        pack(place / "all.tar", [*both, ("set/.hidden", b"x"), ("set/train/Thumbs.db", b"")])
    )


def tar_each(photos: Path, place: Path) -> str:
    pack(place / "train.tar", images(photos, "train"))
    pack(place / "val.tar", ((f"./imgs/{n}", c) for n, c in images(photos, "val")))
    return str(place)


def class_tars(photos: Path, place: Path) -> str:
    for split in ("train", "val"):
        for name in ("class0", "class1"):
            own = [(n.split("/")[1], c) for n, c in images(photos, split) if n.startswith(name)]
            pack(place / split / f"{name}.tar", own)
    return f"tar/{place}"


def bare_class_tars(photos: Path, place: Path) -> str:
    return class_tars(photos, place).removeprefix("tar/")


def samples(
    photos: Path, split: str, label: Callable[[int], tuple[str, str]]
) -> list[tuple[str, bytes]]:
    """WebDataset members, sorted as the folder is."""
    found = []
    for number, (name, content) in enumerate(sorted(images(photos, split))):
        ending, text = label(int(name[5]))
        found += [(f"{number:04}.png", content), (f"{number:04}.{ending}", text.encode())]
    return found


def shards(photos: Path, place: Path) -> str:
    train = samples(photos, "train", lambda n: ("cls", str(n)))
    pack(place / "set-train-000.tar", train[:10])
    pack(place / "set-train-001.tar", train[10:])
    pack(place / "set-val-000.tar", samples(photos, "val", lambda n: ("json", f'{{"label": {n}}}')))
    (place / "classnames.txt").write_text("class0\nclass1\n")
    return f"wds/{place}"


def pattern(photos: Path, place: Path) -> str:
    shards(photos, place)
    (place / "classnames.txt").unlink()
    pack(place / "set-val-000.tar", samples(photos, "val", lambda n: ("cls", f"class{n}")))
    train = samples(photos, "train", lambda n: ("json", json.dumps({"cls": f"class{n}"})))
    pack(place / "set-train-000.tar", train)
    return f"wds/{place}/*-000.tar"


def hugging_face(photos: Path) -> object:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["class0", "class1"])
    )
    made = {}
    for split in ("train", "val"):
        files = sorted(images(photos, split))
        rows = {
            "image": [{"bytes": content, "path": None} for _, content in files],
            "label": [int(name[5]) for name, _ in files],
        }
        made[split] = datasets.Dataset.from_dict(rows, features=features)
    return datasets.DatasetDict(made)


def saved(photos: Path, place: Path) -> str:
    hugging_face(photos).save_to_disk(str(place))  # type: ignore[attr-defined]
    return f"hfds/{place}"


def parquet(photos: Path, place: Path) -> str:
    for split, rows in hugging_face(photos).items():  # type: ignore[attr-defined]
        # The library takes "validation" for the same as "val", and calls it so.
        rows.to_parquet(str(place / "data" / f"{split}-00000-of-00001.parquet"))
    return f"hfds/{place}"


_MAKERS = (
    one_tar, tar_each, class_tars, bare_class_tars, shards, pattern, saved, parquet,
)  # fmt: skip
SOURCES = {
    f.__name__: f
    for f in (one_tar, tar_each, class_tars, bare_class_tars, shards, pattern, saved, parquet)
}


def contents(split: Split) -> list[bytes]:
    def read(index: int) -> bytes:
        file = split.file(index)
        return Path(file).read_bytes() if isinstance(file, str) else file.open().read()

    return [read(index) for index in range(len(split))]


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source_gives_the_same_as_the_folder(
    photos: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = SOURCES[kind](photos, tmp_path / "x")
    for ours, folder in zip(open_training(data), open_training(photos), strict=True):
        assert ours.classes == folder.classes == ("class0", "class1")
        assert ours.labels.tolist() == folder.labels.tolist()
        assert contents(ours) == contents(folder)
        assert contents(pickle.loads(pickle.dumps(ours))) == contents(folder)
        assert len(set(ours.paths)) == len(ours)
    train, folder = open_split(data, "train"), open_split(photos, "train")
    expected = epoch(folder, 0, 0)
    for workers in (0, 2):
        assert all(map(torch.equal, epoch(train, 0, workers), expected))
        assert all(map(torch.equal, epoch(train, 1, workers), expected[1:]))


def epoch(split: Split, start: int, workers: int) -> list[torch.Tensor]:
    dataset = ImageDataset(split, LARGE, train=True, seed=3)
    batches = train_batches(dataset, batch_size=4, epoch=1, start_batch=start, workers=workers)
    return [batch.images for batch in batches]


@pytest.mark.parametrize("kind", ["train.tar", "shards", "hfds"])
def test_the_labels_are_those_of_timm(photos: Path, tmp_path: Path, kind: str) -> None:
    """timm's own reader of the same files gives every image the same label."""
    if kind == "shards":
        pytest.importorskip("webdataset")
        data = shards(photos, tmp_path)
        reader = create_reader(
            "wds/", root=str(tmp_path), split="set-train-{000..001}.tar|12",
            input_img_mode="RGB",
        )  # fmt: skip
        ours = open_split(data, "train")
        theirs = {image.tobytes(): int(label) for image, label in reader}
        from mecq_cli.data import read_image

        mine = {read_image(ours.file(i)).tobytes(): int(ours.labels[i]) for i in range(len(ours))}
        assert mine == theirs
        return
    if kind == "hfds":
        data = parquet(photos, tmp_path / "x")
        reader = create_reader(data, root=str(tmp_path / "cache"), split="train")
    else:
        data = str(pack(tmp_path / "train.tar", images(photos, "train")))
        reader = create_reader("", root=data)
    ours = open_split(data, "train")

    def read(file: BinaryIO) -> bytes:
        with file:
            return file.read()

    theirs = {read(reader[i][0]): int(reader[i][1]) for i in range(len(reader))}
    assert dict(zip(contents(ours), ours.labels.tolist(), strict=True)) == theirs


def test_a_tar_without_splits_is_held_out_of(photos: Path, tmp_path: Path) -> None:
    data = pack(tmp_path / "photos.tar", images(photos, "train"))
    train, val = open_training(data, val_split=0.5)
    assert (len(train), len(val)) == (6, 6)
    assert not set(contents(train)) & set(contents(val))
    with pytest.raises(DataError, match="--val-split"):
        open_training(data)


def test_splits_inside_of_a_lone_tar_tell_more_than_its_name(photos: Path, tmp_path: Path) -> None:
    both = [(f"{s}/{n}", c) for s in ("train", "val") for n, c in images(photos, s)]
    for name in ("photos_train_val.tar", "test/photos.tar"):
        train, val = open_training(pack(tmp_path / name, both))
        assert (len(train), len(val)) == (12, 6)
        assert not set(contents(train)) & set(contents(val))


def test_samples_in_folders_of_splits_stay_apart(photos: Path, tmp_path: Path) -> None:
    members = [
        (f"{split}/{name}", content)
        for split in ("train", "val")
        for name, content in samples(photos, split, lambda n: ("cls", str(n)))
    ]
    train, val = open_training(f"wds/{pack(tmp_path / 'all.tar', members)}")
    assert (len(train), len(val)) == (12, 6)
    assert not set(contents(train)) & set(contents(val))


def test_a_class_may_be_called_as_a_split_is(photos: Path, tmp_path: Path) -> None:
    renamed = [(n.replace("class1", "train"), c) for n, c in images(photos, "train")]
    data = pack(tmp_path / "vehicles.tar", renamed)
    assert find_splits(str(data)) == ()


def test_a_split_is_said_by_the_name_before_the_folder(photos: Path, tmp_path: Path) -> None:
    place = tmp_path / "val"
    for split, name in (("val", "x-val-0"), ("train", "x-test-0")):
        pack(place / f"{name}.tar", images(photos, split))
    assert find_splits(f"tar/{place}") == ("val", "test")
    assert len(open_split(f"tar/{place}", "val")) == 6
    assert len(open_split(f"tar/{place}", "test")) == 12


def test_shards_that_do_not_tell_the_classes_are_refused(photos: Path, tmp_path: Path) -> None:
    """Alone, a file with one class would take its folders for classes."""
    content = images(photos, "train")[0][1]
    for name in ("cat", "dog"):
        files = [(f"{name}/{view}/{n}.png", content) for view in ("front", "back") for n in (1, 2)]
        pack(tmp_path / f"x-train-{name}.tar", files)
    with pytest.raises(DataError, match=r"x-train-cat.tar': which of its folders name the classes"):
        open_split(f"tar/{tmp_path}", "train")
    for name in ("cat", "dog"):  # below one folder that all have they do
        pack(tmp_path / f"x-train-{name}.tar", [(f"set/{name}/{n}.png", content) for n in (1, 2)])
    assert open_split(f"tar/{tmp_path}", "train").classes == ("cat", "dog")


@pytest.mark.parametrize("names", ["class0\n\nclass1\n", "class0\nclass0\n"])
def test_names_of_classes_that_would_shift_the_numbers(
    photos: Path, tmp_path: Path, names: str
) -> None:
    data = shards(photos, tmp_path)
    (tmp_path / "classnames.txt").write_text("class0\nclass1\n\n\n")
    assert open_split(data, "train").classes == ("class0", "class1")
    (tmp_path / "classnames.txt").write_text(names)
    with pytest.raises(DataError, match=r"classnames.txt' must have different names, one a line"):
        open_split(data, "train")


def link(name: str, kind: bytes) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        with tarfile.open(path, "w") as tar:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)

    return make


def tars(*members: tuple[str, bytes]) -> Callable[[Path], object]:
    return lambda path: pack(path, members)


def cut(path: Path) -> None:
    tars(("cat/1.png", b"x" * 5000))(path)
    path.write_bytes(path.read_bytes()[:2000])


def noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(20_000))


def packed(path: Path) -> None:
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("cat/1.png"))


def bad_head(path: Path) -> None:
    """tarfile alone takes this for the end, and would leave out the second image."""
    tars(("cat/1.png", b"x"), ("cat/2.png", b"x"))(path)
    content = bytearray(path.read_bytes())
    content[1024 + 150] ^= 1
    path.write_bytes(content)


def joined(path: Path) -> None:
    tars(("cat/1.png", b"x"))(path)
    path.write_bytes(2 * path.read_bytes())


def no_end(path: Path) -> None:
    tars(("cat/1.png", b"x"))(path)
    path.write_bytes(path.read_bytes()[:1024])


def negative(path: Path) -> None:
    """A size below zero, as base 256: readers that trust it go round in circles."""
    tars(("cat/1.png", b"x"), ("cat/2.png", b"x"))(path)
    content = bytearray(path.read_bytes())
    content[124:136] = (-512).to_bytes(12, "big", signed=True)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "cannot read|no file|No such|no data folder"),
    "empty file": (lambda path: path.touch(), "no uncompressed tar|holds no files"),
    "no members": (tars(), "holds no files"),
    "noise": (noise, "no uncompressed tar file"),
    "cut off": (cut, "damaged or incomplete"),
    "compressed": (packed, "no uncompressed tar file"),
    "negative size": (negative, "damaged"),
    "bad head": (bad_head, "damaged.*behind"),
    "joined": (joined, "several were joined"),
    "no end": (no_end, "incomplete behind"),
    "symbolic link": (link("cat/1.png", tarfile.SYMTYPE), "no plain file"),
    "hard link": (link("cat/1.png", tarfile.LNKTYPE), "no plain file"),
    "device": (link("cat/1.png", tarfile.CHRTYPE), "no plain file"),
    "twice": (tars(("cat/1.png", b"x"), ("cat/1.png", b"y")), "twice"),
    "no image": (tars(("cat/1.png", b"x"), ("cat/a\nb.txt", b"y")), r"'cat/a\\nb.txt' is no image"),
    "no class": (tars(("1.png", b"x")), "outside of any class folder"),
    "no label": (
        tars(("1.png", b"x"), ("2.png", b"x"), ("1.cls", b"0")),
        "sample '2' has 1 images",
    ),
    "two images": (tars(("1.png", b"x"), ("1.jpg", b"x"), ("1.cls", b"0")), "has 2 images"),
    "no number": (tars(("1.png", b"x"), ("1.cls", b"-1\x1b[2J\x00")), "is no label"),
    "not UTF-8": (tars(("1.png", b"x"), ("1.cls", b"\xff\xfe")), "is no label"),
    "deep json": (tars(("1.png", b"x"), ("1.json", b"[" * 100_000)), "is no label"),
    "other json": (tars(("1.png", b"x"), ("1.json", b'{"cls": [1]}')), "is no label"),
    "large label": (tars(("1.png", b"x"), ("1.cls", b"1" * 2**21)), "too large"),
    "mixed": (
        tars(("1.png", b"x"), ("1.cls", b"1"), ("2.png", b"x"), ("2.cls", b"cat")),
        "numbers",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tars_get_one_line(tmp_path: Path, case: str) -> None:
    make, message = BAD[case]
    make(tmp_path / "val.tar")
    with pytest.raises(DataError, match=message) as caught:
        open_evaluation(f"wds/{tmp_path / 'val.tar'}")
    assert str(caught.value).isprintable()
    assert caught.value.exit_code == 3


def test_a_path_that_leads_out_is_only_a_name(photos: Path, tmp_path: Path) -> None:
    content = images(photos, "val")[0][1]
    members = [("../../etc/cat/1.png", content), ("/etc/dog/2.png", content)]
    split = open_evaluation(pack(tmp_path / "val.tar", members))
    assert contents(split) == [content, content]
    assert [*tmp_path.iterdir()] == [tmp_path / "val.tar"]


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        ("hfids/cifar10", UsageError, "stream"),
        ("tfds/cifar10", UsageError, "stream"),
        ("wds/https://example.org/{0..9}.tar", UsageError, "fetch them"),
        ("wds/pipe:cat x.tar", UsageError, "fetch them"),
        ("wds/x-{0..9}.tar", UsageError, "use \\*"),
        ("wds/x-*.tar", DataError, "no file matches"),
    ],
)
def test_what_is_no_source_is_said(data: str, error: type[MecqError], said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        open_training(data)
    assert "\n" not in str(caught.value)


def test_rows_are_known_by_what_is_in_the_data_set_not_by_where_it_is() -> None:
    rows = [Rows(where, "train", [0, 1, 2], "image") for where in ("ds", "/elsewhere/ds")]
    assert rows[0].name(2) == rows[1].name(2) == "train[2]"
    assert rows[1].file(2).name == "/elsewhere/ds train[2]"


def test_hugging_face_columns(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    made = hugging_face(photos)["val"]  # type: ignore[index]

    def opened(rows: object) -> Split:
        rows.save_to_disk(str(tmp_path / "x"))  # type: ignore[attr-defined]
        return open_split(f"hfds/{tmp_path / 'x'}", ".")

    renamed = made.rename_columns({"image": "img", "label": "fine_label"})
    assert opened(renamed).classes == ("class0", "class1")
    words = made.cast_column("label", datasets.Value("string"))
    assert opened(words).classes == ("0", "1")
    for spoilt, said in (
        (made.remove_columns("label"), "needed are"),
        (made.remove_columns("image"), "needed are"),
        (made.map(lambda row: {"label": None}), "without a label"),
        (made.select([]), "no rows|cannot open"),
    ):
        with pytest.raises(DataError, match=said):
            opened(spoilt)
    empty = opened(made.map(lambda row: {"image": None}, features=made.features))
    with pytest.raises(DataError, match=r"x \.\[\d\]': the row has no image"):
        next(iter(train_batches(ImageDataset(empty, LARGE), batch_size=6, epoch=0)))
    with pytest.raises(DataError, match="has no split 'test'"):
        open_split(f"hfds/{tmp_path / 'x'}", "test")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EnvironmentFailure, match=r"mecq\[hfds\]"):
        open_training("hfds/cifar10")
