"""Asking a run to stop: a flag first, an interrupt only when asked twice, the old handlers afterwards."""

from __future__ import annotations

import os
import signal

import pytest

from pipeline.engine.signals import StopFlag


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in StopFlag.SIGNALS]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_polite_request_only_sets_a_flag(number: signal.Signals) -> None:
    with StopFlag() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested and not stop.interrupted
        os.kill(os.getpid(), number)
        assert stop.requested and not stop.interrupted, "asking again changes nothing"


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
