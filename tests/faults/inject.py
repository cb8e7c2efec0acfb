"""The k-th call of this process that changes files under a folder fails, or is its last one.

Wrapped are the calls by which Python changes files: open (to write or to read), write, fsync,
rename, unlink and mkdir. Calls are counted only where their path, or the file behind their
descriptor, lies under the folder.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Fault:
    """What happens, and when.

    Attributes:
        root: the folder.
        at: number of the call, from 1; 0 for never.
        action: "eio" (this call fails), "full" (this and every later write fails, after half of
            its bytes), "kill" (the process ends by SIGKILL, after half of the bytes).
        calls: "kind name" of all calls so far.
    """

    root: Path
    at: int
    action: str
    calls: list[str] = field(default_factory=list)

    def strikes(self, kind: str, path: str) -> bool:
        """Count a call; whether it is the one."""
        if not path.startswith(f"{self.root}/"):
            return False
        self.calls.append(f"{kind} {os.path.relpath(path, self.root)}")
        if self.action == "full" and self.at and len(self.calls) > self.at:
            return kind == "write"
        return len(self.calls) == self.at

    def happen(self) -> None:
        """Fail as the system would, or end."""
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        number = errno.ENOSPC if self.action == "full" else errno.EIO
        raise OSError(number, os.strerror(number))


def install(fault: Fault) -> None:
    """From now on, in this process."""
    paths: dict[int, str] = {}

    def where(target: Any) -> str:
        if isinstance(target, int):
            return paths.get(target, "")
        return os.path.normpath(Path(target).absolute())

    def wrapped(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(target: Any, *rest: Any, **options: Any) -> Any:
            if fault.strikes(kind, where(target)):
                fault.happen()
            result = call(target, *rest, **options)
            if kind == "open":
                paths[result] = where(target)
            return result

        return guarded

    class Raw(io.FileIO):
        """An open file whose writes are counted."""

        def write(self, data: Any) -> int:
            if fault.strikes("write", where(self.name)):
                view = memoryview(data)
                super().write(view[: len(view) // 2])
                fault.happen()
            return super().write(data)

    plain = builtins.open

    def opened(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
        path = where(file)
        if not path.startswith(f"{fault.root}/"):
            return plain(file, mode, buffering, *rest, **options)
        if not isinstance(file, int) and fault.strikes("open", path):
            fault.happen()
        if "r" in mode:
            reader = plain(file, mode, buffering, *rest, **options)
            paths[reader.fileno()] = path
            return reader
        raw = Raw(file, mode.replace("b", ""))
        paths[raw.fileno()] = path
        binary = io.BufferedWriter(raw)
        if "b" in mode:
            return binary
        return io.TextIOWrapper(binary, line_buffering=buffering == 1, **options)

    builtins.open = opened
    io.open = opened
    for kind, name in [
        ("open", "open"), ("fsync", "fsync"), ("rename", "replace"), ("rename", "rename"),
        ("unlink", "unlink"), ("mkdir", "mkdir"),
    ]:  # fmt: skip
        setattr(os, name, wrapped(kind, getattr(os, name)))
