"""Index tars that exist already: shards made by other programs, or a shard set whose index was lost."""

from __future__ import annotations

import collections
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shards.adopt_rows import tar_rows
from shards.errors import DataError
from shards.index import INDEX_NAME, MANIFEST_NAME, file_sha256, fingerprint, read_manifest, rows_to_table, write_index
from shards.schema import IndexRow, Kind, Manifest
from shards.store import Folder, open_folder


def adopt(
    location: Path | str,
    corpus: str = "",
    on_progress: Callable[[int, int], None] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Manifest:
    """Write ``index.parquet`` and ``manifest.json`` for the tars of a folder.

    Args:
        location: folder or URL that holds ``*.tar``; shards of an object store are copied to a temporary folder one
            after another. An existing manifest is kept as far as it describes how the shards were made.
        corpus: name for samples whose json does not give one; default: the folder's name.
        on_progress: called with (shards done, shards in all).
        storage_options: see :func:`shards.store.open_folder`.

    Raises:
        DataError: no tars, a damaged tar, a sample that cannot be used (see :mod:`shards.adopt_rows`), or a tar whose
            bytes an existing manifest knows to be different.
    """
    folder = open_folder(location, storage_options)
    names = folder.list(".tar")
    if not names:
        raise DataError("no *.tar files", where=str(location), fix="pass the folder that holds the shards")
    rows: list[IndexRow] = []
    shards: list[dict[str, Any]] = []
    kinds: dict[Kind, str] = {}
    with tempfile.TemporaryDirectory(prefix="slt-adopt-") as scratch:
        before = _manifest(folder, Path(scratch))
        for number, name in enumerate(names, 1):
            path, digest = _local(folder, name, Path(scratch))
            kind, found = tar_rows(path, corpus or folder.location.rstrip("/").rpartition("/")[2])
            if found:
                kinds.setdefault(kind, name)
            rows += found
            shards.append({"name": name, "samples": len(found), "size": path.stat().st_size, "sha256": digest})
            if not folder.is_local:
                path.unlink()
            if on_progress is not None:
                on_progress(number, len(names))
        _check(before, shards, kinds, str(location))
        manifest = before or Manifest(next(iter(kinds), "video"), options={"adopted": True})
        manifest.shards = shards
        manifest.splits = dict(sorted(collections.Counter(row.split for row in rows).items()))
        manifest.counts = manifest.counts or {"samples": len(rows), "skipped": 0}
        table = rows_to_table(rows)
        manifest.fingerprint = fingerprint(shards, table)
        target = folder.path("") if folder.is_local else Path(scratch)
        write_index(target, table, manifest)
        if not folder.is_local:
            for name in (INDEX_NAME, MANIFEST_NAME):  # the manifest last: with it the set is complete
                folder.upload(target / name, name)
    return manifest


def _manifest(folder: Folder, scratch: Path) -> Manifest | None:
    if not folder.exists(MANIFEST_NAME):
        return None
    if folder.is_local:
        return read_manifest(folder.path(""))
    folder.download(MANIFEST_NAME, scratch / MANIFEST_NAME)
    return read_manifest(scratch)


def _local(folder: Folder, name: str, scratch: Path) -> tuple[Path, str]:
    """A tar as a local file, and its sha256."""
    if folder.is_local:
        return folder.path(name), file_sha256(folder.path(name))
    return scratch / name, folder.download(name, scratch / name)


def _check(before: Manifest | None, shards: list[dict[str, Any]], kinds: dict[Kind, str], where: str) -> None:
    if before is not None and before.shards != shards:
        changed = [new["name"] for new in shards if new not in before.shards]
        missing = sorted({old["name"] for old in before.shards} - {new["name"] for new in shards})
        found = [f"{name}: not the bytes its manifest was written for" for name in changed]
        found += [f"{name} is missing" for name in missing]
        raise DataError(
            "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if found[3:] else ""),
            where=where,
            fix="run `slt shards lint` to see the damage; delete manifest.json to accept the tars as they are",
        )
    if len(kinds) > 1:
        what = f"{' and '.join(kinds)} shards are mixed: {', '.join(kinds.values())}"
        raise DataError(what, where=where, fix="put them into folders of their own")
