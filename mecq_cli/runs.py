"""Run folders: where they are, which is the latest, who works in one.

runs/latest            a text file with the path of the latest run that has a checkpoint
RUN/config.toml        the settings, complete
RUN/metrics.jsonl      a row a training step
RUN/checkpoints/       what --resume continues from
RUN/classifier.safetensors  the last layer that --reset-classifier fitted
RUN/model.safetensors  the integer artifact
RUN/summary.json       accuracy, sizes, seconds
RUN/report.html        what `mecq report` writes
RUN/tensorboard/       events, with --log tensorboard
RUN/.lock              held while a process works in the folder
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mecq_cli.errors import EnvironmentFailure, InputError, Interrupted, MecqError, UsageError
from mecq_cli.locks import exclusive_lock
from mecq_cli.settings import short_model
from mecq_cli.storage import atomic_write, remove_leftovers, require_writable

if TYPE_CHECKING:
    from mecq_cli.config import QuantizeConfig

RUNS = Path("runs")
"""Where runs without --output go, relative to the current folder."""

LATEST = "latest"
"""Name of the file in it that says which run is the latest."""

_LOCK = ".lock"

PACKED_WEIGHTS = "compressed-tensors"
"""Folder that ``mecq export --format compressed-tensors`` writes by default: the library's name."""

PACKED_FILES = ("model.safetensors", "config.json")
"""What is in it; the first is the only name that the library looks for."""

SCRIPT_MARK = "Needs onnxruntime ("
"""What each script beside an ONNX file says of itself at its beginning."""

_MADE = ("model", "model-portable", "model-qonnx", "model-export")
"""Stems of the names that exports give by default, and the artifact's."""


@dataclass(frozen=True)
class RunFolder:
    """The paths in a run folder; none of them need exist."""

    path: Path

    @property
    def config(self) -> Path:
        """Settings, complete, as TOML."""
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        """One JSON document a training step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the training checkpoints."""
        return self.path / "checkpoints"

    @property
    def classifier(self) -> Path:
        """The last layer that was fitted to the float features, if it is a new one."""
        return self.path / "classifier.safetensors"

    @property
    def artifact(self) -> Path:
        """The integer model."""
        return self.path / "model.safetensors"

    @property
    def onnx(self) -> Path:
        """Where ``mecq export`` writes by default."""
        return self.path / "model.onnx"

    @property
    def summary(self) -> Path:
        """The results, as JSON."""
        return self.path / "summary.json"

    @property
    def report(self) -> Path:
        """Where ``mecq report`` writes by default."""
        return self.path / "report.html"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def has_begun(self) -> bool:
        """Whether there is something to continue or to evaluate."""
        return self.artifact.is_file() or any(self.checkpoints.glob("step-*"))

    @property
    def is_run(self) -> bool:
        """Whether a run was started here, or an artifact was put here."""
        return self.config.is_file() or self.artifact.is_file()


@contextmanager
def create_run(config: QuantizeConfig) -> Iterator[RunFolder]:
    """A run folder to work in, locked until the ``with`` block ends.

    What killed processes left of their writes is removed first. It becomes the latest run by
    `make_latest`, once there is something to continue. A new folder in which there is nothing to
    continue when the block ends by an error is removed again, so that the same command can be
    given once more; not so after a signal, whose message names the command that continues.

    Raises:
        UsageError: the folder is in use without --resume or --force, or another process works
            in it.
        EnvironmentFailure: the folder cannot be made, locked or cleared.
    """
    run, is_new = _make_folder(config)
    with exclusive_lock(run.path / _LOCK):
        _clear_or_refuse(run, config)
        for folder in (run.path, run.checkpoints):
            remove_leftovers(folder)
        try:
            yield run
        except BaseException as error:
            stopped = isinstance(error, Interrupted) or not isinstance(error, Exception)
            if is_new and not run.has_begun and not (stopped and _content(run.path)):
                _take_back(run)
            raise


def make_latest(run: RunFolder) -> None:
    """Let runs/latest name this run: there is something in it to continue or to evaluate.

    It is written relative inside of runs/, so that a project may be moved, else absolute. Where
    --output leads elsewhere, a current folder without write permission is no reason to fail.

    Raises:
        EnvironmentFailure: the run is in runs/, and the file cannot be written there.
    """
    absolute, root = run.path.absolute(), RUNS.absolute()
    inside = absolute.is_relative_to(root)
    pointer = absolute.relative_to(root) if inside else absolute
    try:
        atomic_write(RUNS / LATEST, f"{pointer}\n".encode(), force=True)
    except MecqError:
        if inside:
            raise


def _make_folder(config: QuantizeConfig) -> tuple[RunFolder, bool]:
    """The folder of a run, and whether it was made just now."""
    if config.output is not None:
        is_new = not config.output.exists()
        _make(config.output, exist_ok=True)
        return RunFolder(config.output), is_new
    model = re.sub(r"[^\w.-]+", "-", short_model(config.model))
    wbits = config.target_size or f"{config.target_avg_bits or config.wbits:g}"
    bits = re.sub(r"[^\w.]+", "", f"w{wbits}a{config.abits}")
    stem = f"{model}-{bits}-{time.strftime('%Y%m%d-%H%M%S')}"
    path, number = RUNS / stem, 1
    while not _make(path, exist_ok=False):
        number += 1
        path = RUNS / f"{stem}-{number}"
    return RunFolder(path), True


def _make(path: Path, *, exist_ok: bool) -> bool:
    """Make a folder; False if it is there and should not be."""
    try:
        path.mkdir(parents=True, exist_ok=exist_ok)
    except (FileExistsError, NotADirectoryError) as error:
        if path.is_dir():
            return False
        raise UsageError(
            f"run folder {path}: it, or a part of its path, is a file; give --output DIR"
        ) from error
    except OSError as error:
        raise EnvironmentFailure(
            f"run folder {path}: cannot be made: {error.strerror}; give another --output"
        ) from error
    return True


def require_output(config: QuantizeConfig) -> None:
    """What `create_run` would refuse, asked without making or changing anything.

    Raises:
        UsageError, EnvironmentFailure: as of `create_run`, except for a lock.
    """
    folder = config.output
    if folder is None or config.resume:
        return
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"run folder {folder}: is a file; give --output DIR")
    if folder.is_dir() and _content(folder):
        _require_startable(RunFolder(folder), config)
    require_writable(folder / "config.toml")


def _clear_or_refuse(run: RunFolder, config: QuantizeConfig) -> None:
    """Only an empty folder is used without being told to; --force removes an old run's files."""
    if config.resume or not _content(run.path):
        return
    try:
        _require_startable(run, config)
    except UsageError:
        if not run.config.exists():
            with suppress(OSError):
                (run.path / _LOCK).unlink()  # the folder is not ours
        raise
    _clear(run)


def _require_startable(run: RunFolder, config: QuantizeConfig) -> None:
    """Whether what is in the folder is a run that may be started over."""
    if not run.config.exists():
        raise UsageError(
            f"--output {run.path}: is not empty, and holds no run that could be started over; give "
            "an empty or a new folder"
        )
    if not config.force:
        raise UsageError(
            f"--output {run.path}: is not empty; --resume continues the run in it, --force starts "
            "it over"
        )
    start = config.checkpoint
    if start is not None and start.resolve().is_relative_to(run.path.resolve()):
        raise UsageError(
            f"--checkpoint {start}: lies in the run folder that --force clears; move it elsewhere"
        )


def _clear(run: RunFolder) -> None:
    try:
        for folder in (run.checkpoints, run.tensorboard):
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder)
        # What exports made of it goes too: files of another network would be taken for this one's.
        for path in (run.metrics, run.classifier, run.summary, run.report, *_exported(run.path)):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            (run.path / PACKED_WEIGHTS).rmdir()  # if nothing else is in it
        # The last one: as long as it is there, this is a run that can be started over.
        run.config.unlink(missing_ok=True)
    except OSError as error:
        raise EnvironmentFailure(
            f"run folder {run.path}: the old run cannot be removed: {error.strerror}"
        ) from error


def _exported(folder: Path) -> Iterator[Path]:
    """The files that exports put there by default; a script only if it is one of ours."""
    for stem in _MADE:
        yield from (folder / f"{stem}.{kind}" for kind in ("safetensors", "onnx"))
        script = folder / f"{stem}.py"
        if is_script(script):
            yield script
    packed = folder / PACKED_WEIGHTS
    if not packed.is_symlink():
        yield from (packed / name for name in PACKED_FILES)


def is_script(path: Path) -> bool:
    """Whether a file is what `mecq export` writes beside an ONNX file, and not somebody's own."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return text.startswith('"""') and SCRIPT_MARK in text[:1024]


def _content(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name != _LOCK]


def _take_back(run: RunFolder) -> None:
    """Undo `create_run`: there is nothing to continue. What is not ours stays, and its folder."""
    with suppress(OSError):
        for path in (run.config, run.metrics, run.classifier, run.path / _LOCK):
            path.unlink(missing_ok=True)
        if run.checkpoints.is_dir():
            run.checkpoints.rmdir()
        run.path.rmdir()
        if run.path.parent.absolute() == RUNS.absolute():
            RUNS.rmdir()  # only if it is empty


def read_summary(run: RunFolder) -> dict[str, Any]:
    """The content of summary.json; {} of a run that is not finished."""
    if not run.summary.exists():
        return {}
    try:
        document = json.loads(run.summary.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{run.summary}: could not be read: {error}; restore it") from error
    if not isinstance(document, dict):
        raise InputError(f"{run.summary}: is no summary of a run; restore it")
    return document


def _read_pointer(runs: Path) -> Path | None:
    """What runs/latest says, as a path from the current folder; None if it says nothing."""
    try:
        text = (runs / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return runs / text if text else None


def latest_run(runs: Path = RUNS) -> RunFolder:
    """The run that runs/latest points to.

    Raises:
        UsageError: there is none.
    """
    path = _read_pointer(runs)
    if path is None:
        raise UsageError(
            f"no latest run in {runs.absolute()}: name a target, or make a run: mecq quantize"
        )
    run = RunFolder(path)
    if not run.is_run:
        raise UsageError(f"{runs / LATEST} points to {path}, which is no run; name a target")
    return run
