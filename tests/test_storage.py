"""Writes that succeed completely or leave everything as it was; paths; bounded reads."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from mecq_cli.errors import ArtifactError, EnvironmentFailure, InputError, UsageError
from mecq_cli.storage import (
    atomic_write,
    read_bytes_limited,
    require_writable,
    sha256_hex,
)

ROOT = Path(__file__).parents[1]


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def write_two(file: BinaryIO) -> None:
    file.write(b"tw")
    file.write(b"o")


def test_writes_makes_folders_and_replaces_only_when_told(tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "file.bin"
    atomic_write(target, b"one")
    with pytest.raises(UsageError, match="--force"):
        atomic_write(target, b"two")
    assert target.read_bytes() == b"one"
    atomic_write(target, write_two, force=True)
    assert target.read_bytes() == b"two"
    assert names(target.parent) == ["file.bin"]


def test_where_no_file_can_be_is_known_before_the_work(tmp_path: Path) -> None:
    require_writable(tmp_path / "new" / "folder" / "file")
    (tmp_path / "file").write_bytes(b"")
    require_writable(tmp_path / "file")
    with pytest.raises(UsageError, match="cannot write a file there, it is a folder"):
        require_writable(tmp_path)
    with pytest.raises(UsageError, match="could not be written: Not a directory"):
        require_writable(tmp_path / "file" / "below" / "it")


def test_new_files_have_the_rights_the_umask_leaves(tmp_path: Path) -> None:
    atomic_write(tmp_path / "file", b"")
    (tmp_path / "plain").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_folders_devices_and_impossible_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for target in (tmp_path, Path(os.devnull), tmp_path / "file" / "below", tmp_path / ("x" * 300)):
        with pytest.raises(UsageError) as caught:
            atomic_write(target, b"data", force=True)
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file"]
    assert not Path(os.devnull).is_file()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_an_error_of_the_system_leaves_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"older")

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(EnvironmentFailure, match="could not be written") as caught:
        atomic_write(target, b"newer", force=True)
    assert str(target) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert target.read_bytes() == b"older"
    assert names(tmp_path) == ["file"]


def test_whatever_a_writer_raises_leaves_no_trace(tmp_path: Path) -> None:
    def interrupted(file: BinaryIO) -> None:
        file.write(b"x" * 100_000)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "file", interrupted)
    assert names(tmp_path) == []


def run(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits there")
def test_a_real_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """The kernel sends SIGXFSZ first; unless it is ignored, the process dies without a word."""
    target = tmp_path / "file"
    target.write_bytes(b"older")
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from mecq_cli.storage import atomic_write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try: atomic_write(Path(sys.argv[1]), bytes(200_000), force=True)\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    process = run(code, target)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert output.startswith("EnvironmentFailure")
    assert "larger than the limit" in output
    assert target.read_bytes() == b"older"
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_killed_write_leaves_the_older_file_and_is_cleaned_up_later(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"older")
    code = (
        "import sys, time; from pathlib import Path\n"
        "from mecq_cli.storage import atomic_write\n"
        "def slow(file):\n"
        "    file.write(bytes(100_000)); file.flush(); print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "atomic_write(Path(sys.argv[1]), slow, force=True)\n"
    )
    process = run(code, target)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    atomic_write(target, b"newer", force=True)
    assert len(names(tmp_path)) == 2, "the file of a living process is left alone"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    process.stdout.close()
    assert target.read_bytes() == b"newer"
    atomic_write(target, b"newest", force=True)
    assert names(tmp_path) == ["file"]


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    expected = hashlib.sha256(b"abc").hexdigest()
    assert sha256_hex(b"abc") == sha256_hex(memoryview(b"abc")) == expected
    assert sha256_hex(tmp_path / "file") == expected
    with pytest.raises(InputError, match="could not be read"):
        sha256_hex(tmp_path / "missing")


def test_reads_are_bounded(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_bytes_limited(file, 5) == b"12345"
    with pytest.raises(ArtifactError, match="has 5 bytes, at most 4"):
        read_bytes_limited(file, 4, error=ArtifactError)
    with pytest.raises(InputError, match="no such file"):
        read_bytes_limited(tmp_path / "missing", 4)
    with pytest.raises(InputError, match="not a file"):
        read_bytes_limited(tmp_path, 4)


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes there")
def test_a_pipe_is_no_file_to_wait_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    start = time.monotonic()
    with pytest.raises(InputError, match="not a file"):
        read_bytes_limited(tmp_path / "pipe", 4)
    assert time.monotonic() - start < 5
