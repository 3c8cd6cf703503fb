"""Local files: exact ranges, copies and new files that appear complete or not at all."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

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


def write_atomic(path: Path, payload: bytes) -> None:
    """Write a small file that appears complete or not at all; several processes may write it at the same time."""
    put_file(path, lambda handle: handle.write(payload))


def put_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write to a temporary file in the same folder, flush it to the disk, rename it."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("wb") as handle:
            write(handle)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
