"""Micro-batches on the device before they are asked for: a step is copied while the one before it computes.

A thread takes the coming step from the loader, puts it into pinned memory and copies it on a stream of its own, so that
neither reading nor copying holds up the device. It is one step ahead and never more. On a CPU there is nothing to copy.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

import torch

from pipeline.stages.batches import map_tensors, to_device
from shards.load.requests import StepBatch

Staged = tuple[StepBatch, list[Any]]
"""A step as the loader made it, and its micro-batches on the device."""


class Copies(Protocol):
    """How a step gets to the device ahead of its use."""

    def begin(self) -> None:
        """Called once by the thread that copies."""
        ...

    def start(self, batches: list[Any]) -> tuple[list[Any], Any]:
        """Begin to copy; returns the copies, and what `finish` needs. Called by that thread."""
        ...

    def finish(self, copies: list[Any], mark: Any) -> None:
        """Let what is computed from now on find the copies complete. Called by the thread that computes."""
        ...


class CopyStream:
    """Copies from pinned memory on a CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def begin(self) -> None:
        torch.cuda.set_device(self.device)  # every thread has its own

    def start(self, batches: list[Any]) -> tuple[list[Any], Any]:
        # torch keeps pinned blocks, and gives one away again only when the copies from it are done
        with torch.cuda.stream(self.stream):
            copies = map_tensors(batches, lambda tensor: tensor.pin_memory().to(self.device, non_blocking=True))
            return copies, self.stream.record_event()

    def finish(self, copies: list[Any], mark: Any) -> None:
        present = torch.cuda.current_stream(self.device)
        present.wait_event(mark)
        # the memory is of the copying stream: it must not be given away there while it is used here
        map_tensors(copies, lambda tensor: tensor.record_stream(present))


class Ahead:
    """The steps of a loader, copied one step ahead by a thread. Leave the context to end it.

    Args:
        loader: read by the thread alone, as far as it goes.
        copies: how they are copied.
    """

    def __init__(self, loader: Iterable[StepBatch], copies: Copies) -> None:
        self._loader, self._copies = loader, copies
        self._room = threading.Semaphore(1)
        self._ended = threading.Event()
        self._ready: queue.SimpleQueue[tuple[StepBatch, list[Any], Any] | BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __iter__(self) -> Iterator[Staged]:
        """Yields the steps; an error of the loader is raised where its step was due."""
        self._thread.start()
        try:
            while True:
                begin = time.perf_counter()
                item = self._ready.get()
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                batch, copies, mark = item
                self._copies.finish(copies, mark)
                self._room.release()
                # what the training waited for; the thread's own waits hold up nothing
                yield batch._replace(wait_seconds=time.perf_counter() - begin), copies
                del item, batch, copies, mark  # one step ahead, not two
        finally:
            self._ended.set()
            self._room.release()

    def _run(self) -> None:
        try:
            self._copies.begin()
            steps = iter(self._loader)
            while self._room.acquire() and not self._ended.is_set():
                batch = next(steps, None)
                if batch is None:
                    self._ready.put(None)
                    return
                self._ready.put((batch, *self._copies.start(list(batch.micro_batches))))
                del batch
        except BaseException as error:  # raised again where the step is asked for
            self._ready.put(error)


def staged(loader: Iterable[StepBatch], device: torch.device, steps: int) -> Iterator[Staged]:
    """The next ``steps`` steps of a loader with their micro-batches on the device.

    Where the loader stands is then no longer where the training stands: a state is that of `StepBatch.cursor_after`.
    """
    coming = islice(loader, steps)
    if device.type == "cuda":
        return iter(Ahead(coming, CopyStream(device)))
    return ((batch, [to_device(micro, device) for micro in batch.micro_batches]) for batch in coming)
