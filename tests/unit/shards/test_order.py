"""The order of an epoch: permutations, locality, mixing weights, distance between equal texts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards import order


@given(st.integers(1, 9000), st.integers(0, 2**63), st.integers(0, 5))
def test_local_shuffle_is_a_permutation(count: int, seed: int, epoch: int) -> None:
    shuffled = order.local_shuffle(count, seed, epoch)
    assert np.array_equal(np.sort(shuffled), np.arange(count))


def test_the_order_is_the_same_on_every_machine() -> None:
    """Golden values: a change here breaks the resume of every run and must raise ORDER_VERSION."""
    assert order.permutation(8, 1, 2).tolist() == [7, 1, 3, 0, 4, 2, 6, 5]
    assert order.local_shuffle(5000, 1, 2)[:6].tolist() == [4901, 1144, 1177, 4608, 1320, 4341]
    assert order.epoch_order([5, 4], [1.0, 1.5], 7, 3).tolist() == [5, 3, 7, 2, 6, 4, 8, 1, 8, 0, 7]


def test_neighbours_part_but_reads_stay_local() -> None:
    shuffled = order.local_shuffle(100_000, 3, 0)
    close = np.abs(np.diff(shuffled)) <= order.BLOCK
    assert close.mean() < 0.01
    bins = [len(np.unique(shuffled[at : at + 32] // 500)) for at in range(0, 90_000, 32)]
    assert np.mean(bins) > 25, "a global batch of 32 comes from all over the set"
    blocks = [len(np.unique(shuffled[at : at + 4096] // order.BLOCK)) for at in range(0, 90_000, 4096)]
    assert np.mean(blocks) < 1200, "4096 samples in a row touch a bounded number of blocks (fully random: about 2270)"


def test_epochs_seeds_and_sources_differ() -> None:
    orders = {tuple(order.source_pass(50, 1.0, *key)) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}
    assert len(orders) == 4


@given(st.integers(1, 400), st.floats(0.01, 3.5), st.integers(0, 4))
def test_weights_are_full_passes_and_a_fraction(count: int, weight: float, epoch: int) -> None:
    counts = np.bincount(order.source_pass(count, weight, 5, epoch, 0), minlength=count)
    assert counts.max() - counts.min() <= 1 and counts.min() >= int(weight)
    assert abs(counts.sum() - weight * count) <= 1


def test_half_weight_shows_every_sample_once_in_two_epochs() -> None:
    halves = [order.source_pass(100, 0.5, 5, epoch, 0) for epoch in (0, 1)]
    assert np.array_equal(np.sort(np.concatenate(halves)), np.arange(100))


def test_sources_are_spread_over_the_epoch() -> None:
    mixed = order.epoch_order([1000, 100], [1.0, 1.0], 1, 0)
    assert np.array_equal(np.sort(mixed), np.arange(1100))
    per_part = [int((mixed[at : at + 110] >= 1000).sum()) for at in range(0, 1100, 110)]
    assert per_part == [10] * 10


def test_without_shuffle_the_index_order_stays() -> None:
    assert order.epoch_order([3, 2], [1.0, 2.0], 9, 4, shuffle=False).tolist() == [0, 1, 2, 3, 4, 3, 4]


def _conflicts(tags: list[tuple[int, ...]], placed: np.ndarray, distance: int) -> int:
    last: dict[int, int] = {}
    found = 0
    for position, item in enumerate(placed.tolist()):
        found += any(position - last[text] < distance for text in tags[item] if text in last)
        last |= dict.fromkeys(tags[item], position)
    return found


@given(st.lists(st.integers(0, 60), min_size=1, max_size=200), st.integers(2, 16))
def test_equal_texts_are_kept_apart(texts: list[int], distance: int) -> None:
    tags = order.tag_items(np.arange(len(texts) + 1), np.asarray(texts, dtype=np.int64))
    placed, stuck = order.spread_texts(tags, distance)
    assert np.array_equal(np.sort(placed), np.arange(len(texts)))
    assert bool(_conflicts(tags, placed, distance)) <= bool(stuck)
    most = max(np.bincount(texts))
    if (most - 1) * distance + 1 > len(texts):
        assert stuck, "no order can keep the most frequent text apart"


@given(st.integers(1, 6), st.integers(0, 100))
def test_sentences_signed_by_several_signers_never_meet_in_a_batch(signers: int, seed: int) -> None:
    """What a sign corpus looks like: every sentence a few times; then nothing may be left over."""
    texts = np.repeat(np.arange(100), signers)[order.permutation(100 * signers, seed)]
    tags = order.tag_items(np.arange(len(texts) + 1), texts)
    placed, stuck = order.spread_texts(tags, 16)
    assert stuck == 0 and _conflicts(tags, placed, 16) == 0


def test_items_of_several_texts_are_kept_apart() -> None:
    starts, texts = np.asarray([0, 2, 4, 5, 6, 7, 8]), np.asarray([1, 2, 2, 3, 4, 5, 6, 7])
    tags = order.tag_items(starts, texts)
    assert [len(tag) for tag in tags] == [1, 1, 0, 0, 0, 0]
    placed, stuck = order.spread_texts(tags, 3)
    assert stuck == 0 and _conflicts(tags, placed, 3) == 0


@pytest.mark.parametrize("blocked, expected", [([], 5), ([(0, 5)], 8), ([(-3, 10)], None), ([(4, 20)], 1)])
def test_widest_gap(blocked: list[tuple[int, int]], expected: int | None) -> None:
    assert order._widest_gap(blocked, 10) == expected
