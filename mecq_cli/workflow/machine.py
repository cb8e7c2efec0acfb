"""The machine that times depend on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mecq_cli import __version__

MOST_WORKERS = 16
"""Chosen unasked; each holds some 200 MB and two batches."""
_CPUINFO = Path("/proc/cpuinfo")
_INTEGER = {"avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX-VNNI", "amx_int8": "AMX"}
"""Flags of instructions that multiply and add up 8-bit integers, and their names."""
_LIBRARIES = ("torch", "torchvision", "timm", "onnx", "onnxruntime", "numpy")


def facts() -> dict[str, Any]:
    """What figures depend on: processor, cores, memory in bytes, system, versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_initialized() else None
    pages = {name: os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_PAGE_SIZE")}
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "integer_instructions": integer_instructions(),
        "gpu": gpu,
        "memory_bytes": pages["SC_PHYS_PAGES"] * pages["SC_PAGE_SIZE"],
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {"mecq": __version__, **{name: _version(name) for name in _LIBRARIES}},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name; only Linux tells."""
    return _field("model name") or platform.processor() or platform.machine()


def integer_instructions() -> list[str]:
    """Which instructions for products of 8-bit integers the processor has; [] where unknown."""
    flags = cpu_features()
    return [name for flag, name in _INTEGER.items() if flag in flags]


def cpu_features() -> frozenset[str]:
    """What Linux calls the instructions of the processor; empty elsewhere."""
    return frozenset(_field("flags").split())


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory(device: torch.device) -> int | None:
    """Bytes that are free for a process, there; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def loader_workers(asked: int | None, device: torch.device, sharing: int = 1) -> int:
    """How many processes decode images, where the user does not say: one a core for a GPU.

    Of ``sharing`` processes on this machine each gets its part of the cores.

    On a CPU the step itself needs the cores, and one more process at work keeps its threads
    waiting for each other; there the images are decoded in between.
    """
    if asked is not None:
        return asked
    return 0 if device.type == "cpu" else min(max(cores() // sharing, 1), MOST_WORKERS)


def _field(name: str) -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    values = (line.partition(":")[2].strip() for line in lines if line.startswith(name))
    return next(values, "")
