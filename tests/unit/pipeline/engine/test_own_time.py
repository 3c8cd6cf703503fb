"""What a rank computes itself, without what it waits for."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d

from pipeline.engine import own_time
from pipeline.engine.own_time import OwnTime


def test_waits_for_other_ranks_are_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Work:
        def wait(self, seconds: float) -> str:
            time.sleep(seconds)
            return "done"

    monkeypatch.setattr(distributed_c10d, "Work", Work)
    wait = Work.wait

    def forward(own: float, waited: float, fails: bool = False) -> str:
        time.sleep(own)
        assert Work().wait(waited) == "done"
        if fails:
            raise ValueError
        return "result"

    own = OwnTime(torch.device("cpu"))
    call = own.measured(forward)
    assert call(0.02, waited=0.2) == call(0.03, waited=0.1) == "result"
    assert 0.05 <= own.take() < 0.1
    with pytest.raises(ValueError):
        call(0.0, 0.0, fails=True)
    assert own.take() == 0.0 and Work.wait is wait


def test_events_of_a_device_are_read_when_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    at = iter(range(100))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = next(at)

        def elapsed_time(self, end: Any) -> float:
            return 500.0 * (end.at - self.at)

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(Event=Event))
    monkeypatch.setattr(own_time, "_EVENTS", 3)
    own = OwnTime(torch.device("cuda", 0))
    call = own.measured(lambda: "result")
    assert [call() for _ in range(5)] == ["result"] * 5
    assert own.take() == 1.5 and own.take() == 0.0
