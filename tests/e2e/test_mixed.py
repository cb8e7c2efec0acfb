"""Mixed precision through the real command line: a target, its allotment, and the whole way on."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mecq_cli.calibration import calibrate
from mecq_cli.config import from_toml, resolve
from mecq_cli.errors import NumericError
from mecq_cli.events import Listener
from mecq_cli.precision import measure
from mecq_cli.workflow import allot as allotting
from mecq_cli.workflow import quantize as workflow
from mecq_cli.workflow.quantize import quantize as quantize_config
from tests.e2e.command import Done, mecq

MORE = (
    "batch_size = 64\nmax_steps = 6\ncheckpoint_every = 2\nepochs = 1\ncompile = 'off'\n"
    "bn_images = 128\ncalibration_images = 64\nimg_size = 16\ndevice = 'cpu'\nabits = 4\n"
)
AVERAGE = ("--target-avg-bits", "2.5")


@pytest.fixture(scope="module")
def place(digits: Path) -> Path:
    """A folder with settings of short runs from the demo's float network."""
    folder = digits / "runs" / "demo"
    text = f'model = "resnet20_cifar"\ncheckpoint = "{folder / "float.safetensors"}"\n'
    (digits / "mixed.toml").write_text(f'{text}data = "{folder / "digits"}"\n{MORE}')
    return digits


def quantize(place: Path, *arguments: object, file: str = "mixed.toml") -> Done:
    return mecq("quantize", "--config", file, *arguments, cwd=place)


@pytest.fixture(scope="module")
def mixed(place: Path) -> dict[str, Any]:
    """The summary of a run at 2.5 bits."""
    return quantize(place, *AVERAGE, "--output", "mixed", "--json").document


def test_the_target_is_reached_and_the_artifact_holds_it(
    place: Path, mixed: dict[str, Any]
) -> None:
    allotment = mixed["allotment"]
    assert 2.49 < allotment["average_bits"] <= 2.5
    assert (allotment["optimal"], allotment["sensitivity"]) == (True, "coding")
    assert mixed["wbits"] == round(allotment["average_bits"], 2)
    assert mixed["sizes"]["ideal_bytes"] == allotment["weight_bytes"]
    assert mixed["top1"] == mixed["simulator_top1"]
    document = mecq("inspect", "mixed", "--json", cwd=place).document
    rows = [row for row in document["sites"] if "sensitivity" in row]
    assert len(rows) == 18
    assert len({row["wbits"] for row in rows}) > 2
    weights = [row["shape"][0] * row["shape"][1] * 9 for row in rows]
    average = sum(w * r["wbits"] for w, r in zip(weights, rows, strict=True)) / sum(weights)
    assert average == pytest.approx(allotment["average_bits"])
    ends = {r["layer"]: r["wbits"] for r in document["sites"] if r["layer"] in ("conv1", "linear")}
    assert ends == {"conv1": 8, "linear": 8}
    kept = from_toml(place / "mixed" / "config.toml")
    assert {a.layer: a.wbits for a in kept.allotted} == {r["layer"]: r["wbits"] for r in rows}
    assert (kept.wbits, kept.weight_decay) == (2, 2.5e-5)


def test_it_is_exported_bit_exact_and_evaluated(place: Path, mixed: dict[str, Any]) -> None:
    done = mecq("export", "mixed", "--verify", "--images", "64", "--json", cwd=place).document
    assert done["verified"] is True
    exact = [way for way in done["replay"]["ways"] if "without" not in way["way"]]
    assert [way["differing"] for way in exact] == [0, 0]
    for target in ("mixed", "mixed/model.onnx"):
        data = ("--data", place / "runs" / "demo" / "digits")
        assert mecq("eval", target, *data, "--json", cwd=place).document["top1"] == mixed["top1"]
    shown = mecq("inspect", "mixed", cwd=place)
    assert shown.out.startswith("resnet20_cifar, W2.5 A4\n")
    assert "sensitivity" in shown.out
    alone = mecq("inspect", "mixed/model.safetensors", "--json", cwd=place).document
    assert alone["wbits"] == alone["allotment"]["average_bits"] == mixed["wbits"]
    assert alone["allotment"]["weight_bytes"] == mixed["allotment"]["weight_bytes"]


def test_a_stopped_run_keeps_its_allotment(
    place: Path, mixed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while training nor before it is anything measured twice that was known."""

    def fail(*_: object, **__: object) -> None:
        raise NumericError("stopped by the test")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(allotting, "measure", fail)
    assert quantize(place, *AVERAGE, "--output", "again", "-q").code == 4
    assert not (place / "again").exists()  # there is nothing to continue

    monkeypatch.setattr(allotting, "measure", measure)
    monkeypatch.setattr(workflow, "calibrate", interrupt)
    assert quantize(place, *AVERAGE, "--output", "again", "-q").code == 130
    monkeypatch.setattr(workflow, "calibrate", calibrate)
    monkeypatch.setattr(allotting, "measure", fail)
    monkeypatch.setattr(workflow, "finish", fail)
    resumed = quantize(place, *AVERAGE, "--output", "again", "--resume")
    assert resumed.code == 4
    assert "layer1.0.conv1 " in resumed.err  # nothing is trained yet, so the bits are told again
    settings = (place / "again" / "config.toml").read_text()
    assert len(tomllib.loads(settings)["allotted"]) == 18

    monkeypatch.undo()
    monkeypatch.setattr(allotting, "measure", fail)
    done = mecq("quantize", "--resume", "--output", "again", "--json", cwd=place).document
    assert (place / "again" / "config.toml").read_text() == settings
    for key in ("wbits", "top1", "sizes"):
        assert done[key] == mixed[key]
    for key in ("average_bits", "weight_bytes", "optimal", "images"):  # "seconds" is another one
        assert done["allotment"][key] == mixed["allotment"][key]
    artifacts = [(place / run / "model.safetensors").read_bytes() for run in ("again", "mixed")]
    assert artifacts[0] == artifacts[1]

    new, _ = resolve(place / "mixed.toml", {"target_avg_bits": 2.5})
    settings_again = new.model_copy(update={"output": place / "again", "resume": True})
    (place / "again" / "summary.json").unlink()
    assert quantize_config(settings_again, {}, Listener())["wbits"] == mixed["wbits"]

    once_more = quantize(
        place, "--output", "copy", "--epochs", "0", "--json", file="mixed/config.toml"
    ).document
    assert once_more["allotment"]["average_bits"] == mixed["allotment"]["average_bits"]


@pytest.mark.parametrize("sensitivity", ["loss", "hessian"])
def test_a_size_is_met_and_rules_are_fixed(place: Path, sensitivity: str) -> None:
    text = (place / "mixed.toml").read_text()
    rules = '[[layers]]\npattern = "layer3.2.*"\nwbits = 5\n'
    (place / "ruled.toml").write_text(f"{text}{rules}")
    command = ["--target-size", "110kB", "--sensitivity", sensitivity, "--dry-run"]
    document = quantize(place, *command, "--epochs", "0", "--json", file="ruled.toml").document
    assert 0.99 * 110_000 < document["allotment"]["weight_bytes"] <= 110_000
    bits = {row["layer"]: row["wbits"] for row in document["sites"] if row["shape"]}
    assert (bits["layer3.2.conv1"], bits["layer3.2.conv2"], bits["conv1"]) == (5, 5, 8)
    told = [row["layer"] for row in document["sites"] if "sensitivity" in row]
    assert len(told) == 16


def test_the_table_is_told_before_the_training(place: Path) -> None:
    done = quantize(place, *AVERAGE, "--output", "told", "--epochs", "0")
    assert done.code == 0, done.err
    lines = done.err.splitlines()
    head = next(
        i for i, line in enumerate(lines) if line.split() == "layer weights bits coding".split()
    )
    table = [line.split() for line in lines[head + 1 : head + 19]]
    assert table[0][:2] == ["layer1.0.conv1", "2,304"]
    assert all(1 <= int(row[2]) <= 8 and float(row[3]) > 0 for row in table)
    assert any("W2.5 A4" in line for line in lines[head + 19 :])
    assert "2.5 bits)" in done.out
    assert "coding, the optimum; 64 images" in done.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target-avg-bits", "9"], "--target-avg-bits: got 9.0; allowed: 1 to 8"),
        ([*AVERAGE, "--target-size", "90kB"], "give one of them"),
        ([*AVERAGE, "--wbits", "2"], "the target allots the bits of the weights"),
        (["--target-size", "10kB"], "too low; this network takes 40,064 bytes even at 1 bit"),
        (["--target-size", "2MB"], "too high; this network takes 273,920 bytes at 8 bits, the"),
        (["--target-size", "2 furlongs"], "allowed: a size, such as 300kB or 1.2MB"),
        ([*AVERAGE, "--sensitivity", "fisher"], "allowed: coding, hessian or loss"),
    ],
)
def test_what_cannot_be(place: Path, arguments: list[str], words: str) -> None:
    done = quantize(place, *arguments, "--output", "never")
    assert done.code == 2
    line = done.err.splitlines()[-1]
    assert line.startswith("error: ")
    assert words in line
    assert not (place / "never").exists()


def test_rules_that_leave_nothing_or_too_little(place: Path) -> None:
    text = (place / "mixed.toml").read_text()
    for pattern, words in (
        ("*", "no layer is left to allot bits to"),
        ("layer3.*", "too low; this network takes"),
    ):
        (place / "all.toml").write_text(f'{text}[[layers]]\npattern = "{pattern}"\nwbits = 8\n')
        done = quantize(place, *AVERAGE, "--output", "never", file="all.toml")
        assert (done.code, words in done.err) == (2, True), done.err


def test_a_finished_summary_is_plain_json(place: Path, mixed: dict[str, Any]) -> None:
    assert json.loads((place / "mixed" / "summary.json").read_text()) == mixed
