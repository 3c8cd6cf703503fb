"""Files in memory: bytes of the page cache in place, without a copy and without the danger of touching missing pages.

A page that cannot be read (a truncated file, a failing disk) kills the process that touches it. Pages that are not in
memory are therefore asked for first, where that is an error like any other.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from collections.abc import Callable

import numpy as np

_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14; the mmap module has no name for it
_PAGE = mmap.PAGESIZE
_Bytes = ctypes.c_char * 0


class MappedFile:
    """An open file, mapped once its first bytes are asked for.

    Args:
        handle: file descriptor, closed by whoever opened it; the views stay good.
    """

    __slots__ = ("_address", "_asked", "_found", "_mincore", "_view", "_whole", "handle")

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self._whole: mmap.mmap | None = None
        self._asked: set[int] = set()
        """Where ranges begin that were asked for before; their pages are most likely still there, and mapped."""

    def view(self, offset: int, size: int) -> memoryview:
        """Bytes ``[offset, offset + size)``, read-only.

        Raises EOFError when the file ends before, and OSError when it cannot be read: EINVAL where the kernel is too
        old to be asked for pages (Linux < 5.14) and some are not in memory.
        """
        whole = self._whole or self._map()
        if offset + size > len(whole):
            raise EOFError(f"bytes {offset}..{offset + size} reach past the end of the mapped file")
        begin = offset // _PAGE * _PAGE
        length = offset + size - begin
        if begin not in self._asked or not self._resident(begin, length):
            whole.madvise(_POPULATE_READ, begin, length)
            self._asked.add(begin)
        return self._view[offset : offset + size]

    def _map(self) -> mmap.mmap:
        if not os.fstat(self.handle).st_size:
            raise EOFError("the file is empty")
        whole = self._whole = mmap.mmap(self.handle, 0, prot=mmap.PROT_READ)
        self._view = memoryview(whole)
        self._address = int(np.frombuffer(whole, dtype=np.uint8).ctypes.data)
        self._found = bytearray(64)
        self._mincore = _mincore()
        return whole

    def _resident(self, begin: int, length: int) -> bool:
        """Whether all of these pages are in memory; asking costs a fraction of what populating mapped pages does."""
        pages = -(-length // _PAGE)
        if pages > len(self._found):
            self._found = bytearray(2 * pages)
        found = _Bytes.from_buffer(self._found)
        return not self._mincore(self._address + begin, length, found) and self._found.count(1, 0, pages) == pages


@functools.cache
def _mincore() -> Callable[[int, int, ctypes.Array[ctypes.c_char]], int]:
    """The call of that name: which pages of a mapping are in memory (man mincore)."""
    found = ctypes.CDLL(None).mincore
    found.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return found
