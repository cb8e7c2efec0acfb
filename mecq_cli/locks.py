"""A lock that keeps a second process out, and that no killed process can leave behind."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mecq_cli.errors import EnvironmentFailure, UsageError

# A forked child (a loader worker, say) shares the locks of its parent, and would keep them when
# the parent is killed. So each child closes its copies, which leaves the parent's lock alone.
_held: set[int] = set()


def _close_inherited() -> None:
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_inherited)


@contextmanager
def exclusive_lock(path: Path) -> Iterator[None]:
    """Hold ``path``, a file made for this purpose, until the block or the process ends.

    The file stays: to remove it would let two processes lock two files of one name.

    Raises:
        UsageError: another process holds it.
        EnvironmentFailure: it cannot be written, or the file system knows no locks.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise EnvironmentFailure(
            f"{path.parent}: cannot be written to: {error.strerror}; choose another folder"
        ) from error
    try:
        _acquire(descriptor, path)
        _held.add(descriptor)
        # Who holds it is a courtesy to others; a full disk must not stop a --resume.
        with suppress(OSError):
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)


def _acquire(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.pread(descriptor, 20, 0).decode("ascii", "replace") or "unknown"
        raise UsageError(
            f"{path.parent}: another mecq works in this folder (process {holder}); wait until it "
            "ends, or choose another folder"
        ) from error
    except OSError as error:
        raise EnvironmentFailure(
            f"{path.parent}: cannot be locked: {error.strerror}; choose a folder on a local disk"
        ) from error
