"""Packing and grouping: nothing lost, nothing cut without need, budgets kept, packs full."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.order.items import Items
from shards.order.packing import best_fit, clips, cut_documents, group, pack, sort_windows

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=120)


def _array(values: list[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.int64)


@given(LENGTHS, st.integers(1, 128))
def test_every_token_is_packed_once_and_only_long_documents_are_cut(lengths: list[int], block: int) -> None:
    items = pack(np.arange(len(lengths)), _array(lengths), block)
    seen = [np.zeros(length, dtype=int) for length in lengths]
    pieces = [0] * len(lengths)
    for sample, start, length in items.elements.tolist():
        seen[sample][start : start + length] += 1
        pieces[sample] += 1
    assert all((tokens == 1).all() for tokens in seen)
    assert pieces == [-(-length // block) for length in lengths]
    totals = np.add.reduceat(items.elements["length"], items.starts[:-1])
    assert totals.max() <= block and totals.min() > 0
    assert items.starts[-1] == len(items.elements)


@given(LENGTHS, st.integers(300, 600), st.integers(1, 8))
def test_best_fit_numbers_packs_by_first_piece_and_never_overfills(lengths: list[int], capacity: int, n: int) -> None:
    packs, count = best_fit(_array(lengths), capacity, open_packs=n)
    assert np.bincount(packs, weights=lengths).max() <= capacity
    firsts = [packs.tolist().index(number) for number in range(count)]
    assert firsts == sorted(firsts) and set(packs.tolist()) == set(range(count))


def test_best_fit_takes_the_pack_it_fills_best() -> None:
    packs, count = best_fit(_array([6, 7, 3, 4]), 10)
    assert packs.tolist() == [0, 1, 1, 0] and count == 2


def test_packs_left_open_are_packed_again() -> None:
    # Online: 4 + 4 + 1, 6, 5. Once more at the end, longest first: 6 + 4, 5 + 4 + 1.
    packs, count = best_fit(_array([4, 4, 6, 5, 1]), 10)
    assert count == 2 and np.bincount(packs, weights=[4, 4, 6, 5, 1]).tolist() == [10, 10]


@pytest.mark.parametrize("block", [1024, 2048])
@pytest.mark.parametrize("kind", ["web", "captions", "mixed"])
def test_utilisation_is_above_99_percent_at_a_microsecond_per_document(kind: str, block: int) -> None:
    random = np.random.default_rng(0)
    short, long = random.integers(5, 60, 50_000), random.integers(1000, 8000, 50_000)
    lengths = {
        "web": np.minimum(random.lognormal(np.log(493), 1.1, 50_000), 100_000).astype(np.int64) + 1,
        "captions": np.clip(random.normal(28, 12, 50_000), 3, 200).astype(np.int64),
        "mixed": np.where(random.random(50_000) < 0.8, short, long),
    }[kind]
    begin = time.process_time()
    items = pack(np.arange(len(lengths)), lengths, block)
    seconds = time.process_time() - begin
    assert lengths.sum() / (len(items) * block) >= 0.99
    assert seconds / len(lengths) < 5e-6, "about 0.4 us/document on an idle core"


def test_long_documents_become_consecutive_pieces() -> None:
    pieces = cut_documents(_array([7, 3]), _array([25, 10]), 10)
    assert pieces.tolist() == [(7, 0, 10), (7, 10, 10), (7, 20, 5), (3, 0, 10)]


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=150), st.integers(100, 400), st.sampled_from([0, 7, 32]),
    st.booleans(), st.integers(1, 40),
)  # fmt: skip
def test_groups_hold_every_clip_once_within_the_budget(
    lengths: list[int], budget: int, window: int, unique: bool, texts: int
) -> None:
    hashes = _array([number % texts for number in range(len(lengths))])
    items, windows = group(np.arange(len(lengths)), _array(lengths), budget, window, hashes if unique else None)
    assert sorted(items.elements["sample"].tolist()) == list(range(len(lengths)))
    for number in range(len(items)):
        members = items.item(number)
        assert len(members) * members["length"].max() <= budget
        if window:
            assert set((members["sample"] // window).tolist()) == {windows[number]}
        if unique:
            assert len(set(hashes[members["sample"]].tolist())) == len(members)


def test_a_clip_longer_than_the_budget_is_a_group_of_its_own() -> None:
    items, _ = group(np.arange(3), _array([10, 500, 10]), 100, 0)
    assert [items.item(n)["sample"].tolist() for n in range(len(items))] == [[0], [1], [2]]


def test_sorting_by_length_stays_inside_its_window() -> None:
    assert sort_windows(_array([3, 1, 2, 9, 8, 7, 5]), 3).tolist() == [1, 2, 0, 5, 4, 3, 6]


def test_reordering_items_keeps_their_elements() -> None:
    items = Items(np.asarray([0, 2, 3, 6]), clips(np.arange(6), np.arange(6)).elements)
    turned = items.reorder(np.asarray([2, 0, 1]), 4)
    assert [turned.item(n)["sample"].tolist() for n in range(3)] == [[3, 4, 5], [0, 1], [2]]
    assert turned.repeated_texts == 4
