"""docs/extending.md, followed to the letter in a copy of the package."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

from tests.e2e.command import write_patterns

ROOT = Path(__file__).parents[2]


def test_a_quantizer_an_estimator_and_a_format_in_one_file_each(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    shutil.copytree(ROOT / "mecq_cli", tmp_path / "mecq_cli")
    blocks = re.findall(r'^```python title="(.*?)"\n(.*?)^```', page, re.M | re.S)
    assert len(blocks) == 6
    changed = [name for name, _ in blocks if (tmp_path / name).exists()]
    assert len(changed) == 3, "a table for each; everything else is in the new files"
    for name, code in blocks:
        path = tmp_path / name
        path.write_text((path.read_text() if path.exists() else "") + "\n\n" + code)
    write_patterns(tmp_path / "photos", {"train": 16, "val": 4})
    [commands] = re.findall(r"^```\n(mecq .*?)^```", page, re.M | re.S)
    lines = [shlex.split(line)[1:] for line in commands.splitlines()]
    lines[0] += ["--device", "cpu", "--compile", "off"]
    script = "import sys; from mecq_cli.cli.main import run\n" + "\n".join(
        f"code = run({line!r}); assert code == 0, code" for line in lines
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "equal to the simulator on 8 images" in done.stdout
    with safe_open(tmp_path / "run" / "model.safetensors", "np") as artifact:
        assert '"quantizer":"shift"' in artifact.metadata()["model"]
    with np.load(tmp_path / "run" / "model-export.npz") as archive:
        integer = archive["layer1.0.conv1.weight"]
    assert integer.dtype == np.int8
    assert np.abs(integer).max() <= 8
