"""Weight files as people have them, broken ones, and ones that want to do harm."""

from __future__ import annotations

import errno
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mecq_cli.errors import CheckpointError
from mecq_cli.models.weights import fit_state_dict, load_state_dict

Wrap = Callable[[dict[str, Tensor]], Any]


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def refused(path: Path) -> str:
    """The one line with which ``path`` is refused."""
    with pytest.raises(CheckpointError) as caught:
        load_state_dict(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))
    assert str(path) in message
    return message


def prefixed(*prefixes: str) -> Wrap:
    return lambda state: {"".join(prefixes) + k: v for k, v in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda s: {"model": prefixed("module.")(s), "epoch": 3},
        lambda s: {"state_dict": prefixed("model.", "_orig_mod.")(s)},
        lambda s: {"state_dict": {k: v * 0 for k, v in s.items()}, "state_dict_ema": s},
        lambda s: {"state_dict": s, "state_dict_ema": None},
        lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}, "epoch": 3},
        lambda s: {"net": prefixed("module.")(s), "acc": 93.0, "epoch": 3},
        lambda s: {"model_ema": {"n_averaged": torch.tensor(3), **prefixed("module.")(s)}},
        lambda s: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()},
    ],
)
def test_wrappers_and_prefixes_are_understood(tmp_path: Path, wrap: Wrap) -> None:
    state = net().state_dict()
    path = tmp_path / "weights.pth"
    torch.save(wrap(state), path)
    module = net()
    fit_state_dict(module, load_state_dict(path), source="it")
    for key, value in module.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_safetensors_old_format_and_half_precision(tmp_path: Path) -> None:
    state = {k: v.half() for k, v in net().state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt", _use_new_zipfile_serialization=False)
    for path in tmp_path.iterdir():
        module = net()
        fit_state_dict(module, load_state_dict(path), source="it")
        assert module.get_parameter("0.weight").dtype == torch.float32
        assert torch.equal(module.get_parameter("0.weight"), state["0.weight"].float())


def test_the_real_checkpoint_has_no_batch_counters(weights: Callable[[str], Path]) -> None:
    state = load_state_dict(weights("cifar10-resnet20-12fca82f.pth"))
    assert len(state) == 97
    assert state["linear.weight"].shape == (10, 64)


class Harm:
    """Runs a command when it is unpickled by somebody who trusts it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


@pytest.mark.parametrize("form", ["bare", "zip", "old", "nested"])
def test_hostile_pickles_run_nothing(tmp_path: Path, form: str) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "weights.pth"
    for harm in (
        Harm(os.system, f"touch {trace}"),
        Harm(exec, f"open({str(trace)!r}, 'w')"),
        Harm(eval, f"open({str(trace)!r}, 'w')"),
        Harm(Path.touch, trace),
        Harm(torch.save, {}, str(trace)),
    ):
        if form == "bare":
            path.write_bytes(pickle.dumps({"0.weight": harm}))
        elif form == "nested":
            torch.save({"state_dict": net().state_dict(), "args": [{"x": harm}]}, path)
        else:
            torch.save({"x": harm}, path, _use_new_zipfile_serialization=form == "zip")
        assert "state_dict()" in refused(path)
        assert not trace.exists()


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    good, path = tmp_path / "good.pth", tmp_path / "bomb.pth"
    torch.save(net().state_dict(), good)
    with (
        zipfile.ZipFile(good) as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, bytes(8 << 20))
    assert path.stat().st_size < 2 << 20
    assert "an archive of another kind" in refused(path)


def test_a_huge_safetensors_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    for size in (2**63, 2**64 - 1, 100_000_001, 0):
        path.write_bytes(struct.pack("<Q", size) + b"{}")
        assert "safetensors" in refused(path)
    header = b'{"a":{"dtype":"F32","shape":[9223372036854775807],"data_offsets":[0,4]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert "safetensors" in refused(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    state = net().state_dict()
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    whole = path.read_bytes()
    chance = random.Random(0)
    for length in {0, 1, 8, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(30))}:
        path.write_bytes(whole[:length])
        refused(path)


def test_mutated_files_never_leave_the_error_tree(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    chance = random.Random(0)
    for old in (True, False):
        torch.save(net().state_dict(), path, _use_new_zipfile_serialization=not old)
        whole = path.read_bytes()
        for _ in range(150):
            mutated = bytearray(whole)
            for _ in range(chance.randint(1, 4)):
                mutated[chance.randrange(len(mutated))] = chance.randrange(256)
            path.write_bytes(mutated)
            try:
                fit_state_dict(net(), load_state_dict(path), source="it")
            except CheckpointError as error:
                assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "a list"),
        (torch.zeros(3), "a Tensor"),
        ({}, "an empty one"),
        ({"epoch": 3}, "'epoch' is a int"),
        ({"a": {"b": torch.zeros(1)}}, "'a' is a dict"),
        ({3: torch.zeros(1)}, "'3' is a Tensor"),
        ({"a": torch.eye(3).to_sparse()}, "no dense tensor"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "no dense tensor"),
        ({"a": torch.zeros(2, device="meta")}, "no dense tensor"),
    ],
)
def test_what_is_no_state_dict_is_named(tmp_path: Path, content: object, said: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    assert said in refused(path)


def test_a_wrapper_around_itself_comes_to_an_end(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "weights.pth")
    assert "'model' is a dict" in refused(tmp_path / "weights.pth")


def test_paths_that_are_no_weight_file(tmp_path: Path) -> None:
    assert "no such weight file" in refused(tmp_path / "absent.pth")
    assert "is a folder" in refused(tmp_path)
    text = tmp_path / "text.pth"
    text.write_text("not weights\n" * 100)
    refused(text)
    fifo = tmp_path / "fifo.pth"
    os.mkfifo(fifo)
    assert "not a regular file" in refused(fifo)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.pth"
    torch.save(net().state_dict(), path)
    path.chmod(0)
    if os.geteuid() == 0:  # root may read everything

        def denied(*_: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(Path, "open", denied)
    assert "Permission denied" in refused(path)


def test_what_does_not_fit_is_named_in_one_line() -> None:
    state = net().state_dict()
    state["3.weight"] = torch.zeros(5, 4)
    del state["0.bias"]
    state |= {f"extra.{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(CheckpointError) as caught:
        fit_state_dict(net(), state, source="some.pth")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "some.pth",
        "1 missing (0.bias)",
        "9 unexpected (extra.0, extra.1, extra.2, ...)",
        "1 of another shape (3.weight [5, 4] for [2, 4])",
    ):
        assert part in message


def test_parts_can_be_left_as_they_are() -> None:
    module, state = net(), net().state_dict()
    before = module.get_parameter("3.weight").clone()
    state["3.weight"] = torch.zeros(5, 4)
    fit_state_dict(module, state, source="it", ignore=["3"])
    assert torch.equal(module.get_parameter("3.weight"), before)
    assert torch.equal(module.get_parameter("0.weight"), state["0.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_numbers_are_refused(value: float) -> None:
    module, state = net(), net().state_dict()
    before = module.get_parameter("0.weight").clone()
    state["1.running_var"][2] = value
    with pytest.raises(CheckpointError, match=r"NaN or Inf in 1 tensors \(1\.running_var\)"):
        fit_state_dict(module, state, source="it")
    assert torch.equal(module.get_parameter("0.weight"), before)


def test_a_giant_that_takes_no_space_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({**net().state_dict(), "0.weight": torch.zeros(1).expand(2**40)}, path)
    with pytest.raises(CheckpointError, match="another shape"):
        fit_state_dict(net(), load_state_dict(path), source="it")


def test_a_file_of_a_quantized_network_is_no_weight_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(net().state_dict(), path, metadata={"format": "mecq-integer"})
    assert "quantized network" in refused(path)
