"""Downloads the shards of coming steps while the present ones are computed; for remote sets read through the cache."""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from shards.errors import DataError
from shards.storage.access import Remote, shard_cache
from shards.storage.cache import ShardCache

logger = logging.getLogger(__name__)

STEPS_AHEAD = 64
_STEPS_AT_ONCE = 4  # looked at per step, so that no step pays for all of them
_DOWNLOADS_AT_ONCE = 2
_Job = tuple[ShardCache, str]


class Prefetcher:
    """Looks at the steps ahead and has their shards fetched, as far as half the cache holds them.

    Args:
        shards: path of every shard of the plan.
        remote: how remote sets are read; without a cache nothing happens.
    """

    def __init__(self, shards: Sequence[Path], remote: Remote) -> None:
        caches = {folder: shard_cache(folder, remote) for folder in {path.parent for path in shards}}
        self._shards, self._caches = shards, {path: cache for path, cache in caches.items() if cache is not None}
        self.active = bool(self._caches)
        largest = max((entry["size"] for cache in self._caches.values() for entry in cache.entries.values()), default=1)
        self._most = max(1, int(remote.cache_gib * (1 << 30)) // (2 * max(largest, 1)))
        self._ahead: deque[set[int]] = deque()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = 0
        weakref.finalize(self, _end, self._jobs)

    def step(self, coming: Iterator[Iterable[int]]) -> None:
        """Called once per step.

        Args:
            coming: endless; the shard numbers of each step, beginning with the present one and never begun anew.
        """
        if self._ahead:
            self._ahead.popleft()
        for _ in range(_STEPS_AT_ONCE):
            known = set().union(*self._ahead)
            if self._ahead and (len(self._ahead) >= STEPS_AHEAD or len(known) >= self._most):
                return
            shards = set(coming.__next__())
            self._ahead.append(shards)
            for number in sorted(shards - known):
                self._want(self._shards[number])

    def _want(self, path: Path) -> None:
        cache = self._caches.get(path.parent)
        if cache is None or cache.holds(path.name):
            return
        while self._threads < _DOWNLOADS_AT_ONCE:
            threading.Thread(target=_download, args=(self._jobs,), daemon=True).start()
            self._threads += 1
        self._jobs.put((cache, path.name))


def _download(jobs: queue.SimpleQueue[_Job | None]) -> None:
    while (job := jobs.get()) is not None:
        cache, name = job
        try:
            cache.fetch(name)
        except DataError as problem:  # whoever reads the shard meets the same problem and reports it
            logger.warning("cannot fetch a shard ahead of time: %s", problem)


def _end(jobs: queue.SimpleQueue[_Job | None]) -> None:
    for _ in range(_DOWNLOADS_AT_ONCE):
        jobs.put(None)
