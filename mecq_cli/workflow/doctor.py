"""`mecq doctor`: whether this machine has what mecq needs, and what it would use."""

from __future__ import annotations

import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from packaging.requirements import Requirement

from mecq_cli.errors import first_line
from mecq_cli.storage import free_space
from mecq_cli.training.recipe import use_bf16
from mecq_cli.workflow.common import compute_on
from mecq_cli.workflow.disk import readable
from mecq_cli.workflow.machine import available_memory, cores, cpu_features, cpu_name

LEAST_DISK = 500_000_000
"""Bytes for the checkpoints of a small run."""
_FEATURES = {
    "VNNI": ("avx512_vnni", "avx_vnni"),
    "AVX2": ("avx2",),
    "AVX512": ("avx512f",),
    "bf16": ("avx512_bf16", "amx_bf16"),
}
_DISTRIBUTION = "mecq"


class Check(NamedTuple):
    """One thing that was looked for.

    Attributes:
        what: its name.
        found: what is here.
        needed: what is asked for; or what its absence means.
        state: "ok"; "missing" where mecq cannot do without it; else "absent".
    """

    what: str
    found: str
    needed: str
    state: Literal["ok", "missing", "absent"]


def doctor() -> dict[str, Any]:
    """All checks as rows of what, found, needed, state; ``ok`` where nothing needed is missing."""
    checks = [*_software(), *_processor(), *_machine(), *_extras()]
    return {
        "ok": all(check.state != "missing" for check in checks),
        "checks": [check._asdict() for check in checks],
    }


def _software() -> Iterator[Check]:
    enough = sys.version_info >= (3, 11)
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Check("Python", found, "3.11 or newer", "ok" if enough else "missing")
    for requirement in _requirements():
        if requirement.marker is None:
            yield _package(requirement, "missing")


def _processor() -> Iterator[Check]:
    yield Check("CPU", f"{cpu_name()}, {cores()} core{'s' * (cores() != 1)}", "", "ok")
    flags = cpu_features()
    for name, wanted in _FEATURES.items():
        there = [flag for flag in wanted if flag in flags]
        meaning = {
            "VNNI": "without it onnxruntime may saturate: --reduce-range",
            "bf16": "without it a training step computes in float32",
        }.get(name, "")
        state: Literal["ok", "absent"] = "ok" if there else "absent"
        yield Check(name, ", ".join(there) or "no", "" if there else meaning, state)


def _machine() -> Iterator[Check]:
    compiler = next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    found = f"{compiler or 'none'}{'' if headers else ', without the headers of Python'}"
    yield Check(
        "C++ compiler", found, "for torch.compile; without it training is slower",
        "ok" if compiler and headers else "absent",
    )  # fmt: skip
    if torch.cuda.is_available():
        device = torch.device("cuda")
        try:
            count = torch.cuda.device_count()
            names = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
            compute_on(device)
            bf16 = "bf16" if use_bf16("auto", device) else "no bf16"
        except RuntimeError as error:
            told = f"PyTorch cannot compute on it: {first_line(error)}"
            yield Check("GPU", f"CUDA {torch.version.cuda}", told, "absent")
        else:
            yield Check("GPU", f"{names}; CUDA {torch.version.cuda}, {bf16}", "", "ok")
    else:
        yield Check("GPU", "none that torch can use", "optional: --device cuda", "absent")
    memory = available_memory(torch.device("cpu"))
    if memory is not None:
        yield Check("memory", f"{readable(memory)} free", "", "ok")
    free = free_space(Path())
    disk: Literal["ok", "missing"] = "ok" if free >= LEAST_DISK else "missing"
    found = f"{readable(free)} free in {Path().absolute()}"
    yield Check("disk", found, f"{readable(LEAST_DISK)} for a run", disk)


def _extras() -> Iterator[Check]:
    for extra in metadata.metadata(_DISTRIBUTION).get_all("Provides-Extra") or []:
        if extra in ("dev", "docs"):
            continue
        for requirement in _requirements():
            if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
                check = _package(requirement, "absent")
                install = "" if check.state == "ok" else f"; pip install '{_DISTRIBUTION}[{extra}]'"
                yield check._replace(what=f"[{extra}] {check.what}", needed=check.needed + install)


def _requirements() -> list[Requirement]:
    """What mecq was installed with, extras included."""
    return [Requirement(text) for text in metadata.requires(_DISTRIBUTION) or []]


def _package(requirement: Requirement, otherwise: Literal["missing", "absent"]) -> Check:
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(requirement.name, "none", str(requirement.specifier), otherwise)
    enough = requirement.specifier.contains(version, prereleases=True)
    state = "ok" if enough else otherwise
    return Check(requirement.name, version, str(requirement.specifier), state)
