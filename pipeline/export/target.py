"""The folder an export appears in: one writer at a time, complete or absent."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipeline.errors import CheckpointError
from shards.atomic import put_folder, sync_folder


def temporary_folder(out: Path) -> Path:
    """Where an export is written before it has its name; an interrupted one stays there and is continued."""
    return out.with_name(f".tmp-{out.name}")


@contextlib.contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Keep every other export out of ``out``; a process that ends, however it does, gives it free.

    Also puts the older export back where a crash left it without its name.

    Raises:
        CheckpointError: another export writes there.
        OSError: the folder around it cannot be written.
    """
    path = out.with_name(f".{out.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, out):
        try:
            if _replaced(out).exists() and not out.exists():
                os.replace(_replaced(out), out)
            yield
        finally:
            path.unlink(missing_ok=True)


def _locked(path: Path, out: Path) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise CheckpointError(
                f"another export to {out} is running ({holder}); wait for it, stop it, or give another --out"
            ) from error
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}")
            file.flush()
            return file
        file.close()  # its holder removed the file between our two calls


def publish(temporary: Path, out: Path) -> None:
    """Give a finished folder its name, durably; an older export of this name stays until then."""
    for file in sorted(temporary.rglob("*")):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    sync_folder(temporary)
    put_folder(temporary, out, _replaced(out))


def _replaced(out: Path) -> Path:
    return out.with_name(f".replaced-{out.name}")
