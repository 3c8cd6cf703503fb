"""Loading: the same global batches at any world size, exact resume, bad samples replaced alike everywhere."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import DataError
from shards.format.index import read_index
from shards.load.loader import EvalLoader, LoaderOptions, StepBatch, StepLoader
from shards.load.reader import Reader
from shards.order.items import Elements
from shards.order.plan import Cursor, Plan, PlanOptions, Source
from tests.unit.shards.shard_sets import (
    collate_lists,
    fetch_numbers,
    fetch_payload,
    fetch_tokens,
    in_memory,
    write_texts,
    write_videos,
)

PAYLOADS = [bytes([number]) * (40 + number) for number in range(60)]


def clip_plan(samples: int = 40, seed: int = 0) -> Plan:
    return Plan([Source(in_memory("video", [3 + n % 7 for n in range(samples)]))], PlanOptions("clip", seed=seed))


def make(plan: Plan, rank: int = 0, world: int = 1, batch: int = 8, fetch: Any = fetch_numbers, **o: Any) -> StepLoader:
    micro = o.pop("micro_batch", 1)
    return StepLoader(plan, fetch, collate_lists, LoaderOptions(rank, world, batch, micro, **o))


def global_batch(parts: list[StepBatch], micro: int) -> list[Any]:
    """The items of a step in plan order, put together from every rank's micro-batches."""
    slots = len(parts[0].micro_batches)
    assert all(len(part.micro_batches) == slots for part in parts), "every rank has the same number of micro-batches"
    items = [item for slot in range(slots) for part in parts for item in part.micro_batches[slot]["items"]]
    assert len(items) == slots * len(parts) * micro
    return items


def run(plan: Plan, world: int, batch: int, micro: int, steps: int, state: dict[str, Any] | None = None) -> list[Any]:
    """Global batches of some steps, every rank with a loader of its own."""
    loaders = [make(plan, rank, world, batch, micro_batch=micro) for rank in range(world)]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    return [global_batch(list(parts), micro) for parts in islice(zip(*loaders, strict=True), steps)]


PLANS = st.builds(
    lambda kind, lengths, seed: Plan(
        [Source(in_memory("text" if kind == "pack" else "video", lengths))],
        PlanOptions(kind, seed=seed, block_tokens=50, frame_budget=64, length_window=8),
    ),
    st.sampled_from(["clip", "pack", "group"]),
    st.lists(st.integers(1, 40), min_size=4, max_size=60),
    st.integers(0, 2**32),
)


@given(PLANS, st.sampled_from([2, 3, 4, 8, 16, 64]), st.sampled_from([1, 2]), st.integers(1, 3))
def test_global_batches_are_the_same_at_any_world_size(plan: Plan, world: int, micro: int, slots: int) -> None:
    batch = world * micro * slots
    assert run(plan, world, batch, micro, 3) == run(plan, 1, batch, 1, 3)


@given(PLANS, st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 8, 16, 64]), st.integers(1, 4)), min_size=1, max_size=4))
def test_any_interruptions_and_world_sizes_show_every_sample_once_per_epoch(
    plan: Plan, runs: list[tuple[int, int]]
) -> None:
    batch, state, read = 192, plan.state(Cursor()), []
    for world, steps in runs:
        for items in run(plan, world, batch, 1, steps, json.loads(json.dumps(state))):
            read += items
        state = plan.state(plan.advance(Cursor(), len(read)))
    expected, cursor = plan.items(Cursor(), len(read))
    assert read == [[(s, length) for s, _, length in item.tolist()] for item in expected]
    begin = 0
    for number in range(cursor.epoch):  # the finished epochs
        size = len(plan.epoch(number))
        samples = sorted(sample for item in read[begin : begin + size] for sample, _ in item)
        assert samples == sorted(plan.epoch(number).elements["sample"].tolist())
        begin += size


@given(PLANS, st.integers(0, 6))
def test_resume_equals_the_uninterrupted_run(plan: Plan, stop: int) -> None:
    straight = list(islice(make(plan), 8))
    first = make(plan)
    for _ in islice(first, stop):
        pass
    second = make(plan)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = list(islice(second, 8 - stop))
    assert [b.micro_batches for b in rest] == [b.micro_batches for b in straight[stop:]]
    assert [b.cursor_after for b in rest] == [b.cursor_after for b in straight[stop:]]
    assert len(json.dumps(first.state_dict())) < 1024


def test_iterating_again_goes_on_where_the_last_step_ended() -> None:
    straight = [b.micro_batches for b in islice(make(clip_plan()), 5)]
    loader = make(clip_plan())
    parts = [b.micro_batches for b in islice(loader, 2)] + [b.micro_batches for b in islice(loader, 3)]
    assert parts == straight


def test_a_state_of_another_seed_or_index_is_refused_by_name() -> None:
    state = make(clip_plan()).state_dict()
    with pytest.raises(DataError, match="belongs to another order of samples: seed: was 0, is 1"):
        make(clip_plan(seed=1)).load_state_dict(state)
    with pytest.raises(DataError, match="belongs to another order of samples: sources: was"):
        make(clip_plan(samples=41)).load_state_dict(state)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="global_batch=8 is not a multiple of micro_batch=1 x world_size=3"):
        make(clip_plan(), 0, 3, 8)
    with pytest.raises(ValueError, match="rank=2 is outside the world"):
        make(clip_plan(), 2, 2, 8)


def test_loading_leaves_the_random_numbers_of_the_training_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    next(iter(make(clip_plan())))
    assert torch.equal(torch.rand(3), expected)


# -- damaged samples ---------------------------------------------------------------------------------------------------
@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_videos(tmp_path / "videos", PAYLOADS, [3 + n % 5 for n in range(60)])


def damage(folder: Path, *samples: int) -> None:
    shard_set = read_index(folder)
    for sample in samples:
        row = shard_set.row(sample)
        with shard_set.shard_path(row.shard).open("r+b") as handle:
            handle.seek(row.offset)
            handle.write(b"\xff\xfe\xfd")


def disk_plan(folder: Path, **options: Any) -> Plan:
    return Plan([Source(read_index(folder))], PlanOptions(**{"kind": "clip", **options}))


@pytest.mark.parametrize("kind", ["clip", "group"])
def test_damaged_samples_are_replaced_alike_at_every_world_size(shards: Path, kind: str) -> None:
    damage(shards, 4, 5, 17, 59)
    options: dict[str, Any] = {"kind": kind, "frame_budget": 21, "length_window": 16}
    found = []
    for world in (1, 2, 4):
        loaders = [make(disk_plan(shards, **options), r, world, 8, fetch_payload) for r in range(world)]
        steps = list(islice(zip(*loaders, strict=True), 12))
        bad = {b.sample: b for parts in steps for part in parts for b in part.skipped}
        found.append(([global_batch(list(parts), 1) for parts in steps], {s: b.substitute for s, b in bad.items()}))
    assert found[0] == found[1] == found[2]
    substitutes = found[0][1]
    assert set(substitutes) == {4, 5, 17, 59} and not set(substitutes.values()) & {4, 5, 17, 59}
    for items in found[0][0]:
        assert all(payload == PAYLOADS[sample] for item in items for sample, payload in item)


def test_a_damaged_sample_is_reported(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    planned = disk_plan(shards).epoch(0).elements["sample"][:20].tolist()
    damage(shards, planned[5])
    loader = make(disk_plan(shards), batch=20, fetch=fetch_payload)
    steps = list(islice(loader, 6))
    assert [len(step.skipped) for step in steps[:3]] == [1, 0, 0]
    assert [sample for sample, _, _ in steps[0].read()] == planned, "the damaged one stands for its substitute"
    (bad, again) = [b for step in steps for b in step.skipped]
    assert bad.sample == again.sample == planned[5] and bad.key == f"clip{bad.sample:04d}"
    assert bad.shard == f"train-{bad.sample // 10:06d}.tar" and "do not match the CRC-32" in bad.reason
    assert bad.substitute not in planned, "a substitute comes from beyond the step"
    assert [record.getMessage() for record in caplog.records] == [f"damaged sample replaced: {bad}"], "logged once"
    assert list(loader.bad_samples) == [bad.sample]


def test_any_number_of_damaged_samples_is_only_reported(shards: Path) -> None:
    damage(shards, *range(40))
    loader = make(disk_plan(shards), batch=60, fetch=fetch_payload)
    step = next(iter(loader))
    assert len(step.skipped) == len(loader.bad_samples) == 40, "the trainer decides, on all ranks at the same step"


def test_nothing_readable_is_an_error(shards: Path) -> None:
    damage(shards, *range(60))
    with pytest.raises(DataError, match="none of the next 256 items holds a readable sample"):
        next(iter(make(disk_plan(shards), fetch=fetch_payload)))


def test_packs_stay_within_the_block_when_a_document_is_damaged(tmp_path: Path) -> None:
    lengths = [5, 30, 12, 3, 64, 100, 7, 9] * 6
    folder = write_texts(tmp_path / "texts", [np.full(n, n, dtype="<u2") for n in lengths])
    plan = disk_plan(folder, kind="pack", block_tokens=64)
    damage(folder, 0, 1, 4, 20)
    items = len(plan.epoch(0))
    (step,) = islice(make(plan, batch=items, fetch=fetch_tokens), 1)
    assert {bad.sample for bad in step.skipped} == {0, 1, 4, 20}
    for micro_batch in step.micro_batches:
        (item,) = micro_batch["items"]
        assert 0 < sum(len(tokens) for _, tokens in item) <= 64
        assert all((tokens == lengths[sample]).all() for sample, tokens in item)


# -- worker processes --------------------------------------------------------------------------------------------------
def collate_tensors(items: list[list[Any]]) -> dict[str, Any]:
    samples = torch.tensor([sample for item in items for sample, _ in item])
    return {"samples": samples, "worker": os.getpid(), "threads": torch.get_num_threads()}


def in_worker() -> bool:
    return multiprocessing.parent_process() is not None


def fetch_slowly_here(reader: Reader, item: Elements) -> list[tuple[int, bytes]]:
    """Slow in this process, so that the workers have started before it has made many batches."""
    if not in_worker():
        time.sleep(0.2)
    return fetch_payload(reader, item)


def fetch_or_kill(reader: Reader, item: Elements) -> list[tuple[int, bytes]]:
    if in_worker() and item["sample"][0] % 10 == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return fetch_slowly_here(reader, item)


def fetch_or_exit(reader: Reader, item: Elements) -> list[tuple[int, bytes]]:
    if in_worker() and item["sample"][0] % 10 == 7:
        os._exit(3)
    return fetch_slowly_here(reader, item)


def fetch_or_hang(reader: Reader, item: Elements) -> list[tuple[int, bytes]]:
    if in_worker() and item["sample"][0] % 10 == 7:
        time.sleep(600)
    return fetch_slowly_here(reader, item)


def test_workers_change_nothing_and_ignore_the_schedulers_signals(shards: Path) -> None:
    damage(shards, 4, 5)
    seen = []
    for workers in (0, 1, 2):
        plan = disk_plan(shards)
        options = LoaderOptions(0, 1, 12, 3, workers=workers, prefetch=2)
        loader = StepLoader(plan, fetch_slowly_here if workers else fetch_payload, collate_tensors, options)
        steps = []
        remote_pids: set[int] = set()
        for step in islice(loader, 20):
            steps.append(step)
            pids = {micro["worker"] for micro in step.micro_batches} - {os.getpid()}
            if pids and not remote_pids:
                for pid in pids:  # what Slurm sends to every process of a job before it ends
                    os.kill(pid, signal.SIGTERM)
                    os.kill(pid, signal.SIGINT)
            remote_pids |= pids
            assert {micro["threads"] for micro in step.micro_batches if micro["worker"] in remote_pids} <= {1}
        assert len(remote_pids) == workers, "all of them work, and no other does"
        read = [element for step in steps for element in step.read()]
        assert read == plan.items(Cursor(), 12 * len(steps))[0].elements.tolist(), "every step says what it was made of"
        assert steps[0].micro_batches[0]["worker"] == os.getpid(), "the first batch waits for no worker"
        seen.append(
            [
                ([m["samples"].tolist() for m in s.micro_batches], s.cursor_after, [b.sample for b in s.skipped])
                for s in steps
            ]
        )
        assert all(step.wait_seconds >= 0 and step.items == 12 for step in steps)
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize(
    "fetch, timeout, said",
    [
        (fetch_or_kill, 60.0, r"loader process \d+ was killed by SIGKILL"),
        (fetch_or_exit, 60.0, r"loader process \d+ ended with status 3"),
        (fetch_or_hang, 2.0, r"loader process \d+ sent nothing for 2 s"),
    ],
)
def test_a_dead_or_hung_worker_raises(shards: Path, fetch: Any, timeout: float, said: str) -> None:
    loader = make(disk_plan(shards), batch=4, fetch=fetch, workers=1, timeout_seconds=timeout)
    begin = time.monotonic()
    with pytest.raises(DataError, match=said):
        for _ in islice(loader, 200):
            pass
    assert time.monotonic() - begin < 30


def test_an_error_in_a_worker_keeps_its_parts(shards: Path) -> None:
    damage(shards, *range(60))
    with pytest.raises(DataError) as caught:
        next(iter(make(disk_plan(shards), fetch=fetch_payload, workers=1)))
    assert "holds a readable sample" in caught.value.what and "clip00" in caught.value.where and caught.value.fix


# -- evaluation --------------------------------------------------------------------------------------------------------
@given(st.integers(1, 40), st.sampled_from([1, 2, 3, 8, 64]), st.integers(1, 5))
def test_evaluation_sees_every_sample_once_over_all_ranks(n: int, world: int, micro: int) -> None:
    plan = Plan([Source(in_memory("video", [4] * n))], PlanOptions("clip", shuffle=False))
    ranks = [EvalLoader(plan, fetch_numbers, collate_lists, r, world, micro) for r in range(world)]
    padded = [list(loader.padded()) for loader in ranks]
    assert {len(batches) for batches in padded} == {len(ranks[0])}, "the same number of collective calls everywhere"
    assert all(batch["items"] for batches in padded for batch, _ in batches), "padding is a real batch"
    seen = sorted(sample for batches in padded for _, samples in batches for sample in samples)
    assert seen == list(range(n))
    for batches in padded:
        for batch, samples in batches:
            assert not samples or [sample for item in batch["items"] for sample, _ in item] == samples


def test_evaluation_can_be_limited_to_some_items_whatever_the_world_size() -> None:
    plan = Plan([Source(in_memory("video", [4] * 30))], PlanOptions("clip", shuffle=False))
    for world in (1, 2, 4):
        loaders = [EvalLoader(plan, fetch_numbers, collate_lists, r, world, 2, max_samples=10) for r in range(world)]
        assert sorted(s for loader in loaders for _, samples in loader for s in samples) == list(range(10))


def test_evaluation_stops_at_a_damaged_sample(shards: Path) -> None:
    damage(shards, 3)
    with pytest.raises(DataError, match=r"clip0003 .*do not match the CRC-32"):
        list(EvalLoader(disk_plan(shards, shuffle=False), fetch_payload, collate_lists))


def test_options_are_plain_values() -> None:
    options = LoaderOptions(1, 2, 16, 4)
    assert options.accumulation_steps == 2 and [options.slot_offset(slot) for slot in (0, 1)] == [4, 12]
    assert dataclasses.replace(options, workers=3).workers == 3
