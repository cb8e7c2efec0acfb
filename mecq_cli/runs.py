"""Run folders: where they are, which is the latest, who works in one, what a target means.

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
from typing import TYPE_CHECKING, Any, Literal

from mecq_cli.errors import EnvironmentFailure, InputError, Interrupted, MecqError, UsageError
from mecq_cli.layout import find_splits, is_image
from mecq_cli.locks import exclusive_lock
from mecq_cli.settings import OWN
from mecq_cli.storage import atomic_write, remove_leftovers, require_writable

if TYPE_CHECKING:
    from mecq_cli.config import QuantizeConfig

RUNS = Path("runs")
"""Where runs without --output go, relative to the current folder."""

_LATEST = "latest"
_LOCK = ".lock"

TargetKind = Literal["run", "artifact", "onnx", "model"]
_FILE_KINDS: dict[str, TargetKind] = {".safetensors": "artifact", ".onnx": "onnx"}


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


@dataclass(frozen=True)
class Target:
    """What a TARGET argument stands for.

    Attributes:
        kind: "run", "artifact" (.safetensors), "onnx" or "model" (a name).
        name: as the user wrote it; of the latest run, its path.
        path: of the folder or file; None for a model name.
    """

    kind: TargetKind
    name: str
    path: Path | None = None

    @property
    def run(self) -> RunFolder | None:
        """The run folder, if it is one."""
        return RunFolder(self.path) if self.kind == "run" and self.path is not None else None

    @property
    def owner(self) -> RunFolder | None:
        """The run it is, or in whose folder the file lies."""
        if self.run is not None or self.path is None:
            return self.run
        run = RunFolder(self.path.parent)
        return run if run.summary.is_file() else None


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
        atomic_write(RUNS / _LATEST, f"{pointer}\n".encode(), force=True)
    except MecqError:
        if inside:
            raise


def _make_folder(config: QuantizeConfig) -> tuple[RunFolder, bool]:
    """The folder of a run, and whether it was made just now."""
    if config.output is not None:
        is_new = not config.output.exists()
        _make(config.output, exist_ok=True)
        return RunFolder(config.output), is_new
    model = re.sub(r"[^\w.-]+", "-", config.model.removeprefix(OWN))
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
        text = (runs / _LATEST).read_text(encoding="utf-8").strip()
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
        raise UsageError(f"{runs / _LATEST} points to {path}, which is no run; name a target")
    return run


def resolve_target(text: str | None) -> Target:
    """What a TARGET argument means; None is the latest run.

    A name that is no path is taken for a model name, and not checked here.

    Raises:
        UsageError: a path that does not exist, or that is neither a run nor an artifact.
    """
    if text is None:
        run = latest_run()
        return Target("run", str(run.path), run.path)
    try:
        path = Path(text).expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long, or a user who is none
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"{text[:80]}: names no file: {why}") from error
    if is_folder:
        if RunFolder(path).is_run:
            return Target("run", text, path)
        if find_splits(path):
            raise UsageError(
                f"{text}: is a folder of images, no run; name what is to be used on them, and give "
                f"them with --data {text}"
            )
        if not _looks_like_path(text):
            return Target("model", text)
        raise UsageError(
            f"{text}: is no run folder: it has no config.toml and no model.safetensors"
        )
    if path.is_file() and path.name == _LATEST and path.parent.name == RUNS.name:
        run = latest_run(path.parent)  # of this folder or of another one
        return Target("run", str(run.path), run.path)
    kind = _FILE_KINDS.get(path.suffix.lower())
    if kind is None and not path.exists() and not _looks_like_path(text):
        return Target("model", text)
    if not path.exists():
        raise UsageError(
            f"{text}: no such file or folder; a target is a run folder, a .safetensors or .onnx "
            "file, or a model name"
        )
    if kind is None and is_image(path.suffix):
        raise UsageError(
            f"{text}: is an image; a target, which comes before images, is a run folder, or a "
            ".safetensors or .onnx file"
        )
    if kind is None:
        raise UsageError(
            f"{text}: got a '{path.suffix}' file; a target is a run folder, a .safetensors or "
            ".onnx file, or a model name (its weights: --checkpoint)"
        )
    return Target(kind, text, path)


def _looks_like_path(text: str) -> bool:
    """Model names may hold slashes and dots: torchvision/resnet18, resnet50.a1_in1k."""
    first, slash, _ = text.partition("/")
    if text.lower().endswith((".pth", ".pt", *_FILE_KINDS)):
        return True
    return bool(slash) and (first in ("", ".", "..", "~", str(RUNS)) or Path(first).is_dir())
