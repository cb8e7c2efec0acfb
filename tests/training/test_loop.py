"""The loop alone: what it writes, when it saves, how it stops."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mecq_cli.calibration import calibrate
from mecq_cli.config import QuantizeConfig
from mecq_cli.errors import EnvironmentFailure, Interrupted, NumericError
from mecq_cli.events import Listener
from mecq_cli.insertion import BitPlan, insert
from mecq_cli.training.loop import Trainer
from mecq_cli.training.recipe import choose
from mecq_cli.training.signals import SignalWatch, stopping
from tests.exactness import float_network, random_images

PER_EPOCH = 4
IMAGES = random_images(16, 16)
LABELS = torch.arange(16) % 10


class Recorder(Listener):
    """Hears everything; ``at`` calls a function after a step."""

    def __init__(self, at: dict[int, Any] | None = None) -> None:
        self.at = at or {}
        self.rows: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def advance(self, task: str, done: int, row: Any = None) -> None:
        self.rows.append(dict(row))
        self.at.get(done, lambda: None)()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def batches(epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(epoch))
    for part in order.split(16 // PER_EPOCH)[first:]:
        yield IMAGES[part], LABELS[part]


def trainer(
    folder: Path,
    listener: Listener | None = None,
    source: Any = batches,
    quantizer: str = "lsq",
    **changes: Any,
) -> Trainer:
    torch.manual_seed(0)
    plan = BitPlan(2, 2, quantizer=quantizer)
    model = insert(float_network("resnet20_cifar", 16), (3, 16, 16), plan, ("penultimate",))
    calibrate(model, [IMAGES], 1)
    values: dict[str, Any] = {
        "model": "m", "wbits": 2, "abits": 2, "data": Path("d"), "amp": "off", "epochs": 3,
        "compile": "off", "distill": False, "lr": 0.01,
    }  # fmt: skip
    recipe = choose(QuantizeConfig(**values | changes), PER_EPOCH, 4, torch.device("cpu"))
    return Trainer(
        model, None, recipe, source, checkpoints=folder / "checkpoints",
        metrics=folder / "metrics.jsonl", checkpoint_every=2, listener=listener or Listener(),
        calibration=lambda: ([IMAGES], 1),
    )  # fmt: skip


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


def state_of(one: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in one.model.state_dict().items()}


def test_rows_are_written_and_heard_step_by_step(tmp_path: Path) -> None:
    def look() -> None:
        assert len(metrics(tmp_path)) == 5  # a reader need not wait for a checkpoint

    listener = Recorder({5: look})
    one = trainer(tmp_path, listener)
    one.train("go on")
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(12))
    assert [row["epoch"] for row in rows] == [n // 4 for n in range(12)]
    assert [row["loss"] for row in listener.rows] == [row["loss"] for row in rows]
    for row in rows:
        total = row["loss_task"] + one.recipe.mec_weight * row["loss_mec"]
        assert row["loss"] == pytest.approx(total, rel=1e-5)


def test_a_run_whose_folder_is_removed_stops_and_does_not_make_half_of_it_anew(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    one = trainer(folder, Recorder({5: lambda: shutil.rmtree(folder)}))
    with pytest.raises(EnvironmentFailure, match=r"run: the run folder was removed or moved"):
        one.train("go on")
    assert one.progress.step == 6
    assert not folder.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"quantizer": "n2uq"},
        {"ema": 0.5},
        {"freeze_oscillations": 0.001, "ema": 0.5},
        {"lower_from": 8, "mec_weight": 0.0},
    ],
    ids=lambda changes: "+".join(changes) or "default",
)
def test_what_was_stopped_goes_on_exactly(tmp_path: Path, changes: dict[str, Any]) -> None:
    """By a signal in the middle of an epoch; rows after the checkpoint are written once."""
    (tmp_path / "a").mkdir()
    whole = trainer(tmp_path / "a", **changes)
    whole.train("")

    (tmp_path / "b").mkdir()
    stop = Recorder({5: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(Interrupted, match="after step 5 of 12, saved; continue with: go on") as got:
        trainer(tmp_path / "b", stop, **changes).train("go on")
    assert got.value.exit_code == 143
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 1}\n{"ste')
    resumed = trainer(tmp_path / "b", **changes)
    assert resumed.resume()
    assert resumed.progress.step == 5
    resumed.train("")
    assert metrics(tmp_path / "b") == metrics(tmp_path / "a")
    wanted = state_of(whole)
    for name, value in state_of(resumed).items():
        assert torch.equal(value, wanted[name]), name
    # All that is done is saved, although nothing is finished yet.
    last = sorted((tmp_path / "b" / "checkpoints").iterdir())
    assert [file.name for file in last] == [
        "step-00000010.safetensors",
        "step-00000012.safetensors",
    ]


def test_numbers_that_are_not_finite_change_nothing(tmp_path: Path) -> None:
    before: dict[str, Tensor] = {}

    def poisoned(epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        for number, (images, labels) in enumerate(batches(epoch, first)):
            if epoch == 1 and number == 1:
                before.update({n: p.detach().clone() for n, p in one.model.named_parameters()})
                images = images.clone()
                images[0, 0, 0, 0] = float("nan")
            yield images, labels

    one = trainer(tmp_path, source=poisoned)
    with pytest.raises(NumericError, match=r"^step 5: .*not finite.*nothing was updated.*--lr"):
        one.train("")
    for name, parameter in one.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    again = trainer(tmp_path)
    assert again.resume()
    assert again.progress.step == 4
    assert all(bool(torch.isfinite(v.float()).all()) for v in state_of(again).values())


def test_a_gradient_that_is_not_finite_names_its_layer(tmp_path: Path) -> None:
    one = trainer(tmp_path)
    parameters = dict(one.model.named_parameters())
    name = next(n for n in parameters if "layer2" in n and n.endswith("weight"))
    parameters[name].register_hook(lambda g: g * float("inf"))
    with pytest.raises(NumericError, match=r"step 0: the gradient of layer2\.\S+ is not finite"):
        one.train("")


def test_out_of_memory_says_what_to_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer(tmp_path)

    for error in (
        torch.OutOfMemoryError("no more"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ):

        def fail(*arguments: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(one, "step", fail)
        with pytest.raises(
            EnvironmentFailure,
            match=r"of 4 images; try --batch-size 2 .*mecq quantize --resume --accumulate 2$",
        ):
            one.train("mecq quantize --resume")


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(tmp_path)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(one, "step", fail)
    with pytest.raises(RuntimeError, match="size mismatch"):
        one.train("")


@pytest.mark.parametrize("error", [SystemExit, BrokenPipeError, RuntimeError])
def test_nothing_that_goes_wrong_in_telling_breaks_a_step_off(error: type[BaseException]) -> None:
    def tell() -> None:
        raise error

    with SignalWatch(tell) as watch:
        os.kill(os.getpid(), signal.SIGTERM)
    assert watch.received == signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_outside_of_a_step_a_signal_acts_at_once(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(Interrupted, match=r"^so go on$") as got, stopping("so go on"):  # noqa: PT012
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        except Exception:  # noqa: BLE001  # as a library may have it
            pytest.fail("taken for an error of the library")
    assert got.value.exit_code == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
