"""The list of models that are known to work: what it says, and that it needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mecq_cli.cli.main import run
from mecq_cli.models.libraries import model_names
from mecq_cli.models.supported import matching, near, supported


def test_the_list_is_of_models_that_exist() -> None:
    known = supported()
    assert {level for level, _ in known.values()} <= {"verified", "captured", "no"}
    assert known.keys() <= {*model_names()}
    assert sum(level == "verified" for level, _ in known.values()) >= 8
    for level, reason in known.values():
        assert (level == "no") <= bool(reason)


def test_patterns_and_near_names() -> None:
    names = ["resnet18", "resnet50", "torchvision/resnet18", "vit_tiny"]
    assert matching("ResNet", names) == names[:3]
    assert matching("resnet*", names) == names[:2]
    assert near("ResNet18", names, "torchvision/")[:2] == ["resnet18", "torchvision/resnet18"]
    assert near("resnet5O", names, "torchvision/")[0] == "resnet50"


def test_the_command_lists_and_suggests(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "mobilenetv3_small_100", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["models"]
    assert row == {"model": "mobilenetv3_small_100", "level": "verified", "reason": ""}
    assert run(["models", "mobilenetv3_small"]) == 0
    assert "mobilenetv3_small_100 verified" in capsys.readouterr().out.replace("  ", " ")
    assert run(["models", "mobilenetv3_smal_100x"]) == 2
    error = capsys.readouterr().err
    assert "did you mean mobilenetv3_small_100" in error
    assert error.count("\n") == 1
    for pattern, name in {
        "fcn": "fcn_resnet50",
        "ssd": "ssd300_vgg16",
        "detect": "retinanet",
    }.items():
        assert run(["models", pattern]) == 2
        error = capsys.readouterr().err
        assert name in error
        assert error.count("\n") == 1


def test_the_list_needs_no_torch() -> None:
    code = "import sys; from mecq_cli.cli.main import run; run(['models', '--json'])"
    code += "; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
