"""Worker processes: order, shared memory used again, no growth, named failures."""

from __future__ import annotations

import copyreg
import gc
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from shards.errors import DataError
from shards.load.loader import _pickled, _reduced, _Result
from shards.load.workers import Pickled, Workers, fork_server
from tests.source_tree import ROOT


class Arrays:
    """Makes an array of so many bytes, filled with the request's number."""

    def begin(self) -> None:
        pass

    def run(self, requests: list[tuple[int, int]]) -> list[Pickled]:
        return [self.one(number, size, len(requests)) for number, size in requests]

    def one(self, number: int, size: int, group: int) -> Pickled:
        buffers: list[pickle.PickleBuffer] = []
        array = np.full(size, number % 251, np.uint8)
        made = {"n": number, "array": array, "pid": os.getpid(), "empty": np.empty(0), "group": group}
        pickled = pickle.dumps(made, protocol=5, buffer_callback=buffers.append)
        return pickled, [buffer.raw() for buffer in buffers]


class Failing(Arrays):
    def __init__(self, problem: BaseException) -> None:
        self.problem = problem

    def begin(self) -> None:
        raise self.problem


class Dying(Arrays):
    def begin(self) -> None:
        os._exit(7)


class Sleepy(Arrays):
    def run(self, requests: list[tuple[int, int]]) -> list[Pickled]:
        time.sleep(0.05 * len(requests))
        return super().run(requests)


class Slow(Arrays):
    def begin(self) -> None:
        time.sleep(60)


def start(maker: Any, count: int = 2, timeout: float = 60.0) -> Workers:
    fork_server(["numpy", __name__])
    return Workers(maker, count, 2, timeout)


def wait(workers: Workers) -> Workers:
    while not workers.started():
        time.sleep(0.01)
    return workers


def results(workers: Workers, sizes: Callable[[int], int], count: int) -> Iterator[Any]:
    requests = ((number, sizes(number)) for number in range(count))
    workers.fill(requests)
    while workers.waiting:
        yield workers.take()
        workers.fill(requests)


def test_results_come_in_order_whatever_their_size() -> None:
    workers = wait(start(Arrays()))
    sizes = [0, 1, 40_000, 100, 3_000_000, 40_000, 5_000_000, 70_000, 33_000, 2] * 4
    kept = list(results(workers, sizes.__getitem__, len(sizes)))
    assert [made["n"] for made in kept] == list(range(len(sizes)))
    assert len({made["pid"] for made in kept}) == 2 and os.getpid() not in {made["pid"] for made in kept}
    for made, size in zip(kept, sizes, strict=True):
        assert len(made["array"]) == size and (made["array"] == made["n"] % 251).all(), "nothing was overwritten"
        assert made["array"].flags.writeable or not size
    workers.stop()


def test_neither_memory_nor_files_grow() -> None:
    workers = wait(start(Arrays(), count=1))
    sizes = [200_000, 350_000, 20_000, 290_000, 310_000]
    stream = results(workers, lambda number: sizes[number % 5], 3000)
    process = psutil.Process()
    worker = psutil.Process(next(stream)["pid"])  # other tests' workers may still be ending beside it

    def used() -> tuple[int, int, int]:
        gc.collect()
        resident = process.memory_info().rss + worker.memory_info().rss
        return resident, process.num_fds(), len(list(Path("/proc/self/map_files").iterdir()))

    for _ in range(500):
        next(stream)
    before = used()
    for _ in stream:
        pass
    after = used()
    assert after[0] - before[0] < 8 << 20 and after[1] <= before[1] + 2 and after[2] <= before[2] + 2
    workers.stop()


@pytest.mark.parametrize(
    ("maker", "said"),
    [
        (Failing(DataError("no index", where="here")), "here: no index"),
        (Failing(RuntimeError("odd")), r"data loader: RuntimeError: odd"),
        (Dying(), "data loader: a loader process ended with status 7 while it started"),
    ],
)
def test_workers_that_cannot_start_are_named(maker: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        wait(start(maker))


def test_what_keeps_processes_from_starting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(11, "no more processes")

    monkeypatch.setattr("shards.load.workers.multiprocessing.Pipe", refused)
    with pytest.raises(DataError, match=r"the loader processes cannot start \(BlockingIOError: .*no more processes"):
        wait(start(Arrays()))


def test_workers_that_take_too_long_to_start_are_named() -> None:
    with pytest.raises(DataError, match="the loader processes did not start within 1 s"):
        wait(start(Slow(), timeout=0.8))


def test_forgotten_workers_end() -> None:
    workers = wait(start(Arrays()))
    pids = [made["pid"] for made in results(workers, lambda _: 1, 2)]
    del workers
    gc.collect()
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float16])
def test_tensors_of_any_type_survive_the_journey(dtype: torch.dtype) -> None:
    values = torch.arange(24_000).reshape(4, 6000).to(dtype).t()
    batch = {"a": values, "nested": [{"b": values[0]}], "none": None, "zero": torch.zeros(0, dtype=dtype)}
    pickled, buffers = _pickled(_Result(batch, []), {**copyreg.dispatch_table, torch.Tensor: _reduced})
    found = pickle.loads(pickled, buffers=[bytearray(buffer) for buffer in buffers]).batch
    assert torch.equal(found["a"], values) and found["a"].dtype == dtype
    assert torch.equal(found["nested"][0]["b"], values[0]) and found["zero"].shape == (0,)
    apart = sum(buffer.nbytes for buffer in buffers)
    assert apart == (values.nbytes if values.nbytes > 32 << 10 else 0), "small ones are copied, large ones never"


def test_small_results_come_several_at_a_time_and_large_or_slow_ones_alone() -> None:
    workers = wait(start(Arrays(), count=1))
    groups = [made["group"] for made in results(workers, lambda number: 10 if number < 200 else 3_000_000, 230)]
    assert groups[0] == 1 and max(groups[:200]) == 8, "the first ones are wanted at once"
    assert groups[-1] == 1
    slow = wait(start(Sleepy(), count=1))
    assert {made["group"] for made in results(slow, lambda _: 10, 6)} == {1}
    workers.stop()
    slow.stop()


PROGRAM = """
import multiprocessing, pickle, sys
from shards.load.workers import _work
from tests.unit.shards.load.test_workers import Arrays, Failing
ours, theirs = multiprocessing.Pipe()
ours.close()
_work(pickle.dumps(Failing(ValueError()) if sys.argv[1] == "failing" else Arrays()), theirs)
"""


@pytest.mark.parametrize("how", ["starting", "failing"])
def test_a_worker_whose_trainer_is_gone_ends_without_a_word(how: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
