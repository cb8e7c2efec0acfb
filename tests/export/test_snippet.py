"""The program beside an ONNX file prepares an image to the last bit as the evaluation does."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mecq_cli.data.augmentation import eval_transform
from mecq_cli.data.images import to_rgb
from mecq_cli.export.snippet import snippet
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.runs import is_script


def prepared(preprocessing: Preprocessing, image: Image.Image) -> Any:
    """As `mecq eval` does it."""
    pixels = np.asarray(eval_transform(preprocessing)(to_rgb(image)), np.float32) / np.float32(255)
    mean, std = (np.array(v, np.float32) for v in (preprocessing.mean, preprocessing.std))
    return ((pixels.transpose(1, 2, 0) - mean) / std).transpose(2, 0, 1)


def load_of(preprocessing: Preprocessing) -> Any:
    """The function ``load`` of the script, without the session behind it."""
    text = snippet("model.onnx", preprocessing, ["a", "b"], "1.24.1")
    before, session, _ = text.partition("if not sys.argv")
    assert session
    names: dict[str, Any] = {}
    code = before.replace("import onnxruntime\n", "")
    exec(compile(code, "model.py", "exec"), names)
    return names["load"]


@pytest.mark.parametrize("name", ["a\\N.onnx", 'b".onnx', 'c"""d.onnx', "d\udcff.onnx", "é.onnx"])
@pytest.mark.parametrize("task", ["classify", "segment", "detect"])
def test_any_name_of_a_file_makes_a_program(name: str, task: str, tmp_path: Path) -> None:
    made = Preprocessing((3, 8, 8), (0.5,) * 3, (0.2,) * 3)
    text = snippet(name, made, ["a", "b"], "1.24.1", task)
    compile(text.encode(), "a.py", "exec")
    (tmp_path / "a.py").write_text(text)
    assert is_script(tmp_path / "a.py")
    names = [n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)]
    assert name in names


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(64, 64), (64, 128), (96, 40)])
@pytest.mark.parametrize("source", [(90, 70), (70, 111), (64, 64), (300, 33)])
def test_it_prepares_images_as_the_evaluation_does(
    source: tuple[int, int], size: tuple[int, int], crop_mode: str, crop_pct: float, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*source, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    made = Preprocessing((3, *size), mean, std, "bilinear", crop_pct, crop_mode)
    found = load_of(made)(tmp_path / "image.png")[0]
    np.testing.assert_array_equal(found, prepared(made, image))


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "L", "I;16", "CMYK"])
def test_it_reads_every_kind_of_image_as_the_evaluation_does(
    kind: str, channels: int, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    if kind == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (40, 50), dtype=np.uint16))
    elif kind == "P":
        image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).convert("P")
        image.info["transparency"] = 7
    else:
        size = (40, 50) if kind == "L" else (40, 50, len(kind))
        image = Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8), kind)
    path = tmp_path / f"image.{'tif' if kind == 'CMYK' else 'png'}"
    image.save(path)
    made = Preprocessing(
        (channels, 32, 32), (0.5,) * channels, (0.25,) * channels, "bilinear", 1.0, "center"
    )
    with Image.open(path) as stored:
        wanted = prepared(made, stored)
    np.testing.assert_array_equal(load_of(made)(path)[0], wanted)
