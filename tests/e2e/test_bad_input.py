"""Whatever is wrong is said in one line, without a traceback, with the exit code of its kind."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mecq_cli.models.hub import PublishedWeights
from tests.e2e.command import mecq, refused, write_patterns

BITS = ["--wbits", "4", "--abits", "4"]
RANDOM = ["quantize", "resnet20_cifar", *BITS, "--no-pretrained", "--device", "cpu"]
QUICK = ["--epochs", "0", "--calibration-images", "8", "--batch-size", "8"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_patterns(tmp_path_factory.mktemp("bad") / "data", {"train": 8, "val": 4})


@pytest.fixture
def own(pictures: Path, tmp_path: Path) -> Path:
    """A copy of the pictures that a test may spoil."""
    return Path(shutil.copytree(pictures, tmp_path / "data"))


@pytest.fixture(scope="module")
def run_folder(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("bad-run")
    done = mecq(*RANDOM, *QUICK, "--data", pictures, "--output", "run", "--quiet", cwd=folder)
    assert done.code == 0, done.err
    return folder / "run"


def test_an_unknown_model_names_its_neighbours(pictures: Path, tmp_path: Path) -> None:
    done = mecq("quantize", "resnet20_cifr", *BITS, "--data", pictures, cwd=tmp_path)
    refused(done, 2, "resnet20_cifr", "resnet20_cifar")
    done = mecq("eval", "torchvision/resnet81", "--data", pictures, cwd=tmp_path)
    refused(done, 2, "torchvision/resnet81", "torchvision/resnet18")
    assert not [*tmp_path.iterdir()]


def test_missing_weights_without_a_network_name_checkpoint(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The address of a network that is reserved for documentation: nobody ever answers there.
    monkeypatch.setattr(PublishedWeights, "url", property(lambda self: "https://192.0.2.1/x"))
    monkeypatch.setattr(PublishedWeights, "cached", lambda self: None)
    for name in ("resnet18", "torchvision/squeezenet1_0"):
        before = time.perf_counter()
        done = mecq("quantize", name, *BITS, "--data", pictures, cwd=tmp_path)
        assert time.perf_counter() - before < 5
        refused(done, 6, "--checkpoint", name.rpartition("/")[2])


def test_weights_for_other_classes(pictures: Path, tmp_path: Path) -> None:
    """Two folders, ten outputs."""
    model = mecq("quantize", "resnet20_cifar", *BITS, "--data", pictures, cwd=tmp_path)
    refused(model, 2, "no published weights", "--checkpoint")
    state = {"linear.weight": torch.zeros(10, 64), "linear.bias": torch.zeros(10)}
    torch.save(state, tmp_path / "odd.pth")
    arguments = ["--checkpoint", tmp_path / "odd.pth", "--data", pictures]
    refused(mecq("quantize", "resnet20_cifar", *BITS, *arguments, cwd=tmp_path), 3, "odd.pth")
    import timm

    import mecq_cli.models  # noqa: F401  # registers the CIFAR networks

    whole = timm.create_model("resnet20_cifar", num_classes=10)
    torch.save(whole.state_dict(), tmp_path / "ten.pth")
    arguments = ["--checkpoint", tmp_path / "ten.pth", "--data", pictures]
    done = mecq("quantize", "resnet20_cifar", *BITS, *arguments, cwd=tmp_path)
    refused(done, 2, "10", "2 class folders", "--reset-classifier")
    done = mecq(
        "quantize", "resnet20_cifar", *BITS, *QUICK, *arguments, "--reset-classifier", "--json",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.document["images"] == 8


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--wbits", "9"], ["--wbits", "9", "1 to 8"]),
        (["--abits", "0"], ["--abits", "0", "1 to 8"]),
        (["--first-last-bits", "16"], ["--first-last-bits", "16"]),
        (["--residual-bits", "4"], ["--residual-bits", "4", "8, or 32"]),
        (["--device", "tpu"], ["--device tpu", "cpu"]),
        (["--device", "meta"], ["--device meta", "cpu"]),
        (["--lr", "-1"], ["--lr", "-1"]),
        (["--val-split", "0.2"], ["--val-split", "val"]),
        (["--batch-size", "1", "--epochs", "1"], ["--batch-size 1", "at least 2"]),
    ],
)
def test_settings_out_of_range(
    pictures: Path, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    done = mecq(*RANDOM, "--data", pictures, *arguments, cwd=tmp_path)
    refused(done, 2, *parts)
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_here(pictures: Path, tmp_path: Path) -> None:
    done = mecq(*RANDOM, "--data", pictures, "--device", "cuda", cwd=tmp_path)
    refused(done, 6, "--device cuda", "--device cpu")


def test_a_pattern_that_matches_no_layer(pictures: Path, tmp_path: Path) -> None:
    settings = tmp_path / "my.toml"
    settings.write_text('[[layers]]\npattern = "layer9.*"\nwbits = 4\n')
    done = mecq(*RANDOM, "--data", pictures, "--config", settings, "--dry-run", cwd=tmp_path)
    refused(done, 2, "layer9.*", "layer1.0.conv1")


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("efficientvit_b0", "stages.2.blocks.1.context_module.main"),
        ("halonet26t", "stages.2.1.self_attn"),
    ],
)
def test_a_model_that_cannot_be_quantized_names_the_module(
    tmp_path: Path, pictures: Path, name: str, module: str
) -> None:
    arguments = [*BITS, "--no-pretrained", "--data", pictures, "--dry-run"]
    refused(mecq("quantize", name, *arguments, cwd=tmp_path), 2, "layer ", module)
    assert not [*tmp_path.iterdir()]


def remove_val(data: Path) -> None:
    shutil.rmtree(data / "val")


def empty_class(data: Path) -> None:
    for file in (data / "train" / "class0").iterdir():
        file.unlink()


def missing_class(data: Path) -> None:
    shutil.rmtree(data / "val" / "class1")


def loose_image(data: Path) -> None:
    shutil.copy(data / "train" / "class0" / "000.png", data / "train" / "loose.png")


def spoil(content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(data: Path) -> None:
        file = data / "val" / "class1" / "002.png"
        file.write_bytes(content(file.read_bytes()))

    return change


def animate(data: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), n * 40, np.uint8)) for n in range(3)]
    frames[0].save(data / "val" / "class1" / "a.gif", save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (remove_val, ["no val/", "--val-split 0.1"]),
        (empty_class, ["class folder 'train/class0'", "no image"]),
        (missing_class, ["differ", "only in train: 'class1'"]),
        (loose_image, ["outside of any class folder", "train/loose.png"]),
        (spoil(lambda b: b[: len(b) // 2]), ["val/class1/002.png", "truncated"]),
        (spoil(lambda b: b""), ["val/class1/002.png", "empty (0 bytes)"]),
        (spoil(lambda b: b"no image" * 40), ["val/class1/002.png", "not an image"]),
        (animate, ["val/class1/a.gif", "animated"]),
        (shutil.rmtree, ["no data folder", "train/ and val/"]),
    ],
)
def test_data_that_cannot_be_used(
    own: Path, tmp_path: Path, change: Callable[[Path], None], parts: list[str]
) -> None:
    change(own)
    refused(mecq(*RANDOM, "--data", own, "--dry-run", cwd=tmp_path), 3, *parts)
    done = mecq(*RANDOM, *QUICK, "--data", own, "--output", "run", cwd=tmp_path)
    refused(done, 3, *parts)
    assert not (tmp_path / "run" / "summary.json").exists()
    # Nothing may be left that stands in the way of a second try.
    again = mecq(*RANDOM, *QUICK, "--data", own, "--output", "run", "--resume", cwd=tmp_path)
    assert again.code == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_data_without_permission(own: Path, tmp_path: Path) -> None:
    (own / "val" / "class1" / "002.png").chmod(0)
    done = mecq(*RANDOM, *QUICK, "--data", own, cwd=tmp_path)
    refused(done, 3, "no permission", "val/class1/002.png")


def test_wrong_targets(pictures: Path, run_folder: Path, tmp_path: Path) -> None:
    refused(mecq("eval", cwd=tmp_path), 2, "no latest run", "mecq quantize")
    refused(mecq("export", cwd=tmp_path), 2, "no latest run")
    refused(mecq("inspect", "runs/no", cwd=tmp_path), 2, "runs/no", "no such file")
    refused(mecq("eval", "a.onnx", "--data", pictures, cwd=tmp_path), 2, "a.onnx", "no such file")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run_folder / "model.safetensors").read_bytes())
    refused(mecq("eval", alone, cwd=tmp_path), 2, "--data DIR")
    within = mecq("eval", run_folder / "model.safetensors", cwd=tmp_path)
    assert (within.code, "of val" in within.out) == (0, True), "the images of its run"
    refused(mecq("predict", "resnet18", "a.png", cwd=tmp_path), 2, "resnet18", "run folder")
    done = mecq("predict", run_folder, tmp_path / "a.png", cwd=tmp_path)
    refused(done, 3, "a.png", "no such file")
    refused(mecq("eval", run_folder, "--split", "vall", cwd=tmp_path), 3, "vall", "it has train")
    refused(mecq("eval", run_folder, "--img-size", "64", cwd=tmp_path), 2, "--img-size")
    artifact = run_folder / "model.safetensors"
    done = mecq("eval", artifact, "--simulator", "--data", pictures, cwd=tmp_path)
    refused(done, 2, "--simulator")
    other = write_patterns(tmp_path / "three", {"val": 1}, classes=3)
    refused(mecq("eval", run_folder, "--data", other, cwd=tmp_path), 2, "2 outputs", "3 class")


def test_nothing_is_overwritten_unasked(run_folder: Path, pictures: Path, tmp_path: Path) -> None:
    before = (run_folder / "model.safetensors").read_bytes()
    done = mecq(*RANDOM, *QUICK, "--data", pictures, "--output", run_folder, cwd=tmp_path)
    refused(done, 2, str(run_folder), "--force", "--resume")
    target = tmp_path / "m.onnx"
    target.write_bytes(b"mine")
    arguments = ["export", run_folder, "--output", target, "--images", "2"]
    refused(mecq(*arguments, cwd=tmp_path), 2, "m.onnx exists", "--force")
    assert target.read_bytes() == b"mine"
    assert mecq(*arguments, "--force", "--json", cwd=tmp_path).document["verified"] is True
    (tmp_path / "net.py").write_text("mine")  # where the script beside the file would be
    script = ["export", run_folder, "--output", tmp_path / "net.onnx", "--images", "2"]
    refused(mecq(*script, cwd=tmp_path), 2, "net.py exists", "--force")
    refused(mecq(*script, "--force", cwd=tmp_path), 2, "net.py", "not written by mecq export")
    assert (tmp_path / "net.py").read_text() == "mine"
    script = ["export", run_folder, "--output", tmp_path / "new.py", "--images", "2"]
    refused(mecq(*script, cwd=tmp_path), 2, "new.py", "ends in .onnx")
    itself = run_folder / "model.safetensors"
    done = mecq("export", run_folder, "-f", "safetensors", "-o", itself, "--force", cwd=tmp_path)
    refused(done, 2, "the artifact itself")
    assert itself.read_bytes() == before


@pytest.mark.parametrize("suffix", ["safetensors", "onnx"])
def test_damaged_artifacts(run_folder: Path, pictures: Path, tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole.{suffix}"
    arguments = ["--format", suffix, "--output", whole, "--images", "2", "--quiet"]
    assert mecq("export", run_folder, *arguments, cwd=tmp_path).code == 0
    data = whole.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 4
    for content in (bytes(flipped), data[:-100], b"", b"x" * 1000):
        bad = tmp_path / f"bad.{suffix}"
        bad.write_bytes(content)
        refused(mecq("eval", bad, "--data", pictures, cwd=tmp_path), 3, f"bad.{suffix}")


def test_an_artifact_of_another_version(run_folder: Path, pictures: Path, tmp_path: Path) -> None:
    import safetensors
    from safetensors.numpy import save_file

    with safetensors.safe_open(run_folder / "model.safetensors", "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    assert metadata["version"] == "1"
    newer = tmp_path / "newer.safetensors"
    save_file(tensors, newer, {**metadata, "version": "99"})
    refused(mecq("eval", newer, "--data", pictures, cwd=tmp_path), 3, "newer.safetensors", "99")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": np.zeros(3, np.float32)}, foreign)
    refused(mecq("eval", foreign, "--data", pictures, cwd=tmp_path), 3, "foreign.safetensors")


def test_a_dry_run_writes_nothing(pictures: Path, tmp_path: Path) -> None:
    done = mecq(*RANDOM, "--data", pictures, "--dry-run", "--json", cwd=tmp_path)
    assert len([s for s in done.document["sites"] if s["wbits"] == 4]) == 18
    expected = done.document["forecast"]
    seconds = expected["training_seconds"]
    assert seconds == pytest.approx(expected["step_seconds"] * done.document["steps"])
    assert seconds > 0
    # The input of each of 20 convolutions is kept at least, as floats or as bf16.
    assert expected["batch_bytes"] > 8 * 20 * 16 * 32 * 32
    parts = ("batch_bytes", "weight_bytes", "image_bytes", "process_bytes")
    assert expected["memory_bytes"] == sum(expected[part] for part in parts)
    shown = mecq(*RANDOM, "--data", pictures, "--dry-run", cwd=tmp_path).out
    assert "from a measured step of 8 images" in shown
    assert not [*tmp_path.iterdir()]


def test_a_pipe_is_not_waited_for(run_folder: Path, own: Path, tmp_path: Path) -> None:
    """Given as an image, or put in the place of one after the folder was listed."""
    os.mkfifo(tmp_path / "pipe.png")
    done = mecq("predict", run_folder, tmp_path / "pipe.png", cwd=tmp_path)
    refused(done, 3, "pipe.png", "not a regular file")


def test_names_of_any_kind_are_data(own: Path, tmp_path: Path) -> None:
    """Class and image names with line breaks, markup, control characters and broken encoding."""
    names = {"class0": "[red]\n\x1b[2J;$(touch x)", "class1": os.fsdecode(b"\xff\xfe..")}
    for split in ("train", "val"):
        for old, new in names.items():
            folder = (own / split / old).rename(own / split / new)
            (folder / "000.png").rename(folder / "-rf\n\x07\udcff.png")
    done = mecq(*RANDOM, *QUICK, "--data", own, "--output", "run", cwd=tmp_path)
    assert done.code == 0, done
    assert "\x1b[2J" not in done.out + done.err
    image = next((own / "val").rglob("-rf*"))
    done = mecq("predict", "run", image, cwd=tmp_path)
    assert done.code == 0, done
    assert "\x1b[2J" not in done.out + done.err
    done = mecq("export", "run", "--images", 2, cwd=tmp_path)
    assert done.code == 0, done
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run", "runs"]


def test_parts_of_one_image_and_batch_norm_on_single_pixels(pictures: Path, tmp_path: Path) -> None:
    done = mecq(
        *RANDOM, "--data", pictures, "--img-size", 4, "--batch-size", 4, "--accumulate", 4,
        "--epochs", 1, "--calibration-images", 8, cwd=tmp_path,
    )  # fmt: skip
    refused(done, 2, "a smaller --accumulate")


def test_images_too_small_for_the_model_say_so(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = [*BITS, "--no-pretrained", "--epochs", 0, "--dry-run", "--data", pictures]
    command = ["quantize", "torchvision/alexnet", *arguments, "--img-size", 32]
    done = mecq(*command, "--quiet", cwd=tmp_path)
    refused(done, 2, "images of 32 x 32 pixels are too small for it", "--img-size")
    assert done.err.count("\n") == 1
    # In a process of its own, where PyTorch sets up its log as it is loaded.
    called = [sys.executable, "-m", "mecq_cli", *map(str, command), "--quiet"]
    alone = subprocess.run(called, cwd=tmp_path, capture_output=True, text=True)
    assert (alone.returncode, alone.stderr) == (2, done.err)
    loud = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not loud, "nothing of PyTorch's beside it"


def test_a_dry_run_refuses_the_output_that_the_run_would(
    run_folder: Path, pictures: Path, tmp_path: Path
) -> None:
    dry = [*RANDOM, *QUICK, "--data", pictures, "--dry-run", "--output"]
    before = sorted(path.name for path in run_folder.iterdir())
    refused(mecq(*dry, run_folder, cwd=tmp_path), 2, "--force starts it over")
    refused(mecq(*dry, pictures, cwd=tmp_path), 2, "holds no run that could be started over")
    (tmp_path / "file").write_text("mine")
    refused(mecq(*dry, "file", cwd=tmp_path), 2, "is a file; give --output DIR")
    assert mecq(*dry, run_folder, "--force", "--quiet", cwd=tmp_path).code == 0
    assert mecq(*dry, "new", "--quiet", cwd=tmp_path).code == 0
    assert sorted(path.name for path in run_folder.iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_images_of_a_run_that_are_elsewhere_now(own: Path, tmp_path: Path) -> None:
    done = mecq(*RANDOM, *QUICK, "--data", own, "--output", "run", "--quiet", cwd=tmp_path)
    assert done.code == 0, done.err
    own.rename(tmp_path / "elsewhere")
    for command in ("eval", "export"):
        refused(mecq(command, "run", cwd=tmp_path), 3, "the images of run were in", "--data DIR")
    assert mecq("eval", "run", "--data", "elsewhere", "--quiet", cwd=tmp_path).code == 0


def test_what_is_named_is_something_else(run_folder: Path, pictures: Path, tmp_path: Path) -> None:
    runs = run_folder.parent
    refused(mecq("eval", runs.name, cwd=runs.parent), 2, "neither a model's name", ": run")
    Image.new("RGB", (9, 9)).save(tmp_path / "cat.png")
    done = mecq("predict", "cat.png", run_folder, cwd=tmp_path)
    refused(done, 2, "cat.png: is an image; a target, which comes before images")
    (tmp_path / "data.tar.gz").write_bytes(b"packed")
    done = mecq(*RANDOM, "--data", "data.tar.gz", cwd=tmp_path)
    refused(done, 3, "is a file, not a data folder; unpack it")
    done = mecq(*RANDOM[:-3], "--checkpoint", "cat.png", "--data", pictures, cwd=tmp_path)
    refused(done, 3, "cat.png is an image; --checkpoint takes weights")
    done = mecq("quantize", "resnet20", *BITS, "--data", pictures, cwd=tmp_path)
    refused(done, 2, "did you mean resnet20_cifar")
    done = mecq("quantize", "--resume", run_folder, cwd=tmp_path)
    refused(done, 2, f"--resume: which run? give --output {run_folder}")
    (tmp_path / "rule.toml").write_text("[[layers]]\nwbits = 4\n")
    done = mecq(*RANDOM, "--config", "rule.toml", "--data", pictures, cwd=tmp_path)
    refused(done, 2, "'layers[0].pattern' in rule.toml is missing")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("mecq eval nope.onnx 2>&-", 2),
        ("mecq config show >&-", 0),
        ("mecq --help | true; exit ${PIPESTATUS[0]}", 141),
    ],
)
def test_closed_streams_do_not_change_the_exit_code(
    command: str, code: int, tmp_path: Path
) -> None:
    called = command.replace("mecq", f"{sys.executable} -m mecq_cli")
    done = subprocess.run(["bash", "-c", called], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode in (code, 0 if "|" in command else code), done.stderr
    assert "internal" not in done.stderr + done.stdout
