"""`mecq doctor`, `mecq config show`, and the completion of the shell."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from mecq_cli.cli import completion
from mecq_cli.cli.completion import NAMES
from mecq_cli.config import QuantizeConfig, to_toml
from mecq_cli.entropy import ESTIMATORS
from mecq_cli.export.formats import FORMATS
from mecq_cli.models.loading import model_names
from mecq_cli.quantizers import QUANTIZERS
from mecq_cli.workflow import doctor as station
from tests.cli.test_main import ROOT, processor_seconds
from tests.e2e.command import mecq


def complete(line: str) -> list[str]:
    """What bash would be offered at the end of ``line``."""
    words = line.split(" ")
    script = (
        "import sys; from mecq_cli.cli.main import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'timm', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ, "PYTHONPATH": str(ROOT), "_MECQ_COMPLETE": "complete_bash",
            "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1),
        },
    )  # fmt: skip
    assert "Error" not in done.stderr, done.stderr
    return done.stdout.split()


def test_completion_knows_models_commands_and_options_and_is_quick() -> None:
    before = processor_seconds()
    names = complete("mecq quantize resn")
    assert processor_seconds() - before < 0.6
    assert {"resnet18", "resnet20_cifar", "resnet50"} <= set(names)
    assert all(name.startswith("resn") for name in names)
    assert complete("mecq eval torchvision/resnet18") == ["torchvision/resnet18"]
    assert complete("mecq do") == ["doctor"]
    assert "--mec-weight" in complete("mecq quantize resnet18 --mec-w")


def test_completion_offers_the_names_that_are_allowed() -> None:
    assert complete("mecq quantize --recipe ") == ["quick", "standard", "best"]
    assert set(completion.QUANTIZERS) == set(QUANTIZERS)
    assert set(completion.ESTIMATORS) == set(ESTIMATORS)
    assert set(completion.FORMATS) == {"onnx", *FORMATS, "compressed-tensors"}


def test_the_list_of_names_is_that_of_the_libraries() -> None:
    """To write it anew: "\\n".join(model_names()) and a newline."""
    listed, known = set(NAMES.read_text().split()), set(model_names())
    # Another timm knows a few more, or has dropped some.
    assert len(listed & known) > 0.9 * len(listed | known)


def test_doctor_finds_what_is_here(tmp_path: Path) -> None:
    document = mecq("doctor", "--json", cwd=tmp_path).document
    assert document["ok"] is True
    rows = {row["what"]: row for row in document["checks"]}
    assert rows["torch"]["found"] == metadata.version("torch")
    assert rows["Python"]["found"].startswith(".".join(map(str, sys.version_info[:3])))
    assert rows["[hfds] datasets"]["needed"].startswith(">=4")
    shown = mecq("doctor", cwd=tmp_path).out
    assert all(word in shown for word in ("VNNI", "bf16", "C++ compiler", "GPU", "disk"))


def test_doctor_fails_where_something_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "1.23.2" if name == "onnxruntime" else real(name)
    )
    monkeypatch.setattr(station, "free_space", lambda path: 1_000)
    done = mecq("doctor", cwd=tmp_path)
    assert done.code == 6
    assert done.out.splitlines()[-1] == "missing or too old: onnxruntime, disk"


def test_config_show_names_the_origin_of_each_value(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text('wbits = 2\nlr = 0.1\n[[layers]]\npattern = "*"\nabits = 4\n')
    command = ["config", "show", "resnet18", "--config", "my.toml", "--wbits", "3", "--no-distill"]
    settings = mecq(*command, "--json", cwd=tmp_path).document["settings"]
    assert settings["model"] == {"value": "resnet18", "origin": "flag"}
    assert settings["wbits"] == {"value": 3, "origin": "flag"}
    assert settings["lr"] == {"value": 0.1, "origin": "file"}
    assert settings["distill"] == {"value": False, "origin": "flag"}
    assert settings["layers"]["value"][0]["abits"] == 4
    assert settings["abits"] == settings["data"] == {"value": None, "origin": "missing"}
    assert settings["optimizer"] == {"value": None, "origin": "default"}
    assert settings["compile"] == {"value": "auto", "origin": "default"}
    assert "(must be given)" in mecq(*command, cwd=tmp_path).out
    assert mecq(*command, "--abits", 9, cwd=tmp_path).code == 2
    assert not (tmp_path / "runs").exists()


def test_config_show_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = QuantizeConfig(model="resnet18", wbits=2, abits=2, data="photos", lr=0.02)
    (run / "config.toml").write_text(to_toml(config))
    settings = mecq("config", "show", "run", "--wbits", 4, "--json", cwd=tmp_path).document[
        "settings"
    ]
    assert settings["wbits"] == {"value": 4, "origin": "flag"}
    assert settings["abits"] == {"value": 2, "origin": "run"}
    assert settings["model"] == {"value": "resnet18", "origin": "run"}
    assert settings["seed"] == {"value": 0, "origin": "default"}
    assert set(settings) >= {"lr", "output", "mec_weight"}
