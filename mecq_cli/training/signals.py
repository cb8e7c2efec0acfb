"""Ctrl-C and SIGTERM: within a step they wait for its end, elsewhere they act at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from mecq_cli.errors import Interrupted

WATCHED = (signal.SIGINT, signal.SIGTERM)


class _Stop(KeyboardInterrupt):
    """No Exception, so that no library takes it for an error of its own."""


class _Received:
    """The signal that `stopping` met last, 0 for none: signals belong to the whole process."""

    number = 0


@contextmanager
def stopping(message: str) -> Iterator[None]:
    """Within the ``with`` block a signal raises `Interrupted` with ``message``.

    Python drops what is raised within a finalizer or a callback of the garbage collector, and
    some libraries catch everything. So the signal is remembered too: the next `SignalWatch`
    within the block begins with it.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        _Received.number = number
        raise _Stop(number)

    old = _install(stop)
    try:
        yield
    except _Stop as stopped:
        raise Interrupted(message, int(stopped.args[0])) from stopped
    finally:
        _Received.number = 0
        _restore(old)


class SignalWatch:
    """Within the ``with`` block a signal is only remembered; a second one acts at once.

    Args:
        tell: called when the signal comes, to say that it was heard.

    Attributes:
        received: number of the signal, 0 while there was none.
    """

    def __init__(self, tell: Callable[[], None] = lambda: None) -> None:
        self.received = _Received.number
        self._tell = tell
        self._old: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        self._old = _install(self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        _restore(self._old)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._old[number])
        # Whatever goes wrong here, a broken pipe or one writing within another, the step is to end
        # and to be saved. SystemExit is how rich says that nobody reads any more.
        with suppress(Exception, SystemExit):
            self._tell()


@contextmanager
def deferring() -> Iterator[None]:
    """Within the ``with`` block, itself within `stopping`, a first signal waits for the end.

    For torch.export: an exception out of a signal handler, there, aborts the whole process.
    """
    with SignalWatch() as watch:
        yield
    if watch.received:
        raise _Stop(watch.received)


def _install(handler: Any) -> dict[int, Any]:
    """Handle both signals by ``handler``; returns the old handlers."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in WATCHED}


def _restore(old: dict[int, Any]) -> None:
    for number, handler in old.items():
        signal.signal(number, handler)
