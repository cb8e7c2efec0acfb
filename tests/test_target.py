"""What a TARGET argument means."""

from __future__ import annotations

from pathlib import Path

import pytest

from mecq_cli.errors import UsageError
from mecq_cli.runs import RunFolder, make_latest
from mecq_cli.target import resolve_target


def run_in(folder: Path) -> RunFolder:
    folder.mkdir(parents=True)
    run = RunFolder(folder)
    run.config.write_text("model = 'resnet18'\n")
    run.artifact.write_bytes(b"artifact")
    make_latest(run)
    return run


def test_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_in(Path("runs/one"))
    assert resolve_target(None).run == run
    assert resolve_target("runs/latest").run == run
    assert resolve_target(str(run.path)).kind == "run"
    assert resolve_target(str(run.artifact)).kind == "artifact"
    (tmp_path / "net.ONNX").write_bytes(b"")
    assert resolve_target(str(tmp_path / "net.ONNX")).kind == "onnx"
    Path("resnet18").mkdir()  # a folder by chance, and no run
    for name in ("resnet18", "resnet50.a1_in1k", "torchvision/squeezenet1_0", "hf_hub:a/b"):
        target = resolve_target(name)
        assert (target.kind, target.name, target.path) == ("model", name, None)
    monkeypatch.chdir("resnet18")
    assert resolve_target("../runs/latest").path == Path("../runs/one")  # of another folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing.onnx", "missing.onnx: no such file or folder"),
        ("runs/missing", "runs/missing: no such file or folder"),
        ("./missing", "./missing: no such file or folder"),
        ("weights.pth", "got a '.pth' file; .* model name .its weights: --checkpoint"),
        ("./folder", "is no run folder: it has no config.toml"),
        (300 * "a", "names no file: File name too long"),
        ("~nobody-of-that-name/model.onnx", "names no file: Could not determine home"),
        (None, "no latest run in .* name a target, or make a run: mecq quantize"),
    ],
)
def test_targets_that_are_none(
    text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("weights.pth").write_bytes(b"")
    Path("folder").mkdir()
    with pytest.raises(UsageError, match=message):
        resolve_target(text)
