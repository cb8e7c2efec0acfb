"""What a launcher (torchrun, accelerate launch) says of the process it started; needs no torch."""

from __future__ import annotations

import os


def rank() -> int:
    """Number of this process among those of its run, from 0; 0 without a launcher."""
    return _number("RANK") if processes() > 1 else 0


def local_rank() -> int:
    """Number of this process among those of its run on this machine."""
    return _number("LOCAL_RANK")


def local_processes() -> int:
    """How many processes the run has on this machine."""
    return max(_number("LOCAL_WORLD_SIZE"), 1) if "RANK" in os.environ else 1


def processes() -> int:
    """How many processes the run has; 1 without a launcher.

    Some clusters set WORLD_SIZE for purposes of their own: a launcher sets RANK as well.
    """
    return max(_number("WORLD_SIZE"), 1) if "RANK" in os.environ else 1


def restarts() -> bool:
    """Whether the launcher starts the same command again when a process fails."""
    return "RANK" in os.environ and _number("TORCHELASTIC_MAX_RESTARTS") > 0


def attempt() -> int:
    """How often the launcher has started the processes again."""
    return _number("TORCHELASTIC_RESTART_COUNT")


def alone_by_mistake() -> bool:
    """Whether ``accelerate launch --cpu`` was asked for several processes and started one.

    Without a list of hosts for MPI it starts one, whatever ``--num_processes`` says; the address
    for the others to meet at is the only trace of their number.
    """
    environment = os.environ
    wanted = "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment
    return wanted and "RANK" not in environment and "OMPI_COMM_WORLD_SIZE" not in environment


def unsupported() -> str | None:
    """Name of a way to split a network that was asked for and does not exist here."""
    for name, variable in (
        ("FSDP", "ACCELERATE_USE_FSDP"),
        ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"),
        ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM"),
    ):
        if os.environ.get(variable, "").lower() in ("1", "true"):
            return name
    return None


def _number(name: str) -> int:
    try:
        return int(os.environ.get(name, "0"))
    except ValueError:
        return 0
