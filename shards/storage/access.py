"""Where the bytes of shards come from: local files, the node cache, or ranged reads of an object store.

All read *spans*, (shard, offset, size), into one buffer.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from shards.errors import DataError
from shards.storage.cache import ShardCache, pin, remote_of, unpin
from shards.storage.mapped import MappedFile
from shards.storage.spans import LONGEST_SPAN, Ints, Spans, merge
from shards.storage.store import Folder

logger = logging.getLogger(__name__)

Access = Literal["auto", "ranged", "cache"]
Bytes = NDArray[np.uint8]

LOCAL_GAP = 8 << 10  # a read call costs as much as copying this many bytes
REMOTE_GAP = 256 << 10  # a request costs as much as receiving this many bytes


@dataclass(frozen=True)
class Remote:
    """How the shards of remote sets are read; local sets need none of it."""

    access: Access = "auto"
    """``cache``: download whole shards into the cache folder; ``ranged``: read only the bytes needed, every time;
    ``auto``: ``cache`` when ``cache_gib`` is positive, else ``ranged``."""
    cache_gib: float = 0.0
    """Limit on the shards in the cache folder, over all sets."""
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)
    """For the fsspec file system: ``endpoint_url``, ``key``, ``secret``, ``profile``."""

    def resolved(self) -> Literal["ranged", "cache"]:
        """What ``auto`` means here."""
        if self.access == "auto":
            return "cache" if self.cache_gib > 0 else "ranged"
        return self.access


class Source(Protocol):
    """Reads one shard set's tars, or all local ones."""

    gap: int
    worth_merging: int
    """Ranges smaller than this on average are merged into spans."""

    def read(self, names: Sequence[Path], offsets: Sequence[int], sizes: Sequence[int]) -> Bytes:
        """The spans, joined. Raises OSError, EOFError or DataError."""
        ...

    def views(self, names: Sequence[Path], offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[memoryview]:
        """Large ranges one by one, each read on demand. Raises as ``read``."""
        ...

    def refresh(self, name: Path) -> bool:
        """Fetch a shard with wrong bytes again; False when that cannot help."""
        ...

    def close(self) -> None:
        """Release every file."""
        ...


class LocalFiles:
    """Shards on a file system. At most ``open_files`` stay open; the least recently used one is closed."""

    gap = LOCAL_GAP
    worth_merging = 8 * LOCAL_GAP

    def __init__(self, open_files: int) -> None:
        self.open_files = open_files
        self._files: OrderedDict[Path, MappedFile] = OrderedDict()
        self._can_map = True

    def read(self, names: Sequence[Path], offsets: Sequence[int], sizes: Sequence[int]) -> Bytes:
        joined = np.empty(sum(sizes), dtype=np.uint8)
        view, at = joined.data, 0
        last = None
        for name, offset, size in zip(names, offsets, sizes, strict=True):
            if name is not last:
                handle, last = self._open(name).handle, name
            _fill(handle, view[at : at + size], offset)
            at += size
        return joined

    def views(self, names: Sequence[Path], offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[memoryview]:
        last = None
        for name, offset, size in zip(names, offsets, sizes, strict=True):
            if self._can_map:
                try:
                    if name is not last:
                        file, last = self._open(name), name
                    view = file.view(offset, size)
                except OSError as problem:
                    if problem.errno != errno.EINVAL:
                        raise
                    self._can_map = False
                    logger.info("this kernel (Linux < 5.14) cannot check mapped pages: shards are read by copies")
            if not self._can_map:
                view = LocalFiles.read(self, [name], [offset], [size]).data.toreadonly()
            yield view

    def refresh(self, name: Path) -> bool:
        del name
        return False

    def close(self) -> None:
        files, self._files = self._files, OrderedDict()
        for file in files.values():
            os.close(file.handle)

    def _open(self, name: Path) -> MappedFile:
        file = self._files.get(name)
        if file is not None:
            self._files.move_to_end(name)
            return file
        if len(self._files) >= self.open_files:
            os.close(self._files.popitem(last=False)[1].handle)
        file = self._files[name] = MappedFile(self._acquire(name))
        return file

    def _acquire(self, name: Path) -> int:
        return os.open(name, os.O_RDONLY | os.O_CLOEXEC)


class CachedFiles(LocalFiles):
    """Shards of a mirror, downloaded when they are first read and never evicted while they are being read."""

    def __init__(self, cache: ShardCache, open_files: int) -> None:
        super().__init__(open_files)
        self.cache = cache
        self._refreshed: set[Path] = set()

    def read(self, names: Sequence[Path], offsets: Sequence[int], sizes: Sequence[int]) -> Bytes:
        with self._pinned(names):
            return super().read(names, offsets, sizes)

    def views(self, names: Sequence[Path], offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[memoryview]:
        with self._pinned(names):
            yield from super().views(names, offsets, sizes)

    def refresh(self, name: Path) -> bool:
        if name in self._refreshed or name not in self._files:
            return False
        self._refreshed.add(name)
        file = self._files.pop(name)
        self.cache.discard(name.name, file.handle)
        os.close(file.handle)
        return True

    @contextmanager
    def _pinned(self, names: Sequence[Path]) -> Iterator[None]:
        pinned: list[MappedFile] = []
        try:
            for name in dict.fromkeys(names):
                file = self._files.get(name)
                if file is not None and not pin(file.handle):  # evicted while it was not being read
                    os.close(self._files.pop(name).handle)
                pinned.append(self._open(name))
            yield
        finally:
            for file in pinned:
                if file in self._files.values():  # a closed one is unlocked already
                    unpin(file.handle)

    def _acquire(self, name: Path) -> int:
        return self.cache.open(name.name)


class RangedObjects:
    """Shards read in place, range by range, several at the same time."""

    gap = REMOTE_GAP
    worth_merging = LONGEST_SPAN

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def read(self, names: Sequence[Path], offsets: Sequence[int], sizes: Sequence[int]) -> Bytes:
        ranges = [(name.name, offset, size) for name, offset, size in zip(names, offsets, sizes, strict=True)]
        return np.frombuffer(b"".join(self.folder.read_ranges(ranges)), dtype=np.uint8)

    def views(self, names: Sequence[Path], offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[memoryview]:
        view = self.read(names, offsets, sizes).data.toreadonly()
        return (view[end - size : end] for end, size in zip(accumulate(sizes), sizes, strict=True))

    def refresh(self, name: Path) -> bool:
        del name
        return False

    def close(self) -> None:
        pass


def _fill(handle: int, view: memoryview, offset: int) -> None:
    """Fill the view from ``offset`` on. Raises EOFError or OSError."""
    size = len(view)
    filled = os.preadv(handle, [view], offset)
    while filled < size:  # a network file system may deliver less than asked
        more = os.preadv(handle, [view[filled:]], offset + filled)
        if not more:
            raise EOFError(f"bytes {offset}..{offset + size} reach past the end of the file")
        filled += more


class ShardBytes:
    """Ranges of many shards, of one or several sets, in few reads.

    File handles belong to the process that opened them: after a fork the child opens its own.

    Args:
        shards: path of every shard; ranges name a shard by its position here.
        remote: how shards of remote sets are read.
        open_files: limit on open shard files per set; all local sets count as one.
    """

    def __init__(self, shards: Sequence[Path], remote: Remote, open_files: int) -> None:
        self.shards, self.remote, self.open_files = shards, remote, open_files
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"shards": self.shards, "remote": self.remote, "open_files": self.open_files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __del__(self) -> None:
        if getattr(self, "_pid", None) == os.getpid():
            self.close()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._local = LocalFiles(self.open_files)
        self._sources: list[Source] = []
        """Of every shard; opened when the first byte is read."""
        self._distinct: list[Source] = []

    def close(self) -> None:
        """Close all shard files; the next read opens them again."""
        for source in self._distinct:
            source.close()
        self._forget()

    def read(self, shards: Ints, offsets: Ints, sizes: Ints) -> tuple[Bytes, Ints]:
        """The joined bytes of ranges given by shard number, offset and size, and where each range begins in them. Small
        ranges close to each other are read as one.

        Raises OSError, EOFError (a range reaches past the end of its shard) or DataError.
        """
        self._connect()
        if len(self._distinct) == 1:
            return self._joined(self._distinct[0], shards, offsets, sizes)
        begins = np.zeros(len(shards), dtype=np.int64)
        blocks: list[Bytes] = []
        total = 0
        of = np.asarray([self._distinct.index(self._sources[number]) for number in shards.tolist()])
        for number in np.unique(of).tolist():
            mine = of == number
            joined, starts = self._joined(self._distinct[number], shards[mine], offsets[mine], sizes[mine])
            begins[mine] = starts + total
            total += len(joined)
            blocks.append(joined)
        joined = np.concatenate(blocks)
        joined.flags.writeable = False
        return joined, begins

    def views(self, shards: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[memoryview]:
        """Large ranges; those of local files are read on demand. Raises as ``read``, now or on demand."""
        self._connect()
        names = [self.shards[number] for number in shards]
        if len(self._distinct) == 1:
            return self._distinct[0].views(names, offsets, sizes)
        rows = zip(shards, names, offsets, sizes, strict=True)
        return (
            view
            for number, name, offset, size in rows
            for view in self._sources[number].views([name], [offset], [size])
        )

    def refresh(self, shard: int) -> bool:
        """Fetch a shard with wrong bytes again; False when that cannot help."""
        return self._sources[shard].refresh(self.shards[shard])

    def _joined(self, source: Source, shards: Ints, offsets: Ints, sizes: Ints) -> tuple[Bytes, Ints]:
        if int(sizes.sum()) < source.worth_merging * len(sizes):
            spans = merge(shards, offsets, sizes, source.gap)
        else:
            spans = Spans(shards, offsets, sizes, np.cumsum(sizes) - sizes)
        names = [self.shards[number] for number in spans.shards.tolist()]
        joined = source.read(names, spans.offsets.tolist(), spans.sizes.tolist())
        joined.flags.writeable = False
        return joined, spans.begins

    def _connect(self) -> None:
        if self._pid != os.getpid():
            self._forget()
        if not self._distinct:
            folders: dict[Path, Source] = {}
            for folder in dict.fromkeys(path.parent for path in self.shards):
                folders[folder] = _open_source(folder, self.remote, self.open_files, self._local)
            self._sources = [folders[path.parent] for path in self.shards]
            self._distinct = list({id(source): source for source in folders.values()}.values())


def _open_source(folder: Path, remote: Remote, open_files: int, local: LocalFiles) -> Source:
    store = remote_of(folder, remote.storage_options)
    if store is None:
        return local
    logger.info("%s: shards are read from %s by access: %s", folder, store.location, remote.resolved())
    cache = shard_cache(folder, remote)
    return RangedObjects(store) if cache is None else CachedFiles(cache, open_files)


def shard_cache(folder: Path, remote: Remote) -> ShardCache | None:
    """The node cache through which a shard set is read; None for local sets and ranged reads.

    Raises DataError for options that contradict each other.
    """
    store = remote_of(folder, remote.storage_options)
    if store is None or remote.resolved() == "ranged":
        return None
    if remote.cache_gib <= 0:
        raise DataError(
            "access 'cache' with a cache of 0 GiB",
            where=store.location,
            fix="set data.cache_gib, or data.access: ranged",
        )
    return ShardCache(folder, store, remote.cache_gib)
