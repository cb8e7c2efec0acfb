"""Class folders and model outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
from timm.data import ImageNetInfo

from mecq_cli.errors import UsageError
from mecq_cli.models.classes import class_name, imagenet_names, match_classes


def imagenet_ids() -> list[str]:
    known = ImageNetInfo("imagenet-1k")
    return [known.index_to_label_name(i) for i in range(1000)]


def test_as_many_folders_as_outputs_match_in_their_order() -> None:
    found = match_classes(["ship", "cat", "dog"], 3)
    assert found.names == ("ship", "cat", "dog")
    assert found.indices == (0, 1, 2)


def test_a_subset_of_imagenet_goes_to_its_own_outputs(imagenette: Path) -> None:
    folders = sorted(f.name for f in (imagenette / "val").iterdir())
    found = match_classes(folders, 1000, imagenet=True)
    assert found.indices == (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
    named = [found.names[i] for i in found.indices]
    assert named[:3] == ["tench", "English springer", "cassette player"]
    assert named[3:6] == ["chain saw", "church", "French horn"]
    numbered = match_classes([str(i) for i in range(1000)], 1000, imagenet=True)
    assert numbered.names == imagenet_names()
    as_text = sorted(str(i) for i in range(1000))  # as folders are: 10 before 2
    assert match_classes(as_text, 1000, imagenet=True).indices == tuple(map(int, as_text))
    ids = [*imagenet_ids()]
    assert match_classes(ids[::-1], 1000, imagenet=True).indices == tuple(range(1000))[::-1]
    own = match_classes(folders, 10)
    assert own.indices == tuple(range(10))
    assert list(own.names) == named


def test_names_of_imagenet() -> None:
    names = imagenet_names()
    assert len(names) == 1000
    assert (names[0], names[281], names[999]) == ("tench", "tabby", "toilet tissue")
    assert class_name("n00007846") == "person"  # beyond the 1,000
    assert class_name("airplane") == "airplane"


@pytest.mark.parametrize(
    ("folders", "outputs", "imagenet", "said"),
    [
        (["a", "b"], 10, False, "10 outputs and the data 2 class folders"),
        (["n01440764", "cats"], 1000, True, "of which 1 have no WordNet id .* 'cats'"),
        (["n01440764"], 1000, False, "1000 outputs and the data 1 class folders"),
        (["n00007846"], 1000, True, "n00007846"),
        ([*imagenet_ids()[1:], "cats"], 1000, True, "of which 1 have no WordNet id .* 'cats'"),
    ],
)
def test_what_does_not_match_is_one_line(
    folders: list[str], outputs: int, imagenet: bool, said: str
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        match_classes(folders, outputs, imagenet=imagenet)
    assert "--reset-classifier" in str(caught.value)
    assert "\n" not in str(caught.value)
