"""The Typer application: its commands in the order of their use, and what a bare mecq says."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mecq_cli import __version__, launch
from mecq_cli.cli.bench import bench
from mecq_cli.cli.bench_deploy import deploy
from mecq_cli.cli.bench_features import features
from mecq_cli.cli.bench_mec import arms, mec
from mecq_cli.cli.bench_train import train
from mecq_cli.cli.compare import compare
from mecq_cli.cli.config import config
from mecq_cli.cli.demo import demo
from mecq_cli.cli.doctor import doctor
from mecq_cli.cli.eval import evaluate
from mecq_cli.cli.export import export
from mecq_cli.cli.inspect import inspect
from mecq_cli.cli.models import models
from mecq_cli.cli.predict import predict
from mecq_cli.cli.quantize import quantize
from mecq_cli.cli.report import report
from mecq_cli.errors import UsageError

STEPS = """\
mecq trains a vision model at 1 to 8 bits and writes it down as integers.

  1  mecq quantize resnet18 --wbits 4 --abits 4 --data DIR    train it at low bits
  2  mecq eval                                                measure the result
  3  mecq export                                              write and verify ONNX

New here?  mecq demo              the whole path in about a minute, offline
Options:   mecq COMMAND --help    each starts with an example
"""


class _PlainGroup(TyperGroup):
    """The list of the commands without rich, whose import would double the time it takes."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "rich_markup_mode": None})
        for command in self.commands.values():
            for parameter in command.params:
                if getattr(parameter, "is_flag", False):
                    parameter.metavar = ""  # else the help calls each a <bool>


app = typer.Typer(
    name="mecq",
    cls=_PlainGroup,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quantize", short_help="Train a model at low bits.")(quantize)
app.command("eval", short_help="Measure accuracy: run, artifact, ONNX or float model.")(evaluate)
app.command("export", short_help="Write a run as ONNX or safetensors, and verify it.")(export)
app.command("predict", short_help="Say what is in an image.")(predict)
app.command("inspect", short_help="Show layers, bits, scales and sizes.")(inspect)
app.command("models", short_help="List the models that are known to work.")(models)
app.command("report", short_help="Write a page about a run: curves, layers, mistakes.")(report)
app.command("compare", short_help="Put runs side by side.")(compare)
app.add_typer(config, name="config", short_help="Show settings and where they come from.")
app.command("doctor", short_help="Look for what mecq needs on this machine.")(doctor)
app.command("demo", short_help="Go the whole path in about a minute, offline.")(demo)
bench.command("mec", short_help="Does the entropy regularizer help? Arms, seeds, a table.")(mec)
bench.command("arms", short_help="What `mecq bench mec` can compare.")(arms)
bench.command("train", short_help="Time and memory of a training step.")(train)
bench.command("features", short_help="Spectra and ranks of the features of runs.")(features)
bench.command("deploy", short_help="Speed and size of the export, beside FP32 and INT8.")(deploy)
app.add_typer(bench, name="bench", short_help="Measure speed and error on this machine.")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mecq {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Example: mecq quantize resnet18 --wbits 4 --abits 4 --data DIR

    Train a vision model at 1 to 8 bits, measure it, and export it as integers.
    """
    if launch.processes() > 1 and ctx.invoked_subcommand != "quantize":
        raise UsageError(
            f"{launch.processes()} processes were launched, and only mecq quantize shares its work "
            "among several; start this command without a launcher"
        )
    if ctx.invoked_subcommand is None:
        typer.echo(STEPS, nl=False)
