"""The index of a shard set: read and write ``index.parquet`` + ``manifest.json``."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from shards.atomic import put_file, write_atomic
from shards.errors import DataError
from shards.schema import FORMAT_VERSION, IndexRow, Manifest

INDEX_NAME, MANIFEST_NAME = "index.parquet", "manifest.json"
NAMES = ("shard", "split", "corpus", "language", "sign_language", "signer")
"""Columns with few distinct texts: an opened index stores them as numbers into a list of names."""
MAPPED_ABOVE = 64 << 20
"""Uncompressed bytes above which an index is memory-mapped."""
BATCH_ROWS = 1 << 16
_UINT32 = ("crc32", "meta_crc32")
_INT32 = ("frames", "width", "height", "tokens")


def index_schema() -> pa.Schema:
    """Columns of ``index.parquet``: the fields of IndexRow, in order."""
    types = {str: pa.string(), float: pa.float64(), int: pa.int64()}
    fields = []
    for name, stored in get_type_hints(IndexRow).items():
        kind = pa.uint32() if name in _UINT32 else pa.int32() if name in _INT32 else types[stored]
        fields.append(pa.field(name, kind, nullable=False))
    return pa.schema(fields)


class _ShardEntry(TypedDict):
    name: str
    samples: int
    size: int
    sha256: str


@dataclass(frozen=True)
class ShardSet:
    """A folder of shards with its manifest and index (one table row per sample, in shard order)."""

    dir: Path
    manifest: Manifest
    table: pa.Table
    cache: Path | None = None
    """Where a memory-mapped copy of the index may be written when the folder is read-only."""
    mapped: pa.Buffer | None = dataclasses.field(default=None, repr=False, compare=False)
    """The file that ``table`` is a view of, when it is memory-mapped."""

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
        text = path.read_text(encoding="utf-8")
        values = json.loads(text)
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
    if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION or set(values) != known:
        fields = values if isinstance(values, dict) else {}
        raise DataError(
            f"format version {fields.get('format_version')!r} with fields {sorted(fields)}, expected {FORMAT_VERSION} "
            f"with {sorted(known)}",
            where=str(path),
            fix="build the shards with this version of the program",
        )
    try:
        manifest = TypeAdapter(Manifest).validate_json(text, strict=True)
        TypeAdapter(list[_ShardEntry]).validate_python(manifest.shards, strict=True)
        return manifest
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"field {'.'.join(map(str, first['loc']))}: {first['msg']}, it is {first['input']!r}",
            where=str(path),
            fix="run `slt shards index DIR` on a copy without this file, or copy the shard set again",
        ) from None


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
        with path.open("rb") as handle:  # given a path, Arrow keeps the file open until garbage collection
            table = pq.read_table(handle, columns=list(columns) if columns is not None else None)
        table.validate(full=True)  # texts that are not UTF-8 would surface anywhere later
    except (OSError, pa.ArrowException) as error:
        raise _unreadable_index(path, error) from error
    _check_index(table, list(columns) if columns is not None else index_schema().names, manifest, path)
    return ShardSet(folder, manifest, table)


def _unreadable_index(path: Path, error: Exception) -> DataError:
    return DataError(f"unreadable index ({error})", where=str(path), fix="run `slt shards index DIR` to write it again")


def _check_index(table: pa.Table, columns: list[str], manifest: Manifest, path: Path) -> None:
    expected = sum(manifest.splits.values())
    if table.num_rows != expected or table.column_names != columns:
        raise DataError(
            f"{table.num_rows} rows with columns {table.column_names}; the manifest says {expected} samples",
            where=str(path),
            fix="run `slt shards index DIR` to write it again",
        )


def open_index(folder: Path | str, cache: Path | str | None = None) -> ShardSet:
    """Open a shard set for long use in many processes, as in training and evaluation.

    A large index (64 MiB and more) is memory-mapped, so that all processes of a host share it: an uncompressed copy,
    ``index-<fingerprint>.arrow``, is made once beside ``index.parquet``, or in ``cache`` if the folder is read-only.
    A smaller one is read as :func:`read_index` does. The columns NAMES may be Arrow dictionaries.

    Raises:
        DataError: as :func:`read_index`; or the copy is needed and no folder for it is writable.
    """
    folder, cache = Path(folder), Path(cache) if cache is not None else None
    manifest = read_manifest(folder)
    if _uncompressed_bytes(folder / INDEX_NAME) < MAPPED_ABOVE:
        return dataclasses.replace(read_index(folder), cache=cache)
    path = _mapped_copy(folder, manifest, cache)
    try:
        with pa.memory_map(str(path)) as file:
            mapped = file.read_buffer()
        table = pa.ipc.open_file(mapped).read_all()
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"unreadable copy of the index ({error})", where=str(path), fix="delete this file; it is made again"
        ) from error
    _check_index(table, index_schema().names, manifest, path)
    return ShardSet(folder, manifest, table, cache, mapped)


def with_numbered_names(table: pa.Table) -> pa.Table:
    """The table with its NAMES as Arrow dictionaries, the same one in every batch."""
    for name in NAMES:
        if not pa.types.is_dictionary(table.column(name).type):
            table = table.set_column(table.column_names.index(name), name, table.column(name).dictionary_encode())
    return table.unify_dictionaries()


def _uncompressed_bytes(path: Path) -> int:
    try:
        metadata = pq.read_metadata(path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable_index(path, error) from error
    return sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))


def _mapped_copy(folder: Path, manifest: Manifest, cache: Path | None) -> Path:
    """The memory-mapped copy of an index, made if missing."""
    name = f"index-{manifest.fingerprint[:16]}.arrow"
    places = [folder / name, *([cache / name] if cache is not None else [])]
    for place in places:
        if place.exists():
            return place
    writable = [place for place in places if os.access(place.parent, os.W_OK)]
    if not writable:
        raise DataError(
            "the index is large and needs a memory-mapped copy, and the folder for it is read-only",
            where=", ".join(str(place.parent) for place in places),
            fix="open it once as a user who may write there, or name an existing cache folder that is writable",
        )
    with (folder / INDEX_NAME).open("rb") as handle:
        with contextlib.suppress(OSError):  # if files cannot be locked, each process makes a copy
            fcntl.flock(handle, fcntl.LOCK_EX)
        if not writable[0].exists():
            _write_mapped(handle, writable[0])
            if writable[0].parent == folder:  # a cache folder also serves other shard sets
                _drop_copies(folder, writable[0])
    return writable[0]


def _drop_copies(folder: Path, kept: Path) -> None:
    """Delete the copies of earlier indices; processes that still read one keep its bytes."""
    for other in folder.glob("index-*.arrow"):
        if other != kept:
            other.unlink(missing_ok=True)


def _write_mapped(source: BinaryIO, target: Path) -> None:
    """Copy a parquet index into an Arrow file, batch by batch; it appears complete or not at all."""
    parquet = pq.ParquetFile(source)
    names = {name: _distinct(parquet, name) for name in NAMES}
    numbered = pa.dictionary(pa.int32(), pa.string())
    schema = pa.schema([field.with_type(numbered) if field.name in names else field for field in index_schema()])
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with partial.open("xb") as handle:
            with pa.ipc.new_file(handle, schema) as writer:
                for batch in parquet.iter_batches(BATCH_ROWS, columns=schema.names):
                    arrays = [
                        pa.DictionaryArray.from_arrays(pc.index_in(array, names[name]).cast(pa.int32()), names[name])
                        if name in names
                        else array
                        for name, array in zip(schema.names, batch.columns, strict=True)
                    ]
                    writer.write_batch(pa.record_batch(arrays, schema=schema))
            sync(handle)
        partial.rename(target)
    except OSError as error:
        raise DataError(
            f"cannot write the memory-mapped copy of the index ({error})", where=str(target), fix="make room there"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _distinct(parquet: pq.ParquetFile, name: str) -> pa.Array:
    """The values of a column in the order of their first row."""
    distinct: dict[str, None] = {}
    for batch in parquet.iter_batches(BATCH_ROWS, columns=[name]):
        distinct.update(dict.fromkeys(batch.column(0).unique().to_pylist()))
    return pa.array(distinct, pa.string())


def rows_to_table(rows: Iterable[IndexRow]) -> pa.Table:
    """IndexRows as an Arrow table with the columns of :func:`index_schema`."""
    schema, names = index_schema(), index_schema().names
    batches, block = [], list(rows)
    for start in range(0, len(block), BATCH_ROWS):  # bounded batches: one string column may exceed 2 GiB in total
        part = block[start : start + BATCH_ROWS]
        arrays = [pa.array([getattr(row, name) for row in part], schema.field(name).type) for name in names]
        batches.append(pa.record_batch(arrays, schema=schema))
    return pa.Table.from_batches(batches, schema=schema)


def write_index(folder: Path, table: pa.Table, manifest: Manifest) -> None:
    """Write ``index.parquet`` and then, last, ``manifest.json``; both appear complete or not at all."""
    layout: dict[str, Any] = {"compression": "zstd", "row_group_size": BATCH_ROWS, "store_schema": False}
    put_file(folder / INDEX_NAME, lambda handle: pq.write_table(table, handle, **layout))
    write_atomic(folder / MANIFEST_NAME, json.dumps(manifest.to_dict(), indent=1, ensure_ascii=False).encode() + b"\n")


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
