"""Damaged files on the command line: one line, exit code 3, nothing printed and nothing written."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import cache
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
from typer.main import get_command

from mecq_cli.export import onnx, safetensors
from mecq_cli.integer.ir import INPUT, IntegerModel
from mecq_cli.models.preprocessing import Preprocessing
from tests.e2e.command import mecq, write_patterns
from tests.integer.random_models import Maker
from tests.mutations import ONNX, SAFETENSORS, Way, mutations, overwrite

PREPROCESSING = Preprocessing((3, 12, 12), (0.5,) * 3, (0.25,) * 3, "bilinear", 1.0)
COMMANDS = {
    "model.onnx": (["predict", "FILE", "IMAGE"], ["eval", "FILE", "--data", "images"]),
    "model.safetensors": (
        ["predict", "FILE", "IMAGE"],
        ["eval", "FILE", "--data", "images", "--json"],
        ["inspect", "FILE", "--json"],
        ["export", "FILE", "--data", "images", "--output", "written.onnx"],
    ),
}


def small() -> IntegerModel:
    rng = np.random.default_rng(0)
    maker = Maker(rng, rng.normal(size=(4, 3, 12, 12)).astype(np.float32))
    maker.tight = 0.0
    last = maker.quantize(INPUT, 8, power_of_two=True)
    branch = maker.conv(last, 8, 3, stride=2, padding=1, wbits=2, power_of_two=True)
    last = maker.conv(last, 8, 1, stride=2, wbits=4, power_of_two=True)
    last = maker.pool("global_avg_pool", maker.add(branch, last), 8)
    maker.linear(maker.flatten(last), 2)
    classes = [f"class{label}" for label in range(2)]
    metadata = {"model": "small", "classes": classes, "preprocessing": PREPROCESSING.to_json()}
    return IntegerModel(maker.model().nodes, (3, 12, 12), metadata)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with both files and a few images."""
    # To make the parser anew for each command takes longer than all the rest.
    monkeypatch.setattr("mecq_cli.cli.main.get_command", cache(get_command))
    onnx.save(small(), tmp_path / "model.onnx")
    safetensors.save(small(), tmp_path / "model.safetensors")
    write_patterns(tmp_path / "images", {"val": 2}, size=12)
    return tmp_path


def commands(place: Path, name: str) -> list[list[str]]:
    image = str(next((place / "images").rglob("*.png")))
    words = {"FILE": name, "IMAGE": image}
    return [[words.get(word, word) for word in command] for command in COMMANDS[name]]


def check(place: Path, name: str, ways: Sequence[Way], count: int, seed: int) -> None:
    path, lines = place / name, cycle(commands(place, name))
    data = path.read_bytes()
    before = sorted(place.rglob("*"))
    for what, damaged in mutations(data, count, seed, ways):
        overwrite(path, damaged)
        line, started = next(lines), time.process_time()
        done = mecq(*line, cwd=place)
        about = f"{what}: {line}: {done}"
        assert (done.code, done.out) == (3, ""), about
        assert done.err.startswith("error: "), about
        assert done.err.count("\n") == 1, about
        assert len(done.err) < 700, about
        assert time.process_time() - started < 10, about
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_intact_files_work(place: Path, name: str) -> None:
    for line in commands(place, name):
        done = mecq(*line, cwd=place)
        assert (done.code, bool(done.out)) == (0, True), done


@pytest.mark.parametrize(
    ("name", "ways"), [("model.onnx", ONNX), ("model.safetensors", SAFETENSORS)]
)
def test_damage_is_one_line(place: Path, name: str, ways: Sequence[Way]) -> None:
    check(place, name, ways, 300, 0)


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_no_file_is_not_waited_for(place: Path, name: str) -> None:
    (place / name).unlink()
    os.mkfifo(place / name)
    for line in commands(place, name):
        done = mecq(*line, cwd=place)
        assert (done.code, done.err.count("\n")) == (3, 1), done
        assert "is not a file" in done.err


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "ways"), [("model.onnx", ONNX), ("model.safetensors", SAFETENSORS)]
)
def test_damage_is_one_line_at_length(place: Path, name: str, ways: Sequence[Way]) -> None:
    check(place, name, ways, 5_000, 1)
