"""Everything that can go wrong, as one tree; each branch has its own exit code.

    MecqError                   1   a bug of ours, when nothing below fits
    ├── UsageError              2   settings that make no sense: unknown model, bits out of range
    ├── InputError              3   data or artifacts that cannot be used
    │   ├── DataError           3   an image folder or an image
    │   ├── CheckpointError     3   weights or a training checkpoint
    │   └── ArtifactError       3   an integer artifact (.safetensors, .onnx)
    ├── NumericError            4   NaN or Inf where a number must be
    ├── VerificationError       5   an exported model that does not compute what it should
    ├── EnvironmentFailure      6   no network, no such device, no disk space, a missing extra
    └── Interrupted       130/143   SIGINT or SIGTERM, after the state was saved

A message is one line: what, where, what was got, what is allowed, what to do next.
"""

from __future__ import annotations


class MecqError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code: int = 1


class UsageError(MecqError):
    """Settings or arguments that cannot work."""

    exit_code = 2


class InputError(MecqError):
    """Data, weights or artifacts that cannot be used."""

    exit_code = 3


class DataError(InputError):
    """An image folder or an image that cannot be used."""


class CheckpointError(InputError):
    """Weights or a training checkpoint that cannot be used."""


class ArtifactError(InputError):
    """An integer artifact that cannot be used."""


class NumericError(MecqError):
    """NaN or Inf in a loss, a gradient or a scale."""

    exit_code = 4


class VerificationError(MecqError):
    """An exported model that does not compute what the simulator computes."""

    exit_code = 5


class EnvironmentFailure(MecqError):
    """Something outside of the program: network, device, disk, a missing extra."""

    exit_code = 6


class Interrupted(MecqError):
    """A signal asked for the end; the state was saved before this was raised."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says first; its name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
