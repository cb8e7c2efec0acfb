"""What the launcher's environment means, and a command that it may repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mecq_cli import launch
from mecq_cli.config import resolve, to_toml
from mecq_cli.distributed import TIMEOUT_VARIABLE, Processes, joined
from mecq_cli.errors import EnvironmentFailure, UsageError
from tests.e2e.command import mecq

FLAGS: dict[str, Any] = {"model": "resnet18", "wbits": 2, "abits": 4, "data": Path("images")}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "TORCHELASTIC_MAX_RESTARTS": "3"}


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # some clusters say so of their machines
    assert (launch.rank(), launch.processes(), launch.restarts()) == (0, 1, False)
    with joined("auto") as processes:
        assert processes.first
        assert processes.sums([1.5]) == [1.5]


def test_each_part_holds_the_same_images_whatever_the_number_of_processes() -> None:
    batch = np.arange(24)
    for count in (1, 2, 3, 4):
        shares = [Processes(rank, count).part(batch, 2) for rank in range(count)]
        for number, part in enumerate((batch[:12], batch[12:])):
            pieces = [share.reshape(2, -1)[number] for share in shares]
            assert np.array_equal(np.concatenate(pieces), part)
    with pytest.raises(UsageError, match=r"--batch-size 24: .*5 processes x 2 micro.* of 10$"):
        Processes(0, 5).part(batch, 2)


def test_a_command_that_may_be_repeated_continues_its_own_run(tmp_path: Path) -> None:
    first, _ = resolve(None, {**FLAGS, "output": tmp_path}, restarts=True)
    assert first.resume
    (tmp_path / "config.toml").write_text(to_toml(first.model_copy(update={"lr": 0.5})))
    again, origins = resolve(None, {**FLAGS, "output": tmp_path}, restarts=True)
    assert (again.lr, origins["lr"]) == (0.5, "checkpoint")
    with pytest.raises(UsageError, match=r"--wbits: got 3"):
        resolve(None, {**FLAGS, "wbits": 3, "output": tmp_path}, restarts=True)
    with pytest.raises(UsageError, match=r"--output is missing.*--max-restarts"):
        resolve(None, FLAGS, restarts=True)
    with pytest.raises(UsageError, match=r"--force.*--max-restarts"):
        resolve(None, {**FLAGS, "output": tmp_path, "force": True}, restarts=True)


def test_what_several_processes_cannot_have_is_one_line(
    torchrun: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (launch.rank(), launch.processes(), launch.restarts()) == (1, 2, True)
    torchrun.setenv("RANK", "0")
    done = mecq("eval", "a.safetensors", cwd=tmp_path)
    assert done.code == 2
    assert "only mecq quantize shares its work" in done.err
    with pytest.raises(UsageError, match="--device cuda:1: each of several processes"), \
         joined("cuda:1"):  # fmt: skip
        pass
    torchrun.setenv(TIMEOUT_VARIABLE, "soon")
    with pytest.raises(UsageError, match="MECQ_TIMEOUT=soon"), joined("cpu"):
        pass
    torchrun.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="FSDP is not supported"), joined("cpu"):
        pass


def test_without_accelerate_the_line_says_what_to_install(torchrun: pytest.MonkeyPatch) -> None:
    torchrun.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(EnvironmentFailure, match=r"pip install 'mecq\[distributed\]'"), \
         joined("cpu"):  # fmt: skip
        pass
