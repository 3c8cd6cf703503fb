"""When a launch is started again, where, and after how long: the policy alone."""

from __future__ import annotations

import pytest

from launch.recovery import Attempt, Restart, RestartPolicy, is_infrastructure, next_attempt

POLICY = RestartPolicy(max_restarts=3, delay_seconds=10.0)


def attempts(*saved: int | None, code: int = 3, lost: tuple[str, ...] = (), requested: bool = False) -> list[Attempt]:
    """One attempt per newest checkpoint at its end."""
    before = (None, *saved[:-1])
    return [
        Attempt(n + 1, code, "why", ("a", "b"), lost, requested, saved_before=before[n], saved=saved[n])
        for n in range(len(saved))
    ]


@pytest.mark.parametrize("code", [0, 1, 2, 4, 5, 6, 75, 130])
def test_what_would_come_again_is_not_restarted(code: int) -> None:
    assert not is_infrastructure(code)
    assert next_attempt(POLICY, attempts(4, code=code), 2) == ""


@pytest.mark.parametrize("code", [3, 134, 137, 139, 143])
def test_infrastructure_is(code: int) -> None:
    assert is_infrastructure(code)
    assert next_attempt(POLICY, attempts(4, code=code), 2) == Restart(10.0)
    assert next_attempt(RestartPolicy(max_restarts=0), attempts(4, code=code), 2) == ""


def test_whoever_asked_for_the_end_gets_it() -> None:
    assert next_attempt(POLICY, attempts(4, code=137, requested=True), 2) == ""


@pytest.mark.parametrize(
    ("saved", "delay"),
    [
        ((None,), 10.0), ((None, None), 20.0), ((None, None, None), 40.0), ((None, 4), 10.0), ((4,), 10.0),
        ((4, 4), 20.0), ((4, 4, 4), 40.0), ((None, None, None, None, 2), 10.0), ((4, 6, 8, 10, 12, 14), 10.0),
    ],
)  # fmt: skip
def test_the_delay_doubles_until_a_newer_checkpoint(saved: tuple[int | None, ...], delay: float) -> None:
    assert next_attempt(POLICY, attempts(*saved), 2) == Restart(delay)


def test_restarts_without_a_newer_checkpoint_are_limited() -> None:
    reason = "not restarted again: 3 restarts in a row (--max-restarts) brought no newer checkpoint"
    assert next_attempt(POLICY, attempts(None, None, None, None), 2) == reason
    assert next_attempt(POLICY, attempts(2, 8, 8, 8, 8), 2) == reason
    assert next_attempt(RestartPolicy(20, delay_seconds=60.0), attempts(*[None] * 9), 2) == Restart(600.0)


def test_a_lost_host_does_not_take_part_in_the_next_attempt() -> None:
    assert next_attempt(POLICY, attempts(4, lost=("b",)), 2) == Restart(10.0, frozenset("b"))
    assert next_attempt(RestartPolicy(min_hosts=2), attempts(4, lost=("b",)), 2) == Restart(10.0), "it is asked again"
    assert next_attempt(POLICY, attempts(4, lost=("a", "b")), 2) == Restart(10.0)


def test_an_attempt_in_a_line() -> None:
    assert str(Attempt(2, 137, "rank 1 on b: killed", ("a", "b"), step=12, saved=10)) == (
        "attempt 2 on a, b ended at step 12 with exit code 137, saved at step 10: rank 1 on b: killed"
    )
    assert str(Attempt(3, 3, "no host")) == "attempt 3 nowhere ended with exit code 3, nothing saved: no host"
