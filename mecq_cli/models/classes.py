"""Which output of a model stands for which folder of images, and what to call it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

from timm.data.imagenet_info import ImageNetInfo

from mecq_cli.errors import UsageError

_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class ClassMap:
    """How a data set's classes and a model's outputs belong together.

    Attributes:
        names: one for each output of the model, for people to read.
        indices: one for each class of the data, in its order: the output that means it.
    """

    names: tuple[str, ...]
    indices: tuple[int, ...]


def match_classes(
    folder_names: Sequence[str],
    num_classes: int,
    *,
    imagenet: bool = False,
    advice: str = "use data of the model's classes, or give --reset-classifier to train a new last "
    "layer for these",
) -> ClassMap:
    """Find the output of the model for every class folder.

    As many folders as outputs: they match in the order of the data (sorted, for folders). A model
    with ImageNet's outputs and folders that are named by its WordNet ids, or by all the numbers of
    its outputs: each goes to its own output, so that any subset of ImageNet will do.

    Args:
        folder_names: of the classes, in the order of the labels.
        num_classes: outputs of the model.
        imagenet: whether those are the classes of ImageNet-1k, in its order.
        advice: what to do where they do not fit.

    Raises:
        UsageError: neither is the case.
    """
    folders = tuple(folder_names)
    if imagenet and sorted(folders) == sorted(map(str, range(num_classes))):
        return ClassMap(imagenet_names(), tuple(map(int, folders)))  # as text, 10 is before 2
    named = imagenet and any(name in _imagenet_outputs() for name in folders)
    if len(folders) == num_classes and not named:
        return ClassMap(tuple(map(class_name, folders)), tuple(range(num_classes)))
    counts = f"the model has {num_classes} outputs and the data {len(folders)} class folders"
    if not imagenet:
        raise UsageError(f"{counts}; {advice}")
    outputs = _imagenet_outputs()
    foreign = [name for name in folders if name not in outputs]
    if foreign:
        raise UsageError(
            f"{counts}, of which {len(foreign)} have no WordNet id of ImageNet-1k for a name "
            f"(the first: {foreign[0]!r}); {advice}"
        )
    return ClassMap(imagenet_names(), tuple(outputs[name] for name in folders))


def class_name(folder: str) -> str:
    """The first word for a WordNet id such as ``n01440764``; any other name as it is."""
    return _words().get(folder, folder)


def imagenet_names() -> tuple[str, ...]:
    """The 1,000 classes of ImageNet-1k in words, in the order of a model's outputs."""
    return tuple(map(class_name, _imagenet_outputs()))


@cache
def _imagenet_outputs() -> dict[str, int]:
    info = ImageNetInfo("imagenet-1k")
    return {info.index_to_label_name(i): i for i in range(_IMAGENET_CLASSES)}


@cache
def _words() -> dict[str, str]:
    # Neither list holds the other; ImageNet-1k's word for an id wins.
    known: dict[str, str] = {}
    for subset in ("imagenet-22k", "imagenet-1k"):
        known |= cast("dict[str, str]", ImageNetInfo(subset).label_descriptions(as_dict=True))
    return {synset: lemmas.split(",")[0] for synset, lemmas in known.items()}
