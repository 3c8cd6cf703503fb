"""Equal texts kept apart: inside a chunk, across the border to the next, and counted where that is impossible."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.order import shuffle as order
from shards.order import unique_texts as plan_texts
from shards.order.unique_texts import Texts, join, no_texts, spread


def clips(texts: object) -> Texts:
    hashes = np.asarray(texts, dtype=np.int64)
    return Texts(np.arange(len(hashes) + 1), hashes)


def conflicts(texts: Texts, distance: int, before: Texts | None = None) -> int:
    """Items with a text that one of the ``distance - 1`` items before them has: counted one by one."""
    last: dict[int, int] = {}
    found = 0
    for part, first in ((before or no_texts(), -len(before or no_texts())), (texts, 0)):
        for item in range(len(part)):
            mine = set(part.hashes[part.starts[item] : part.starts[item + 1]].tolist())
            found += first + item >= 0 and any(first + item - last[text] < distance for text in mine if text in last)
            last |= dict.fromkeys(mine, first + item)
    return found


ITEMS = st.one_of(
    st.lists(st.integers(0, 60), min_size=1, max_size=200).map(clips),
    st.lists(st.sets(st.integers(0, 80), min_size=1, max_size=4), min_size=1, max_size=80).map(
        lambda items: Texts(np.cumsum([0, *map(len, items)]), np.asarray([t for i in items for t in i], dtype=np.int64))
    ),
)


@given(ITEMS, st.integers(2, 16))
def test_spreading_keeps_every_item_and_repeats_less(texts: Texts, distance: int) -> None:
    placed = spread(texts, distance)
    assert np.array_equal(np.sort(placed), np.arange(len(texts)))
    assert conflicts(texts.reorder(placed), distance) <= conflicts(texts, distance)


@given(st.integers(1, 6), st.integers(0, 100))
def test_sentences_signed_by_several_signers_never_meet_in_a_batch(signers: int, seed: int) -> None:
    """What a sign corpus looks like: every sentence a few times; then nothing may be left over."""
    texts = clips(np.repeat(np.arange(100), signers)[order.permutation(100 * signers, seed)])
    assert conflicts(texts.reorder(spread(texts, 16)), 16) == 0


@pytest.mark.parametrize("signers, distance", [(5, 20), (3, 33), (2, 48)])
def test_crowded_texts_wait_for_their_turn(signers: int, distance: int) -> None:
    """Almost as many equal texts as fit: exchanging places is not enough, the chunk is ordered anew."""
    texts = clips(np.repeat(np.arange(100), signers)[order.permutation(100 * signers, 3)])
    assert conflicts(texts.reorder(spread(texts, distance)), distance) == 0


@given(ITEMS, ITEMS, st.integers(2, 16))
def test_chunks_join_without_touching_what_the_next_one_sees(one: Texts, other: Texts, distance: int) -> None:
    before = one.reorder(spread(one, distance)).tail(distance - 1)
    texts = other.reorder(spread(other, distance))
    placed, repeated = join(texts, before, distance)
    assert np.array_equal(np.sort(placed), np.arange(len(texts)))
    joined = texts.reorder(placed)
    assert repeated == conflicts(joined, distance, before) <= conflicts(texts, distance, before)
    kept = min(distance - 1, len(texts))
    assert placed[len(texts) - kept :].tolist() == list(range(len(texts) - kept, len(texts)))


@given(st.integers(0, 200))
def test_nothing_is_repeated_across_chunks_with_room(seed: int) -> None:
    first, second = (np.repeat(np.arange(200), 2)[order.permutation(400, seed, part)] for part in (0, 1))
    before = clips(first).reorder(spread(clips(first), 16)).tail(15)
    texts = clips(second).reorder(spread(clips(second), 16))
    assert join(texts, before, 16)[1] == 0


def test_a_text_too_frequent_is_counted_not_searched_for() -> None:
    texts = clips(np.where(np.arange(60_000) % 3, np.arange(60_000), 7))
    begin = time.process_time()
    placed = spread(texts, 32)
    assert time.process_time() - begin < 3.0
    repeated = join(texts.reorder(placed), no_texts(), 32)[1]
    assert repeated == conflicts(texts.reorder(placed), 32) >= 20_000 - 60_000 // 32 - 1


def test_few_repeated_texts_cost_little() -> None:
    keys = order.permutation(1 << 16, 5)
    texts = clips(np.where(keys % 20, keys + 10_000, keys % 2000))
    begin = time.process_time()
    spread(texts, 1024)
    assert (time.process_time() - begin) / (1 << 16) < 3e-6, "about 0.1 us per item on an idle core"


def test_items_of_several_texts_are_kept_apart() -> None:
    texts = Texts(np.asarray([0, 2, 4, 5, 6, 7, 8]), np.asarray([1, 2, 2, 3, 4, 5, 6, 7]))
    assert conflicts(texts, 3) == 1 and conflicts(texts.reorder(spread(texts, 3)), 3) == 0
    assert [len(tag) for tag in plan_texts.tag_items(texts.starts, texts.hashes)] == [1, 1, 0, 0, 0, 0]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=120), st.integers(2, 12))
def test_waiting_counts_what_it_leaves(texts: list[int], distance: int) -> None:
    tags = plan_texts.tag_items(np.arange(len(texts) + 1), np.asarray(texts, dtype=np.int64))
    placed, stuck = plan_texts.wait_for_texts(tags, distance)
    assert np.array_equal(np.sort(placed), np.arange(len(texts)))
    assert bool(conflicts(clips(texts).reorder(placed), distance)) <= bool(stuck)


@pytest.mark.parametrize("blocked, expected", [([], 5), ([(0, 5)], 8), ([(-3, 10)], None), ([(4, 20)], 1)])
def test_widest_gap(blocked: list[tuple[int, int]], expected: int | None) -> None:
    assert plan_texts._widest_gap(blocked, 10) == expected
