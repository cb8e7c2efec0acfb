"""A signal is never lost, wherever it comes."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest

from mecq_cli.errors import Interrupted
from mecq_cli.training.signals import SignalWatch, deferring, stopping


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_within_the_block_a_signal_acts_at_once() -> None:
    with pytest.raises(Interrupted, match="the message") as caught, stopping("the message"):
        interrupt()
    assert caught.value.exit_code == 128 + signal.SIGTERM


def test_a_watch_only_remembers() -> None:
    with stopping("unused"), SignalWatch() as watch:
        assert watch.received == 0
        interrupt()
        assert watch.received == signal.SIGTERM


def test_a_signal_that_a_library_swallowed_is_remembered() -> None:
    class Finalized:
        def __del__(self) -> None:
            with contextlib.suppress(BaseException):
                interrupt()

    with stopping("unused"):
        Finalized()
        with SignalWatch() as watch:
            assert watch.received == signal.SIGTERM
    with stopping("unused"), SignalWatch() as watch:
        assert watch.received == 0, "the next block knows nothing of it"


def test_a_signal_waits_for_what_must_not_be_interrupted() -> None:
    done = []
    with pytest.raises(Interrupted, match="the message"), stopping("the message"):  # noqa: PT012
        with deferring():
            interrupt()
            done.append("all of it")
        done.append("and more")
    assert done == ["all of it"]
