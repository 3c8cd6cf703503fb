"""Showings: how often the run has shown a sample before, for every element, by arithmetic."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shards.order import chunks as chunk_module
from shards.order.items import ELEMENT, SHOWN_ELEMENT, without_showings
from shards.order.plan import Cursor, Plan, PlanOptions, Source
from tests.unit.shards.shard_sets import in_memory

SOURCES = st.lists(
    st.tuples(st.integers(1, 30), st.sampled_from([1.0, 0.3, 0.7, 2.0, 3.4, [(0, 2.0), (2, 0.5)]])),
    min_size=1,
    max_size=3,
)


def plan_of(sources: list[tuple[int, object]], **options: object) -> Plan:
    made = [
        Source(in_memory("video", [1 + n % 9 for n in range(count)], f"set{number}"), weight=weight)  # type: ignore[arg-type]
        for number, (count, weight) in enumerate(sources)
    ]
    return Plan(made, PlanOptions(**{"kind": "clip", "seed": 3, **options}))  # type: ignore[arg-type]


@given(
    SOURCES, st.sampled_from(["clip", "group"]), st.booleans(), st.sampled_from([0, 7]), st.sampled_from([3, 1 << 16])
)
def test_every_showing_of_a_sample_has_the_next_number(
    sources: list[tuple[int, object]], kind: str, shuffle: bool, epoch_samples: int, chunk: int
) -> None:
    """Of each sample the numbers up to the last are all there, once each, and no later epoch has a lower one."""
    plan = plan_of(sources, kind=kind, shuffle=shuffle, epoch_samples=epoch_samples, frame_budget=20, length_window=4)
    plan.chunks.size = chunk
    seen: Counter[int] = Counter()
    for epoch in range(4):
        for number in range(plan.chunks.count(epoch)):
            elements = plan._make_shown(epoch, number).elements
            for sample in np.unique(elements["sample"]).tolist():
                found = sorted(elements["showing"][elements["sample"] == sample].tolist())
                assert found == list(range(seen[sample], seen[sample] + len(found)))
                seen[sample] += len(found)


def test_a_showing_is_the_epoch_where_every_sample_is_shown_once_per_epoch() -> None:
    plan = plan_of([(20, 1.0), (13, 1.0)])
    items, cursor = plan.items(Cursor(), 33 * 3, showings=True)
    assert items.elements["showing"].tolist() == [0] * 33 + [1] * 33 + [2] * 33
    assert cursor.epoch == 3


def test_shown_elements_are_those_of_the_plan_with_one_more_field() -> None:
    plan = plan_of([(20, 2.0), (9, 0.5)])
    plain, after = plan.items(Cursor(0, 0, 5, 5), 70)
    shown, also_after = plan.items(Cursor(0, 0, 5, 5), 70, showings=True)
    assert (plain.elements.dtype, shown.elements.dtype) == (ELEMENT, SHOWN_ELEMENT) and after == also_after
    assert without_showings(shown.elements).tobytes() == plain.elements.tobytes()
    assert shown.starts.tolist() == plain.starts.tolist()


def test_occurrences_before_equal_a_loop() -> None:
    values = np.random.default_rng(0).integers(0, 6, 200)
    seen: Counter[int] = Counter()
    expected = []
    for value in values.tolist():
        expected.append(seen[value])
        seen[value] += 1
    assert chunk_module._occurrences_before(values).tolist() == expected
    assert chunk_module._occurrences_before(values[:0]).tolist() == []
