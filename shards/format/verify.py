"""Compares every byte of a shard set with its index and manifest."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from isal.isal_zlib import crc32

from shards.errors import DataError
from shards.format.index import INDEX_NAME, MANIFEST_NAME, file_sha256, fingerprint, read_index
from shards.format.tar import Member, index_tar
from shards.storage.store import Folder, open_folder


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule: where it was found and what is wrong."""

    shard: str
    key: str
    rule: str
    detail: str

    def __str__(self) -> str:
        return f"{self.shard}{':' + self.key if self.key else ''}: {self.rule}: {self.detail}"


def verify(location: Path | str, storage_options: Mapping[str, object] | None = None) -> list[Problem]:
    """Re-read every byte of a shard set and compare it with index and manifest; an empty list means intact.

    Args:
        location: folder or URL; shards of an object store are copied to a temporary folder one by one.
        storage_options: see :func:`shards.storage.store.open_folder`.

    Raises DataError only when the set cannot be opened at all.
    """
    folder = open_folder(location, storage_options)
    if folder.is_local:
        return _verify(folder, Path(folder.location))
    with tempfile.TemporaryDirectory(prefix="slt-verify-") as scratch:
        for name in (MANIFEST_NAME, INDEX_NAME):
            folder.download(name, Path(scratch) / name)
        return _verify(folder, Path(scratch))


def _verify(folder: Folder, local: Path) -> list[Problem]:
    shard_set = read_index(local)
    problems = []
    if (actual := fingerprint(shard_set.manifest.shards, shard_set.table)) != shard_set.fingerprint:
        problems.append(Problem(INDEX_NAME, "", "fingerprint", f"content is {actual}, manifest says otherwise"))
    listed = {shard["name"]: shard for shard in shard_set.manifest.shards}
    for name in sorted(set(shard_set.table.column("shard").unique().to_pylist()) - set(listed)):
        problems.append(Problem(name, "", "unlisted_shard", "in the index but not in the manifest"))
    names = np.asarray(shard_set.table.column("shard").to_pylist(), dtype=object)
    for name, shard in listed.items():
        rows = shard_set.table.filter(pa.array(names == name)).to_pylist()
        path = local / name
        if not folder.is_local and folder.exists(name):
            folder.download(name, path)
        problems += verify_shard(path, shard, rows)
        if not folder.is_local:
            path.unlink(missing_ok=True)
    return problems


def verify_shard(path: Path, shard: dict[str, Any], rows: list[dict[str, Any]]) -> list[Problem]:
    """Compare one tar with its manifest entry (name, samples, size, sha256) and its index rows."""
    name = path.name
    if not path.is_file():
        return [Problem(name, "", "missing_shard", "the manifest lists it, the folder does not hold it")]
    problems = []
    if path.stat().st_size != shard["size"]:
        problems.append(Problem(name, "", "size", f"{path.stat().st_size} bytes, the manifest says {shard['size']}"))
    if len(rows) != shard["samples"]:
        problems.append(Problem(name, "", "samples", f"{len(rows)} index rows, the manifest says {shard['samples']}"))
    members: dict[int, Member] = {}
    try:
        members = {member.offset: member for member in index_tar(path)}
    except DataError as error:  # continue: the rows below show which samples are affected
        problems.append(Problem(name, "", error.what.split(":", 1)[0], f"{error.where}: {error.what}"))
    if file_sha256(path) != shard["sha256"]:
        problems.append(Problem(name, "", "sha256", "the bytes differ from those the manifest was written for"))
    with path.open("rb") as handle:
        for row in rows:
            problems += _verify_row(handle, members, row)
    return problems


def _verify_row(handle: BinaryIO, members: dict[int, Member], row: dict[str, Any]) -> list[Problem]:
    problems = []
    for offset, size, crc in (
        (row["offset"], row["size"], row["crc32"]),
        (row["meta_offset"], row["meta_size"], row["meta_crc32"]),
    ):
        if offset < 0:
            continue
        member = members.get(offset)
        if member is not None and member.size == size:
            actual = member.crc32
        else:
            handle.seek(offset)
            actual = crc32(handle.read(size))
        if actual != crc:
            problems.append(
                Problem(row["shard"], row["key"], "crc32", f"bytes {offset}+{size} of {row['sample_id']} were changed")
            )
    return problems
