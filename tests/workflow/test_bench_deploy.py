"""`mecq bench deploy` through the real command line, on the smallest network there is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mecq_cli.export import safetensors
from mecq_cli.export.safetensors import save
from mecq_cli.insertion import BitPlan, insert
from mecq_cli.integerize import integerize
from mecq_cli.models.loading import load_model
from mecq_cli.workflow.deploy_networks import ARMS
from mecq_cli.workflow.interleave import WARM_ROUNDS, interleave, ratio
from tests.e2e.command import mecq, write_patterns

torch.set_num_threads(1)

W2A2 = ("resnet20_cifar", "--wbits", 2, "--abits", 2)
SHORT = ("--threads", 1, "--repeats", 2, "--calibration-images", 8)


def test_a_model_by_its_name(tmp_path: Path) -> None:
    flags = (*W2A2, *SHORT, "--batch-sizes", "1,3", "--plot", "speed.svg")
    done = mecq("bench", "deploy", *flags, "--json", cwd=tmp_path)
    document = done.document
    assert "compute with floats" not in done.err
    assert document["float_nodes"] == []
    assert [(c["threads"], c["batch_size"], c["rounds"]) for c in document["cells"]] == [
        (1, 1, 2),
        (1, 3, 2),
    ]
    for cell in document["cells"]:
        assert set(cell["arms"]) == set(ARMS)
        assert cell["arms"]["fp32"]["speedup"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        for arm in cell["arms"].values():
            rate = 1e3 * cell["batch_size"] / arm["latency_ms"]
            assert arm["images_per_second"] == pytest.approx(rate)
    kernels = document["kernels"]
    assert kernels["fp32"]["Conv"] == 19
    assert "BatchNormalization" not in kernels["fp32"]
    for arm in ("static_int8", "mecq"):
        assert kernels[arm]["QLinearConv"] == 19
        assert not {"Conv", "Add", "Gemm"} & kernels[arm].keys()
    sizes = document["sizes"]
    assert sizes["ideal"] < sizes["mecq"] < sizes["static_int8"] / 2 < sizes["fp32"] / 6
    assert (tmp_path / "speed.svg").read_bytes().count(b"<path") > 20

    again = mecq("bench", "deploy", *flags, cwd=tmp_path)
    assert (again.code, again.out) == (2, "")
    assert "--plot speed.svg: exists already; give --force" in again.err


def test_float_kernels_inside_are_told(tmp_path: Path) -> None:
    flags = (*W2A2, *SHORT, "--residual-bits", 32, "--batch-sizes", 1)
    done = mecq("bench", "deploy", *flags, cwd=tmp_path)
    assert done.code == 0
    assert "warning: between the first and the last layer" in done.err
    assert "conv1.dequantize (Cast, Mul, Transpose)" in done.err
    lines = done.out.splitlines()
    assert lines[0] == "resnet20_cifar, W2 A2, input 3x32x32, random weights"
    assert sum("static INT8" in line for line in lines) == 3  # times, size, kernels
    assert any(line.startswith("mecq ran ") and " Add" in line for line in lines), done.out


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A random, uncalibrated W4A4 network of 4 classes at 16 pixels."""
    loaded = load_model("resnet20_cifar", pretrained=False, num_classes=4, img_size=16)
    size = loaded.preprocessing.input_size
    metadata = {
        "model": loaded.name,
        "wbits": 4,
        "abits": 4,
        "classes": list("abcd"),
        "preprocessing": loaded.preprocessing.to_json(),
    }
    network = insert(loaded.module, size, BitPlan(4, 4)).eval()
    save(integerize(network, size, metadata), tmp_path / "run" / "model.safetensors")
    return tmp_path / "run" / "model.safetensors"


def test_a_run_with_images_of_its_own(artifact: Path, tmp_path: Path) -> None:
    write_patterns(tmp_path / "photos", {"train": 3})
    flags = ("run", *SHORT, "--batch-sizes", 1, "--data", "photos", "--json")
    document = mecq("bench", "deploy", *flags, cwd=tmp_path).document
    assert (document["model"], document["wbits"]) == ("resnet20_cifar", 4)
    assert document["input_shape"] == [3, 16, 16]
    assert document["calibration"] == {"images": 6, "source": "photos"}
    assert document["sizes"]["mecq"] > document["sizes"]["ideal"] > 4e4

    refused = mecq("bench", "deploy", artifact, "--wbits", 2, cwd=tmp_path)
    assert refused.code == 2
    assert "--wbits is for model names" in refused.err
    model = safetensors.load(artifact)
    nameless = type(model)(model.nodes, model.input_shape, {**model.metadata, "model": None})
    save(nameless, artifact, force=True)
    done = mecq("bench", "deploy", artifact, cwd=tmp_path)
    assert done.code == 3
    assert "the name of its model is none" in done.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["resnet20_cifar"], "resnet20_cifar is a model: which bits? give --wbits and --abits"),
        ([*W2A2, "--threads", "1,x"], "--threads: got '1,x'; allowed: whole numbers from 1"),
        ([*W2A2, "--batch-sizes", "0"], "--batch-sizes: got '0'; allowed: whole numbers from 1"),
        ([*W2A2, "--seconds", 1, "--repeats", 1], "--seconds and --repeats: give one of them"),
        ([*W2A2, "--plot", "a.png"], "--plot a.png: it is drawn as SVG"),
        (["resnet99", "--wbits", 2, "--abits", 2], "unknown model 'resnet99'"),
    ],
)
def test_bad_settings(flags: list[object], message: str, tmp_path: Path) -> None:
    done = mecq("bench", "deploy", *flags, cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {message}")
    assert done.err.count("\n") == 1


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = mecq("bench", "deploy", *W2A2, "--plot", "a.svg", cwd=tmp_path)
    assert (done.code, done.out) == (6, "")
    assert done.err == "error: --plot: matplotlib is not installed; pip install 'mecq[report]'\n"


def test_arms_take_turns() -> None:
    calls: list[str] = []
    arms = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = interleave(arms, seconds=0.0, repeats=4)
    assert "".join(calls) == "abc" * WARM_ROUNDS + "abc" + "bca" + "cab" + "abc"
    assert all(len(t.wall) == len(t.cpu) == 4 for t in times.values())
    assert len(interleave(arms, seconds=1e-9)["a"].wall) == 5
    assert ratio([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == {"median": 3.0, "low": 2.5, "high": 3.5}
