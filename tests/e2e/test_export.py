"""`mecq export` in every profile, on a run with a reduced range."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from mecq_cli.export.cpu import CpuPath
from mecq_cli.integer.ir import multiplied_weight
from mecq_cli.workflow import export as workflow
from tests.e2e.command import Done, mecq, write_patterns

QUANTIZE = [
    "quantize", "resnet20_cifar", "--no-pretrained", "--device", "cpu", "--epochs", "0",
    "--calibration-images", "8", "--batch-size", "8", "--data", "data",
]  # fmt: skip
IMAGES = ["--images", "12"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with two runs of a random network: "full", W2A2, and "reduced", W8A8 in 7 bits."""
    folder = tmp_path_factory.mktemp("export")
    write_patterns(folder / "data", {"train": 8, "val": 8})
    bits = ["--wbits", "2", "--abits", "2", "--output", "full"]
    assert mecq(*QUANTIZE, *bits, "--quiet", cwd=folder).code == 0
    bits = ["--wbits", "8", "--abits", "8", "--reduce-range", "--output", "reduced"]
    assert mecq(*QUANTIZE, *bits, "--quiet", cwd=folder).code == 0
    return folder


def error_of(done: Done) -> str:
    assert done.out == ""
    return done.err.splitlines()[-1]


def test_a_reduced_range_is_recorded_and_kept(place: Path) -> None:
    from mecq_cli.export import safetensors

    assert "reduce_range = true" in (place / "reduced" / "config.toml").read_text()
    model = safetensors.load(place / "reduced" / "model.safetensors")
    assert (model.metadata["reduce_range"], model.metadata["wbits"]) == (True, 8)
    for node in model.nodes:
        if node.weight_bits:
            assert node.weight_bits == 7
            assert np.abs(multiplied_weight(node)).max() <= 64
    sites = mecq("inspect", "reduced", "--json", cwd=place).document["sites"]
    assert {(s["wbits"], s["abits"]) for s in sites if s["wbits"]} == {(7, 8)}
    assert "reduce_range = false" in (place / "full" / "config.toml").read_text()


@pytest.mark.parametrize("run", ["full", "reduced"])
@pytest.mark.parametrize("profile", ["ort", "portable", "qonnx"])
def test_every_profile_is_run_layer_by_layer(
    place: Path, tmp_path: Path, profile: str, run: str
) -> None:
    if profile == "qonnx":
        pytest.importorskip("qonnx", reason="needs the extra: pip install 'mecq[qonnx]'")
    target = tmp_path / "net.onnx"
    arguments = [run, "-p", profile, "-o", target, *IMAGES, "--verify"]
    document = mecq("export", *arguments, "--json", cwd=place).document
    assert (document["verified"], document["profile"], document["images"]) == (True, profile, 12)
    found = document["replay"]
    ways = {way["way"]: way for way in found["ways"]}
    runtimes = {"qonnx"} if profile == "qonnx" else {
        "onnxruntime", "onnxruntime without optimizations",
    }  # fmt: skip
    assert ways.keys() == {"torch", *runtimes}
    assert (found["images"], len(found["by_layer"])) == (12, found["layers"])
    for name, way in ways.items():
        rows = [row["ways"][name] for row in found["by_layer"]]
        for key in ("compared", "differing"):
            assert way[key] == sum(row[key] for row in rows)
        assert way["compared"] > 12 * 300_000
        assert way["left_out"] == 0
        assert way["differing"] <= (0 if way["exact"] else 3 + 1e-5 * way["compared"])

    proto = onnx.load(target)
    assert proto.opset_import[0].version == document["opset"] == (25 if profile == "ort" else 13)
    [metadata] = [json.loads(p.value) for p in proto.metadata_props if p.key == "mecq.metadata"]
    preprocessing = metadata["preprocessing"]
    keys = {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}
    assert preprocessing.keys() == keys
    assert metadata["classes"] == ["class0", "class1"]
    assert metadata["reduce_range"] == (run == "reduced")

    if profile == "qonnx":
        assert "saturation" not in document
    else:
        allowed = {"conv1", "linear"} if run == "full" else set()
        assert {*document["saturation"]["layers"]} <= allowed
    evaluated = mecq("eval", target, "--data", "data", "--json", cwd=place).document
    wanted = json.loads((place / run / "summary.json").read_text())["top1"]
    # In floats one image of the 16 may go the other way.
    leeway = 100 / 16 if profile == "qonnx" else 0
    assert evaluated["images"] == 16
    assert evaluated["top1"] == pytest.approx(wanted, abs=leeway)


def test_what_the_check_prints_for_people(place: Path, tmp_path: Path) -> None:
    arguments = ["full", "-o", tmp_path / "a.onnx", *IMAGES]
    short = mecq("export", *arguments, "--quiet", cwd=place).out
    assert "onnx, profile ort, opset 25" in short
    assert "equal to the simulator on 12 images" in short
    rows = [line for line in short.splitlines() if "integers differ" in line]
    assert [row.split("  ")[0] for row in rows] == ["onnxruntime without optimizations"]
    full = mecq("export", *arguments, "--verify", "--force", "--quiet", cwd=place).out
    rows = [line for line in full.splitlines() if "integers differ" in line]
    assert [row.split("  ")[0] for row in rows] == [
        "torch", "onnxruntime", "onnxruntime without optimizations",
    ]  # fmt: skip
    assert len({row.split(" integers ")[0].split(" of ")[1] for row in rows}) == 1


def test_the_next_command_is_about_the_run_wherever_the_file_is(
    place: Path, tmp_path: Path
) -> None:
    output = tmp_path / "elsewhere" / "m.onnx"
    done = mecq("export", "--output", output, *IMAGES, cwd=place)
    assert (done.code, "next: mecq report\n" in done.err) == (0, True)


def test_the_artifact_itself_is_replayed_too(place: Path, tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    arguments = ["full", "-f", "safetensors", "-o", target, *IMAGES, "--verify", "--json"]
    document = mecq("export", *arguments, cwd=place).document
    [way] = document["replay"]["ways"]
    assert (way["way"], way["differing"], way["exact"]) == ("torch", 0, True)
    done = mecq("export", "full", "-f", "safetensors", "-p", "portable", cwd=place)
    assert done.code == 2
    assert error_of(done).startswith("error: --profile portable: is a form of ONNX files")


def test_an_unverified_file_needs_no_images(place: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    artifact = tmp_path / "alone" / "model.safetensors"
    artifact.write_bytes((place / "full" / "model.safetensors").read_bytes())
    done = mecq("export", "alone", cwd=tmp_path)
    assert (done.code, error_of(done)) == (2, "error: which images? give --data DIR")
    document = mecq("export", "alone", "--no-verify", "--json", cwd=tmp_path).document
    assert document["verified"] is False
    assert not {"images", "top1_agreement", "replay"} & document.keys()
    assert (tmp_path / document["path"]).stat().st_size == document["bytes"]


def test_profiles_lie_side_by_side(place: Path) -> None:
    for profile in ("ort", "portable", "qonnx"):
        done = mecq("export", "reduced", "-p", profile, "--no-verify", "--quiet", cwd=place)
        assert done.code == 0, done.err
    names = {file.name for file in (place / "reduced").iterdir()}
    assert {"model.onnx", "model-portable.onnx", "model-qonnx.onnx"} <= names
    assert {"model.py", "model-portable.py"} <= names
    assert "model-qonnx.py" not in names


def test_without_qonnx_the_profile_is_written_unverified_only(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "qonnx"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "qonnx", None)
    target = tmp_path / "q.onnx"
    arguments = ["export", "full", "-p", "qonnx", "-o", target]
    done = mecq(*arguments, cwd=place)
    assert done.code == 6
    assert "pip install 'mecq[qonnx]'" in error_of(done)
    assert not target.exists()
    assert mecq(*arguments, "--no-verify", "--quiet", cwd=place).code == 0
    done = mecq("eval", target, "--data", "data", cwd=place)
    assert done.code == 6
    assert "pip install 'mecq[qonnx]'" in error_of(done)


@pytest.mark.parametrize(("name", "warned"), [("no-vnni", True), ("vnni", False)])
@pytest.mark.parametrize("run", ["full", "reduced"])
def test_a_cpu_that_saturates_is_warned_of(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, warned: bool, run: str
) -> None:
    monkeypatch.setattr(workflow, "cpu_path", lambda: CpuPath(name, f"this CPU is {name}"))
    done = mecq("export", run, "-o", tmp_path / "a.onnx", "--no-verify", cwd=place)
    assert done.code == 0, done.err
    assert f"this CPU is {name}" in done.out
    assert ("--reduce-range" in done.out) == (run == "full")
    assert ("warning: this CPU is" in done.err) == (warned and run == "full")
