"""Files that appear complete or not at all, also after a crash: the one place where small files are written."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a small file (text as UTF-8): readers see the old content or the new; several processes may write it."""
    data = content.encode() if isinstance(content, str) else content
    put_file(path, lambda handle: handle.write(data))


def put_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write under a name of its own in the same folder, flush to the disk, rename.

    Raises:
        OSError: as writing does; the old file is left, and nothing of the new one.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("wb") as handle:
            write(handle)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def put_folder(written: Path, final: Path, older: Path) -> None:
    """Give a finished folder its name, durably. What has the name until then waits under ``older`` and is removed: a
    crash between the two renames leaves it there, and nothing under the name."""
    shutil.rmtree(older, ignore_errors=True)
    if final.exists():
        os.replace(final, older)
    os.replace(written, final)
    sync_folder(final.parent)
    shutil.rmtree(older, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
