"""Which task a model is for."""

from __future__ import annotations

from mecq_cli.errors import UsageError
from mecq_cli.models.loading import LoadedModel
from mecq_cli.tasks.base import Task
from mecq_cli.tasks.classification import Classification
from mecq_cli.tasks.figures import CLASSIFY, DETECT, SEGMENT

CLASSIFICATION: Task = Classification()


def task_named(name: str) -> Task:
    """The task of such a name; torchmetrics is only read where it is needed."""
    if name == CLASSIFY:
        return CLASSIFICATION
    if name == DETECT:
        from mecq_cli.tasks.detection import Detection

        return Detection()
    assert name == SEGMENT, name
    from mecq_cli.tasks.segmentation import Segmentation

    return Segmentation()


def task_of(model: LoadedModel) -> Task:
    """The task of a model, which it can be trained and measured by."""
    if model.detector is None:
        return task_named(model.task)
    from mecq_cli.tasks.detection import Detection

    return Detection(model.detector, model.module)


def choose(asked: str, found: str, model: str) -> Task:
    """The task of a model.

    Args:
        asked: by ``--task``; "auto" for what the model is made for.
        found: what the model is made for.
        model: its name, for the message.

    Raises:
        UsageError: they contradict each other.
    """
    if asked not in ("auto", found):
        raise UsageError(
            f"--task {asked}: {model} is made to {found}; leave --task out, or choose a model "
            f"that can {asked}"
        )
    return task_named(found)
