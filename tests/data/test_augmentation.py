from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from mecq_cli.data.augmentation import (
    eval_transform,
    pad_crop_flip,
    random_crops,
    random_resized_crop,
)
from mecq_cli.data.loader import normalize
from mecq_cli.errors import UsageError
from mecq_cli.models.preprocessing import Preprocessing

IMAGENET = Preprocessing((3, 96, 96), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours, so that every kind of resampling and every shift gives other pixels."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 7 + y / 11), np.cos(x / 5 - y / 13), np.sin(x * y / 900)]
    return Image.fromarray((127.5 + 127 * np.stack(waves, axis=-1)).astype(np.uint8))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [0.875, 0.95, 1.0])
@pytest.mark.parametrize("size", [(96, 96), (64, 100)])
@pytest.mark.parametrize("source", [(301, 200), (120, 260), (96, 96), (40, 40)])
def test_evaluation_is_timms(
    source: tuple[int, int], size: tuple[int, int], crop_pct: float, crop_mode: str
) -> None:
    p = replace(IMAGENET, input_size=(3, *size), crop_pct=crop_pct, crop_mode=crop_mode)
    image = photo(*source)
    pixels = eval_transform(p)(image)
    assert pixels.dtype == np.uint8
    reference = create_transform(
        p.input_size,
        interpolation=p.interpolation,
        mean=p.mean,
        std=p.std,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
    )
    ours = normalize(torch.from_numpy(pixels.copy())[None], p)[0]
    torch.testing.assert_close(ours, reference(image), rtol=0, atol=1e-6)


def test_evaluation_resizes_the_short_side_and_crops_the_centre() -> None:
    p = replace(IMAGENET, interpolation="bilinear")
    short = math.floor(96 / 0.875)  # 109
    resized = photo(300, 200).resize((short * 300 // 200, short), Image.Resampling.BILINEAR)
    left, top = round((resized.width - 96) / 2), round((resized.height - 96) / 2)
    expected = np.asarray(resized)[top : top + 96, left : left + 96].transpose(2, 0, 1)
    np.testing.assert_array_equal(eval_transform(p)(photo(300, 200)), expected)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
def test_an_image_of_the_right_size_is_not_resampled(crop_mode: str) -> None:
    transform = eval_transform(replace(IMAGENET, crop_pct=1.0, crop_mode=crop_mode))
    image = photo(96, 96)
    np.testing.assert_array_equal(transform(image), np.asarray(image).transpose(2, 0, 1))


def test_pad_crop_flip_takes_every_shift_and_flip_alike() -> None:
    image = np.asarray(photo(32, 32)).transpose(2, 0, 1)
    padded = np.zeros((3, 40, 40), dtype=np.uint8)
    padded[:, 4:36, 4:36] = image
    places = {}
    for down in range(9):
        for right in range(9):
            window = padded[:, down : down + 32, right : right + 32]
            places[window.tobytes()] = (down, right, False)
            places[window[..., ::-1].tobytes()] = (down, right, True)
    words = np.random.default_rng(0).integers(0, 2**64, 4000, dtype=np.uint64)
    out = pad_crop_flip(np.repeat(image[None], len(words), axis=0), words)
    assert out.shape == (4000, 3, 32, 32)
    seen = [places[sample.tobytes()] for sample in out]  # KeyError: no shift and flip gives this
    _, counts = np.unique(seen, axis=0, return_counts=True)
    assert len(counts) == 9 * 9 * 2
    chi2 = ((counts - 4000 / 162) ** 2 / (4000 / 162)).sum()
    assert chi2 < 161 + 5 * math.sqrt(2 * 161)
    np.testing.assert_array_equal(pad_crop_flip(image[None], words[7:8])[0], out[7])


def test_random_resized_crop_depends_on_its_word_alone() -> None:
    crop, image = random_resized_crop(IMAGENET), photo(200, 150)
    torch.manual_seed(3)
    expected_next = torch.rand(1)
    torch.manual_seed(3)
    first = crop(image, 2**64 - 1)
    assert torch.equal(torch.rand(1), expected_next)  # the training's own draws are not moved
    assert first.shape == (3, 96, 96)
    assert first.dtype == np.uint8
    torch.manual_seed(4)
    np.testing.assert_array_equal(crop(image, 2**64 - 1), first)
    assert len({crop(image, word).tobytes() for word in range(50)}) == 50


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"interpolation": "bicubical"}, "interpolation is 'bicubical'; allowed: nearest, bil"),
        ({"crop_mode": "left"}, "crop_mode is 'left'; allowed: center"),
        ({"crop_pct": 0.0}, "crop_pct is 0.0"),
        ({"input_size": (4, 28, 28)}, "input channels is 4; allowed: 3"),
    ],
)
def test_impossible_preprocessing(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        eval_transform(replace(IMAGENET, **wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("image", "size", "mode", "stretch"),
    [
        ((640, 480), (96, 96), "center", 1.0),
        ((320, 96), (48, 160), "center", 1.0),
        ((2048, 1024), (96, 96), "squash", 0.5),
        ((100, 300), (96, 192), "squash", 6.0),
    ],
)
def test_random_parts_are_stretched_as_the_image_is_in_evaluation(
    image: tuple[int, int], size: tuple[int, int], mode: str, stretch: float
) -> None:
    """Up to a third more or less, and of 35 to 100 % of the area where so much has that shape."""
    crop = random_crops(replace(IMAGENET, input_size=(3, *size), crop_mode=mode))(*image)
    torch.manual_seed(0)
    found, kept = [], []
    for _ in range(300):
        place = crop.make_params([Image.new("RGB", image)])
        found.append((size[1] / place["width"]) / (size[0] / place["height"]) / stretch)
        kept.append(place["width"] * place["height"] / (image[0] * image[1]))
    assert 0.7 < min(found) < 0.8
    assert 1.2 < max(found) < 1.4
    assert 0.9 < float(np.exp(np.log(found).mean())) < 1.1
    assert max(kept) > 0.75
