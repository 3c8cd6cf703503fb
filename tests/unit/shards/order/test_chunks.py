"""Random corpora, weights, schedules, worlds and interruptions: counts are exact, and no step depends on the past."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.format.index import ShardSet
from shards.load.requests import LoaderOptions
from shards.order.figures import stats
from shards.order.mix import Weight
from shards.order.plan import Cursor, Plan, PlanOptions, Source
from shards.schema import Kind, Manifest
from tests.unit.shards.shard_sets import in_memory

LARGEST = 20_000


@functools.cache
def _rows(kind: Kind) -> ShardSet:
    lengths = 1 + np.arange(LARGEST) * 7919 % 60
    texts = np.where(np.arange(LARGEST) % 5, np.arange(LARGEST), np.arange(LARGEST) // 5 % 300)
    return in_memory(kind, lengths.tolist(), text_hash=texts.tolist())


def source(kind: Kind, size: int, weight: Weight) -> Source:
    """The first rows of a large set."""
    table = _rows(kind).table.slice(0, size)
    manifest = Manifest(kind, fingerprint=f"{size:064x}", options={"text_tokenizer": "abc"})
    return Source(ShardSet(Path("/nowhere"), manifest, table), weight=weight)


KINDS = {
    "clip": PlanOptions("clip", length_window=64, unique_texts_window=8),
    "pack": PlanOptions("pack", block_tokens=100),
    "group": PlanOptions("group", frame_budget=256, length_window=64, unique_texts_window=4),
    "sequence": PlanOptions("sequence", block_tokens=100, frames_per_token=2, prompt_tokens=3, tokenizer="abc"),
}
GOLDEN = {
    "clip": "6d94891b42159eb2",
    "group": "a5e7e30dda74b275",
    "pack": "5511ddd30b63ccc2",
    "sequence": "9fc7544b6ebbae67",
}
WEIGHTS = st.one_of(
    st.floats(0.05, 2.5),
    st.tuples(st.integers(0, 2), st.floats(0.1, 2), st.floats(0, 2)).map(lambda v: ((v[0], v[1]), (v[0] + 2, v[2]))),
)
SIZES = st.one_of(st.integers(1, 300), st.integers(1, LARGEST))


def planned(sources: list[Source], options: PlanOptions, chunk_samples: int) -> Plan:
    """A plan of small chunks."""
    plan = Plan(sources, options)
    plan.chunks.size = chunk_samples
    return plan


@st.composite
def plans(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(KINDS), small: bool = True) -> tuple[Plan, int]:
    """A plan of chunks of 256 samples, and its first epochs that are worth a look."""
    kind = draw(st.sampled_from(kinds))
    stored: Kind = "text" if kind == "pack" else "video"
    sizes = draw(st.lists(st.integers(1, 400) if small else SIZES, min_size=1, max_size=4))
    weights = [draw(st.floats(0.05, 2.5)), *(draw(WEIGHTS) for _ in sizes[1:])]
    virtual = draw(st.sampled_from([0, 0, 97, 700]))
    options = dataclasses.replace(
        KINDS[kind], seed=draw(st.integers(0, 2**40)), epoch_samples=virtual, shuffle=draw(st.booleans())
    )
    return planned(
        [source(stored, n, w) for n, w in zip(sizes, weights, strict=True)], options, 256 if small else 8192
    ), 3


@settings(deadline=None, max_examples=40)
@given(plans(small=False))
def test_samples_are_shown_exactly_as_often_as_defined(drawn: tuple[Plan, int]) -> None:
    plan, epochs = drawn
    shown = np.zeros(len(plan.samples), dtype=np.int64)
    firsts = np.cumsum([0, *plan.samples.counts])
    for epoch in range(epochs):
        orders = [plan.chunks.order(epoch, chunk) for chunk in range(plan.chunks.count(epoch))]
        shown += np.bincount(np.concatenate(orders), minlength=len(plan.samples))
        begins = plan.mixture.begins(epoch + 1)
        for number, (begin, end) in enumerate(itertools.pairwise(firsts)):
            mine = shown[begin:end]
            assert mine.sum() == begins[number], "a source gives exactly its quota"
            assert mine.max() - mine.min() <= 1, "and all of its samples equally often, give or take one"
        if plan.options.epoch_samples:
            assert sum(map(len, orders)) == plan.options.epoch_samples


@settings(deadline=None, max_examples=60)
@given(plans())
def test_items_hold_what_the_order_says(drawn: tuple[Plan, int]) -> None:
    plan, epochs = drawn
    for epoch in range(epochs):
        for chunk, items in enumerate(plan.chunks.of_epoch(epoch)):
            samples = plan.chunks.order(epoch, chunk)
            whole = items.elements["sample"]
            assert np.array_equal(np.sort(whole), np.sort(samples))
            assert np.array_equal(items.elements["length"], plan.chunks.lengths(whole))
            assert items.starts[-1] == len(samples) and (len(items) > 0) == (len(samples) > 0)


@settings(deadline=None, max_examples=60)
@given(plans(), st.randoms(use_true_random=False))
def test_chunks_are_the_same_in_whatever_order_they_are_asked_for(drawn: tuple[Plan, int], random: object) -> None:
    plan, epochs = drawn
    keys = [(epoch, chunk) for epoch in range(epochs) for chunk in range(plan.chunks.count(epoch))][:12]
    straight = {key: plan.chunks.make(*key) for key in keys}
    random.shuffle(keys)  # type: ignore[attr-defined]
    other = planned(list(plan.sources), plan.options, plan.chunks.size)
    for key in keys:
        made = other.chunks.make(*key)
        assert np.array_equal(made.elements, straight[key].elements)
        assert np.array_equal(made.starts, straight[key].starts)
        assert made.repeated_texts == straight[key].repeated_texts


def steps(plan: Plan, cursor: Cursor, world: int, batch: int, count: int) -> Iterator[tuple[list[list[int]], Cursor]]:
    """Global batches as the ranks of a world read them, put together again."""
    options = [LoaderOptions(rank, world, batch, 1) for rank in range(world)]
    for _ in range(count):
        found = []
        for slot in range(options[0].accumulation_steps):
            for mine in options:
                found += plan.items(plan.advance(cursor, mine.slot_offset(slot)), 1)[0]
        cursor = plan.advance(cursor, batch)
        yield [item["sample"].tolist() for item in found], cursor


RUNS = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 5, 8, 64]), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=5
)


@settings(deadline=None, max_examples=60)
@given(plans(), RUNS)
def test_any_interruptions_worlds_and_batches_read_the_uninterrupted_order(
    drawn: tuple[Plan, int], runs: list[tuple[int, int, int]]
) -> None:
    plan, _ = drawn
    read: list[list[int]] = []
    state = plan.state(Cursor())
    for world, slots, count in runs:
        fresh = planned(list(plan.sources), plan.options, plan.chunks.size)
        cursor = fresh.restore(json.loads(json.dumps(state)))
        for batch, after in steps(fresh, cursor, world, world * slots, count):
            read += batch
            state = fresh.state(after)
        assert len(json.dumps(state)) < 1024
    expected, cursor = plan.items(Cursor(), len(read))
    assert read == [item["sample"].tolist() for item in expected]
    assert state == plan.state(cursor) and cursor.consumed == len(read)


@settings(deadline=None, max_examples=40)
@given(plans(("clip",)))
def test_sizes_of_clip_chunks_are_arithmetic(drawn: tuple[Plan, int]) -> None:
    plan, _ = drawn
    assert plan.items_per_epoch == sum(map(len, plan.chunks.of_epoch(0))) == len(plan.epoch(0))


@settings(deadline=None, max_examples=30)
@given(plans(("clip", "group")))
def test_repeated_texts_are_counted_over_chunk_borders(drawn: tuple[Plan, int]) -> None:
    plan, epochs = drawn
    distance = plan.options.unique_texts_window
    last: dict[int, int] = {}
    position = 0
    for epoch in range(epochs):
        for items in plan.chunks.of_epoch(epoch):
            found = 0
            for number in range(len(items)):
                texts = set(plan.samples.columns["text_hash"][items.item(number)["sample"]].tolist())
                found += any(position - last[text] < distance for text in texts if text in last)
                last |= dict.fromkeys(texts, position)
                position += 1
            assert items.repeated_texts <= found, "a chunk looks back as far as the chunk before it"
            if len(items) >= distance:
                assert found <= items.repeated_texts or epoch + position < 2 * distance


def test_sources_are_spread_over_the_epoch() -> None:
    plan = Plan([source("video", 1000, 1.0), source("video", 100, 1.0)], PlanOptions("clip", seed=1))
    mixed = plan.chunks.order(0, 0)
    assert np.array_equal(np.sort(mixed), np.arange(1100))
    assert [int((mixed[at : at + 110] >= 1000).sum()) for at in range(0, 1100, 110)] == [10] * 10


def test_chunks_continue_the_order_of_the_epoch() -> None:
    """Where an epoch is cut into chunks does not change the order of its samples."""
    sources = [source("video", 9000, 1.0), source("video", 700, 1.5), source("video", 1, 1.0)]
    whole = Plan(sources, PlanOptions("clip", seed=1))
    cut = planned(sources, PlanOptions("clip", seed=1), 999)
    assert whole.chunks.count(1) == 1 and cut.chunks.count(1) == 11
    assert np.array_equal(cut.epoch(1).elements, whole.epoch(1).elements)


def test_without_shuffle_the_sources_follow_one_another() -> None:
    sources = [source("video", 3, 1.0), source("video", 2, 2.0)]
    assert Plan(sources, PlanOptions("clip", shuffle=False)).epoch(4).elements["sample"].tolist() == [
        0,
        1,
        2,
        3,
        4,
        3,
        4,
    ]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_many_sources_of_one_sample_meet_in_the_middle(kind: str) -> None:
    """Chunks may be empty then; steps go over them."""
    one = source("text" if kind == "pack" else "video", 1, 1.0)
    plan = planned([one] * 60, KINDS[kind], 10)
    assert [len(items) > 0 for items in plan.chunks.of_epoch(0)] == [False] * 3 + [True] + [False] * 2
    items, cursor = plan.items(Cursor(), 2 * plan.items_per_epoch)
    assert sorted(s for item in items for s in item["sample"].tolist()) == sorted([*range(60)] * 2)
    assert cursor == plan.advance(Cursor(), len(items)) and cursor.epoch == 2
    assert stats(plan)["samples"] == 60


def test_short_documents_in_long_blocks_make_larger_chunks() -> None:
    short = PlanOptions("pack", block_tokens=32_768)
    assert Plan([source("text", LARGEST, 1.0)], short).chunks.size == 9 * (1 << 16)
    assert Plan([source("text", LARGEST, 1.0)], KINDS["pack"]).chunks.size == 1 << 16
    assert Plan([source("text", LARGEST, 1.0)], dataclasses.replace(short, block_tokens=1 << 20)).chunks.size == 1 << 20


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_plan_is_the_same_on_every_machine(kind: str) -> None:
    """Golden values: a change here breaks the resume of every run and must raise ORDER_VERSION."""
    stored: Kind = "text" if kind == "pack" else "video"
    sources = [source(stored, 18_000, 0.7), source(stored, 900, ((0, 1.5), (2, 0.5)))]
    items = planned(sources, dataclasses.replace(KINDS[kind], seed=11), 5000).epoch(1)
    digest = hashlib.sha256(items.starts.astype("<i8").tobytes())
    for name in ("sample", "start", "length"):
        digest.update(items.elements[name].astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == GOLDEN[kind]
