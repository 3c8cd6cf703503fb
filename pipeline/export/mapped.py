"""Memory-mapped files whose pages are given back once they are read.

Pages of a mapped file count as this process's memory until the kernel takes them back, so a stream over a mapped file
would grow to the size of the file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from pathlib import Path

_MADV_DONTNEED = 4
_DROP_BYTES = 32 * 1024**2


class MappedFiles:
    """The mappings of all files below some folders, as they are now.

    Only mappings that nobody has written to are given back: theirs are the bytes of the file. Make it after the files
    are opened, and do not write to their tensors afterwards. Without /proc (not Linux) nothing is given back.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        resolved = [folder.resolve() for folder in folders]
        self.ranges = [
            (begin, end) for begin, end, path in _unwritten() if any(path.is_relative_to(near) for near in resolved)
        ]
        self._since_drop = 0

    def read(self, size: int) -> None:
        """``size`` bytes more were read; gives the pages back now and then."""
        self._since_drop += size
        if self._since_drop >= _DROP_BYTES:
            self.drop()

    def drop(self) -> None:
        """Give all pages back; the next read takes them from the page cache or the disk."""
        self._since_drop = 0
        system = ctypes.CDLL(None, use_errno=True)
        for begin, end in self.ranges:
            system.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_DONTNEED)


def _unwritten() -> Iterator[tuple[int, int, Path]]:
    """Begin, end and file of every mapping whose pages are all those of the file."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        return
    mapping = None
    for line in smaps.read_text(errors="replace").splitlines():
        words = line.split(maxsplit=5)
        if "-" in words[0] and not words[0].endswith(":"):
            begin, _, end = words[0].partition("-")
            path = words[5] if len(words) > 5 else ""
            # a shared mapping is the file itself; a private one holds what was written to it
            mapping = (int(begin, 16), int(end, 16), Path(path)) if path.startswith("/") else None
        elif words[0] == "Anonymous:" and mapping is not None and words[1] == "0":
            yield mapping
