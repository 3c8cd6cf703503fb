"""`Phases`: seconds add up to the time that passed, whatever was entered when."""

from __future__ import annotations

import pytest

from pipeline.engine.phases import Phases


def test_seconds_per_phase_add_up_to_the_time_that_passed() -> None:
    at = 100.0
    phases = Phases(lambda: at)
    at += 5
    phases.enter("step")
    at += 2
    with phases.during("checkpoint"):
        assert phases.now == ("checkpoint", 0.0)
        at += 3
    at += 1
    assert phases.now == ("step", 1.0)
    assert phases.seconds() == {"start": 5.0, "step": 3.0, "checkpoint": 3.0}


def test_an_error_ends_the_phase_it_left() -> None:
    phases = Phases()
    with pytest.raises(KeyError), phases.during("evaluation"):
        raise KeyError
    assert phases.now[0] == "start"
