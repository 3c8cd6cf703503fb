"""What is far above its running mean, and what the mean remembers."""

from __future__ import annotations

import math

import pytest

from pipeline.engine.spikes import Spikes


def test_a_number_far_above_the_mean_of_enough_steps_is_a_spike() -> None:
    spikes = Spikes(factor=10.0, window=4, seen=[0.0, 0.0])
    assert not any(spikes.found(value) for value in (1.0, 300.0, 1.0, 2.0)), "there is no mean yet"
    assert spikes.mean == 76.0 and spikes.limit == 760.0
    spikes.seen[:] = [2.0, 4.0]
    assert not spikes.found(20.0) and spikes.found(1000.0)


def test_a_spike_counts_as_the_limit_it_broke() -> None:
    spikes = Spikes(factor=10.0, window=100, seen=[1.0, 100.0])
    assert spikes.found(1e9)
    assert spikes.mean == pytest.approx(1 + 9 / 100)
    lasting = [spikes.found(40.0) for _ in range(60)]
    assert lasting[0] and not lasting[-1], "a new level ends by itself"


def test_old_steps_are_forgotten_and_several_steps_weigh_more() -> None:
    one_by_one, together = Spikes(0.0, 10, [5.0, 10.0]), Spikes(0.0, 10, [5.0, 10.0])
    for _ in range(4):
        assert not one_by_one.found(1.0)
    assert not together.found(1.0, steps=4)
    assert together.mean == pytest.approx(5 - 4 * 4 / 10) and one_by_one.mean == pytest.approx(1 + 4 * 0.9**4)
    assert not together.found(3.0, steps=50) and together.mean == 3.0


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_what_is_not_finite_is_no_spike(value: float) -> None:
    spikes = Spikes(2.0, 1, [1.0, 5.0])
    assert not spikes.found(value) and spikes.seen == [1.0, 5.0]


def test_factor_0_finds_none() -> None:
    spikes = Spikes(0.0, 1, [1.0, 5.0])
    assert spikes.limit == math.inf and not spikes.found(1e30)
