"""Run folders: naming, runs/latest, locks that outlive no process."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from mecq_cli.config import QuantizeConfig
from mecq_cli.errors import DataError, EnvironmentFailure, Interrupted, UsageError
from mecq_cli.export.snippet import snippet
from mecq_cli.models.preprocessing import Preprocessing
from mecq_cli.runs import RunFolder, create_run, latest_run, make_latest


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def settings(**changed: Any) -> QuantizeConfig:
    given: dict[str, Any] = {"model": "resnet18", "wbits": 2, "abits": 4, "data": Path("images")}
    return QuantizeConfig(**{**given, **changed})


def finished_run(**changed: Any) -> RunFolder:
    with create_run(settings(**changed)) as run:
        run.config.write_text("model = 'resnet18'\n")
        run.artifact.write_bytes(b"artifact")
        run.checkpoints.mkdir()
        (run.checkpoints / "step-10").write_bytes(b"state")
        make_latest(run)
    return run


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_default_names_never_collide_and_latest_follows() -> None:
    first = finished_run(model="torchvision/resnet18")
    second = finished_run(model="torchvision/resnet18")
    assert re.fullmatch(r"runs/torchvision-resnet18-w2a4-\d{8}-\d{6}", str(first.path))
    assert first.path != second.path
    assert latest_run() == second
    assert (Path("runs") / "latest").is_file()
    assert not (Path("runs") / "latest").is_symlink()


def test_latest_follows_output_and_a_moved_project(project: Path, tmp_path: Path) -> None:
    outside = finished_run(output=tmp_path / "outside")
    assert latest_run().path == outside.path
    inside = finished_run()
    os.chdir(tmp_path)
    project.rename(tmp_path / "moved")
    os.chdir(tmp_path / "moved")
    assert latest_run().path == inside.path
    os.chdir(tmp_path)
    assert latest_run(Path("moved/runs")).path == Path("moved") / inside.path


SCRIPT = snippet("model.onnx", Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3), ["a"], "1.24")


def test_a_run_that_could_not_be_cleared_can_be_started_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(output=tmp_path / "run")

    def fails(path: Path, **_: bool) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", fails)
        with (
            pytest.raises(EnvironmentFailure, match="the old run cannot be removed"),
            create_run(settings(output=run.path, force=True)),
        ):
            pytest.fail("it was entered")
    assert run.config.exists()
    with create_run(settings(output=run.path, force=True)):
        assert tree(run.path) == [".lock"]


def test_a_folder_in_use_needs_resume_or_force(tmp_path: Path) -> None:
    output = tmp_path / "run"
    run = finished_run(output=output)
    (output / "notes.txt").write_text("mine")
    for name in ("model.onnx", "model-portable.onnx", "model-export.safetensors"):
        (output / name).write_text("of the old network")
    (output / "model.py").write_text(SCRIPT)
    (output / "compressed-tensors").mkdir()
    for name in ("model.safetensors", "config.json"):
        (output / "compressed-tensors" / name).write_text("of the old network")
    before = tree(output)
    with (
        pytest.raises(UsageError, match=r"not empty; --resume continues .* --force starts"),
        create_run(settings(output=output)),
    ):
        pytest.fail("it was entered")
    assert tree(output) == before

    with create_run(settings(output=output, resume=True)):
        assert tree(output) == before

    with create_run(settings(output=output, force=True)):
        assert tree(output) == [".lock", "notes.txt"]
    assert not run.is_run


def test_force_clears_runs_and_nothing_else(project: Path) -> None:
    mine = project / "mine"
    (mine / "checkpoints").mkdir(parents=True)
    for name in ("model.py", "model_float.safetensors", "checkpoints/epoch90.safetensors"):
        (mine / name).write_text("mine")
    before = tree(mine)
    with (
        pytest.raises(UsageError, match="holds no run that could be started over"),
        create_run(settings(output=mine, force=True)),
    ):
        pytest.fail("it was entered")
    assert tree(mine) == before

    output = project / "there"
    finished_run(output=output)
    (output / "compressed-tensors").mkdir()
    own = ("model_float.safetensors", "models.py", "model_best.onnx", "model.py")
    for name in (*own, "compressed-tensors/notes.txt"):
        (output / name).write_text("mine")
    weights = output / "model_float.safetensors"
    with (
        pytest.raises(UsageError, match="lies in the run folder that --force clears"),
        create_run(settings(output=output, force=True, checkpoint=weights)),
    ):
        pytest.fail("it was entered")
    with create_run(settings(output=output, force=True)):
        assert tree(output) == [
            ".lock", "compressed-tensors", "compressed-tensors/notes.txt", "model.py",
            "model_best.onnx", "model_float.safetensors", "models.py",
        ]  # fmt: skip


def test_a_run_that_fails_before_it_writes_leaves_nothing(project: Path) -> None:
    def fail() -> None:
        with create_run(settings(data=Path("nowhere"))):
            raise DataError("nowhere: no such folder")

    with pytest.raises(DataError):
        fail()
    assert tree(project) == []
    good = finished_run()
    before = tree(project)
    with pytest.raises(DataError):
        fail()
    assert latest_run() == good
    assert tree(project) == before


def test_a_run_that_fails_before_its_first_checkpoint_can_be_given_again(project: Path) -> None:
    """And what was the latest run still is; a signal keeps what its message says to continue."""
    good = finished_run()
    before = tree(project)

    def stop(error: Exception) -> None:
        with create_run(settings(output=project / "new")) as run:
            run.config.write_text("model = 'resnet18'\n")
            run.metrics.write_text("")
            run.checkpoints.mkdir()
            raise error

    with pytest.raises(DataError):
        stop(DataError("x.png: truncated"))
    assert tree(project) == before
    with pytest.raises(Interrupted):
        stop(Interrupted("continue with ...", 2))
    assert (project / "new" / "config.toml").exists()
    assert latest_run() == good


def test_leftovers_of_killed_processes_go_at_the_next_start(tmp_path: Path) -> None:
    """Also those of a process whose number another one has now, as in a container."""
    run = finished_run(output=tmp_path / "run")
    ours = [run.path / f".summary.json.{os.getpid()}-0123abcd.tmp"]
    ours.append(run.checkpoints / ".step-00000012.safetensors.99999-0123abcd.tmp")
    for path in (*ours, run.path / ".mine.tmp"):
        path.write_bytes(b"x")
    with create_run(settings(output=tmp_path / "run", resume=True)):
        assert not any(path.exists() for path in ours)
        assert (run.path / ".mine.tmp").exists()


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    with (
        create_run(settings(output=tmp_path / "run")),
        pytest.raises(
            UsageError, match=f"another mecq works in this folder .process {os.getpid()}"
        ),
        create_run(settings(output=tmp_path / "run", resume=True)),
    ):
        pytest.fail("it was entered")


def test_a_killed_process_leaves_no_lock_even_if_its_workers_live_on(tmp_path: Path) -> None:
    script = """
        import os, sys, time
        from pathlib import Path
        from mecq_cli.config import QuantizeConfig
        from mecq_cli.runs import create_run

        config = QuantizeConfig(
            model="resnet18", wbits=2, abits=4, data=Path("d"), output=Path(sys.argv[1])
        )
        with create_run(config) as run:
            run.config.write_text("")
            if os.fork() == 0:
                print(os.getpid(), flush=True)
            time.sleep(60)
    """
    output = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(output)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    try:
        with (
            pytest.raises(UsageError, match="another mecq"),
            create_run(settings(output=output, resume=True)),
        ):
            pytest.fail("it was entered")
        process.kill()
        process.wait()
        os.kill(worker, 0)  # still there
        with create_run(settings(output=output, resume=True)):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        process.kill()
        process.stdout.close()


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_an_output_that_is_a_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match="is a file; give --output DIR"),
        create_run(settings(output=tmp_path / name)),
    ):
        pytest.fail("it was entered")


def test_latest_that_was_deleted() -> None:
    run = finished_run()
    run.config.unlink()
    run.artifact.unlink()
    with pytest.raises(UsageError, match=r"runs/latest points to .* which is no run"):
        latest_run()
