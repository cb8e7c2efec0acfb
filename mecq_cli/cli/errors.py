"""From an exception to one line and an exit code."""

from __future__ import annotations

import errno

import typer

from mecq_cli.errors import Interrupted, MecqError
from mecq_cli.memory import is_out_of_memory, out_of_memory

_DISK = {
    errno.EACCES: "no permission to read or to write there",
    errno.EPERM: "it is not permitted",
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would be larger than the limit allows",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk or the network drive failed to read or to write",
    errno.ESTALE: "the network drive went away",
    errno.EMFILE: "too many files are open; raise `ulimit -n`",
    errno.ENFILE: "too many files are open on this machine",
}

_OF_COMMANDS = ("--json", "--quiet", "-q", "--debug")

_VALUES = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
}


def describe(error: BaseException) -> tuple[str, int]:
    """The line for stderr, and the exit code."""
    if isinstance(error, typer.TyperException):
        return f"error: {one_line(_usage(error))}", 2
    if isinstance(error, Interrupted):
        return f"interrupted: {one_line(str(error))}", error.exit_code
    if isinstance(error, MecqError):
        return f"error: {one_line(str(error))}", error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, OSError) and error.errno in _DISK:
        where = f"{error.filename}: " if error.filename else ""
        return f"error: {one_line(where + _DISK[error.errno])}", 6
    if is_out_of_memory(error):
        return f"error: {one_line(out_of_memory())}", 6
    said = one_line(str(error))
    what = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return f"error: internal: {what}; run again with --debug and report what it shows", 1


def _usage(error: typer.TyperException) -> str:
    """What the parser complains about; of a value, in the words that the settings use."""
    from pydantic import ValidationError

    cause = error.__cause__
    if not (isinstance(error, typer.BadParameter) and isinstance(cause, ValidationError)):
        # A group without a command says nothing: it shows its help.
        message = error.format_message().removesuffix(".") or "missing: a command"
        context = getattr(error, "ctx", None)
        option = getattr(error, "option_name", None)
        if context is not None and context.parent is None and option in _OF_COMMANDS:
            return f"{option}: belongs behind the command: mecq COMMAND {option}"
        if context is None or message.endswith("?"):
            return message
        return f"{message}; see {context.command_path} --help"
    problem = cause.errors(include_url=False)[0]
    option = error.param.opts[0] if error.param is not None else "value"
    allowed = _VALUES.get(problem["type"], problem["msg"])
    return f"{option}: got {problem['input']!r}; allowed: {allowed}"


def one_line(text: str) -> str:
    """Without line breaks, and with control characters made visible.

    A file name may hold any character, also those that command a terminal.
    """
    joined = "; ".join(line.strip() for line in text.splitlines() if line.strip())
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)
