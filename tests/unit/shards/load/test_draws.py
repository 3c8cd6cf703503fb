"""Random numbers of a showing: fixed for ever, independent of processes, one stream per purpose."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.errors import DataError
from shards.format.index import read_index
from shards.load.draws import Draw, Purpose, turn
from shards.load.loader import EvalLoader, LoaderOptions, StepBatch, StepLoader
from shards.load.reader import SampleReader
from shards.order.items import Elements
from shards.order.plan import Cursor, Plan, PlanOptions, Source
from tests.unit.shards.shard_sets import collate_lists, in_memory, write_videos

BROKEN = 7


class FetchDrawn:
    """Raw sample = its number, its showing and a random number."""

    draws = True

    def __call__(self, reader: SampleReader, item: Elements) -> list[tuple[int, int, float]]:
        raws = []
        for element in item:
            sample, showing = int(element["sample"]), int(element["showing"])
            if sample == BROKEN:
                raise DataError("broken", where="here", fix="none")
            draw = Draw(Purpose.TIME, reader.plan.options.seed, sample, showing)
            raws.append((sample, showing, draw.random()))
        return raws


def fetch_names(reader: SampleReader, item: Elements) -> list[Any]:
    del reader
    return [item.dtype.names]


def plan_of(seed: int = 1) -> Plan:
    return Plan(
        [Source(in_memory("video", [3] * 30), weight=2.0), Source(in_memory("video", [5] * 11, "b"), weight=0.6)],
        PlanOptions("clip", seed=seed),
    )


def steps(plan: Plan, world: int, workers: int = 0, state: dict[str, Any] | None = None, count: int = 12) -> list[Any]:
    """Global batches of 6, put together in plan order from all ranks."""
    loaders = [
        StepLoader(plan, FetchDrawn(), collate_lists, LoaderOptions(r, world, 6, 1, workers)) for r in range(world)
    ]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    ranks: Sequence[list[StepBatch]] = [list(islice(loader, count)) for loader in loaders]
    return [
        [step.micro_batches[slot]["items"][0] for slot in range(6 // world) for step in parts]
        for parts in zip(*ranks, strict=True)
    ]


def test_numbers_are_fixed_for_ever() -> None:
    draw = Draw(Purpose.PICTURE, 1, 2, 3)
    assert [draw.random() for _ in range(3)] == [0.429023305783122, 0.14016694338761237, 0.6625637755766166]
    assert draw.integers(1000) == 664


def test_a_draw_keeps_to_its_limits() -> None:
    draw = Draw(Purpose.PICTURE, 0, 0, 0)
    assert draw.uniform(0.5, 0.5) == 0.5
    assert {draw.integers(3) for _ in range(100)} == {0, 1, 2}
    assert {draw.choice("ab") for _ in range(50)} == {"a", "b"}
    assert not any(draw.chance(0.0) for _ in range(1000)) and all(draw.chance(1.0) for _ in range(1000))
    many = draw.randoms(20_000)
    assert many.min() >= 0 and many.max() < 1 and abs(many.mean() - 0.5) < 0.01 and abs(many.var() - 1 / 12) < 0.002


def test_many_at_once_equal_one_by_one() -> None:
    one, other = (Draw(Purpose.VIEW, 5, 6, 7) for _ in range(2))
    assert one.randoms(5).tolist() == [other.random() for _ in range(5)]


def test_every_part_of_the_identity_counts() -> None:
    keys = [(p, s, n, t) for p in (Purpose.TIME, Purpose.VIEW) for s in (0, 1) for n in (0, 1) for t in (0, 1)]
    assert len({Draw(*key).random() for key in keys}) == len(keys)


def test_the_same_numbers_for_any_ranks_and_after_a_resume() -> None:
    plan = plan_of()
    whole = steps(plan, 1)
    assert whole == steps(plan, 2) == steps(plan, 3)
    resumed = steps(plan, 2, state=plan.state(plan.advance(Cursor(), 30)), count=7)
    assert resumed == whole[5:]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_numbers_for_any_workers(workers: int, tmp_path: Path) -> None:
    folder = write_videos(tmp_path / "set", [bytes([n]) * 40 for n in range(20)], [3] * 20)
    plan = Plan([Source(read_index(folder), weight=2.0)], PlanOptions("clip", seed=1))
    assert steps(plan, 1, workers) == steps(plan, 1)


def test_a_substitute_has_its_own_showing() -> None:
    found = [raw for step in steps(plan_of(), 2) for raw in step]
    assert all(sample != BROKEN for ((sample, _, _),) in found)
    assert all(number == Draw(Purpose.TIME, 1, sample, showing).random() for ((sample, showing, number),) in found)


def test_only_a_fetch_that_draws_is_given_showings() -> None:
    loader = StepLoader(plan_of(), fetch_names, collate_lists, LoaderOptions(0, 1, 4, 2))
    assert next(iter(loader)).micro_batches[0]["items"][0] == [("sample", "start", "length")]
    ((batch, _), *_) = EvalLoader(plan_of(), fetch_names, collate_lists)
    assert batch["items"][0] == [("sample", "start", "length")]


def test_the_ledger_reads_what_was_shown() -> None:
    plan = plan_of()
    step = next(iter(StepLoader(plan, FetchDrawn(), collate_lists, LoaderOptions(0, 1, 4, 2))))
    items, _ = plan.items(Cursor(), 4)
    assert step.read() == items.elements.tolist()
    assert np.frombuffer(step.elements, dtype=items.elements.dtype).tolist() == items.elements.tolist()


def test_every_one_has_its_turn_once_before_any_comes_again() -> None:
    for sample in range(5):
        turns = [turn(Purpose.VIEW, 3, sample, showing, 4) for showing in range(12)]
        assert all(sorted(turns[at : at + 4]) == [0, 1, 2, 3] for at in (0, 4, 8))
    firsts = {tuple(turn(Purpose.VIEW, 3, sample, showing, 4) for showing in range(4)) for sample in range(40)}
    assert len(firsts) > 10, "each sample has an order of its own"
    assert turn(Purpose.VIEW, 3, 0, 9, 1) == 0
