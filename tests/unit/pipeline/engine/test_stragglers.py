"""A rank that stays slow is told once, and so is its recovery."""

from __future__ import annotations

from pipeline.engine.stragglers import Stragglers, ratios

EVEN, SLOW = [1.0, 1.0, 1.1, 1.0], [1.0, 1.0, 1.0, 1.5]


def test_a_rank_is_slow_after_several_rows_and_told_once() -> None:
    stragglers = Stragglers(1.2)
    assert [stragglers.changes(row) for row in (EVEN, SLOW, SLOW)] == [[], [], []]
    assert stragglers.changes(SLOW) == [(3, 1.5, True)] and stragglers.slow == {3}
    assert [stragglers.changes(SLOW) for _ in range(5)] == [[]] * 5


def test_its_recovery_is_told_too() -> None:
    stragglers = Stragglers(1.2)
    rows = [*[SLOW] * 3, EVEN, EVEN, SLOW, EVEN, EVEN, EVEN]
    assert [bool(stragglers.changes(row)) for row in rows] == [False, False, True, *[False] * 5, True]
    assert not stragglers.slow


def test_a_single_slow_row_is_none() -> None:
    stragglers = Stragglers(1.2)
    assert not any(stragglers.changes(row) for row in [SLOW, SLOW, EVEN] * 4)


def test_times_are_compared_with_the_median_rank() -> None:
    assert ratios([2.0, 4.0, 2.0]) == [1.0, 2.0, 1.0]
    assert ratios([1.0, 3.0]) == [0.5, 1.5]
    assert ratios([0.0, 0.0]) == [1.0, 1.0], "nothing was measured"
