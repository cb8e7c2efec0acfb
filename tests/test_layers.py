"""The architecture: which module may import which. The contracts are in pyproject.toml."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lint_imports(project: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts in ``project``, in a process that finds only its package."""
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return subprocess.run(
        [sys.executable, "-c", command, "--no-cache", "--no-logo"],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_module_keeps_to_its_layer() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line", "broken"),
    [
        ("errors.py", "from mecq_cli import events", "Each station imports"),
        ("models/probe.py", "from mecq_cli.data import probe", "Each station imports"),
        ("entropy/probe.py", "import mecq_cli.export", "Each station imports"),
        ("no_layer_of_its_own.py", "", "Each station imports"),
        ("integer/probe.py", "import torch.nn", "The integer model runs"),
        ("events.py", "from rich.table import Table", "Only the command line"),
        ("training/probe.py", "import typer", "Only the command line"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, module: str, line: str, broken: str) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "mecq_cli", tmp_path / "mecq_cli")
    (tmp_path / "mecq_cli/data/probe.py").touch()
    with (tmp_path / "mecq_cli" / module).open("a") as file:
        file.write(f"\n{line}\n")
    result = lint_imports(tmp_path)
    verdict = next(row for row in result.stdout.splitlines() if row.startswith(broken))
    assert result.returncode == 1
    assert "BROKEN" in verdict, result.stdout
    assert f"mecq_cli.{module[:-3].replace('/', '.')}" in result.stdout


def test_importing_the_package_is_light() -> None:
    code = "import sys, mecq_cli.integer.ir; print(*({'torch', 'timm', 'onnx'} & {*sys.modules}))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == ""
