"""Checkpoints of a run: the newest that is whole, and only for the network it belongs to."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mecq_cli.errors import CheckpointError, EnvironmentFailure, NumericError
from mecq_cli.insertion import BitPlan, QuantizedModel, insert
from mecq_cli.sites import ProductSite
from mecq_cli.tensorfile import RawTensor, encode
from mecq_cli.training import container, state
from mecq_cli.training.loop import Trainer
from tests.exactness import float_network
from tests.training.test_loop import trainer


def first_weight(one: Trainer) -> Tensor:
    site = next(site for site in one.model.sites() if isinstance(site, ProductSite))
    return site.weight


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the steps 1 to 3, of which two are kept."""
    place = tmp_path_factory.mktemp("state")
    one = trainer(place)
    one.progress.facts = {"fp_top1": 12.5}
    for step in (1, 2, 3):
        one.progress.step = step
        with torch.no_grad():
            first_weight(one).fill_(float(step))
        one.save()
    return place / "checkpoints"


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoints"))


def test_only_the_last_two_are_kept(folder: Path) -> None:
    assert [p.stem for p in state.checkpoints(folder)] == ["step-00000002", "step-00000003"]
    assert {p.name for p in folder.iterdir()} == {p.name for p in state.checkpoints(folder)}


def test_the_newest_that_is_whole_is_used(folder: Path) -> None:
    one = trainer(folder.parent)
    assert one.resume()
    assert (one.progress.step, one.progress.facts) == (3, {"fp_top1": 12.5})
    newest = state.checkpoints(folder)[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    progress, complaints = state.restore(folder, one.model, one.optimizer, one.parts())
    assert progress is not None
    assert progress.step == 2
    assert [newest.name in text for text in complaints] == [True]
    state.load_model(folder, one.model)
    assert bool((first_weight(one) == 2).all())

    for file in state.checkpoints(folder):
        file.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be read .*--force"):
        one.resume()
    with pytest.raises(CheckpointError):
        state.load_model(folder, one.model)


def network(bits: int) -> QuantizedModel:
    return insert(float_network("resnet20_cifar", 16), (3, 16, 16), BitPlan(bits, 32))


def test_a_lack_of_memory_is_not_the_fault_of_the_checkpoint(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(folder.parent)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(one.optimizer, "load_state_dict", fail)
    with pytest.raises(EnvironmentFailure, match=r"^out of memory; try"):
        one.resume()


def test_no_checkpoint_and_another_network(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        state.load_model(tmp_path / "empty", network(2))
    with pytest.raises(CheckpointError, match=r"does not fit the network .*config.toml"):
        state.load_model(folder, network(2))


def test_what_a_checkpoint_takes_is_known_before(tmp_path: Path) -> None:
    one = trainer(tmp_path, max_steps=2)
    expected = state.expected_bytes(one.model, one.optimizer)
    one.train("")
    taken = state.checkpoints(tmp_path / "checkpoints")[-1].stat().st_size
    assert taken <= expected <= 1.2 * taken


def test_the_number_kept_and_damaged_ones_that_were_passed_over(folder: Path) -> None:
    """A damaged checkpoint of a later step is none of the last that are good."""
    newest = state.checkpoints(folder)[-1]
    newest.write_bytes(b"damaged")
    one = trainer(folder.parent)
    assert one.resume()
    assert one.progress.step == 2
    one.save()
    assert not newest.exists()
    one.keep = 3
    for step in (4, 6, 8):
        one.progress.step = step
        one.save()
    assert [state.step_of(p) for p in state.checkpoints(folder)] == [4, 6, 8]
    one.keep = 1
    one.progress.step = 10
    one.save()
    assert [state.step_of(p) for p in state.checkpoints(folder)] == [10]


def test_a_broken_network_never_takes_the_place_of_a_good_one(folder: Path) -> None:
    one = trainer(folder.parent)
    assert one.resume()
    before = [(p.name, p.read_bytes()) for p in state.checkpoints(folder)]
    one.progress.step = 5
    site = next(site for site in one.model.sites() if isinstance(site, ProductSite))
    with torch.no_grad():
        site.weight.view(-1)[7] = float("inf")
    with pytest.raises(NumericError, match=rf"^step 5: {site.name}\S* is not finite .*not saved"):
        one.save()
    with torch.no_grad():
        site.weight.view(-1)[7] = 0.0
    one.optimizer.state[site.weight]["momentum_buffer"] = torch.full_like(site.weight, torch.nan)
    with pytest.raises(NumericError, match=r"momentum_buffer"):
        one.save()
    assert [(p.name, p.read_bytes()) for p in state.checkpoints(folder)] == before


def test_crafted_checkpoints_are_one_line(folder: Path) -> None:
    """Whole by their hashes, which anybody can compute, and of another content."""
    one = trainer(folder.parent)
    newest = state.checkpoints(folder)[-1]
    tensors, document = container.read(newest)
    changes: tuple[dict[str, Any], ...] = (
        {"state": None}, {"state": []}, {"state": {"dict": []}}, {"step": "x"}, {"step": None},
        {"state": {"tensor": next(iter(tensors))}}, {"state": {"dict": [["model", {"dict": []}]]}},
        {"facts": 3},
    )  # fmt: skip
    for changed in changes:
        container.write(newest, tensors, document | changed)
        with pytest.raises(CheckpointError) as caught:
            one.resume()
        assert "\n" not in str(caught.value), changed
        with contextlib.suppress(CheckpointError):
            state.load_model(folder, one.model)


def test_absurd_shapes_and_depths_are_passed_over(folder: Path) -> None:
    """Written by hand: our own writer would not."""
    one = trainer(folder.parent)
    newest = state.checkpoints(folder)[-1]
    empty = [
        RawTensor("F32", shape, b"") for shape in ((0, *[2**48] * 4), (2**48, 0, 2**48, 2**48))
    ]
    contents = [({"t": tensor}, {"document": "{}"}) for tensor in empty]
    contents += [
        ({}, {"document": "[" * 100_000 + "]" * 100_000}),
        ({}, {"document": '{"state":' + '{"dict":[[0,' * 900 + "0" + "]]}" * 900 + "}"}),
    ]
    for raw, metadata in contents:
        newest.write_bytes(b"".join(encode(container.KIND, raw, metadata)))
        assert one.resume()
        assert one.progress.step == 2
    newest.unlink()
    newest.mkdir()
    assert one.resume()
    os.mkfifo(newest.with_name("step-00000004.safetensors"))
    assert one.resume(), "and a pipe is not waited for"
