"""Mixing: exact counts for any weights, schedules, and epochs of a fixed size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.order.mix import Mixture, Weight, apportion, as_schedule, chunk_range, weight_at
from shards.order.shuffle import Stream

WEIGHTS = st.floats(0.01, 3.5)


@given(st.integers(1, 400), WEIGHTS, st.integers(1, 6))
def test_samples_of_a_source_are_shown_equally_often_at_any_weight(count: int, weight: float, epochs: int) -> None:
    mixture = Mixture([count], [as_schedule(weight)])
    shown = np.bincount(Stream(count, 5, 0).take(0, mixture.begins(epochs)[0]), minlength=count)
    assert shown.max() - shown.min() <= 1
    assert abs(mixture.quotas(0)[0] - weight * count) <= 1 and mixture.quotas(0)[0] >= 1


def test_half_weight_shows_every_sample_once_in_two_epochs() -> None:
    mixture = Mixture([100], [as_schedule(0.5)])
    assert np.array_equal(np.sort(Stream(100, 5, 0).take(0, mixture.begins(2)[0])), np.arange(100))


@pytest.mark.parametrize(
    "points, weights",
    [
        ([(0, 1.0), (4, 0.2)], [1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),
        ([(2, 0.0), (4, 1.0)], [0.0, 0.0, 0.0, 0.5, 1.0, 1.0]),
        ([(1, 3.0)], [3.0, 3.0, 3.0]),
        (2, [2.0, 2.0]),
    ],
)
def test_a_schedule_is_linear_between_its_points(points: Weight, weights: list[float]) -> None:
    assert [weight_at(as_schedule(points), e) for e in range(len(weights))] == pytest.approx(weights)


def test_a_scheduled_source_gives_what_its_weight_says() -> None:
    mixture = Mixture([100, 10], [as_schedule([(0, 1.0), (4, 0.2)]), as_schedule([(1, 0.0), (2, 1.0)])])
    assert [mixture.quotas(epoch) for epoch in (0, 1, 2, 5, 90)] == [(100, 0), (80, 0), (60, 10), (20, 10), (20, 10)]
    begins = [mixture.begins(epoch) for epoch in range(8)]
    assert begins[:4] == [(0, 0), (100, 0), (180, 0), (240, 10)]
    assert begins[7] == (100 + 80 + 60 + 40 + 3 * 20, 50)
    assert Mixture([100, 10], mixture.schedules).begins(7) == begins[7], "whatever was asked before"


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.integers(8, 10_000))
def test_shares_add_up_and_follow_the_weights(weights: list[float], total: int) -> None:
    if not any(weights):
        return
    parts = apportion(total, weights)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert (part > 0) == (weight > 0)
        assert part <= max(1, total * weight / sum(weights) + 1)


def test_equal_remainders_go_to_the_earlier_source() -> None:
    assert apportion(10, [1, 1, 1]) == [4, 3, 3]
    assert apportion(5, [1e-9, 1, 1]) == [1, 2, 2], "a positive weight is never rounded away"
    assert apportion(7, [0, 0.5, 0.5]) == [0, 4, 3]


def test_epochs_of_a_fixed_size_take_shares_of_it() -> None:
    mixture = Mixture([1000, 10], [as_schedule(0.7), as_schedule([(0, 0.3), (2, 0.0)])], epoch_samples=100)
    assert [mixture.quotas(epoch) for epoch in range(4)] == [(70, 30), (82, 18), (100, 0), (100, 0)]
    assert mixture.begins(4) == (352, 48)


@given(st.integers(0, 1000), st.integers(1, 20))
def test_chunks_divide_what_a_source_gives(quota: int, chunks: int) -> None:
    ranges = [chunk_range(quota, chunk, chunks) for chunk in range(chunks)]
    assert ranges[0][0] == 0 and ranges[-1][1] == quota
    assert all(one[1] == other[0] for one, other in itertools.pairwise(ranges))
    assert max(end - begin for begin, end in ranges) - min(end - begin for begin, end in ranges) <= 1


@pytest.mark.parametrize(
    "weight, problem",
    [
        (0, "must be positive, it is 0"),
        (float("nan"), "must be positive, it is nan"),
        ([], "must be a number or a list of"),
        ([(0, 1, 2)], "must be a number or a list of"),
        ([(0.5, 1.0)], "needs whole epochs in ascending order"),
        ([(3, 1.0), (1, 0.5)], "needs whole epochs in ascending order"),
        ([(0, 0.0), (3, 0.0)], "needs weights of at least 0, and one above"),
        ([(0, 1.0), (3, -1.0)], "needs weights of at least 0"),
    ],
)
def test_impossible_weights_are_named(weight: Weight, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        as_schedule(weight)


def test_impossible_mixtures_are_named() -> None:
    off_and_on, on_and_off = as_schedule([(0, 1.0), (2, 0.0)]), as_schedule([(2, 0.0), (3, 1.0)])
    assert Mixture([5, 5], [off_and_on, on_and_off]).problem() == "all weights are 0 in epoch 2"
    one = as_schedule(1)
    assert "less than one sample for each of 3" in Mixture([5] * 3, [one] * 3, epoch_samples=2).problem()
    assert Mixture([5], [one]).problem() == ""
