"""Keeps the chunks of a plan that are in use, and makes the next one in a thread so that no step waits for it."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from concurrent.futures import Future
from typing import NamedTuple

from shards.order.chunks import Chunks
from shards.order.items import Items

_KEPT_CHUNKS = 3
_KEPT_ELEMENTS = 1 << 16  # a step over a tiny set may span many epochs
_WORTH_A_THREAD = 1 << 12  # elements of a chunk that takes longer to make than a thread to start


class _Pending(NamedTuple):
    """A chunk that a thread is making. A forked process has no such thread and makes its own."""

    key: tuple[int, int]
    pid: int
    items: Future[Items]


class ChunkCache:
    """The last chunks asked for: three, and more when they are small.

    Args:
        chunks: makes them.
    """

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self._kept: OrderedDict[tuple[int, int], Items] = OrderedDict()
        self._pending: _Pending | None = None

    def chunk(self, epoch: int, chunk: int) -> Items:
        """The items of a chunk. Raises what making it in the thread raised."""
        key = (epoch, chunk)
        if key not in self._kept:
            pending = self._pending_for(key)
            if pending is None:
                self._kept[key] = self._chunks.make(epoch, chunk)
            else:
                self._kept[key], self._pending = pending.result(), None
            most = max(_KEPT_CHUNKS, _KEPT_ELEMENTS // max(len(self._kept[key].elements), 1))
            while len(self._kept) > most:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def begin_next(self, epoch: int, chunk: int) -> None:
        """Begin to make the chunk after this one, which has been asked for."""
        key = self._chunks.after(epoch, chunk)
        if key in self._kept or len(self._kept[epoch, chunk].elements) < _WORTH_A_THREAD:
            return
        if self._pending_for(key) is not None:
            return
        self._pending = _Pending(key, os.getpid(), Future())
        threading.Thread(target=_make, args=(self._pending, self._chunks), daemon=True).start()

    def _pending_for(self, key: tuple[int, int]) -> Future[Items] | None:
        pending = self._pending
        return pending.items if pending is not None and pending[:2] == (key, os.getpid()) else None


def _make(pending: _Pending, chunks: Chunks) -> None:
    try:
        pending.items.set_result(chunks.make(*pending.key))
    except BaseException as error:  # raised where the chunk is asked for
        pending.items.set_exception(error)
