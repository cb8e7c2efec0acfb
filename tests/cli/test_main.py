"""The command line as a user meets it: help, flags, one-line errors, exit codes, clean stdout.

The library calls behind the commands are replaced here by ones that note what they were asked:
these tests are about what lies before and after a call. End to end they are tested elsewhere.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import mecq_cli
from mecq_cli.cli.app import app
from mecq_cli.cli.main import run
from mecq_cli.config import (
    CompareConfig,
    DemoConfig,
    EvalConfig,
    ExportConfig,
    QuantizeConfig,
    ReportConfig,
)
from mecq_cli.errors import (
    ArtifactError,
    DataError,
    EnvironmentFailure,
    Interrupted,
    MecqError,
    NumericError,
    UsageError,
    VerificationError,
)

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "quantize",
    "eval",
    "export",
    "predict",
    "inspect",
    "report",
    "compare",
    "demo",
    "doctor",
]

SIZES = {"fp32_bytes": 1_081_000, "packed_bytes": 81_000, "ideal_bytes": 80_000, "ratio": 13.35}
SUMMARY = {
    "run": "runs/x",
    "model": "resnet20_cifar",
    "wbits": 2,
    "abits": 2,
    "fp_top1": 92.46,
    "top1": 88.1,
    "simulator_top1": 88.1,
    "sizes": SIZES,
    "images": 5000,
    "seconds": 312.3,
    "resumed_at": None,
    "finished": True,
}
EVALUATION = {
    "target": "runs/x",
    "kind": "artifact",
    "images": 5000,
    "top1": 88.1,
    "top5": float("nan"),
    "split": "val",
    "seconds": 3.2,
}
QUANTIZE = ["quantize", "resnet18", "--wbits", "2", "--abits", "4", "--data", "images"]

Call = Callable[..., dict[str, Any]]
Replace = Callable[[str, Call], list[Any]]


PUBLIC = """
ArtifactError CheckpointError Classifier DataError DemoConfig EnvironmentFailure EvalConfig
ExportConfig InputError InspectConfig Interrupted LayerOverride Listener MecqError NumericError
PredictConfig Preprocessing QuantizeConfig Quantized UsageError VerificationError __version__ demo
evaluate export_artifact inspect load predict progress quantize quantize_config resolve
"""
"""What `mecq_cli` offers. A name that goes, or changes its meaning, breaks programs of others."""


def mecq(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mecq_cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80", **environment},
        check=False,
    )


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Replace:
    """``replace(name, call)`` puts ``call`` in place of a workflow; returns its arguments."""

    # Nothing that these workflows are told to read is there.
    for check in ("check_training", "check_target"):
        monkeypatch.setattr(f"mecq_cli.cli.early.{check}", lambda *_: None)

    def install(name: str, call: Call) -> list[Any]:
        calls: list[Any] = []

        def noted(*arguments: Any) -> dict[str, Any]:
            calls.append(arguments)
            return call(*arguments)

        module = ModuleType(f"mecq_cli.workflow.{name}")
        setattr(module, name, noted)
        package = ModuleType("mecq_cli.workflow")
        package.__path__ = []
        monkeypatch.setitem(sys.modules, "mecq_cli.workflow", package)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return calls

    return install


def test_help_is_quick_and_loads_neither_torch_nor_rich() -> None:
    script = (
        "import sys; from mecq_cli.cli.main import run; run(['--help']);"
        "print(sorted({'torch', 'timm', 'numpy', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    times = []
    for _ in range(5):
        before = processor_seconds()
        assert mecq("--help").returncode == 0
        times.append(processor_seconds() - before)
    # Processor time, the best of some: what other programs do meanwhile is not ours to measure.
    assert min(times) < 0.3


def processor_seconds() -> float:
    """Used so far by the processes this one has started and seen end."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_importing_the_package_loads_no_torch_and_offers_every_public_name() -> None:
    script = "import sys, mecq_cli; mecq_cli.QuantizeConfig; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr
    assert dir(mecq_cli) == sorted(mecq_cli.__all__) == PUBLIC.split()
    for name in mecq_cli.__all__:
        assert getattr(mecq_cli, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        mecq_cli.quantise  # noqa: B018


def test_version() -> None:
    done = mecq("--version")
    assert (done.returncode, done.stdout) == (0, f"mecq {mecq_cli.__version__}\n")


def test_a_bare_mecq_shows_the_three_steps_and_the_demo() -> None:
    done = mecq()
    assert done.returncode == 0
    places = [done.stdout.index(f"mecq {name}") for name in ("quantize", "eval", "export", "demo")]
    assert places == sorted(places)


INTERRUPTED_IMPORT = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a background job
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                signal.pause()
            except KeyboardInterrupt:
                pass
            raise ImportError("a library in C that was broken off")
sys.meta_path.insert(0, Finder())
sys.argv = ["mecq", "doctor"]
from mecq_cli.__main__ import main
main()
"""


def test_ctrl_c_while_libraries_are_loaded_is_no_internal_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_IMPORT], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


NAME_BEYOND_ASCII = """
import sys
from mecq_cli.workflow.arms import ARMS
ARMS["f\\u00fcchse"] = {}
sys.argv = ["mecq", "bench", "arms"]
from mecq_cli.__main__ import main
main()
"""


def test_names_that_the_terminal_cannot_show_are_no_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NAME_BEYOND_ASCII], capture_output=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"f?chse" in done.stdout


def test_a_home_folder_that_nobody_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", "--config", "~nobody-at-all/x.toml"]) == 2
    assert "settings file ~nobody-at-all/x.toml" in capsys.readouterr().err


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_every_help_opens_with_an_example_that_parses(command: str | None) -> None:
    result = CliRunner().invoke(app, [command, "--help"] if command else ["--help"])
    assert result.exit_code == 0
    usage, example, *_ = [line.strip() for line in result.stdout.splitlines() if line.strip()]
    assert usage.startswith("Usage: ")
    assert example.startswith("Example: mecq ")
    words = example.removeprefix("Example: mecq ").split()
    group: Any = get_command(app)
    group.commands[words[0]].make_context(words[0], words[1:])


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_in_a_help_is_cut_off_at_80_columns(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"})
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "…" not in result.stdout
    group: Any = get_command(app)
    for parameter in group.commands[command].params:
        # A wide name of a value would leave no room for what it means.
        assert len(parameter.metavar or "") <= 10, parameter.name


def test_the_defaults_in_the_help_are_those_of_the_settings() -> None:
    group: Any = get_command(app)
    kinds: dict[str, Any] = {
        "quantize": QuantizeConfig, "eval": EvalConfig, "export": ExportConfig,
        "report": ReportConfig,
    }  # fmt: skip
    checked = 0
    for command, kind in kinds.items():
        for parameter in group.commands[command].params:
            said = re.search(r"\(default (\w+)\)", getattr(parameter, "help", None) or "")
            if said:
                assert said[1] == str(kind.model_fields[parameter.name].default), parameter.name
                checked += 1
    assert checked >= 10


def test_all_flags_of_quantize_arrive(replace: Replace) -> None:
    calls = replace("quantize", lambda *_: SUMMARY)
    numbers = {
        "first-last-bits": 4, "residual-bits": 32, "val-split": 0.2, "img-size": 64,
        "crop-pct": 1.0, "calibration-images": 10, "workers": 1, "epochs": 3, "max-steps": 7,
        "batch-size": 16, "lr": 0.1, "mec-weight": 0.5, "mec-distortion": 0.03, "seed": 9,
        "checkpoint-every": 5, "keep-checkpoints": 4, "mec-warmup": 0.2, "mec-align": 0.5,
        "mec-grid": 2, "mec-order": 3, "accumulate": 2,
        "ema": 0.9, "freeze-oscillations": 0.1, "lower-from": 4, "eval-every": 2,
    }  # fmt: skip
    words = {
        "checkpoint": "w.pth", "device": "cpu", "amp": "off", "compile": "model", "output": "out",
        "mec-on": "stages+weights", "mec-views": "fp+quantized", "mec-estimator": "taylor",
        "mec-term": "divergence", "quantizer": "lsq+",
        "recipe": "quick", "task": "classify",
        "log": "tensorboard",
    }  # fmt: skip
    valued = [part for key, value in (numbers | words).items() for part in (f"--{key}", str(value))]
    switches = [
        "--no-pretrained",
        "--reset-classifier",
        "--no-distill",
        "--resume",
        "--reduce-range",
    ]
    assert run([*QUANTIZE, *valued, *switches, "--quiet", "--json"]) == 0
    ((config, origins, _),) = calls
    given = {**numbers, **words, "model": "resnet18", "wbits": 2, "abits": 4, "data": "images"}
    for key, value in given.items():
        got = getattr(config, key.replace("-", "_"))
        assert got == (Path(str(value)) if isinstance(got, Path) else value), key
    assert (config.pretrained, config.reset_classifier) == (False, True)
    assert config.reduce_range is True
    assert (config.distill, config.resume, config.force, config.dry_run) == (
        False,
        True,
        False,
        False,
    )
    flagged = {key for key, origin in origins.items() if origin == "flag"}
    assert len(flagged) == len(given) + 5
    assert run([*QUANTIZE, "--mec-experts", "exact+linear", "--quiet", "--json"]) == 0
    assert calls[-1][0].mec_experts == "exact+linear"
    flagged |= {key for key, origin in calls[-1][1].items() if origin == "flag"}
    # These take the place of --wbits, one of them at a time.
    for key, value in (("target_avg_bits", 2.5), ("target_size", "90kB")):
        target = [f"--{key.replace('_', '-')}", str(value), "--sensitivity", "loss"]
        others = ["quantize", "resnet18", "--abits", "4", "--data", "images", "-q", "--json"]
        assert run([*others, *target]) == 0
        config, origins, _ = calls[-1]
        assert (getattr(config, key), config.sensitivity) == (value, "loss")
        flagged |= {key for key, origin in origins.items() if origin == "flag"}
    offered = {p.name for p in get_command(app).commands["quantize"].params}  # type: ignore[attr-defined]
    targets = {"target_avg_bits", "target_size", "sensitivity"}  # instead of --wbits
    assert flagged | {"force", "dry_run"} | targets == offered & set(QuantizeConfig.model_fields)


def test_the_other_commands_hand_their_flags_over(replace: Replace, tmp_path: Path) -> None:
    calls = replace("evaluate", lambda *_: EVALUATION)
    arguments = ["r", "--simulator", "--split", "test", "--no-pretrained", "--batch-size", "8"]
    assert run(["eval", *arguments, "--quiet"]) == 0
    assert calls[0][0] == EvalConfig(
        target="r", simulator=True, split="test", pretrained=False, batch_size=8
    )
    exported = {"path": "m.onnx", "format": "onnx", "bytes": 9, "verified": True, "images": 3}
    calls = replace("export", lambda *_: exported)
    assert run(["export", "r", "-f", "safetensors", "--images", "3", "--force", "--quiet"]) == 0
    assert calls[0][0] == ExportConfig(run="r", format="safetensors", images=3, force=True)
    calls = replace("predict", lambda *_: {"target": "r", "predictions": []})
    assert run(["predict", "r", "a.png", "b.png", "--quiet"]) == 0
    assert calls[0][0].images == (Path("a.png"), Path("b.png"))
    calls = replace("inspect", lambda *_: {"target": "r", "sites": [], "totals": SIZES})
    assert run(["inspect", "--quiet"]) == 0
    assert calls[0][0].target is None
    written = {"path": "r.html", "bytes": 9, "run": "r", "left_out": []}
    calls = replace("report", lambda *_: written)
    assert run(["report", "r", "--images", "3", "-o", "r.html", "--force", "--quiet"]) == 0
    assert calls[0][0] == ReportConfig(run="r", images=3, output=Path("r.html"), force=True)
    calls = replace("compare", lambda *_: {"runs": [], "differing": [], "unknown": []})
    assert run(["compare", "a", "b", "--html", "c.html", "--quiet"]) == 0
    assert calls[0][0] == CompareConfig(runs=("a", "b"), html=Path("c.html"))
    calls = replace("demo", lambda *_: SUMMARY)
    assert run(["demo", "-o", str(tmp_path), "--quiet"]) == 0
    assert calls[0][0] == DemoConfig(output=tmp_path)


def test_json_is_one_document_whatever_the_library_prints(
    replace: Replace, capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty(config: EvalConfig, listener: Any) -> dict[str, Any]:
        print("library noise")  # noqa: T201
        listener.note("a note")
        listener.warn("a warning")
        return EVALUATION

    replace("evaluate", chatty)
    assert run(["eval", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out) == {**EVALUATION, "top5": None}
    assert "NaN" not in output.out
    for text in ("library noise", "a note", "warning: a warning"):
        assert text in output.err

    assert run(["eval", "--json", "--quiet"]) == 0
    assert "a note" not in capsys.readouterr().err


def test_a_result_is_a_table_and_the_next_command(
    replace: Replace,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    replace("quantize", lambda *_: SUMMARY)
    assert run(QUANTIZE) == 0
    output = capsys.readouterr()
    for text in (
        "92.46 %",
        "88.10 %  (-4.36)",
        "1.08 MB -> 81.0 kB, 13.3 times",
        "(+1.2 %)",
        "5:12",
    ):
        assert text in output.out
    assert output.err == "next: mecq export runs/x\n"

    replace("quantize", lambda *_: {**SUMMARY, "top1": 80.0})
    assert run(QUANTIZE) == 0
    assert capsys.readouterr().err == (
        "12.5 points below float; to lose less: --recipe best or more --epochs, "
        "--abits 4 (the file stays as small), --wbits 3, or --target-avg-bits 2.5\n"
        "next: mecq export runs/x\n"
    )

    allotment = {
        "target_avg_bits": 2.0, "target_size": None, "average_bits": 2.0, "weight_bytes": 70_000,
        "sensitivity": "coding", "optimal": False, "gap": None, "images": 64, "seconds": 5.0,
    }  # fmt: skip
    replace("quantize", lambda *_: {**SUMMARY, "top1": 80.0, "allotment": allotment})
    assert run(QUANTIZE) == 0
    output = capsys.readouterr()
    assert "coding, not proven to be the optimum; 64 images" in output.out
    assert "--abits 4 (the file stays as small), a larger target\n" in output.err

    replace("quantize", lambda *_: {**SUMMARY, "fp_top1": 33.33, "fp_trained": False})
    assert run(QUANTIZE) == 0
    assert "33.33 %  (untrained: no measure)" in (shown := capsys.readouterr().out)
    assert "88.10 %\n" in shown, "nothing to compare with"

    assert run([*QUANTIZE, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantise"], "No such command 'quantise'. Did you mean 'quantize'?"),
        (
            ["eval", "--spilt", "val"],
            "No such option: --spilt (Possible options: --simulator, --split)",
        ),
        (["quantize", "m", "--wbits", "two"], "--wbits: got 'two'; allowed: a whole number"),
        ([*QUANTIZE, "--lr", "fast"], "--lr: got 'fast'; allowed: a number"),
        ([*QUANTIZE, "--wbits", "9"], "--wbits: got 9; allowed: 1 to 8, or 32"),
        ([*QUANTIZE, "--config", "no.toml"], "settings file no.toml: No such file"),
        (["quantize"], "missing: MODEL, --wbits, --abits, --data"),
        (["predict", "runs/x"], "Missing argument 'IMAGE'; see mecq predict --help"),
        (["export", "--images", "0"], "--images: got 0; allowed: 1 or more"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = mecq(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def disk_full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("what"), 2, "error: what"),
        (DataError("a\nb"), 3, "error: a; b"),
        (ArtifactError("x\x1b[2J.onnx"), 3, r"error: x\x1b[2J.onnx"),
        (NumericError("loss is nan"), 4, "error: loss is nan"),
        (VerificationError("3 of 256"), 5, "error: 3 of 256"),
        (EnvironmentFailure("no network"), 6, "error: no network"),
        (disk_full(), 6, "error: runs/x/metrics.jsonl: no space is left on the disk"),
        (
            Interrupted("saved; continue: mecq ...", 15),
            143,
            "interrupted: saved; continue: mecq ...",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("a bug"), 1, "error: internal: ZeroDivisionError: a bug; run again"),
    ],
)
def test_every_error_is_one_line_and_its_exit_code(
    replace: Replace,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    line: str,
) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise error

    replace("evaluate", fail)
    assert run(["eval", "--json"]) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(line)
    assert output.err.count("\n") == 1

    if isinstance(error, (MecqError, ZeroDivisionError)):
        assert run(["eval", "--debug"]) == code
        output = capsys.readouterr()
        assert "Traceback (most recent call last)" in output.err
        assert output.err.splitlines()[-1].startswith(line)


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from types import ModuleType\n"
        "package, module = ModuleType('p'), ModuleType('m')\n"
        "package.__path__ = []\n"
        "module.predict = lambda *_: {'predictions': [\n"
        "    {'image': 'x' * 99, 'top5': []}] * 9999}\n"
        "sys.modules['mecq_cli.workflow'] = package\n"
        "sys.modules['mecq_cli.workflow.predict'] = module\n"
        "from mecq_cli.cli.main import main\n"
        "main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script), "predict", "t", "i", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.read(10)
    process.stdout.close()
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (141, b"")
