"""Real images and weights for tests, unpacked once a machine; a test skips where there are none.

They lie in the folder ``MECQ_TEST_DATA`` (default: ``../shared`` beside the project):
``data/unpack DEST --only NAME --limit N`` makes image folders, ``weights/`` holds state dicts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

_PROJECT = Path(__file__).resolve().parents[1]


def shared_folder() -> Path:
    """The folder with data/ and weights/, whether it exists or not."""
    return Path(os.environ.get("MECQ_TEST_DATA") or _PROJECT.parent / "shared").resolve()


@cache
def real_data(name: str, limit: int | None = None) -> Path:
    """Folder with train/ and val/ of the data set ``name``, read-only by convention.

    ``limit`` keeps the first images of each class of each split. Skips the test where the data
    are absent.
    """
    source = shared_folder() / "data"
    unpack = source / "unpack"
    archives = sorted(source.glob(f"{name}.tar*"))
    if not unpack.is_file() or not archives:
        pytest.skip(f"no real data {name!r}: {unpack} is missing (set MECQ_TEST_DATA)")
    # The size tells a replaced archive from the one unpacked earlier.
    folder = _cache() / f"{name}-{limit or 'all'}-{archives[0].stat().st_size}"
    if not folder.exists():
        # Unpack beside and rename, so that a test run beside this one sees all of it or nothing.
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
        try:
            command = [sys.executable, str(unpack), str(partial), "--only", name]
            command += [] if limit is None else ["--limit", str(limit)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            try:
                partial.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder / name


def real_weights(name: str) -> Path:
    """A file of real pretrained weights. Skips the test where it is absent."""
    path = shared_folder() / "weights" / name
    if not path.is_file():
        pytest.skip(f"no real weights: {path} is missing (set MECQ_TEST_DATA)")
    return path


def _cache() -> Path:
    """A folder of this user alone."""
    folder = Path(tempfile.gettempdir()) / f"mecq-test-data-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        pytest.skip(f"{folder} belongs to somebody else; remove it to run tests on real data")
    return folder
