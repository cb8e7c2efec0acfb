"""`mecq_cli.quantize` on modules and data sets of a program."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import mecq_cli
from mecq_cli.config import QuantizeConfig
from mecq_cli.data.items import split_of
from mecq_cli.errors import DataError, UsageError
from mecq_cli.workflow.api import Settings
from tests.e2e.command import mecq, write_patterns

QUICK: dict[str, Any] = {
    "epochs": 2, "batch_size": 8, "calibration_images": 16, "bn_images": 16, "compile": "off",
    "device": "cpu",
}  # fmt: skip


class Net(nn.Module):
    """Two convolutions and a sum; ``channels`` of the image."""

    def __init__(self, channels: int = 3, classes: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        logits: Tensor = self.head(torch.relu(x + self.second(x)).mean((2, 3)))
        return logits


class Pictures(Dataset[tuple[Any, int]]):
    """Stripes of two kinds: as Pillow images, or as ``change`` makes them."""

    classes = ("flat", "steep")

    def __init__(self, count: int, change: Any = None) -> None:
        self.count, self.change = count, change

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        return (self[index] for index in range(self.count))

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        label = index % 2
        wave = 128 + 90 * np.sin(np.arange(12) * (1 + 2 * label) * 0.5 + index)
        pixels = np.repeat(wave[:, None], 12, 1).astype(np.uint8)
        image = Image.fromarray(pixels).convert("RGB")
        return (image if self.change is None else self.change(image)), label


def floats(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, np.float32).copy()).permute(2, 0, 1) / 255 - 0.5


def jittered(image: Image.Image) -> Tensor:
    """Augmented by each of the generators that data sets draw from."""
    noise = np.random.rand() + float(torch.rand(()))  # noqa: NPY002
    return floats(image) + 0.1 * noise


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def test_the_settings_are_those_of_the_command_with_their_types() -> None:
    found_by_a_run = {"allotted", "allotment", "chosen"}
    known = set(QuantizeConfig.model_fields) - found_by_a_run
    assert set(Settings.__annotations__) == known - {"model", "data", "wbits", "abits", "dry_run"}
    ours, theirs = get_type_hints(Settings), get_type_hints(QuantizeConfig)
    for key, kind in ours.items():
        if key not in ("layers", "checkpoint", "output", "mec_estimator"):
            assert kind == theirs[key] or kind | None == theirs[key], key


def test_a_target_in_the_place_of_wbits() -> None:
    data = (Pictures(32, floats), Pictures(16, floats))
    settings: dict[str, Any] = {**QUICK, "epochs": 0, "target_avg_bits": 3.0}
    result = mecq_cli.quantize(Net(), data, abits=4, **settings)
    assert result.summary["wbits"] == result.summary["allotment"]["average_bits"] == 3
    rows = mecq_cli.inspect(mecq_cli.InspectConfig(target=str(result.run)), mecq_cli.Listener())
    bits = {row["layer"]: row["wbits"] for row in rows["sites"] if row["shape"]}
    assert bits == {"first": 8, "second": 3, "head": 8}
    with pytest.raises(UsageError, match="--wbits and --target-avg-bits"):
        mecq_cli.quantize(Net(), data, wbits=4, **settings)


class Notes(mecq_cli.Listener):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize(
    "bits", [{"wbits": 1}, {"wbits": 2}, {"wbits": 3}, {"target_avg_bits": 2.5}]
)
def test_depthwise_networks_are_told_of_targets(groups: int, bits: dict[str, Any]) -> None:
    net, heard = Net(), Notes()
    net.second = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
    data = (Pictures(16, floats), Pictures(8, floats))
    mecq_cli.quantize(net, data, abits=4, listener=heard, **{**QUICK, "epochs": 1, **bits})
    told = [text for text in heard.said if text.startswith("--target-avg-bits 2 in the place")]
    assert len(told) == (groups > 1 and bits == {"wbits": 2})


def test_decoded_images_train_as_a_folder_does() -> None:
    """The same pixels by three ways: the same weights, to the last bit."""

    def tensor(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)

    preprocessing = mecq_cli.Preprocessing((3, 12, 12), (0.5,) * 3, (0.5,) * 3, crop_pct=1.0)
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for split, count in (("train", 32), ("val", 16)):
        # In the order of the data set, which numbers them across the classes.
        for number, (image, label) in enumerate(Pictures(count)):
            place = Path("photos", split, Pictures.classes[label])
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{number:03d}.png")
    order = [*range(0, 32, 2), *range(1, 32, 2)]
    train = Subset(Pictures(32), order)
    runs: dict[str, Any] = {
        "folder": "photos",
        "pillow": (train, Pictures(16)),
        "bytes": (DataLoader(Subset(Pictures(32, tensor), order), 8), Pictures(16, tensor)),
    }
    files = []
    for name, data in runs.items():
        result = mecq_cli.quantize(
            net, data, 2, 2, preprocessing=preprocessing, output=name,
            classes=None if name == "folder" else Pictures.classes, **QUICK,
        )  # fmt: skip
        assert result.module.classes == ("flat", "steep")
        assert result.summary["model"] == "python:Net"
        files.append((Path(name) / "model.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())


def test_floats_with_augmentation_repeat_and_continue() -> None:
    """A run that is stopped and continued ends as one that is not, random augmentation and all."""
    data = (Pictures(32, jittered), DataLoader(Pictures(16, floats), batch_size=4))
    net = Net()
    state = torch.get_rng_state()
    mecq_cli.quantize(net, data, 2, 2, output="whole", checkpoint_every=3, **QUICK)
    shutil.copytree("whole", "stopped")
    newest = sorted(Path("stopped/checkpoints").glob("*"))[-1]
    newest.unlink()
    Path("stopped/summary.json").unlink()
    Path("stopped/model.safetensors").unlink()
    result = mecq_cli.quantize(
        net, data, 2, 2, output="stopped", checkpoint_every=3, resume=True, **QUICK
    )
    assert 0 < result.summary["resumed_at"] < 8
    whole = Path("whole/model.safetensors").read_bytes()
    assert whole == Path("stopped/model.safetensors").read_bytes()
    assert len(state) == len(torch.get_rng_state())

    # Looking at it in the middle changes nothing.
    watched = mecq_cli.quantize(net, data, 2, 2, output="watched", eval_every=1, **QUICK)
    assert whole == (watched.run / "model.safetensors").read_bytes()
    rows = [json.loads(line) for line in (watched.run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_top1" in row] == [4]  # and not after the last
    assert rows[4]["val_top1"] * 16 / 100 in range(1, 17)

    right = sum(int(result(x[None]).argmax()) == y for x, y in Pictures(16, floats))
    assert 100 * right / 16 == result.top1
    assert result.export(images=8).stat().st_size > 0
    assert result.save("here.safetensors").read_bytes() == whole
    with pytest.raises(UsageError, match=r"here\.safetensors.*exists"):
        result.save("here.safetensors")
    with pytest.raises(UsageError, match="for ONNX"):
        result.save("here.onnx")


def test_the_commands_on_such_a_run(tmp_path: Path) -> None:
    """They do what can be done without the program, and say what cannot."""
    data = write_patterns(tmp_path / "photos", {"train": 8, "val": 4}, size=12)
    result = mecq_cli.quantize(Net(), (Pictures(16, floats), Pictures(8, floats)), 4, 4, **QUICK)
    assert str(result.run).startswith("runs/Net-w4a4-")
    for command, words in (
        (["eval"], "--data DIR"),
        (["export"], "--data DIR"),
        (["eval", "--simulator", "--data", data], "is a module of the program"),
        (["quantize", "--resume", "--output", result.run], "--data DIR"),
        (["quantize", "--resume", "--output", result.run, "--data", data], "is a module"),
    ):
        done = mecq(*command, cwd=tmp_path)
        assert done.code in (2, 3), done
        assert words in done.err.splitlines()[-1], done.err
    assert mecq("inspect", "--json", cwd=tmp_path).document["totals"]["packed_bytes"] > 0
    names = json.loads(
        mecq("predict", result.run, next(data.rglob("*.png")), "--json", cwd=tmp_path).out
    )
    assert len(names["predictions"][0]["top5"]) == 2


UNEVEN = WeightedRandomSampler([1.0] * 8, 8)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize(
    ("data", "settings", "words"),
    [
        (3, {}, "data: got int; give a folder, or (train, val)"),
        ((Endless(), Pictures(4)), {}, "data: got Endless; give a folder"),
        ((Pictures(0), Pictures(4)), {}, "the data set is empty"),
        ((Pictures(8, floats), Pictures(4, str)), {}, "val[0]: the image is of type str"),
        ((Pictures(8, floats), TensorDataset(torch.zeros(4, 3, 12, 12))), {}, "give (image, "),
        ((Pictures(8, floats), TensorDataset(torch.zeros(4, 3, 12, 12), torch.full((4,), 7))),
         {}, "val: a label is 7; the model has 2 outputs"),
        ((Pictures(8, floats), TensorDataset(torch.zeros(4, 3, 12, 12), torch.zeros(4, 3))), {},
         "val[0]: the label is"),
        ((Pictures(8, lambda _: Image.new("F", (12, 12))), Pictures(4)), {}, "mode F, of unknown"),
        ((DataLoader(Pictures(8, floats), collate_fn=list), Pictures(4)), {}, "a collate_fn of"),
        ((DataLoader(Pictures(8, floats), batch_sampler=BatchSampler(UNEVEN, 4, False)),
          Pictures(4)), {}, "a sampler or a"),
        ((DataLoader(Pictures(8, floats), sampler=RandomSampler(range(8), num_samples=3)),
          Pictures(4)), {}, "a sampler or a"),
        ((Pictures(8, floats), Pictures(4, lambda i: floats(i)[:, 2:])), {},
         "train has float tensors [3, 12, 12] and val [3, 10, 12]"),
        ((TensorDataset(torch.zeros(4, 3, 12, 12), torch.tensor([0.9, 1.9, 0.9, 1.9])),
          Pictures(4)), {}, "train[0]: the label is tensor(0.9000)"),
        ((Pictures(8, floats), Pictures(4, floats)), {"img_size": 9}, "img_size: float tensors"),
        ((Pictures(8, floats), Pictures(4, floats)), {"classes": "abc"}, "classes: got 3 names"),
        ((Pictures(8, floats), Pictures(4, floats)), {"wbits": 9}, "wbits: got 9; allowed: 1 to 8"),
        ((Pictures(8, floats), Pictures(4, floats)), {"epoch": 9}, "did you mean 'epochs'?"),
        ((Pictures(8, floats), Pictures(4, floats)), {"pretrained": True}, "brings its own"),
        (("nowhere"), {}, "no data folder 'nowhere'"),
        ((Pictures(8, lambda i: floats(i)[:2]), Pictures(4)), {}, "fails at images of [2, 12, 12]"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(data: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises((UsageError, DataError)) as caught:
        mecq_cli.quantize(Net(), data, **settings)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("runs").exists()


class Renamed(Pictures):
    """A data set that gives other labels than it has."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.targets = [index % 2 for index in range(count)]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = super().__getitem__(index)
        return image, 1 - label


def test_labels_are_those_that_come_with_the_images() -> None:
    assert split_of(Renamed(6), "train", ("flat", "steep")).labels.tolist() == [1, 0, 1, 0, 1, 0]
    names: Any = np.array(["flat", "steep"])
    data = (Pictures(8, floats), Pictures(4, floats))
    quick = {**QUICK, "epochs": 0}
    assert mecq_cli.quantize(Net(), data, 4, classes=names, **quick).run.exists()
