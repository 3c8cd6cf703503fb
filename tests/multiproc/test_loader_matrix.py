"""The resume matrix with real worker processes: worlds x workers x global batches, one after another."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from shards.format.index import read_index
from shards.load.loader import LoaderOptions, StepLoader
from shards.order.plan import Cursor, Plan, PlanOptions, Source
from tests.unit.shards.shard_sets import collate_lists, fetch_payload, write_videos

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
SAMPLES = 96
# (world, workers, global batch): every run goes on where the one before stopped
RUNS = [(1, 0, 12), (2, 1, 12), (3, 2, 12), (4, 4, 32), (8, 0, 64), (16, 0, 16), (64, 0, 64), (1, 2, 5), (2, 0, 6)]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    payloads = [bytes([number]) * (30 + number) for number in range(SAMPLES)]
    folder = write_videos(tmp_path_factory.mktemp("matrix") / "set", payloads, [2 + n % 5 for n in range(SAMPLES)])
    return Plan([Source(read_index(Path(folder)))], PlanOptions("clip", seed=7))


def steps(plan: Plan, world: int, workers: int, batch: int, state: dict[str, Any], count: int) -> list[list[int]]:
    """Samples of ``count`` global batches, put together in plan order from all ranks.

    Of a large world only the first two ranks get worker processes: each pair costs seconds.
    """
    parts = []
    for rank in range(world):
        options = LoaderOptions(rank, world, batch, 1, workers if rank < 2 else 0)
        loader = StepLoader(plan, fetch_payload, collate_lists, options)
        loader.load_state_dict(json.loads(json.dumps(state)))
        parts.append(list(islice(loader, count)))
        assert len(json.dumps(loader.state_dict())) < 1024
    assert {len(step.micro_batches) for part in parts for step in part} == {batch // world}
    return [
        [parts[r][n].micro_batches[s]["items"][0][0][0] for s in range(batch // world) for r in range(world)]
        for n in range(count)
    ]


def test_resume_matrix(plan: Plan) -> None:
    read: list[int] = []
    for world, workers, batch in RUNS:
        state = plan.state(plan.advance(Cursor(), len(read)))
        for samples in steps(plan, world, workers, batch, state, 3):
            read += samples
    assert read == [int(item["sample"][0]) for item in plan.items(Cursor(), len(read))[0]]
    for epoch in range(len(read) // SAMPLES):
        assert sorted(read[epoch * SAMPLES : (epoch + 1) * SAMPLES]) == list(range(SAMPLES))


def test_equal_global_batches_in_every_world_and_for_any_workers(plan: Plan) -> None:
    state = plan.state(Cursor())
    found = [steps(plan, world, workers, 64, state, 2) for world, workers in [(1, 0), (1, 4), (2, 2), (8, 0), (64, 0)]]
    assert all(batches == found[0] for batches in found)
