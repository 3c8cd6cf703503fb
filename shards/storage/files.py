"""Local files: exact ranges and copies."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any, BinaryIO

from shards.atomic import put_file

_CHUNK = 8 << 20


def pieces(handle: Any, offset: int, size: int) -> list[bytes]:
    """``size`` bytes from ``offset`` on, in the pieces that reads return; fewer at the end of the file."""
    handle.seek(offset)
    chunks = []
    while size and (piece := handle.read(size)):
        chunks.append(piece)
        size -= len(piece)
    return chunks


def copy_file(source: Path, target: Path) -> str:
    """Copy a file; returns the sha256 of the bytes that arrived."""

    def write(handle: BinaryIO) -> None:
        with source.open("rb") as original:
            shutil.copyfileobj(original, handle, _CHUNK)

    put_file(target, write)
    with target.open("rb") as copied:
        return hashlib.file_digest(copied, "sha256").hexdigest()
