"""One step ahead and no further, in order, with the state of the step that was taken."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pipeline.engine import prefetch
from pipeline.engine.prefetch import Ahead, CopyStream, staged
from shards.errors import DataError
from shards.load.loader import StepLoader
from shards.load.requests import LoaderOptions, StepBatch
from shards.order.options import PlanOptions, Source
from shards.order.plan import Cursor, Plan
from tests.unit.shards.shard_sets import collate_lists, fetch_numbers, in_memory


class Copied:
    """Stands for a CUDA stream: copies by hand, and notes who did what."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.threads: set[threading.Thread] = set()

    def begin(self) -> None:
        self.log.append("begin")

    def start(self, batches: list[Any]) -> tuple[list[Any], Any]:
        self.threads.add(threading.current_thread())
        self.log.append(f"start {batches[0]['step']}")
        return [{**batch, "copied": True} for batch in batches], f"mark {batches[0]['step']}"

    def finish(self, copies: list[Any], mark: Any) -> None:
        assert threading.current_thread() is threading.main_thread() and mark == f"mark {copies[0]['step']}"
        self.log.append(f"finish {copies[0]['step']}")


def steps(count: int, error: Exception | None = None, seconds: float = 0.0) -> Iterator[StepBatch]:
    for number in range(count):
        time.sleep(seconds)
        yield StepBatch([{"step": number}], Cursor(0, 0, number + 1), [], 9.0, 1)
    if error is not None:
        raise error


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_step_is_copied_while_the_one_before_computes_and_none_further() -> None:
    copies = Copied()
    for number, (batch, micro_batches) in enumerate(Ahead(steps(4), copies)):
        assert batch.micro_batches == [{"step": number}] and micro_batches == [{"step": number, "copied": True}]
        coming = [f"start {number + 1}"] * (number < 3)
        until(lambda coming=coming: copies.log[-1:] == coming or not coming)
        time.sleep(0.01)  # and the one behind it is left alone
        started = [entry for entry in copies.log if entry.startswith("start")]
        assert len(started) == min(number + 2, 4)
    assert copies.log[:4] == ["begin", "start 0", "finish 0", "start 1"]
    assert threading.main_thread() not in copies.threads and len(copies.threads) == 1


def test_waiting_is_what_the_training_waits() -> None:
    waits = []
    for batch, _ in Ahead(steps(3, seconds=0.05), Copied()):
        waits.append(batch.wait_seconds)
        time.sleep(0.2)
    assert waits[0] > 0.04 and max(waits[1:]) < 0.04


def test_an_error_comes_where_its_step_was_due() -> None:
    ahead = iter(Ahead(steps(2, DataError("a worker died")), Copied()))
    assert [next(ahead)[0].cursor_after.item, next(ahead)[0].cursor_after.item] == [1, 2]
    with pytest.raises(DataError, match="a worker died"):
        next(ahead)


def test_who_stops_early_leaves_no_thread() -> None:
    ahead = Ahead(steps(100), Copied())
    taken = iter(ahead)
    next(taken)
    taken.close()  # type: ignore[attr-defined]
    ahead._thread.join(timeout=10)
    assert not ahead._thread.is_alive()


def loader(state: dict[str, Any] | None = None) -> StepLoader:
    plan = Plan([Source(in_memory("video", [3 + n % 7 for n in range(40)]))], PlanOptions("clip", seed=4))
    made = StepLoader(plan, fetch_numbers, collate_lists, LoaderOptions(0, 1, 8, 4))
    if state is not None:
        made.load_state_dict(state)
    return made


def test_a_state_is_that_of_the_step_that_was_taken() -> None:
    """Killed after any step, a run continues with the next one, though that one was copied before the kill."""
    whole = [step.micro_batches for _, step in zip(range(8), loader(), strict=False)]
    for killed in range(1, 4):
        source, copies = loader(), Copied()
        copies.start = lambda batches: (batches, "mark")  # type: ignore[method-assign]
        copies.finish = lambda batches, mark: None  # type: ignore[method-assign]
        ahead = iter(Ahead(source, copies))
        taken = [next(ahead)[0] for _ in range(killed)]
        until(lambda source=source, taken=taken: source.cursor != taken[-1].cursor_after)
        resumed = loader(source.state_dict(taken[-1]))
        both = [batch.micro_batches for batch in taken]
        both += [step.micro_batches for _, step in zip(range(8 - killed), resumed, strict=False)]
        assert both == whole
        ahead.close()  # type: ignore[attr-defined]


def test_a_cpu_has_nothing_to_copy() -> None:
    before = threading.active_count()
    taken = list(staged(steps(5), torch.device("cpu"), 3))
    assert [batch.wait_seconds for batch, _ in taken] == [9.0] * 3 and threading.active_count() == before
    assert [micro_batches for _, micro_batches in taken] == [[{"step": number}] for number in range(3)]


def test_what_is_asked_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the calls, on a machine without it."""
    log: list[Any] = []
    inside: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name if isinstance(name, str) else "copying"

        def record_event(self) -> str:
            log.append("recorded")
            return "event"

        def wait_event(self, event: str) -> None:
            log.append(f"{self.name} waits for {event}")

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        inside.append(stream.name)
        yield
        inside.pop()

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        log.append(f"pinned on {inside[-1]}")
        return tensor

    device = torch.device("meta")
    for name, value in {
        "Stream": Stream, "stream": on, "current_stream": lambda device: Stream("computing"),
        "set_device": lambda device: log.append("device set"),
    }.items():  # fmt: skip
        monkeypatch.setattr(prefetch.torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"kept for {stream.name}"))
    stream = CopyStream(device)
    stream.begin()
    copies, mark = stream.start([{"ids": torch.ones(2), "samples": 2}, {"ids": torch.ones(3), "samples": 3}])
    assert [copy["ids"].device.type for copy in copies] == ["meta"] * 2 and copies[1]["samples"] == 3
    stream.finish(copies, mark)
    assert log == [
        "device set", "pinned on copying", "pinned on copying", "recorded", "computing waits for event",
        "kept for computing", "kept for computing",
    ]  # fmt: skip
