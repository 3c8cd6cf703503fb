"""Opening a shard set for training and evaluation, wherever it lies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards.cache import mirror
from shards.errors import DataError
from shards.index import ShardSet, open_index
from shards.store import is_remote


def open_shards(
    location: str | Path,
    cache_dir: str | Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> ShardSet:
    """The shard set at a path or URL, its index shared by all processes of the host.

    Args:
        location: folder, or URL in an object store.
        cache_dir: node-local folder for the index (and shards) of remote sets, and for mapped copies of large
            indices whose folder is read-only.
        storage_options: of the object store's fsspec file system.

    Raises:
        DataError: no intact shard set there, or a remote one without ``cache_dir``.
    """
    if not is_remote(location):
        return open_index(Path(str(location).removeprefix("file://")), cache_dir)
    if cache_dir is None:
        raise DataError(
            "a shard set in an object store needs a local folder for its index",
            where=str(location),
            fix="set data.cache_dir, or copy the set to a disk",
        )
    return open_index(mirror(str(location), Path(cache_dir), storage_options), cache_dir)
