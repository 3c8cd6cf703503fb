"""Measuring a stream of batches: the same code in the environment of every side."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import psutil

PATIENCE_SECONDS = 60.0


def cpu_seconds() -> float:
    """User and system time so far of this process and its descendants that are alive, to the nanosecond.

    ``/proc`` counts in hundredths of a second; the clock of each process (man clock_getcpuclockid) does not.
    """
    pids = [child.pid for child in psutil.Process().children(recursive=True)]
    found = time.process_time()
    for pid in pids:
        try:
            found += time.clock_gettime((~pid << 3) | 2)
        except OSError:
            continue  # it ended meanwhile
    return found


def windows(stream: Iterator[dict[str, Any]], workers: int, samples: int, runs: int) -> dict[str, Any]:
    """Read ``runs`` windows of ``samples``, once the side has settled.

    Settled: half a window was read, and the last batches came from every worker and from nobody else. Before that a
    side pays for its start, whether it waits for its workers or reads in the main process meanwhile.

    Args:
        stream: the batches, for ever; ``n`` samples each, collated by process ``pid``.
        workers: processes the side was asked to use.
        samples: samples per window; less than an epoch, so that some windows hold no epoch border.
        runs: windows.

    Returns:
        Per window the CPU seconds (main and workers) and the seconds per sample; of the start the seconds to the first
        batch, and the seconds and CPU seconds until it was settled.

    Raises:
        RuntimeError: other processes than the workers still make batches after a minute.
    """
    begin, cpu_begin = time.perf_counter(), cpu_seconds()
    seen, made_by = 0, deque[int](maxlen=32 * max(workers, 1))
    first = 0.0
    while seen < samples / 2 or not _settled(made_by, workers):
        batch = next(stream)
        first = first or time.perf_counter() - begin
        seen += batch["n"]
        made_by.append(batch["pid"])
        if time.perf_counter() - begin > PATIENCE_SECONDS:
            raise RuntimeError(f"process {os.getpid()} asked for {workers} workers, and batches come from {made_by}")
    start = {"seconds": time.perf_counter() - begin, "cpu_seconds": cpu_seconds() - cpu_begin, "first_batch": first}
    cpu: list[float] = []
    wall: list[float] = []
    for _ in range(runs):
        seen, cpu_before, wall_before = 0, cpu_seconds(), time.perf_counter()
        while seen < samples:
            seen += next(stream)["n"]
        cpu.append((cpu_seconds() - cpu_before) / seen)
        wall.append((time.perf_counter() - wall_before) / seen)
    return {"cpu": cpu, "wall": wall, "start": start}


def _settled(made_by: deque[int], workers: int) -> bool:
    makers = set(made_by)
    if not workers:
        return makers == {os.getpid()}
    return len(made_by) == made_by.maxlen and len(makers) == workers and os.getpid() not in makers
