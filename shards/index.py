"""The index of a shard set: read and write ``index.parquet`` + ``manifest.json``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.errors import DataError
from shards.schema import FORMAT_VERSION, IndexRow, Manifest

INDEX_NAME, MANIFEST_NAME = "index.parquet", "manifest.json"
_UINT32 = ("crc32", "meta_crc32")
_INT32 = ("frames", "width", "height", "tokens")


def index_schema() -> pa.Schema:
    """Columns of ``index.parquet``: the fields of IndexRow, in order."""
    types = {"str": pa.string(), "float": pa.float64(), "int": pa.int64()}
    fields = []
    for field in dataclasses.fields(IndexRow):
        kind = pa.uint32() if field.name in _UINT32 else pa.int32() if field.name in _INT32 else types[str(field.type)]
        fields.append(pa.field(field.name, kind, nullable=False))
    return pa.schema(fields)


@dataclass(frozen=True)
class ShardSet:
    """A folder of shards with its manifest and index (one table row per sample, in shard order)."""

    dir: Path
    manifest: Manifest
    table: pa.Table

    @property
    def fingerprint(self) -> str:
        """Identity of the content; see :func:`fingerprint`."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        return self.table.num_rows

    def row(self, sample: int) -> IndexRow:
        """The index row of one sample (only when all columns were read)."""
        return IndexRow(**{name: column[sample].as_py() for name, column in self._columns()})

    def rows(self) -> Iterator[IndexRow]:
        """Every index row in shard order (only when all columns were read)."""
        for batch in self.table.to_batches():
            for values in batch.to_pylist():
                yield IndexRow(**values)

    def shard_path(self, shard: str) -> Path:
        """Absolute path of a shard named in the index."""
        return self.dir / shard

    def _columns(self) -> Iterator[tuple[str, pa.ChunkedArray]]:
        return zip(self.table.column_names, self.table.columns, strict=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a shard set. Raises DataError when it is missing, unreadable or of another format version."""
    path = Path(folder) / MANIFEST_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            "no manifest.json: not a shard set, or its build did not finish",
            where=str(folder),
            fix="run `slt shards build ...` again, or `slt shards index DIR` for tars made elsewhere",
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(
            f"unreadable manifest ({error})", where=str(path), fix="rebuild or copy the shard set again"
        ) from error
    known = {field.name for field in dataclasses.fields(Manifest)}
    if values.get("format_version") != FORMAT_VERSION or set(values) != known:
        raise DataError(
            f"format version {values.get('format_version')!r} with fields {sorted(values)}, expected {FORMAT_VERSION}",
            where=str(path),
            fix="build the shards with this version of the program",
        )
    return Manifest(**values)


def read_index(folder: Path | str, columns: Sequence[str] | None = None) -> ShardSet:
    """Open a shard set.

    Args:
        folder: holds ``manifest.json`` and ``index.parquet``.
        columns: read only these IndexRow fields (a million-sample index is mostly text).

    Raises:
        DataError: a file is missing or damaged, or index and manifest disagree about the number of samples.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    path = folder / INDEX_NAME
    try:
        with path.open("rb") as handle:  # given a path, Arrow keeps the file open until the garbage collector comes
            table = pq.read_table(handle, columns=list(columns) if columns is not None else None)
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"unreadable index ({error})", where=str(path), fix="run `slt shards index DIR` to write it again"
        ) from error
    expected = sum(manifest.splits.values())
    wanted = list(columns) if columns is not None else index_schema().names
    if table.num_rows != expected or table.column_names != wanted:
        raise DataError(
            f"{table.num_rows} rows with columns {table.column_names}; the manifest says {expected} samples",
            where=str(path),
            fix="run `slt shards index DIR` to write it again",
        )
    return ShardSet(folder, manifest, table)


def rows_to_table(rows: Iterable[IndexRow]) -> pa.Table:
    """IndexRows as an Arrow table with the columns of :func:`index_schema`."""
    schema, names = index_schema(), index_schema().names
    batches, block = [], list(rows)
    for start in range(0, len(block), 1 << 16):  # bounded batches: one string column may exceed 2 GiB in total
        part = block[start : start + (1 << 16)]
        arrays = [pa.array([getattr(row, name) for row in part], schema.field(name).type) for name in names]
        batches.append(pa.record_batch(arrays, schema=schema))
    return pa.Table.from_batches(batches, schema=schema)


def write_index(folder: Path, table: pa.Table, manifest: Manifest) -> None:
    """Write ``index.parquet`` and then, last, ``manifest.json``; both appear complete or not at all."""
    partial = folder / (INDEX_NAME + ".tmp")
    with partial.open("wb") as handle:
        pq.write_table(table, handle, compression="zstd", row_group_size=1 << 16, store_schema=False)
        sync(handle)
    partial.rename(folder / INDEX_NAME)
    write_atomic(folder / MANIFEST_NAME, json.dumps(manifest.to_dict(), indent=1, ensure_ascii=False).encode() + b"\n")


def write_atomic(path: Path, payload: bytes) -> None:
    """Write a small file under a temporary name, flush it to disk and rename it."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as handle:
        handle.write(payload)
        sync(handle)
    partial.rename(path)


def sync(handle: BinaryIO) -> None:
    """Flush a file's content to the disk."""
    handle.flush()
    os.fsync(handle.fileno())


def fingerprint(shards: list[dict[str, Any]], table: pa.Table) -> str:
    """sha256 over the shard names and checksums and over the index values, whatever wrote the parquet file."""
    digest = hashlib.sha256(json.dumps([[shard["name"], shard["sha256"]] for shard in shards]).encode())
    for name, column in zip(table.column_names, table.columns, strict=True):
        digest.update(name.encode() + b"\0")
        if pa.types.is_string(column.type):
            digest.update(np.ascontiguousarray(pc.binary_length(column).to_numpy(), dtype="<i8").tobytes())
            for chunk in column.chunks:
                digest.update("".join(chunk.to_pylist()).encode())
        else:
            dtype = "<f8" if pa.types.is_floating(column.type) else "<i8"
            digest.update(np.ascontiguousarray(column.to_numpy(), dtype=dtype).tobytes())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
