"""Two processes on the CPU train as one does with the whole batch, and stop as one."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mecq_cli.calibration import calibrate, reestimate_batch_norm
from mecq_cli.config import QuantizeConfig
from mecq_cli.distributed import ALONE, Processes, joined
from mecq_cli.errors import EnvironmentFailure, Interrupted, NumericError
from mecq_cli.events import Listener
from mecq_cli.insertion import BitPlan, Tap, insert
from mecq_cli.training.loop import Trainer
from mecq_cli.training.recipe import choose
from mecq_cli.training.teacher import Teacher
from tests.exactness import random_images

BATCH, STEPS = 16, 5
TAPS: tuple[Tap, ...] = ("stages",)
SHAPE = (3, 16, 16)
IMAGES = random_images(2 * BATCH, 16)
LABELS = torch.arange(2 * BATCH) % 10


class Small(nn.Module):
    """Convolutions with batch norm, a residual add, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8))
        self.linear = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.block(x) + x)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class At(Listener):
    """Calls a function after a step."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def advance(self, task: str, done: int, row: Any = None) -> None:
        if done == self.step:
            self.act()


def trainer(
    folder: Path,
    processes: Processes,
    parts: int = 1,
    listener: Listener | None = None,
    images: Tensor = IMAGES,
    lower_from: int = 0,
) -> Trainer:
    """With distillation, two views, and the weights coded too."""
    folder.mkdir(exist_ok=True, parents=True)
    torch.manual_seed(0)
    network = Small().eval()
    teacher = Teacher(copy.deepcopy(network), SHAPE, TAPS)
    model = insert(network, SHAPE, BitPlan(4, 4), TAPS)
    calibrate(model, [IMAGES], 1)
    config = QuantizeConfig(
        model="m", wbits=4, abits=4, data="d", amp="off", compile="off", epochs=3,
        lr=0.02, mec_on="stages+weights", mec_weight=1.0, accumulate=parts, max_steps=STEPS,
        lower_from=lower_from,
    )  # fmt: skip
    recipe = choose(config, 2, BATCH, torch.device("cpu"))

    def batches(epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = np.random.default_rng(epoch).permutation(2 * BATCH)
        for chunk in order.reshape(2, BATCH)[first:]:
            mine = processes.part(chunk, parts)
            yield images[mine], LABELS[mine]

    return Trainer(
        model, teacher, recipe, batches, checkpoints=folder / "checkpoints",
        metrics=folder / "metrics.jsonl", checkpoint_every=2, listener=listener or Listener(),
        processes=processes, calibration=lambda: (iter([IMAGES]), 1),
    )  # fmt: skip


def trained(
    folder: Path, processes: Processes, parts: int = 1, lower_from: int = 0
) -> dict[str, Tensor]:
    """The network at the end, its batch norm statistics measured anew."""
    one = trainer(folder, processes, parts, lower_from=lower_from)
    one.train("")
    half = processes.part(np.arange(2 * BATCH))
    reestimate_batch_norm(one.model, [IMAGES[half]])
    return dict(one.model.state_dict())


def stopped(folder: Path, processes: Processes) -> int:
    """The second process gets a signal within the third step."""

    def send() -> None:
        if processes.rank:
            os.kill(os.getpid(), signal.SIGTERM)

    one = trainer(folder, processes, listener=At(3, send))
    with pytest.raises(Interrupted, match="after step 3 of 5") as got:
        one.train("")
    return got.value.exit_code


def poisoned(folder: Path, processes: Processes) -> str:
    """The second process meets an image that is not finite."""
    images = IMAGES * float("nan") if processes.rank else IMAGES
    with pytest.raises(NumericError) as got:
        trainer(folder, processes, images=images).train("")
    return str(got.value)


def resumed(folder: Path, processes: Processes) -> int:
    """Goes on, although only the first process sees the checkpoints."""
    one = trainer(folder if processes.first else folder / "elsewhere", processes)
    assert one.resume()
    step = one.progress.step
    one.train("")
    return step


def gathered(processes: Processes) -> list[Tensor]:
    """Rows of which one process has more, or the only ones."""
    mine = torch.arange(2.0 * processes.rank + 1)[:, None] + 10 * processes.rank
    both = torch.cat([mine, -mine], 1)
    return [processes.rows(both), processes.rows(both[: 2 * processes.rank])]


def killed(folder: Path, processes: Processes) -> None:
    """The second process dies within the fourth step."""

    def die() -> None:
        if processes.rank:
            os.kill(os.getpid(), signal.SIGKILL)

    trainer(folder, processes, listener=At(3, die)).train("")


def _worker(rank: int, port: int, folder: str) -> None:
    try:
        _scenarios(rank, port, folder)
    except EnvironmentFailure as error:
        Path(folder, "lost.txt").write_text(str(error))
        os._exit(1)  # as the command line does


def _scenarios(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    root = Path(folder)
    with joined("cpu") as processes:
        result = {
            "whole": trained(root / "whole", processes),
            "parts": trained(root / "parts", processes, 2),
            "lowered": trained(root / "lowered", processes, lower_from=5),
            "stopped": stopped(root / "stopped", processes),
            "poisoned": poisoned(root / "poisoned", processes),
            "resumed": resumed(root / "stopped", processes),
            "gathered": gathered(processes),
        }
        torch.save(result, root / f"{rank}.pt")
        # The last thing they do: with one of them gone the group is of no use.
        killed(root / "killed", processes)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder that two processes worked in, and what each of them found."""
    folder = tmp_path_factory.mktemp("both")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(rank, port, str(folder))) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker, code in zip(workers, (1, -signal.SIGKILL), strict=True):
        worker.join(timeout=200)
        assert worker.exitcode == code
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def losses(folder: Path) -> list[list[float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(STEPS))
    keys = ("loss", "loss_task", "loss_mec", "train_top1")
    return [[row[key] for key in keys] + [*row["coding_length"].values()] for row in rows]


@pytest.mark.parametrize(
    ("name", "parts", "lower_from"), [("whole", 1, 0), ("parts", 2, 0), ("lowered", 1, 5)]
)
def test_two_train_as_one(
    both: Any, tmp_path: Path, name: str, parts: int, lower_from: int
) -> None:
    folder, found = both
    single = trained(tmp_path, ALONE, parts, lower_from)
    assert np.allclose(losses(folder / name), losses(tmp_path), rtol=1e-4, atol=1e-5)
    for key, value in single.items():
        for process in found:
            assert torch.equal(process[name][key], found[0][name][key]), key
            assert torch.allclose(process[name][key], value, rtol=1e-3, atol=1e-4), key


def test_rows_of_all_are_below_each_other(both: Any) -> None:
    _, found = both
    for process in found:
        all_of_them, second = process["gathered"]
        assert all_of_them.tolist() == [[n, -n] for n in (0.0, 10.0, 11.0, 12.0)]
        assert second.tolist() == [[10.0, -10.0], [11.0, -11.0]]


def test_they_stop_as_one_and_go_on(both: Any) -> None:
    folder, found = both
    for process in found:
        assert process["stopped"] == 143
        assert process["poisoned"].startswith("step 0: the loss is not finite")
        assert process["resumed"] == 3
    # Bit by bit the run that nobody stopped.
    assert losses(folder / "stopped") == losses(folder / "whole")
    assert not any(p.is_file() for p in (folder / "stopped" / "elsewhere").rglob("*"))


def test_after_a_kill_the_other_one_ends_and_one_process_goes_on(both: Any) -> None:
    folder, _ = both
    assert "process 0 of 2: another process of this run ended" in (folder / "lost.txt").read_text()
    one = trainer(folder / "killed", ALONE)
    assert one.resume()
    assert one.progress.step == 2  # saved every two steps
    one.train("")
    assert np.allclose(losses(folder / "killed"), losses(folder / "whole"), rtol=1e-4, atol=1e-5)
