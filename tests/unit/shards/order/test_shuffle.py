"""The stream of a source: passes are permutations, any range alone equals the whole, reads stay local."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.order import shuffle as order
from shards.order.shuffle import Stream

COUNTS = st.one_of(st.integers(1, 200), st.sampled_from([16_383, 16_384, 16_385, 16_415, 20_011, 32_768]))


@given(COUNTS, st.integers(0, 2**63), st.integers(0, 5))
def test_every_pass_is_a_permutation(count: int, seed: int, number: int) -> None:
    shuffled = Stream(count, seed, 0).take(number * count, (number + 1) * count)
    assert np.array_equal(np.sort(shuffled), np.arange(count))


@given(COUNTS, st.lists(st.floats(0, 3), min_size=2, max_size=2), st.integers(0, 9))
def test_a_range_alone_is_the_same_as_in_the_whole(count: int, ends: list[float], seed: int) -> None:
    begin, end = sorted(int(count * part) for part in ends)
    assert np.array_equal(Stream(count, seed, 1).take(begin, end), Stream(count, seed, 1).take(0, 3 * count)[begin:end])


def test_the_order_is_the_same_on_every_machine() -> None:
    """Golden values: a change here breaks the resume of every run and must raise ORDER_VERSION."""
    assert order.permutation(8, 1, 2).tolist() == [7, 1, 3, 0, 4, 2, 6, 5]
    assert Stream(7, 1, 2).take(5, 10).tolist() == [3, 2, 2, 1, 3]
    assert Stream(20_000, 1, 2).take(19_998, 20_004).tolist() == [6245, 1711, 17866, 90, 8101, 1671]
    assert order.shuffle_groups(np.asarray([0, 0, 0, 1, 1]), 7, 3, 0).tolist() == [2, 0, 1, 3, 4]


def test_neighbours_part_but_reads_stay_local() -> None:
    shuffled = Stream(100_000, 3, 0).take(0, 100_000)
    close = np.abs(np.diff(shuffled)) <= order.BLOCK
    assert close.mean() < 0.01
    bins = [len(np.unique(shuffled[at : at + 32] // 500)) for at in range(0, 90_000, 32)]
    assert np.mean(bins) > 25, "a global batch of 32 comes from all over the set"
    reach = order.LANES * order.WINDOW
    for at in range(0, 100_000, reach):
        blocks = len(np.unique(shuffled[at : at + reach] // order.BLOCK))
        assert blocks <= order.LANES * (order.WINDOW // order.BLOCK + 2), "a window touches a bounded number of blocks"


@pytest.mark.parametrize("lane", [0, 17, 63])
def test_a_lane_reads_few_blocks(lane: int) -> None:
    """What a rank reads when the lanes are dealt to the ranks: a few neighbourhoods at a time."""
    mine = Stream(200_000, 3, 0).take(0, 4 * order.LANES * order.WINDOW)[lane :: order.LANES]
    for at in range(0, len(mine), order.WINDOW):
        assert len(np.unique(mine[at : at + order.WINDOW] // order.BLOCK)) <= order.WINDOW // order.BLOCK + 2


def test_passes_seeds_and_sources_differ() -> None:
    streams = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    for count in (50, 20_000):
        orders = {tuple(Stream(count, s, i).take(p * count, (p + 1) * count).tolist()) for p, s, i in streams}
        assert len(orders) == 4


def test_without_shuffle_the_index_order_stays() -> None:
    assert Stream(3, 9, 0, shuffle=False).take(1, 8).tolist() == [1, 2, 0, 1, 2, 0, 1]
    assert Stream(3, 9, 0).take(4, 4).tolist() == []


def test_groups_are_mixed_inside_their_window() -> None:
    windows = np.repeat(np.arange(5), [4, 1, 9, 0, 6])
    mixed = order.shuffle_groups(windows, 1, 0, 0)
    assert np.array_equal(windows[mixed], windows) and not np.array_equal(mixed, np.arange(20))
    assert not np.array_equal(mixed, order.shuffle_groups(windows, 1, 0, 1))
