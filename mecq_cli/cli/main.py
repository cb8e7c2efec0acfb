"""The entry point: every error ends here, as one line on stderr and an exit code."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TextIO

import typer
from typer.main import get_command

from mecq_cli import launch
from mecq_cli.cli.app import app
from mecq_cli.cli.errors import describe
from mecq_cli.errors import Interrupted, MecqError, NumericError, UsageError


class _Pressed:
    """Whether Ctrl-C was pressed: what it breaks off may tell of another error instead."""

    yes = False


def _remember(number: int, frame: FrameType | None) -> None:
    _Pressed.yes = True
    signal.default_int_handler(number, frame)


def main() -> None:
    """Run the command line of this process."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _remember)
    # Where the shell has closed them (>&-), Python has none.
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # for names that its encoding does not have
    code = run(sys.argv[1:])
    if code and launch.processes() > 1:
        # With another process gone, the threads that talk to it abort where they are taken down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def run(arguments: Sequence[str]) -> int:
    """Run one command line, without the program's name; returns the exit code."""
    debug = "--debug" in arguments
    if not debug:
        _silence_libraries()
    try:
        code = get_command(app).main(list(arguments), prog_name="mecq", standalone_mode=False)
    except SystemExit as error:  # rich's, of help that nobody reads to its end
        return 141 if error.code == 1 else int(error.code or 0)
    except (Exception, typer.Abort, KeyboardInterrupt) as error:  # noqa: BLE001  # told to the user, in one line
        return _fail(error, debug)
    if code == 130:  # how typer ends on Ctrl-C
        return _fail(KeyboardInterrupt(), debug)
    return int(code or 0)


def _fail(error: BaseException, debug: bool) -> int:
    if _Pressed.yes and not isinstance(error, MecqError):
        error = KeyboardInterrupt()
    line, code = describe(error)
    if debug:
        traceback.print_exception(error)
    if launch.rank() == 0:
        sys.stderr.write(line + "\n")
    elif isinstance(error, (UsageError, NumericError, Interrupted)):
        # It came to all processes and the first one tells, unless the launcher ends it before:
        # which it does as soon as one has left.
        time.sleep(1.0)
    else:
        sys.stderr.write(f"process {launch.rank()}: {line}\n")
    return code


def _silence_libraries() -> None:
    """What libraries say to developers is not for users; --debug shows it."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.getLogger().addHandler(logging.NullHandler())
    # That there is a CUDA compiler and no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
