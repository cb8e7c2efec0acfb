"""What a report says of answers that are drawn, from figures that are given."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from mecq_cli.report import pictures
from mecq_cli.tasks.base import Measured
from mecq_cli.tasks.drawing import MaskDrawing
from mecq_cli.tasks.figures import FIGURES, SEGMENT

NAMES, COLOURS = ("ground", "disc", "box"), (None, "red", "blue")


def scores(whole: float, by_class: list[float | None], *images: float | None) -> pictures.Scores:
    measured = Measured(len(images), {"miou": whole}, {"iou": by_class})
    return pictures.Scores(measured, images)


def test_the_worst_come_first_and_what_has_no_figure_is_left_out() -> None:
    integer = scores(50.0, [90.0, 20.0, None], 70.0, None, 40.0, 60.0)
    fp = scores(60.0, [95.0, 30.0, None], 70.0, 10.0, 80.0, 50.0)
    paths = ("a", "b", "c", "d")
    found = pictures.gather(integer, fp, FIGURES[SEGMENT], NAMES, COLOURS, paths)
    assert [row["class"] for row in found["classes"]] == ["disc", "ground"]
    assert [(row["path"], row["index"], row["fp"]) for row in found["examples"]] == [
        ("c", 2, 80.0),
        ("d", 3, 50.0),
        ("a", 0, 70.0),
    ]
    assert (found["worse"], found["better"], found["same"]) == (1, 1, 1)
    assert (found["integer"], found["fp"], found["images"]) == (50.0, 60.0, 4)
    alone = pictures.gather(integer, None, FIGURES[SEGMENT], NAMES, COLOURS, paths)
    assert alone["fp"] is None
    assert [row["fp"] for row in (*alone["classes"], *alone["examples"])] == [None] * 5
    assert "worse" not in alone


def test_masks_are_drawn_in_the_colours_that_the_table_shows() -> None:
    drawing = MaskDrawing()
    bare, *colours = drawing.colours(3)
    assert bare is None
    labels = torch.tensor([[0, 1], [2, 255]], dtype=torch.uint8)
    logits = torch.nn.functional.one_hot(labels.long() % 3, 3).permute(2, 0, 1).float()
    black = Image.new("RGB", (2, 2))
    true, said = (
        np.asarray(one)
        for one in (drawing.labels(black, labels, 3), drawing.answers(black, logits, 3))
    )
    assert not true[0, 0].any()
    assert (true[:1] == said[:1]).all()
    for place, colour in zip(((0, 1), (1, 0)), colours, strict=True):
        assert colour is not None
        wanted = [int(value) for value in colour.removeprefix("rgb(").removesuffix(")").split()]
        assert np.abs(true[place] - 0.55 * np.array(wanted)).max() <= 1
    assert len(set(true[1, 1])) == 1, "no class: white"
    assert true[1, 1, 0] > 0
