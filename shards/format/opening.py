"""Opens a shard set on a disk or an object store: for training and evaluation, or for a tool that reads it once."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from shards.errors import DataError
from shards.format.index import INDEX_NAME, MANIFEST_NAME, ShardSet, open_index, read_index
from shards.format.text_columns import column_file
from shards.storage.cache import mirror
from shards.storage.store import Folder, is_remote


def open_shards(
    location: str | Path,
    cache_dir: str | Path | None = None,
    storage_options: Mapping[str, object] | None = None,
    columns: Sequence[str] = (),
) -> ShardSet:
    """The shard set at a path or URL, its index shared by all processes of the host.

    Args:
        location: folder, or URL in an object store.
        cache_dir: node-local folder for the index (and shards) of remote sets, and for mapped copies of large
            indices whose folder is read-only.
        storage_options: for the object store's fsspec file system.
        columns: text columns that a mirror of a remote set shall hold, too (:mod:`shards.format.text_columns`).

    Raises:
        DataError: no intact shard set, a remote one without ``cache_dir``, or one that lacks a column.
    """
    if not is_remote(location):
        return open_index(Path(str(location).removeprefix("file://")), cache_dir)
    if cache_dir is None:
        raise DataError(
            "a shard set in an object store needs a local folder for its index",
            where=str(location),
            fix="set data.cache_dir, or copy the set to a disk",
        )
    files = [column_file(name) for name in columns]
    return open_index(mirror(str(location), Path(cache_dir), storage_options, files), cache_dir)


def open_set(folder: Folder) -> ShardSet:
    """The shard set in a folder, local or on an object store, with all columns of its index.

    Raises:
        DataError: manifest or index missing or damaged.
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
