"""A reader killed at any moment: the next one, in any world, shows every sample once, and nothing stays behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from shards.format.index import read_index
from shards.order.plan import Cursor, Plan, PlanOptions, Source
from tests.source_tree import ROOT
from tests.unit.shards.shard_sets import write_videos

SAMPLES, BATCH = 120, 12

# One rank: reads steps, writes "samples, state" of each as one line, and goes on until it is killed.
READER = """
import json, sys, time
from shards.format.index import read_index
from shards.load.loader import LoaderOptions, StepLoader
from shards.order.plan import Plan, PlanOptions, Source
from tests.unit.shards.shard_sets import collate_lists, fetch_payload
folder, log, rank, world, batch, workers, state = sys.argv[1:]
plan = Plan([Source(read_index(folder))], PlanOptions("clip", seed=3))
options = LoaderOptions(int(rank), int(world), int(batch), 1, int(workers))
loader = StepLoader(plan, fetch_payload, collate_lists, options)
loader.load_state_dict(json.loads(state))
with open(log, "w", buffering=1) as out:
    for step in loader:
        items = [item for micro in step.micro_batches for item in micro["items"]]
        out.write(json.dumps([[s for item in items for s, _ in item], loader.state_dict()]) + "\\n")
        time.sleep(0.02)
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    payloads = [bytes([number]) * (40 + number) for number in range(SAMPLES)]
    return write_videos(tmp_path_factory.mktemp("kill") / "set", payloads, [3] * SAMPLES)


def start(folder: Path, log: Path, share: tuple[int, int, int, int], state: str) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-c", READER, str(folder), str(log), *map(str, share), state]
    return subprocess.Popen(program, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def lines(log: Path) -> list[tuple[list[int], dict[str, object]]]:
    """The complete lines; the kill may have cut the last one."""
    text = log.read_text() if log.exists() else ""
    return [tuple(json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]


def run_until_killed(folder: Path, log: Path, world: int, workers: int, state: str, steps: int) -> list[list[int]]:
    """Samples of each step that all ranks finished, in step order, after killing every rank with SIGKILL."""
    logs = [log.with_suffix(f".{rank}") for rank in range(world)]
    ranks = [start(folder, path, (rank, world, BATCH, workers), state) for rank, path in enumerate(logs)]
    deadline = time.monotonic() + 60
    try:
        while min(len(lines(path)) for path in logs) < steps:
            assert time.monotonic() < deadline and all(process.poll() is None for process in ranks)
            time.sleep(0.01)
    finally:
        for process in ranks:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    parts = [lines(path) for path in logs]
    return [[sample for part in parts for sample in part[number][0]] for number in range(min(map(len, parts)))]


def test_killed_readers_lose_and_repeat_nothing(shards: Path, tmp_path: Path) -> None:
    """Four runs in worlds of 1, 3, 2 and 1 ranks with 2, 1, 0 and 1 workers; every rank dies by SIGKILL."""
    plan = Plan([Source(read_index(shards))], PlanOptions("clip", seed=3))
    read: list[list[int]] = []
    for number, (world, workers) in enumerate([(1, 2), (3, 1), (2, 0), (1, 1)]):
        state = json.dumps(plan.state(plan.advance(Cursor(), BATCH * len(read))))
        read += run_until_killed(shards, tmp_path / str(number), world, workers, state, 4)
    order = [int(item["sample"][0]) for item in plan.items(Cursor(), BATCH * len(read))[0]]
    for step, samples in enumerate(read):
        expected = order[step * BATCH : (step + 1) * BATCH]
        assert Counter(samples) == Counter(expected), f"step {step} is not the step of an uninterrupted run"
    per_epoch = SAMPLES // BATCH
    for epoch in range(len(read) // per_epoch):
        shown = [sample for step in read[epoch * per_epoch : (epoch + 1) * per_epoch] for sample in step]
        assert sorted(shown) == list(range(SAMPLES))


def test_workers_end_when_their_trainer_is_killed(shards: Path, tmp_path: Path) -> None:
    """The out-of-memory killer takes only the trainer; readers left behind would fill the node restart by restart."""
    plan = Plan([Source(read_index(shards))], PlanOptions("clip", seed=3))
    log = tmp_path / "log"
    process = start(shards, log, (0, 1, BATCH, 2), json.dumps(plan.state(Cursor())))
    try:
        deadline = time.monotonic() + 60
        family: list[psutil.Process] = []
        while len(family) < 3 or not lines(log):  # the fork server and two workers at least
            assert time.monotonic() < deadline
            time.sleep(0.2)
            family = psutil.Process(process.pid).children(recursive=True)
        process.kill()  # only the trainer
        process.wait()
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive, [" ".join(one.cmdline())[:80] for one in alive]
    finally:
        with contextlib.suppress(ProcessLookupError):  # nobody is left
            os.killpg(process.pid, signal.SIGKILL)
