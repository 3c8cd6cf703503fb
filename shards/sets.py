"""Opening a shard set wherever it lies, and telling what its videos are."""

from __future__ import annotations

import tempfile
from pathlib import Path

from shards.errors import DataError
from shards.index import INDEX_NAME, MANIFEST_NAME, ShardSet, read_index
from shards.store import Folder


def open_set(folder: Folder) -> ShardSet:
    """The shard set in a folder, local or on an object store, with all columns of its index.

    Raises:
        DataError: no manifest or index there, or they are damaged.
    """
    if folder.is_local:
        return read_index(folder.location)
    with tempfile.TemporaryDirectory(prefix="slt-index-") as scratch:
        for name in (MANIFEST_NAME, INDEX_NAME):
            if not folder.exists(name):
                raise DataError(f"no {name}: not a shard set", where=folder.location, fix="check the address")
            folder.download(name, Path(scratch) / name)
        return read_index(scratch)


def media_type(head: bytes) -> str:
    """MIME type of a video from its first bytes."""
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "video/webm"
    if head[:4] == b"RIFF":
        return "video/x-msvideo"
    return "video/mp4"
