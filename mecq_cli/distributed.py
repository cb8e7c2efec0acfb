"""The processes of one run: who they are, and what they tell each other.

A run of several processes is one run: each works on its own part of every batch (data parallel
training), and what comes out is what one process with the whole batch gets, up to rounding. The
first process writes the files and talks to the user.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.distributed.rendezvous import rendezvous

from mecq_cli import launch
from mecq_cli.errors import EnvironmentFailure, MecqError, UsageError, first_line

TIMEOUT_VARIABLE = "MECQ_TIMEOUT"
TIMEOUT = 600.0
"""Seconds a process waits for the others, unless the variable says otherwise."""

T = TypeVar("T")


class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: number of this one; the first, 0, writes and speaks.
        count: how many there are.
        device: of this process; None where there is only one, which may choose.
    """

    def __init__(
        self, rank: int = 0, count: int = 1, device: torch.device | None = None,
        accelerator: Any = None,
    ) -> None:  # fmt: skip
        self.rank, self.count, self.device = rank, count, device
        self._accelerator = accelerator

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def broadcast(self, value: T) -> T:
        """What the first process has; tensors in lists and dictionaries arrive on the CPU."""
        if self.count == 1:
            return value
        from accelerate.utils import send_to_device

        values = [send_to_device(value, "cpu")]
        dist.broadcast_object_list(values, src=0, device=self.device)
        arrived: T = values[0]
        return arrived

    def from_first(self, function: Callable[[], T]) -> T:
        """The result of ``function``, which only the first process calls.

        Raises:
            MecqError: in every process, where the first one raised it.
        """
        if self.count == 1:
            return function()
        outcome: Any = None
        if self.first:
            try:
                outcome = function()
            except MecqError as error:
                outcome = error
        outcome = self.broadcast(outcome)
        if isinstance(outcome, MecqError):
            raise outcome
        result: T = outcome
        return result

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sums over the processes, the same in all of them."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        sums: list[float] = total.tolist()
        return sums

    def largest(self, number: int) -> int:
        """The largest ``number`` of any process."""
        if self.count == 1:
            return number
        value = torch.tensor(number, device=self.device)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def rows(self, mine: torch.Tensor) -> torch.Tensor:
        """The rows [n, columns] of all processes below each other, in their order, on the CPU."""
        if self.count == 1:
            return mine
        most = self.largest(len(mine))
        padded = torch.full((most, mine.shape[1] + 1), -1.0, dtype=torch.float64)
        padded[: len(mine)] = torch.cat([torch.ones(len(mine), 1), mine], 1)
        parts = [torch.empty_like(padded, device=self.device) for _ in range(self.count)]
        dist.all_gather(parts, padded.to(self.device))
        whole = torch.cat(parts).cpu()
        return whole[whole[:, 0] == 1, 1:].to(mine.dtype)

    def wait(self) -> None:
        """Until all processes are here."""
        self.largest(0)

    def part(self, batch: NDArray[np.int64], parts: int = 1) -> NDArray[np.int64]:
        """What this process takes of a batch that all of them work on.

        The batch is cut into ``parts`` one after the other, and each of these into equal pieces,
        one a process: so a part holds the same images, however many processes there are.

        Raises:
            UsageError: the batch cannot be divided so.
        """
        if self.count == 1:
            return batch
        check_divides(len(batch), self.count, parts)
        mine: NDArray[np.int64] = batch.reshape(parts, self.count, -1)[:, self.rank].reshape(-1)
        return mine

    def data_parallel(self, network: nn.Module) -> nn.Module:
        """``network``, whose gradients are averaged over the processes in the backward pass."""
        if self.count == 1:
            return network
        wrapped: nn.Module = self._accelerator.prepare_model(network)
        return wrapped


ALONE = Processes()
"""A run of one process."""


def check_divides(batch: int, count: int, parts: int) -> None:
    """Raises UsageError unless a batch can be divided over processes and micro-batches."""
    if batch % (count * parts):
        ways = [f"{count} processes"] if count > 1 else []
        ways += [f"{parts} micro-batches (--accumulate)"] if parts > 1 else []
        raise UsageError(
            f"--batch-size {batch}: cannot be divided evenly by {' x '.join(ways)}; the batch size "
            f"is that of all together: give a multiple of {count * parts}"
        )


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """This process among those that the launcher started, until the ``with`` block ends.

    Args:
        device: "auto", "cpu" or "cuda"; each process takes a GPU of its own.

    Raises:
        UsageError: a device or a launcher's mode that several processes cannot have.
        EnvironmentFailure: accelerate is missing, there are too few GPUs, or another process
            died or does not answer.
    """
    mode = launch.unsupported()
    if mode is not None:
        raise UsageError(
            f"{mode} is not supported: these networks fit on one device; launch without it, and "
            "every process trains on its part of each batch (docs/scaling.md)"
        )
    if launch.processes() == 1:
        yield ALONE
        return
    accelerator = _accelerator(device)
    place = accelerator.device if accelerator.device.type == "cuda" else torch.device("cpu")
    try:
        yield Processes(launch.rank(), launch.processes(), place, accelerator)
    except RuntimeError as error:
        if not _is_about_the_others(error):
            raise
        raise EnvironmentFailure(
            f"process {launch.rank()} of {launch.processes()}: another process of this run ended "
            f"or did not answer for {_timeout():g} s ({TIMEOUT_VARIABLE}); its own message says "
            "why; start the run again with --resume"
        ) from error
    # Only where all goes well: with a process missing it could wait for that one.
    accelerator.end_training()


def _accelerator(device: str) -> Any:
    """The process group, made by the accelerate library."""
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"--device {device}: each of several processes takes a device of its own; "
            "give auto, cpu or cuda"
        )
    try:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise EnvironmentFailure(
            f"{launch.processes()} processes were launched, which takes the accelerate library "
            f"({error}); install it with: pip install 'mecq[distributed]'"
        ) from error
    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    if not on_cpu and launch.local_rank() >= torch.cuda.device_count():
        raise EnvironmentFailure(
            f"process {launch.rank()}: {torch.cuda.device_count()} GPUs are usable on this "
            f"machine, and this is its process number {launch.local_rank() + 1}; launch no more "
            "processes than GPUs, or give --device cpu"
        )
    _meet("gloo" if on_cpu else "nccl")
    # The buffers need no broadcast: batch norm is that of all processes, so they are equal.
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="no",  # the step has an autocast of its own (--amp)
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        ],
    )


def _meet(backend: str) -> None:
    """Make the process group, which accelerate then takes over.

    Where torchrun starts processes again, it may keep the store of those before: their addresses
    in it must not be taken for ours.
    """
    timeout = timedelta(seconds=_timeout())
    if backend == "nccl":
        torch.cuda.set_device(launch.local_rank())
    try:
        store, rank, count = next(rendezvous("env://", timeout=timeout))
        own = dist.PrefixStore(f"mecq/{launch.attempt()}/{count}", store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=own, rank=rank, world_size=count, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise EnvironmentFailure(
            f"process {launch.rank()} of {launch.processes()}: the processes cannot reach each "
            f"other ({first_line(error)}); check the addresses given to the launcher"
        ) from error


def _timeout() -> float:
    """Seconds to wait for the other processes."""
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text) if text else TIMEOUT
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UsageError(f"{TIMEOUT_VARIABLE}={text}: allowed: seconds, more than 0")
    return seconds


def _is_about_the_others(error: RuntimeError) -> bool:
    """Whether a collective operation failed; gloo's and NCCL's errors have no common class."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("gloo", "nccl", "connection closed by peer")
    )
