"""Mapped files: bytes of the page cache without a copy, and without the risk of touching pages that cannot be read.

A process that touches an unreadable page (truncated file, failing disk) is killed. Pages that are not in memory are
therefore populated first, which reports such a page as an ordinary error.
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
    """An open file, mapped when its first bytes are read.

    Args:
        handle: file descriptor, closed by whoever opened it; the views stay valid.
    """

    __slots__ = ("_address", "_asked", "_flags", "_mincore", "_view", "_whole", "handle")

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self._whole: mmap.mmap | None = None
        self._asked: set[int] = set()
        """Where earlier ranges began; their pages are most likely still in memory and mapped."""

    def view(self, offset: int, size: int) -> memoryview:
        """Bytes ``[offset, offset + size)``, read-only.

        Raises EOFError when the file ends earlier and OSError when it cannot be read: EINVAL when some pages are not
        in memory and the kernel cannot populate them (Linux < 5.14).
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
        self._flags = bytearray(64)
        self._mincore = _mincore()
        return whole

    def _resident(self, begin: int, length: int) -> bool:
        """Whether all of these pages are in memory; cheaper than populating pages that are mapped already."""
        pages = -(-length // _PAGE)
        if pages > len(self._flags):
            self._flags = bytearray(2 * pages)
        flags = _Bytes.from_buffer(self._flags)
        return not self._mincore(self._address + begin, length, flags) and self._flags.count(1, 0, pages) == pages


@functools.cache
def _mincore() -> Callable[[int, int, ctypes.Array[ctypes.c_char]], int]:
    """mincore(2): tells which pages of a mapping are in memory."""
    function = ctypes.CDLL(None).mincore
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return function
