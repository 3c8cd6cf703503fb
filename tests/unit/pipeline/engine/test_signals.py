"""Asking a run to stop: a flag first, an interrupt only when asked twice, the old handlers afterwards."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from pipeline.engine.signals import StopFlag


@pytest.fixture(autouse=True)
def terminal() -> Iterator[None]:
    """As started from one, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in StopFlag.SIGNALS]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_polite_request_only_sets_a_flag(number: signal.Signals) -> None:
    with StopFlag() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and not stop.interrupted
        os.kill(os.getpid(), number)
        assert stop.requested and not stop.interrupted, "asking again changes nothing"


def test_a_run_started_to_outlive_its_terminal_does() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_the_second_interrupt_does_not_wait_for_the_save() -> None:
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and stop.interrupted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_interrupt_stays_one_when_the_launcher_adds_its_own_signal() -> None:
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.interrupted


def test_handlers_are_put_back_also_after_an_error() -> None:
    before = handlers()
    with pytest.raises(ValueError), StopFlag():
        assert all(now != old for now, old in zip(handlers(), before, strict=True))
        raise ValueError
    assert handlers() == before


@pytest.mark.parametrize("number", StopFlag.SIGNALS)
def test_before_the_first_step_the_process_leaves_at_once(number: signal.Signals) -> None:
    """By a thread: the main thread may be inside a library for minutes, where no Python handler runs."""
    left: list[int] = []
    begun: list[None] = []
    with StopFlag(left.append, lambda: begun.append(None)) as stop:
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 5
        while not left and time.monotonic() < deadline:
            time.sleep(0.005)
        assert left == [number] and begun == []
        stop.begin()
        stop.begin()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        assert left == [number] and stop.requested, "from the first step on there is something to save"
    assert len(begun) == 1 and signal.set_wakeup_fd(-1) == -1
