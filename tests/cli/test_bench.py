"""`mecq bench entropy`, end to end."""

from __future__ import annotations

import json

import pytest

from mecq_cli.cli.main import run


def test_a_small_table_and_its_json(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--sizes", "64x48,512x520", "--families", "relu,isotropic", "--repeats", "1", "-q"]
    flags += ["--distortions", "0.06"]
    assert run(["bench", "entropy", *flags, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["rows"]) == 4
    for row in document["rows"]:
        for name in ("exact", "moe", "moe_alone"):
            assert row[name]["value_error"] < 1e-3
            assert row[name]["one_minus_cosine"] < 1e-3
            assert row[name]["seconds"] > 0
        assert sum(row["experts"].values()) == pytest.approx(1.0)
    assert any(row["taylor"] is None for row in document["rows"])
    assert run(["bench", "entropy", *flags]) == 0
    assert "head_order1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", [["--sizes", "5x"], ["--distortions", "-1"], ["--families", "none"]]
)
def test_settings_that_make_no_sense(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "entropy", *flags]) == 2
    assert capsys.readouterr().err.startswith("error: ")
