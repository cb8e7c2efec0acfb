"""What is shipped: a wheel, and an sdist that makes the same wheel; installed, they work."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import mecq_cli

ROOT = Path(__file__).parents[1]
sdist = pytest.importorskip("hatchling.builders.sdist", reason="hatchling is not installed")
wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, made from what the sdist holds."""
    place = tmp_path_factory.mktemp("package")
    [archive] = sdist.SdistBuilder(str(ROOT)).build(directory=str(place), versions=["standard"])
    with tarfile.open(archive) as files:
        files.extractall(place, filter="data")
    [source] = [path for path in place.iterdir() if path.is_dir()]
    [file] = wheel.WheelBuilder(str(source)).build(directory=str(place), versions=["standard"])
    return Path(file)


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(built) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    here = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "mecq_cli").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == here
    assert {"mecq_cli/models/names.txt", "mecq_cli/py.typed"} <= names


def test_the_metadata_is_complete(built: Path) -> None:
    with zipfile.ZipFile(built) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        text = archive.read(name).decode()
    assert f"Version: {mecq_cli.__version__}\n" in text
    for line in (
        "License-Expression: Apache-2.0",
        "Requires-Python: >=3.11",
        "Classifier: Programming Language :: Python :: 3.11",
        "Classifier: Typing :: Typed",
        "Description-Content-Type: text/markdown",
        "Provides-Extra: hfds",
    ):
        assert f"{line}\n" in text


def test_the_installed_wheel_runs(built: Path, tmp_path: Path) -> None:
    """In an environment of its own, whose other packages are those of this one."""
    venv.create(tmp_path / "venv", with_pip=False)
    [site] = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(site)
    others = Path(str(metadata.distribution("torch").locate_file(""))).resolve()
    (site / "others.pth").write_text(f"{others}\n")
    script = (
        "import sys, mecq_cli; from mecq_cli.cli.main import run\n"
        "assert mecq_cli.__file__.startswith(sys.prefix), mecq_cli.__file__\n"
        "code = run(['doctor', '--quiet']) or run(['--version'])\n"
        "assert code == 0, code\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-c", script],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"mecq {mecq_cli.__version__}\n")


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_pip_installs_the_wheel_with_all_it_needs(built: Path, tmp_path: Path) -> None:
    """Needs the package index, or what pip keeps of it."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", built], check=True)
    mecq = tmp_path / "venv" / "bin" / "mecq"
    done = subprocess.run([mecq, "demo"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "equal to the simulator on 256 images" in done.stdout
