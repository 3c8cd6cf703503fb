"""Runs a build: with processes of this machine, or on the machines of a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from shards.build.layout import BuildOptions, ShardTask, work_units
from shards.build.prepare import ordered_map
from shards.build.shard import Finished, build_shard, preparer, write_shard
from shards.build.work import Work
from shards.errors import DataError
from shards.schema import Kind, Segment

_LOST_TASK_RETRIES = 5


@dataclass(frozen=True, slots=True)
class ShardToWrite:
    """A shard to write."""

    task: ShardTask
    sources: str
    """Digest of its media's state before they are read."""

    def __str__(self) -> str:
        return self.task.name


class Counter(Protocol):
    """Receives progress: per sample from local builds, per shard from others."""

    def samples(self, shard: str, results: list[Any]) -> None: ...

    def shard(self, done: Finished) -> None: ...


def build_locally(
    work: Work, todo: Iterator[ShardToWrite], options: BuildOptions, kind: Kind, run: tuple[int, Counter]
) -> None:
    """Write shards one by one; ``workers`` processes prepare segments, also those of the next shards.

    Args:
        todo: the shards to write.
        run: workers (0 or 1: this process) and the progress counter.
    """
    workers, counter = run

    def units() -> Iterator[tuple[ShardToWrite, list[Segment]]]:
        for item in todo:
            if not item.task.segments:
                counter.shard(write_shard(work, item.task, item.sources, iter(()), options))
            for unit in work_units(item.task, kind):
                yield item, unit

    with contextlib.closing(ordered_map(preparer(options, kind), units(), workers)) as prepared:
        for item, first in prepared:
            results = _results(item.task, first, prepared, counter)
            write_shard(work, item.task, item.sources, results, options)


def _results(task: ShardTask, results: list[Any], more: Iterator[Any], counter: Counter) -> Iterator[Any]:
    """One result per segment of ``task``: ``results``, then as many units of ``more`` as are needed."""
    counter.samples(task.name, [skip for skip in task.skips if not skip.excluded])
    left = len(task.segments)
    while left:
        yield from results
        counter.samples(task.name, results)
        left -= len(results)
        if left:
            results = next(more)[1]


def build_with_ray(
    work: Work, todo: Iterator[ShardToWrite], options: BuildOptions, kind: Kind, run: tuple[int, Counter]
) -> None:
    """Write each shard in one Ray task, which stores it in the shared folder or object store itself.

    Tasks lost with their machine are started again. ``workers`` limits the running tasks; 0 = the cluster's cores.

    Raises:
        DataError: Ray is not installed, a task was lost too often, or a task raised it.
    """
    try:
        import ray
        from ray.exceptions import RayError
    except ImportError as error:
        raise DataError(
            f"Ray is not installed ({error})", where="--engine ray", fix="pip install 'llava-slt[ray]'"
        ) from error
    workers, counter = run
    ours = not ray.is_initialized()
    if ours:  # joins the cluster of RAY_ADDRESS or of this machine, or starts one here
        ray.init(include_dashboard=False, log_to_driver=False)
    try:
        remote = ray.remote(num_cpus=1, max_retries=_LOST_TASK_RETRIES)(_shard_or_error)
        shared_work, shared_options = ray.put(work), ray.put(options)
        limit = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
        running: list[Any] = []
        for item in todo:
            running.append(remote.remote(shared_work, item.task, item.sources, shared_options, kind))
            if len(running) >= 2 * limit:  # the second half waits inside Ray, so that no core does
                running = _collect(ray, running, counter)
        while running:
            running = _collect(ray, running, counter)
    except RayError as error:
        raise DataError(
            f"a task was lost {_LOST_TASK_RETRIES + 1} times ({type(error).__name__}: {error})",
            where="--engine ray",
            fix="look at `ray status` and at the memory of the machines, then run again: finished shards are kept",
        ) from error
    finally:
        if ours:
            ray.shutdown()


def _shard_or_error(work: Work, task: ShardTask, sources: str, options: BuildOptions, kind: Kind) -> Any:
    """Body of a Ray task; returns its error, because Ray would wrap a raised one."""
    try:
        return build_shard(work, task, sources, options, kind)
    except (DataError, OSError) as error:
        return error


def _collect(ray: Any, running: list[Any], counter: Counter) -> list[Any]:
    """Wait for one task, count it and return the others."""
    done, rest = ray.wait(running, num_returns=1)
    result = ray.get(done[0])
    if isinstance(result, Exception):
        raise result
    counter.shard(result)
    return rest


ENGINES: dict[str, Callable[..., None]] = {"local": build_locally, "ray": build_with_ray}
