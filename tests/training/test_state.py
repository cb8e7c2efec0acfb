"""Checkpoints of a run: the newest that is whole, and only for the network it belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mecq_cli.errors import CheckpointError
from mecq_cli.insertion import BitPlan, QuantizedModel, insert
from mecq_cli.sites import ProductSite
from mecq_cli.training import state
from mecq_cli.training.loop import Trainer
from tests.exactness import float_network
from tests.training.test_loop import trainer


def first_weight(one: Trainer) -> Tensor:
    site = next(site for site in one.model.sites() if isinstance(site, ProductSite))
    return site.weight


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of the steps 1 to 3, of which two are kept."""
    one = trainer(tmp_path)
    one.progress.facts = {"fp_top1": 12.5}
    for step in (1, 2, 3):
        one.progress.step = step
        with torch.no_grad():
            first_weight(one).fill_(float(step))
        one.save()
    return tmp_path / "checkpoints"


def test_only_the_last_two_are_kept(folder: Path) -> None:
    assert [p.stem for p in state.checkpoints(folder)] == ["step-00000002", "step-00000003"]
    assert {p.name for p in folder.iterdir()} == {p.name for p in state.checkpoints(folder)}


def test_the_newest_that_is_whole_is_used(folder: Path) -> None:
    one = trainer(folder.parent)
    assert one.resume()
    assert (one.progress.step, one.progress.facts) == (3, {"fp_top1": 12.5})
    newest = state.checkpoints(folder)[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    progress, complaints = state.restore(folder, one.model, one.optimizer, one.step.regularizer)
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


def test_no_checkpoint_and_another_network(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        state.load_model(tmp_path / "empty", network(2))
    with pytest.raises(CheckpointError, match=r"does not fit the network .*config.toml"):
        state.load_model(folder, network(2))
