"""Disks that are full, files that may not grow, memory that ends: one line, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import Course, assert_same
from tests.faults.test_calls import assert_whole
from tests.faults.warm import Ended, Warm

Report = Callable[[str], None]


def refused(done: Ended, *parts: str) -> None:
    """One line of error, and the exit code of the environment."""
    assert done.code == 6, done
    assert "Traceback" not in done.err
    assert done.err.count("error: ") == 1, done
    for part in parts:
        assert part in done.line, done.line


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """``disk(kilobytes)``: a folder that holds no more, or is resized to that."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = False

    def sized(kilobytes: int) -> Path:
        nonlocal mounted
        options = f"size={kilobytes}k" + (",remount" if mounted else "")
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place],
            capture_output=True,
            check=False,
        )
        if made.returncode != 0:
            pytest.skip("mounting a small tmpfs needs root")
        mounted = True
        return place

    if not shutil.which("mount") or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield sized
    if mounted:
        subprocess.run(["umount", place], check=True)


def test_a_full_disk(
    warm: Warm, short: Course, disk: Callable[[int], Path], report: Report
) -> None:
    """It is full when the run starts, or becomes so at any later moment."""
    place = disk(48)
    refused(
        warm.run(*short.arguments, "--output", place / "run", cwd=short.work),
        "kB of disk are needed", "kB are free", "--keep-checkpoints", str(place),
    )  # fmt: skip
    assert [*place.iterdir()] == [], "the same command can be given again"

    met = set()
    for kilobytes in range(20, 400, 20):
        # Not told before the start: the disk is filled by another program meanwhile.
        shutil.rmtree(disk(2000) / "run", ignore_errors=True)
        fill = place / "other"
        fill.unlink(missing_ok=True)
        done = warm.run(
            *short.arguments, "--output", place / "run", cwd=short.work,
            at_step={"step": 0, "fill": (str(fill), kilobytes * 1024)},
        )  # fmt: skip
        assert not [*place.rglob(".*.tmp")]
        assert_whole(place / "run")
        if done.code == 0:
            break
        refused(done, "no space is left on the disk", str(place / "run"))
        met.add(Path(done.line.removeprefix("error: ").partition(": ")[0]).name)
        fill.unlink()
        again = warm.run(*short.arguments, "--resume", "--output", place / "run", cwd=short.work)
        assert again.code == 0, again.err
        assert_same(place / "run", short.whole)
    assert done.code == 0
    assert any(name.startswith("step-") for name in met), met
    report(f"full disk (tmpfs): in {', '.join(sorted(met))}; all continued and equal")


def test_a_limit_on_the_size_of_files(warm: Warm, short: Course) -> None:
    """The kernel's own; the first checkpoint is the first file that is larger."""
    limit = {"RLIMIT_FSIZE": 10_000}
    done = warm.run(*short.arguments, "--output", "limited", cwd=short.work, limits=limit)
    refused(done, "step-00000000.safetensors", "larger than the limit", "ulimit -f")
    assert not (short.work / "limited").exists()
    # Momentum makes the second one larger than the first.
    second = min(path.stat().st_size for path in (short.whole / "checkpoints").iterdir())
    limit = {"RLIMIT_FSIZE": second - 1000}
    done = warm.run(*short.arguments, "--output", "limited", cwd=short.work, limits=limit)
    refused(done, "step-00000002.safetensors", "larger than the limit")
    kept = [path.name for path in (short.work / "limited" / "checkpoints").iterdir()]
    assert kept == ["step-00000000.safetensors"]
    done = warm.run(*short.arguments, "--resume", "--output", "limited", cwd=short.work)
    assert done.code == 0, done.err
    assert_same(short.work / "limited", short.whole)


def test_the_disk_need_is_told_and_true(warm: Warm, short: Course) -> None:
    followed = "ema = 0.9\nfreeze_oscillations = 0.02\n"
    for optimizer, more in (("sgd", followed), ("adamw", "")):
        settings = short.place / f"{optimizer}.toml"
        text = (short.place / "run.toml").read_text() + f'optimizer = "{optimizer}"\n{more}'
        settings.write_text(text.replace("lr = 0.05", "lr = 0.001"))
        arguments = [str(settings) if str(a).endswith("run.toml") else a for a in short.arguments]
        done = warm.run(*arguments, "--output", f"told-{optimizer}", cwd=short.work)
        assert done.code == 0, done.err
        said = re.search(
            r"([\d.]+) kB of disk are needed \(3 checkpoints of ([\d.]+) kB, .* are free", done.err
        )
        assert said, done.err
        run = short.work / f"told-{optimizer}"
        largest = max(p.stat().st_size for p in (run / "checkpoints").iterdir())
        assert largest <= 1e3 * float(said[2])
        taken = sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) + largest
        assert taken <= 1e3 * float(said[1])
        shutil.rmtree(run)


def test_memory_that_ends(warm: Warm, tmp_path: Path, short: Course) -> None:
    """The system's own limit, in a training step and in the evaluation before it."""
    from tests.e2e.command import write_patterns

    write_patterns(tmp_path / "data", {"train": 64, "val": 2}, size=16)
    arguments = [*short.arguments, "--data", tmp_path / "data", "--img-size", 512]
    large = {"RLIMIT_AS": memory_of(warm, short) + (600 << 20)}
    done = warm.run(*arguments, "--batch-size", 128, "-o", "out", cwd=tmp_path, limits=large)
    refused(done, "out of memory at a batch of 128 images", "--batch-size 64")
    assert "resume" not in done.line, "there is no checkpoint yet"
    assert not (tmp_path / "out").exists()


def memory_of(warm: Warm, short: Course) -> int:
    """Bytes of address space that a warm process has already."""
    text = Path(f"/proc/{warm.pid}/status").read_text()
    found = re.search(r"VmSize:\s+(\d+) kB", text)
    assert found
    return int(found[1]) * 1024


def test_a_dry_run_tells_the_disk_need(tmp_path: Path) -> None:
    import tests.faults.tiny  # noqa: F401  # registers the network
    from tests.e2e.command import mecq, write_patterns

    write_patterns(tmp_path / "data", {"train": 16, "val": 4}, size=16)
    arguments = [
        "quantize", "tiny_for_faults", "--wbits", 2, "--abits", 2, "--no-pretrained", "--dry-run",
        "--data", "data", "--device", "cpu", "--batch-size", 8, "--epochs", 3,
    ]  # fmt: skip
    disk = mecq(*arguments, "--json", "--keep-checkpoints", 3, cwd=tmp_path).document["disk"]
    assert disk["checkpoints"] == 4
    assert disk["needed_bytes"] == 4 * disk["checkpoint_bytes"] + disk["other_bytes"]
    assert disk["free_bytes"] > disk["needed_bytes"]
    json.dumps(disk)
    done = mecq(*arguments, cwd=tmp_path)
    assert re.search(r"disk of a run +[\d.]+ [kM]B \([\d.]+ [MG]B are free\)", done.out), done.out
    # As large as can be asked for, and nothing that would have to be trained for it.
    done = mecq(*arguments[:6], *arguments[7:], "--keep-checkpoints", 0, cwd=tmp_path)
    assert done.code == 2
    assert "--keep-checkpoints: got 0; allowed: 1 or more" in done.err
