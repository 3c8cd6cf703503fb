"""How long a rank itself computes. All ranks of a step take equally long, because each waits for the slowest in the
collectives; so the slow one is found by what the others do not spend waiting.

Only forward passes are measured. On a CPU every wait for other ranks is subtracted. On CUDA, events on the device's own
stream are used: ZeRO stages 0 to 2 have no collective in a forward pass, but stage 3 gathers weights there, and what
a rank waits for them counts as its own.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.distributed import distributed_c10d

_EVENTS = 512
"""Forward passes per row of metrics that are measured on CUDA, at most."""


class OwnTime:
    """Seconds that this rank has spent in measured calls since they were last taken."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def measured(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, measured."""
        during = self._on_device if self._cuda else self._on_host

        def call(*args: Any, **kwargs: Any) -> Any:
            with during():
                return forward(*args, **kwargs)

        return call

    def take(self) -> float:
        """The seconds so far; they begin again. The device must be done with the calls."""
        on_device = sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        seconds, self._seconds, self._events = self._seconds + on_device, 0.0, []
        return seconds

    @contextlib.contextmanager
    def _on_host(self) -> Iterator[None]:
        with _waits() as waits:
            begin = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - begin - waits[0]

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        if len(self._events) == _EVENTS:
            yield
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((begin, end))


@contextlib.contextmanager
def _waits() -> Iterator[list[float]]:
    """One number: the seconds this thread has waited for other ranks meanwhile. Every collective ends in one method."""
    kind: Any = distributed_c10d.Work
    wait, waited = kind.wait, [0.0]

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            return wait(*args, **kwargs)
        finally:
            waited[0] += time.perf_counter() - begin

    kind.wait = timed
    try:
        yield waited
    finally:
        kind.wait = wait
