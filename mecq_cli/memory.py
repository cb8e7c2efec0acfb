"""Memory that ran out: how to tell, and what to say. Imports no torch, nor does it need to."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mecq_cli.errors import EnvironmentFailure

# Of a GPU torch raises OutOfMemoryError, of a CPU a plain RuntimeError with one of these texts.
# CUDA's libraries say CUBLAS_STATUS_ALLOC_FAILED and the like.
_SIGNS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch, numpy or the system says that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def out_of_memory(
    batch: int | None = None, resume_command: str | None = None, parts: int | None = None
) -> str:
    """One line of advice.

    Args:
        batch: images of the batch that did not fit; None where none is to blame.
        resume_command: continues the run from its last checkpoint; None where there is none.
        parts: micro-batches that a step could be computed in.
    """
    if batch is None:
        return (
            "out of memory; try a smaller --batch-size or --img-size, fewer --workers, or "
            "--device cpu"
        )
    said = f"out of memory at a batch of {batch} images; try --batch-size {max(batch // 2, 1)}"
    if resume_command is None:
        return f"{said}, fewer --workers, or --device cpu"
    if parts is not None and resume_command.startswith("mecq quantize "):
        resume_command = f"{resume_command} --accumulate {parts}"
    return (
        f"{said} in a new run (the batch size of a run cannot change), or go on with more memory, "
        f"fewer --workers or another --device: {resume_command}"
    )


@contextmanager
def advising(
    batch: int, resume_command: Callable[[], str | None], parts: int | None = None
) -> Iterator[None]:
    """Raise EnvironmentFailure with `out_of_memory` where memory runs out within the block.

    Args:
        batch, parts: as there.
        resume_command: asked only then.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise EnvironmentFailure(out_of_memory(batch, resume_command(), parts)) from error
