"""How this CPU adds up 8-bit products in onnxruntime: see `mecq_cli.integer.saturation`."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

_X86 = {"x86_64", "amd64", "i386", "i686"}
_VNNI = {"avx512_vnni", "avx_vnni"}


@dataclass(frozen=True)
class CpuPath:
    """What is known of a CPU.

    Attributes:
        name: "vnni" (32-bit sums), "no-vnni" (pairs may saturate at 16 bits) or "unknown".
        text: the same for people.
    """

    name: str
    text: str


def cpu_path(cpuinfo: Path = Path("/proc/cpuinfo"), machine: str | None = None) -> CpuPath:
    """The path of the CPU that ``cpuinfo`` describes.

    Args:
        cpuinfo: Linux's description of the CPU; elsewhere there is none.
        machine: as `platform.machine` says; only x86 has the two paths.
    """
    machine = platform.machine() if machine is None else machine
    if machine.lower() not in _X86:
        return CpuPath("unknown", f"{machine or 'this machine'} is no x86 CPU; not known")
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    if not flags:
        return CpuPath("unknown", f"not known: {cpuinfo} does not name the CPU's features")
    found = _VNNI.intersection(flags)
    if found:
        return CpuPath("vnni", f"this CPU has VNNI ({', '.join(sorted(found))}): 32-bit sums")
    return CpuPath("no-vnni", "this CPU has no VNNI: sums of two products saturate at 16 bits")
