"""Every call by which a run changes files fails once, or is the last one of its process.

After a failure: one line of error, the exit code of the environment, nothing left over, whatever
was there before still whole. After a failure as well as after a kill the run continues and ends as
one that nobody disturbed.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest

from mecq_cli.export import safetensors
from mecq_cli.training import container, state
from tests.faults.conftest import Course, assert_same
from tests.faults.warm import Ended, Warm

ACTIONS = ("eio", "kill", "full")


def sites(calls: tuple[str, ...]) -> list[list[int]]:
    """Numbers of the calls, from 1, those together that do the same to the same kind of file."""
    same: dict[str, list[int]] = {}
    for number, call in enumerate(calls, 1):
        same.setdefault(re.sub(r"\d+(-[0-9a-f]{8})?", "", call), []).append(number)
    return [*same.values()]


def assert_whole(run: Path) -> None:
    """Whatever is there, under its own name, is complete."""
    for path in state.checkpoints(run / "checkpoints"):
        container.read(path)
    if (run / "model.safetensors").exists():
        safetensors.load(run / "model.safetensors")


def disturb(warm: Warm, course: Course, at: int, action: str, output: str) -> Ended:
    """One run with one fault, and its continuation."""
    run = course.work / output
    shutil.rmtree(course.work / "runs", ignore_errors=True)
    done = warm.run(
        *course.arguments, "--output", output, cwd=course.work, fault=(course.work, at, action)
    )
    about = f"call {at} ({course.calls[at - 1]}), {action}: {done.code} {done.err}"
    assert "Traceback" not in done.err, about
    if run.exists():
        assert_whole(run)
    if action == "kill":
        assert done.code == -signal.SIGKILL, about
    else:
        # 3: the artifact, read back to be evaluated, cannot be read.
        reads = course.calls[at - 1].startswith("open ") and "model.safetensors" in about
        assert done.code in (0, 6, 3 if reads else 6), about
        assert done.err.count("error: ") == (done.code != 0), about
        assert done.code == 0 or done.line.startswith("error: "), about
        assert not [*course.work.rglob(".*.tmp")], about
    again = warm.run(*course.arguments, "--resume", "--output", output, cwd=course.work)
    assert again.code == 0, f"{about}; then {again.err}"
    assert_same(run, course.whole)
    shutil.rmtree(run)
    return done


def names_what_failed(done: Ended, call: str, output: str) -> bool:
    """Whether the line says which file or folder it was."""
    path = Path(call.rpartition(" ")[2])
    name = re.sub(r"^\.(.*)\.\d+-[0-9a-f]{8}\.tmp$", r"\1", path.name)
    expected = output if name in ("whole", ".lock") else name
    return expected in done.line


def test_calls_of_many_kinds(warm: Warm, short: Course, report: Callable[[str], None]) -> None:
    chance, started = random.Random(0), time.perf_counter()
    # Every second kind of call meets one of the three; all of them all in `test_every_call`.
    found, actions = sites(short.calls)[chance.randrange(2) :: 2], cycle(ACTIONS)
    ends: Counter[str] = Counter()
    for numbers in found:
        at, action = chance.choice(numbers), next(actions)
        done = disturb(warm, short, at, action, f"call-{at}")
        ends[f"{action} -> {done.code}"] += 1
    assert ends["eio -> 6"] >= 3
    report(
        f"k-th call: {len(found)} of {len(short.calls)} calls ({dict(sorted(ends.items()))}), all "
        f"continued and equal; {time.perf_counter() - started:.0f} s"
    )


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("action", ACTIONS)
def test_every_call(warm: Warm, short: Course, report: Callable[[str], None], action: str) -> None:
    started = time.perf_counter()
    ends: Counter[int] = Counter()
    for at in range(1, len(short.calls) + 1):
        output = f"every-{at}"
        done = disturb(warm, short, at, action, output)
        ends[done.code] += 1
        if done.code == 6 and action == "eio":
            call = short.calls[at - 1]
            assert names_what_failed(done, call, output), (call, done.line)
    report(
        f"k-th call, {action}: k = 1 to {len(short.calls)}, exit codes {dict(sorted(ends.items()))}"
        f", all continued and equal; {time.perf_counter() - started:.0f} s"
    )
