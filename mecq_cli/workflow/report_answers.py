"""What both networks of a report answer on the evaluation images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mecq_cli.data import Batch, ImageDataset, eval_batches, normalize
from mecq_cli.data.images import open_rgb, picture_of
from mecq_cli.errors import DataError
from mecq_cli.events import Listener
from mecq_cli.integer.ir import IntegerModel
from mecq_cli.integerize import IntegerModule
from mecq_cli.report import pictures, predictions
from mecq_cli.tasks.base import Drawing, Task
from mecq_cli.workflow.common import eval_batch_size
from mecq_cli.workflow.report_material import Material

PICTURE = 192
"""Pixels of the longer side of a picture with an answer over it."""

_TASK = "look at images"
Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Answered:
    """The section of a page.

    Attributes:
        document: its numbers, as `predictions.gather` or `pictures.gather` makes them, with
            "task", "of" (images in the split), "split" and "root".
        shown: data URIs of the "examples" by their "index", which is their place in the split.
    """

    document: dict[str, Any]
    shown: dict[int, tuple[str, ...]]


def answer(
    material: Material,
    model: IntegerModel,
    dataset: ImageDataset,
    places: Sequence[int],
    listener: Listener,
) -> Answered:
    """Run both networks on the images, by whatever the task takes for an answer.

    Args:
        material: of the report.
        model: the integer network.
        dataset: the images.
        places: of these in the split.
        listener: hears of the progress.
    """
    assert material.split is not None
    task = material.task
    if task.drawing is None:
        found, shown = _named(material, model, dataset, listener)
    else:
        found, shown = _drawn(material, model, dataset, task.drawing, listener)
    for example in found["examples"]:
        example["index"] = places[example["index"]]
    split = dataset.split
    place = {"of": len(material.split), "split": split.name, "root": str(split.root)}
    return Answered(
        {"task": task.name, **place, **found},
        {places[number]: pictures for number, pictures in shown.items()},
    )


def _batches(dataset: ImageDataset, listener: Listener) -> Iterator[tuple[Batch, Tensor]]:
    """Batches, and the same images normalised."""
    listener.start(_TASK, len(dataset))
    done = 0
    for batch in eval_batches(dataset, batch_size=eval_batch_size(dataset.preprocessing)):
        yield batch, normalize(batch.images, dataset.preprocessing)
        done += len(batch.labels)
        listener.advance(_TASK, done)
    listener.finish(_TASK)


@torch.no_grad()
def _named(
    material: Material, model: IntegerModel, dataset: ImageDataset, listener: Listener
) -> tuple[dict[str, Any], dict[int, tuple[str, ...]]]:
    """One class an image."""
    assert material.classes is not None
    integer, plain = IntegerModule(model), material.fp
    labels, said, sure, fp = [], [], [], []
    for batch, images in _batches(dataset, listener):
        confidence, choice = torch.softmax(integer(images).double(), 1).max(1)
        labels.append(batch.labels)
        said.append(choice)
        sure.append(confidence)
        if plain is not None:
            fp.append(plain(images).argmax(1))
    answers = predictions.Answers(
        torch.cat(labels).numpy(),
        torch.cat(said).numpy(),
        torch.cat(fp).numpy() if fp else None,
        torch.cat(sure).numpy(),
    )
    split = dataset.split
    found = predictions.gather(answers, material.classes.names, split.paths)
    shown: dict[int, tuple[str, ...]] = {
        e["index"]: (predictions.thumbnail(open_rgb(split.file(e["index"]))),)
        for e in found["examples"]
    }
    return found, shown


@torch.no_grad()
def _drawn(
    material: Material,
    model: IntegerModel,
    dataset: ImageDataset,
    drawing: Drawing,
    listener: Listener,
) -> tuple[dict[str, Any], dict[int, tuple[str, ...]]]:
    """Answers that are drawn over the picture."""
    assert material.classes is not None
    task, names = material.task, material.classes.names
    networks: dict[str, Network] = {"integer": IntegerModule(model)}
    if material.fp is not None:
        networks = {"fp": material.fp, **networks}
    metrics = {name: _Scored(task, len(names)) for name in networks}
    for batch, images in _batches(dataset, listener):
        for name, network in networks.items():
            metrics[name].see(task.answers(network(images).float()), batch.labels)
    scores = {name: metric.scores() for name, metric in metrics.items()}
    colours = drawing.colours(len(names))
    found = pictures.gather(
        scores["integer"], scores.get("fp"), task.figures, names, colours, dataset.split.paths
    )
    shown = dict[int, tuple[str, ...]]()
    for example in found["examples"]:
        batch = dataset.batch(np.array([example["index"]]))
        picture = picture_of(batch.images[0].numpy())
        images = normalize(batch.images, dataset.preprocessing)
        drawn = [picture, drawing.labels(picture, batch.labels[0], len(names))]
        for network in networks.values():
            answers = task.answers(network(images).float())
            drawn.append(drawing.answers(picture, answers[0], len(names)))
        shown[example["index"]] = tuple(predictions.thumbnail(one, PICTURE) for one in drawn)
    return found, shown


class _Scored:
    """The metric of a task on all images together, and on each of them alone."""

    def __init__(self, task: Task, outputs: int) -> None:
        self.task, self.outputs = task, outputs
        self.metric, self.images = task.metric(outputs), list[float | None]()

    def see(self, answers: Tensor, labels: Tensor) -> None:
        self.metric.update(answers, labels)
        self.images += [
            self._alone(answers[i : i + 1], labels[i : i + 1]) for i in range(len(answers))
        ]

    def _alone(self, answers: Tensor, labels: Tensor) -> float | None:
        metric = self.task.metric(self.outputs)
        metric.update(answers, labels)
        try:
            return metric.measured(1, metric.sums()).figures[self.task.figures.key]
        except DataError:  # nothing in it counts
            return None

    def scores(self) -> pictures.Scores:
        whole = self.metric.measured(len(self.images), self.metric.sums())
        return pictures.Scores(whole, self.images)
