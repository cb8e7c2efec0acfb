"""Files: atomic writes, hashes, paths that stay inside their root, bounded reads, free space."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from mecq_cli.errors import EnvironmentFailure, InputError, MecqError, UsageError

_WRITE_REASONS = {
    errno.ENOSPC: "no space is left on the disk; free some or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "the file is larger than the limit allows; raise `ulimit -f` or change the disk",
    errno.EACCES: "no permission to write there; choose another folder or change its rights",
    errno.EPERM: "no permission to write there; choose another folder or change its rights",
    errno.EROFS: "the file system is read-only; choose another folder",
}
_LEFTOVER = re.compile(r"\..+\.\d{1,9}-[0-9a-f]{8}\.tmp", re.DOTALL)
_NOT_A_PLACE = {errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}


def atomic_write(
    path: Path, data: bytes | Callable[[BinaryIO], None], *, force: bool = False
) -> None:
    """Write a file completely or not at all, and so that a power cut does not undo it.

    The bytes go to a hidden file in the same folder, which is synced and then renamed; until
    then the file that was there before is untouched. Missing folders are made. A hidden file
    that a killed process left for the same target is removed.

    Args:
        path: the target; a symbolic link is replaced, not followed.
        data: the content, or a function that writes it to an open file.
        force: replace a file that exists.

    Raises:
        UsageError: the target exists and ``force`` is not set, or cannot be a file.
        EnvironmentFailure: disk full, no permission, read-only file system, ...
    """
    _check_target(path, force)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        made = _make_folders(path.parent)
        _sweep(path)
        try:
            _write_synced(temporary, data)
            _check_target(path, force)
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        for folder in (path.parent, *made):
            _sync_folder(folder)
    except OSError as error:
        raise write_failure(path, error) from error


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; the parents of the new ones, which hold their names."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return [place.parent for place in missing]


def _check_target(path: Path, force: bool) -> None:
    """Refuse folders, devices and, without ``force``, whatever exists."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise write_failure(path, error) from error
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise UsageError(f"{path}: cannot write a file there, it is {kind}; give a file name")
    if not force:
        raise UsageError(f"{path}: exists already; give --force to replace it")


def _write_synced(path: Path, data: bytes | Callable[[BinaryIO], None]) -> None:
    # Opened by hand: tempfile's files are readable by their owner only, umask or not.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    with open(descriptor, "wb") as file:
        if callable(data):
            data(file)
        else:
            file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename in this folder last; not every system or file system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _sweep(path: Path) -> None:
    """Remove what killed processes left of earlier writes of the same file."""
    if os.name != "posix":
        return
    leftover = re.compile(rf"\.{re.escape(path.name)}\.(\d{{1,9}})-[0-9a-f]{{8}}\.tmp")
    for entry in path.parent.iterdir():
        match = leftover.fullmatch(entry.name)
        if match and not _is_alive(int(match[1])):
            entry.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left of their writes in a folder that nobody else works in.

    Raises:
        EnvironmentFailure: one of them cannot be removed.
    """
    try:
        for entry in folder.iterdir() if folder.is_dir() else ():
            if _LEFTOVER.fullmatch(entry.name) and not entry.is_dir():
                entry.unlink(missing_ok=True)
    except OSError as error:
        raise write_failure(folder, error) from error


def sync_file(path: Path) -> None:
    """Make what was written to a file so far last; a missing file is none to sync.

    Raises:
        EnvironmentFailure: the disk refuses.
    """
    try:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except FileNotFoundError:
        return
    except OSError as error:
        raise write_failure(path, error) from error


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_failure(path: Path, error: OSError) -> MecqError:
    """What to raise where writing ``path`` failed: the one line, with the exit code."""
    number = error.errno or 0
    reason = _WRITE_REASONS.get(number, error.strerror or type(error).__name__)
    message = f"{path}: could not be written: {reason}"
    return UsageError(message) if number in _NOT_A_PLACE else EnvironmentFailure(message)


def require_writable(path: Path) -> None:
    """Whether a file could be written at ``path``, asked before the work that makes its content.

    Raises:
        UsageError: a folder is there, or a part of the path is a file.
        EnvironmentFailure: the folder, or the one it would be made in, is not writable.
    """
    _check_target(path, force=True)
    place = path.absolute().parent
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise write_failure(path, NotADirectoryError(errno.ENOTDIR, "Not a directory"))
    if not os.access(place, os.W_OK):
        raise write_failure(path, PermissionError(errno.EACCES, "Permission denied"))


def free_space(folder: Path) -> int:
    """Bytes that are free on the disk of ``folder``, which need not exist yet.

    Raises:
        EnvironmentFailure: the system does not say.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return shutil.disk_usage(place).free
    except OSError as error:
        raise EnvironmentFailure(f"{place}: free space is unknown: {error.strerror}") from error


def sha256_hex(source: bytes | bytearray | memoryview | Path) -> str:
    """SHA-256 of a buffer or of a file's content, as 64 lower-case hex digits.

    Raises:
        InputError: the file cannot be read.
    """
    if not isinstance(source, Path):
        return hashlib.sha256(source).hexdigest()
    try:
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{source}: could not be read: {error.strerror}") from error


def read_bytes_limited(path: Path, limit: int, *, error: type[InputError] = InputError) -> bytes:
    """The content of a regular file of at most ``limit`` bytes.

    Raises:
        InputError: (or the subclass ``error``) missing, not a file, too large, unreadable.
    """
    try:
        # Before it is opened: opening a pipe would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise error(f"{path}: is not a file; give the path of a file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            # Not read(limit): that would allocate the limit, however small the file is.
            data = file.read(min(size, limit) + 1)
    except FileNotFoundError as missing:
        raise error(f"{path}: no such file; check the path") from missing
    except (OSError, ValueError) as failure:
        reason = getattr(failure, "strerror", None) or str(failure)
        raise error(f"{path}: could not be read: {reason}") from failure
    if len(data) > limit:
        raise error(f"{path}: has {max(size, len(data)):,} bytes, at most {limit:,} are allowed")
    return data
