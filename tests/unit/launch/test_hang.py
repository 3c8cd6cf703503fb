"""Which rank keeps the others waiting, from what they last told."""

from __future__ import annotations

import pytest

from launch.hang import LONG_SECONDS, Hang, Limits, find_hang, resolved
from launch.pulse import Beat, Pulses

AUTO = Limits()


def pulses(*last: tuple[str, int, float], slowest: float = 1.0, stepped: bool = True) -> Pulses:
    """Ranks in a phase after so many steps for so many seconds, all heard at 1000.0."""
    made = Pulses()
    for rank, (phase, step, seconds) in enumerate(last):
        if stepped:
            made.take(Beat(rank, "h", 1, "step", slowest, step - 2, 99, 900.0))
            made.take(Beat(rank, "h", 1, "step", 0.0, step - 1, 99, 910.0))
        made.take(Beat(rank, "h", 1, phase, seconds, step, 99, 1000.0))
    return made


@pytest.mark.parametrize(
    ("last", "slowest", "found"),
    [
        ([("step", 5, 299.0), ("step", 5, 299.0)], 1.0, None),
        ([("step", 5, 301.0), ("data", 5, 301.0)], 1.0, None),  # the loader of rank 1 has 25 minutes
        ([("step", 5, 1501.0), ("data", 5, 1501.0)], 1.0, (1,)),
        ([("step", 6, 301.0), ("step", 5, 301.0)], 1.0, (1,)),
        ([("step", 5, 301.0), ("step", 5, 302.0)], 1.0, (0, 1)),
        ([("step", 5, 500.0), ("step", 4, 500.0)], 30.0, None),  # steps of half a minute: ten minutes
        ([("step", 5, 601.0), ("step", 4, 601.0)], 30.0, (1,)),
        ([("step", 5, 1400.0), ("step", 4, 1400.0)], 600.0, None),
        ([("step", 5, 1501.0), ("step", 4, 1501.0)], 600.0, (1,)),  # and never longer than the collectives wait
        ([("data", 5, 400.0), ("checkpoint", 5, 400.0)], 1.0, None),
        ([("data", 5, 1501.0), ("checkpoint", 5, 1501.0), ("evaluation", 5, 1501.0)], 1.0, (2,)),
        ([("end", 9, 1400.0)], 1.0, None),
        ([("a phase of another version", 9, 1600.0)], 1.0, (0,)),
    ],
)
def test_only_the_rank_that_is_behind_is_judged(
    last: list[tuple[str, int, float]], slowest: float, found: tuple[int, ...] | None
) -> None:
    hang = find_hang(pulses(*last, slowest=slowest), (), AUTO, 1000.0)
    assert (hang and hang.ranks) == found


def test_a_first_step_may_compile() -> None:
    assert find_hang(pulses(("step", 3, 1400.0), stepped=False), (), AUTO, 1000.0) is None
    assert find_hang(pulses(("step", 3, 1400.0), stepped=False), (), Limits(10.0), 1000.0) is None
    assert find_hang(pulses(("step", 3, 1501.0), stepped=False), (), AUTO, 1000.0) is not None


def test_given_seconds_hold_for_steps_and_data() -> None:
    for phase in ("step", "data"):
        assert find_hang(pulses((phase, 5, 9.0)), (), Limits(10.0), 1000.0) is None
        assert find_hang(pulses((phase, 5, 11.0)), (), Limits(10.0), 1000.0) is not None
    assert find_hang(pulses(("checkpoint", 5, 1400.0)), (), Limits(10.0), 1000.0) is None
    assert find_hang(pulses(("checkpoint", 5, 1600.0)), (), Limits(2000.0), 1000.0) is None
    assert find_hang(pulses(("step", 5, 1e6)), (), Limits(0), 1e6) is None


def test_one_launcher_of_several_hears_only_its_own_ranks() -> None:
    """They may wait for a rank of another launcher, which waits for its data."""
    own = Limits(hears_all=False)
    assert find_hang(pulses(("step", 5, 400.0)), (), own, 1000.0) is None
    assert find_hang(pulses(("step", 5, 1501.0)), (), own, 1000.0) is not None
    assert find_hang(pulses(("step", 5, 40.0)), (), Limits(30.0, hears_all=False), 1000.0) is not None


def test_silent_ranks_are_the_cause_wherever_they_are() -> None:
    """Those of one host fall silent within seconds of each other."""
    made = pulses(("step", 5, 1.0), ("step", 5, 1.0), ("step", 5, 1.0))
    made.take(Beat(0, "h", 1, "step", 61.0, 5, 99, 1060.0))
    made.take(Beat(2, "h", 1, "step", 2.0, 5, 99, 1002.0))
    assert find_hang(made, (), AUTO, 1059.0) is None
    hang = find_hang(made, (), AUTO, 1061.0)
    assert hang == Hang((1, 2), "step", 5, 61.0, silent=True, everybody=False)
    assert (
        str(hang)
        == "silent for 61 s in `step` after step 5: its process is stopped or gone, or its host is out of reach"
    )
    assert find_hang(made, (1, 2), AUTO, 1061.0) is None, "they have ended"
    assert find_hang(made, (), Limits(8.0), 1009.0) is not None


def test_a_rank_that_loads_or_saves_may_be_silent_for_longer() -> None:
    for phase in ("start", "checkpoint"):
        assert find_hang(pulses((phase, 5, 1.0)), (), AUTO, 1290.0) is None
        assert find_hang(pulses((phase, 5, 1.0)), (), AUTO, 1310.0) is not None
        assert find_hang(pulses((phase, 5, 1.0)), (), Limits(5.0), 1059.0) is None
        assert find_hang(pulses((phase, 5, 1.0)), (), Limits(5.0), 1061.0) is not None


def test_words() -> None:
    assert str(Hang((1,), "data", 5, 400.0, silent=False, everybody=False)) == "hangs: for 400 s in `data` after step 5"
    assert str(Hang((0, 1), "step", 5, 400.0, silent=False, everybody=True)).endswith(
        "all ranks wait, which of them is the cause is not known"
    )
    assert resolved(AUTO) == {
        "step": "20 x the slowest, at least 300 s", "data": "1500 s", "other phases": "1500 s"
    }  # fmt: skip
    assert resolved(Limits(20.0)) == {"step": "20 s", "data": "20 s", "other phases": f"{LONG_SECONDS:g} s"}
    assert resolved(Limits(0)) == {"hang": "never looked for (--hang-seconds 0)"}


def test_nobody_heard_is_nobody_judged() -> None:
    assert find_hang(Pulses(), (), AUTO, 1e9) is None
