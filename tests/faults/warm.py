"""Command lines in processes of their own that need no start: forked from one that is warm.

``python -m tests.faults.warm`` imports everything, lets the network be captured once, and then
forks a child for every order it reads from stdin. It has a single thread, without which a fork
would not be safe; each child runs the real command line from its first setting on. Orders and
answers are lines of JSON.
"""

from __future__ import annotations

import io
import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How a command line ended.

    Attributes:
        code: exit code; negative: the signal that ended it.
        err: its stderr.
        seconds: it ran.
        calls: the calls that were counted, where a fault was ordered.
    """

    code: int
    err: str
    seconds: float
    calls: list[str]

    @property
    def line(self) -> str:
        """The last line of stderr."""
        return (self.err.splitlines() or [""])[-1]


class Warm:
    """The warm process, as a context manager."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Of the warm process."""
        return self._process.pid

    def others(self) -> int:
        """Processes that children of the warm one have left behind."""
        found = 0
        for entry in Path("/proc").iterdir():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except (OSError, UnicodeDecodeError):
                continue
            session, state = int(fields[3]), fields[0]
            found += session == self._process.pid and state != "Z"
        return found - 1

    def run(
        self,
        *arguments: object,
        cwd: Path,
        signal_after: float | None = None,
        signal_number: int = signal.SIGKILL,
        fault: tuple[Path, int, str] | None = None,
        limits: dict[str, int] | None = None,
        at_step: dict[str, Any] | None = None,
    ) -> Ended:
        """Run ``mecq ARGUMENTS``.

        Args:
            arguments: of the command line.
            cwd: folder it runs in.
            signal_after: seconds until it gets a signal.
            signal_number: that signal.
            fault: folder, number of the call and action, see `inject.Fault`.
            limits: of the resource module, "RLIMIT_AS" and the like.
            at_step: see `_at_step`.
        """
        order = {
            "arguments": [str(a) for a in arguments],
            "cwd": str(cwd),
            "after": signal_after,
            "signal": int(signal_number),
            "fault": None if fault is None else [str(fault[0]), *fault[1:]],
            "limits": limits or {},
            "at_step": at_step,
        }
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        requests.write(json.dumps(order) + "\n")
        requests.flush()
        answer = answers.readline()
        assert answer, f"the warm process ended by itself: {self._process.poll()}"
        return Ended(**json.loads(answer))

    def __enter__(self) -> Warm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def serve() -> None:
    """Answer orders until stdin ends."""
    import torch

    import tests.faults.tiny  # noqa: F401  # registers the network
    from mecq_cli.cli.main import run
    from tests.e2e.command import write_patterns

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = write_patterns(Path(folder) / "data", {"train": 2, "val": 1}, size=16)
        rehearsal = ["quantize", "tiny_for_faults", "--wbits", "2", "--abits", "2", "--dry-run"]
        # Without training: the step that a dry run measures would start threads.
        rehearsal += ["--epochs", "0"]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            code = run([*rehearsal, "--no-pretrained", "--device", "cpu", "--data", str(data)])
    assert code == 0
    assert len(os.listdir("/proc/self/task")) == 1, "a fork needs a single thread"  # noqa: PTH208
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of children too, until they are ready
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_obey(json.loads(line))) + "\n")
        sys.stdout.flush()


def _obey(order: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as err, tempfile.TemporaryFile("w+") as calls:
        started = time.perf_counter()
        child = os.fork()
        if child == 0:
            try:
                _child(order, err, calls)
            except BaseException:
                traceback.print_exc(file=err)
                err.flush()
                raise
            finally:
                os._exit(70)
        if order["after"] is not None:
            handle = os.pidfd_open(child)
            if not select.select([handle], [], [], order["after"])[0]:
                os.kill(child, order["signal"])
            os.close(handle)
        _, status = os.waitpid(child, 0)
        seconds = time.perf_counter() - started
        err.seek(0)
        calls.seek(0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "err": err.read(),
            "seconds": seconds,
            "calls": calls.read().splitlines(),
        }


def _child(order: dict[str, Any], err: IO[str], calls: IO[str]) -> None:
    import torch

    from mecq_cli.cli.main import run
    from tests.faults.inject import Fault, install

    # PyTorch makes its pool of threads anew in a forked process when it is first asked for one. The
    # threads of a backward pass would be the first to ask, two at once, which it does not survive.
    torch.set_num_threads(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor, replacement in ((0, nothing), (1, nothing), (2, err.fileno())):
        os.dup2(replacement, descriptor)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    os.chdir(order["cwd"])
    for name, value in order["limits"].items():
        resource.setrlimit(getattr(resource, name), (value, value))
    if order["at_step"]:
        _at_step(**order["at_step"])
    fault = None
    if order["fault"]:
        root, at, action = order["fault"]
        fault = Fault(Path(root), at, action)
        install(fault)
    # Only now: an interrupt before the command begins would be one of this file.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = run(order["arguments"])
    if fault is not None:
        calls.write("\n".join(fault.calls))
        calls.flush()
    sys.stderr.flush()
    os._exit(code)


def _at_step(step: int, **what: Any) -> None:
    """Something happens before step ``step``.

    Of ``what``: "fill" (a file, and how many bytes stay free beside it); or "tensor", a parameter
    as errors call it, whose first number becomes "value", or with "gradient" its gradient times
    that.
    """
    import torch

    from mecq_cli.training.diagnosis import label
    from mecq_cli.training.step import TrainingStep

    honest = TrainingStep.__call__

    def disturbed(self: TrainingStep, images: Any, labels: Any, number: int) -> Any:
        if number == step and "fill" in what:
            path, free = what["fill"]
            size = shutil.disk_usage(Path(path).parent).free - free
            Path(path).write_bytes(bytes(max(size, 0)))
        elif number == step:
            named = {label(name): p for name, p in self.model.named_parameters()}
            parameter = named[what["tensor"]]
            if what.get("gradient"):
                parameter.register_hook(lambda gradient: gradient * what["value"])
            else:
                with torch.no_grad():
                    parameter[(0,) * parameter.dim()] = what["value"]
        return honest(self, images, labels, number)

    setattr(TrainingStep, "__call__", disturbed)  # noqa: B010  # mypy knows no such assignment


if __name__ == "__main__":
    serve()
