"""The resume matrix in one process: {1, 2, 3, 4, 8, 16, 64} ranks, any stops, any changes of the global batch."""

from __future__ import annotations

import json
from itertools import islice, product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.load.loader import LoaderOptions, StepLoader
from shards.order.plan import Cursor, Plan, PlanOptions, Source
from tests.unit.shards.shard_sets import collate_lists, fetch_numbers, in_memory

WORLDS = (1, 2, 3, 4, 8, 16, 64)
SAMPLES = 331


def make_plan(kind: str) -> Plan:
    lengths = [1 + (number * 37) % 40 for number in range(SAMPLES)]
    options = PlanOptions(kind, seed=5, block_tokens=64, frame_budget=80, length_window=16)  # type: ignore[arg-type]
    return Plan([Source(in_memory("text" if kind == "pack" else "video", lengths))], options)


PLANS = {kind: make_plan(kind) for kind in ("clip", "pack", "group")}


def read(plan: Plan, world: int, batch: int, micro: int, state: dict[str, Any], count: int) -> list[list[Any]]:
    """``count`` global batches as lists of items in plan order; every rank has the same number of micro-batches."""
    ranks = []
    for rank in range(world):
        options = LoaderOptions(rank, world, batch, micro)
        loader = StepLoader(plan, fetch_numbers, collate_lists, options)
        loader.load_state_dict(json.loads(json.dumps(state)))
        ranks.append(list(islice(loader, count)))
    assert {len(step.micro_batches) for steps in ranks for step in steps} == {batch // (world * micro)}
    slots = range(batch // (world * micro))
    return [
        [item for slot in slots for steps in ranks for item in steps[number].micro_batches[slot]["items"]]
        for number in range(count)
    ]


@pytest.mark.parametrize("kind", sorted(PLANS))
def test_global_batches_are_identical_in_every_world(kind: str) -> None:
    plan, state = PLANS[kind], PLANS[kind].state(Cursor())
    for batch in (192, 384):
        found = [read(plan, world, batch, 1, state, 2) for world in WORLDS]
        assert all(batches == found[0] for batches in found)


@pytest.mark.parametrize("kind", sorted(PLANS))
def test_every_change_of_world_and_batch_at_once(kind: str) -> None:
    """All 49 pairs of worlds in turn, with another global batch each time: nothing lost, nothing twice."""
    plan, got = PLANS[kind], []
    for number, (one, two) in enumerate(product(WORLDS, WORLDS)):
        for world in (one, two):
            state = plan.state(plan.advance(Cursor(), len(got)))
            assert len(json.dumps(state)) < 1024
            for items in read(plan, world, world * (1 + number % 3), 1, state, 1):
                got += items
    expected, cursor = plan.items(Cursor(), len(got))
    assert got == [[(sample, length) for sample, _, length in item.tolist()] for item in expected]
    assert cursor.epoch >= 2


@given(
    st.sampled_from(sorted(PLANS)),
    st.lists(st.tuples(st.sampled_from(WORLDS), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3)), max_size=6),
)
def test_any_interruptions(kind: str, runs: list[tuple[int, int, int, int]]) -> None:
    plan, got = PLANS[kind], []
    for world, slots, micro, steps in runs:
        state = plan.state(plan.advance(Cursor(), len(got)))
        for items in read(plan, world, world * slots * micro, micro, state, steps):
            got += items
    expected, _ = plan.items(Cursor(), len(got))
    assert got == [[(sample, length) for sample, _, length in item.tolist()] for item in expected]
