"""What a TARGET argument means: a run, a file, or the name of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mecq_cli.errors import UsageError
from mecq_cli.layout import find_splits, is_image
from mecq_cli.runs import LATEST, RUNS, RunFolder, latest_run

TargetKind = Literal["run", "artifact", "onnx", "model"]
_FILE_KINDS: dict[str, TargetKind] = {".safetensors": "artifact", ".onnx": "onnx"}


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
    if path.is_file() and path.name == LATEST and path.parent.name == RUNS.name:
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
