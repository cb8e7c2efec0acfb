"""Checkpoints: exact, without pickle, and not one damaged byte unnoticed."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_with_the_library
from torch import Tensor, nn

from mecq_cli.errors import CheckpointError, UsageError
from mecq_cli.training.container import flatten_state, read, unflatten_state, write
from tests.mutations import mutations, overwrite

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16,
    torch.int32, torch.uint32, torch.int64, torch.uint64,
]  # fmt: skip


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type_and_shape_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for shape in [(), (0,), (3,), (2, 3), (1, 2, 3, 5)]:
        raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator).to(torch.uint8)
        if dtype == torch.bool:
            raw = raw % 2
        tensors[f"t{shape}"] = raw.view(dtype).reshape(shape)
    tensors["transposed"] = tensors["t(2, 3)"].T
    write(tmp_path / "c", tensors, {})
    loaded, _ = read(tmp_path / "c")
    assert {*loaded} == {*tensors}
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (dtype, tensor.shape)
        assert bits(loaded[name]) == bits(tensor)
        loaded[name].zero_()  # writable


def test_document_and_bytes_are_exact(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(2), "a": torch.zeros((), dtype=torch.int64)}
    document = {"step": 7, "loss": 0.1 + 0.2, "tiny": 5e-324, "text": "é\n", "none": [None, True]}
    write(tmp_path / "one", tensors, document)
    swapped = dict(reversed(document.items()))
    write(tmp_path / "two", dict(reversed(tensors.items())), swapped)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert read(tmp_path / "one")[1] == document
    assert {*load_with_the_library((tmp_path / "one").read_bytes())} == {"a", "b"}
    with pytest.raises(UsageError, match="--force"):
        write(tmp_path / "one", tensors, document, force=False)


@pytest.mark.parametrize("document", [{"a": math.nan}, {"a": (1,)}, {1: 2}, {"a": object()}])
def test_what_would_not_come_back_is_refused(tmp_path: Path, document: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="not plain JSON"):
        write(tmp_path / "c", {}, document)
    assert not [*tmp_path.iterdir()]


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    net.append(nn.Linear(8 * 36, 4))
    return net.to(memory_format=torch.channels_last)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        images = torch.rand(4, 3, 8, 8) + random.random()
        optimizer.zero_grad()
        net(images).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_training_goes_on_as_if_it_had_never_stopped(tmp_path: Path, kind: str) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        net = small_net()
        if kind == "sgd":
            return net, torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, nesterov=True)
        groups = [{"params": [p], "lr": 0.01 / (i + 1)} for i, p in enumerate(net.parameters())]
        return net, torch.optim.AdamW(groups, betas=(0.9, 0.99))

    net, optimizer = make()
    random.seed(1)
    train(net, optimizer, 3)
    numpy_rng = np.random.default_rng(5)
    state = {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": {
            "torch": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": numpy_rng.bit_generator.state,
            "numpy_legacy": np.random.RandomState(3).get_state(),
        },
    }
    tensors, document = flatten_state("state", state)
    write(tmp_path / "c", tensors, {"state": document})
    train(net, optimizer, 3)
    after, numpy_after = random.random(), numpy_rng.random(3)

    net2, optimizer2 = make()
    tensors, stored = read(tmp_path / "c")
    back = unflatten_state(tensors, stored["state"])
    net2.load_state_dict(back["model"])
    optimizer2.load_state_dict(back["optimizer"])
    torch.set_rng_state(back["rng"]["torch"])
    random.setstate(back["rng"]["python"])
    numpy_rng2 = np.random.default_rng()
    numpy_rng2.bit_generator.state = back["rng"]["numpy"]
    np.random.RandomState().set_state(back["rng"]["numpy_legacy"])
    train(net2, optimizer2, 3)
    assert random.random() == after
    assert (numpy_rng2.random(3) == numpy_after).all()
    for (name, a), b in zip(net.state_dict().items(), net2.state_dict().values(), strict=True):
        assert bits(a) == bits(b), name
        assert a.stride() == b.stride(), name


def test_states_keep_types_keys_and_order() -> None:
    nhwc = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    state = {
        2: [1, 2.5, -0.0, True, None, "x", 2**100],
        "a.b": torch.ones(1),
        "a": {"b": torch.zeros(2), "c": (torch.ones(()), [nhwc])},
        None: {"nan": [math.inf, -math.inf]},
        (1, "k"): np.arange(3, dtype=np.uint32),
    }
    tensors, document = flatten_state("s", state)
    back = unflatten_state(tensors, document)
    assert [*back] == [*state]
    assert repr(back[2]) == repr(state[2])
    assert (back["a.b"].tolist(), back["a"]["b"].tolist()) == ([1.0], [0.0, 0.0])
    assert isinstance(back["a"]["c"], tuple)
    assert back["a"]["c"][1][0].stride() == nhwc.stride()
    assert back[None] == state[None]
    assert (back[1, "k"].dtype, back[1, "k"].tolist()) == (np.uint32, [0, 1, 2])
    assert math.isnan(unflatten_state({}, flatten_state("", math.nan)[1]))
    with pytest.raises(CheckpointError, match=r"s.f.1: a set has no place"):
        flatten_state("s", {"f": [0, set()]})


@pytest.mark.parametrize(
    "document",
    [{"tensor": "missing"}, {"code": "x"}, {}, {"a": 1, "b": 2}, {"dict": [1]}, {"float": []}],
)
def test_documents_it_does_not_know_are_refused(document: Any) -> None:
    with pytest.raises(CheckpointError, match="cannot be used"):
        unflatten_state({}, document)


def assert_each_is_noticed(folder: Path, count: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(0)
    tensors = {
        f"{i}.{dtype}": torch.rand(7, i, generator=rng).to(dtype)
        for i in range(3)
        for dtype in (torch.float32, torch.bfloat16, torch.uint8)
    }
    path = folder / "c"
    write(path, tensors, {"step": 12, "log": [0.1, None, "text"]})
    for name, damaged in mutations(path.read_bytes(), count, seed):
        overwrite(path, damaged)
        message = None
        try:
            read(path)
        except CheckpointError as error:
            message = str(error)
        assert message is not None, f"{name} was not noticed"
        assert "\n" not in message, name


def test_no_damage_goes_unnoticed(tmp_path: Path) -> None:
    assert_each_is_noticed(tmp_path, 5_000, 1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 7))
def test_no_damage_goes_unnoticed_at_length(tmp_path: Path, seed: int) -> None:
    assert_each_is_noticed(tmp_path, 40_000, seed)


def test_pickles_and_missing_files_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="not a usable mecq-checkpoint file"):
        read(tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="no such file"):
        read(tmp_path / "none")
