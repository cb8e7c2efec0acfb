"""docs/api.md is a program, and this runs it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import mecq_cli

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_program_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(program, str(PAGE), "exec"), names)
    result, logits = names["result"], names["logits"]
    assert isinstance(result, mecq_cli.Quantized)
    assert result.float_top1 > 90
    assert result.top1 > 80
    assert 100 * float(names["right"]) == pytest.approx(result.top1, abs=1e-3)  # type: ignore[arg-type]
    assert "onnxruntime gives the same logits: True" in capsys.readouterr().out
    again = names["again"]
    assert isinstance(again, mecq_cli.Classifier)
    assert (again(names["images"][1400:]) == logits).all()  # type: ignore[index]
    assert (tmp_path / "digits-w2a2.py").is_file()
