"""The index of a shard set: read and write ``index.parquet`` + ``manifest.json``, parse and verify any WebDataset tar.

Tar headers are parsed here rather than by ``tarfile``, which takes a damaged header past the first member for the end
of the archive and thereby loses every later sample without a word.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zlib
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
BLOCK = 512
_CHUNK = 1 << 20
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


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside a tar: its name, the first payload byte, the payload size and its CRC-32."""

    name: str
    offset: int
    size: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule: where it was found and what is wrong."""

    shard: str
    key: str
    rule: str
    detail: str

    def __str__(self) -> str:
        return f"{self.shard}{':' + self.key if self.key else ''}: {self.rule}: {self.detail}"


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


def index_tar(path: Path | str) -> list[Member]:
    """Every regular file of a tar with its payload address and CRC-32.

    Understands ustar, GNU long names and pax headers. Raises DataError naming shard and byte offset for a damaged
    header checksum, a truncated member, missing end-of-archive blocks, or zeros where a header should be.
    """
    path = Path(path)
    members: list[Member] = []
    try:
        with path.open("rb", buffering=_CHUNK) as handle:
            total = os.fstat(handle.fileno()).st_size
            position, long_name = 0, None
            while (block := _header(handle, position, total, path)) is not None:
                size, kind = _size(block, position, path), block[156:157]
                payload = position + BLOCK
                if payload + size > total:
                    raise _damage(
                        path, position, f"member of {size} bytes is cut off, the file ends at byte {total}", "truncated"
                    )
                if kind in b"Lxg":
                    override = _override(kind, handle.read(size), position, path)
                    long_name = override if kind in b"Lx" and override is not None else long_name
                elif kind in b"07\0":
                    members.append(Member(long_name or _name(block), payload, size, _crc(handle, size)))
                    long_name = None
                else:
                    long_name = None
                position = payload + -(-size // BLOCK) * BLOCK
    except OSError as error:
        raise DataError(f"cannot read the shard ({error.strerror})", where=str(path), fix="check the path") from error
    return members


def _damage(path: Path, position: int, what: str, rule: str) -> DataError:
    return DataError(
        f"{rule}: {what}", where=f"{path}@{position}", fix="copy this shard again, or delete the set and rebuild it"
    )


def _header(handle: BinaryIO, position: int, total: int, path: Path) -> bytes | None:
    """The header at ``position``, checksum verified; None at a proper end of archive."""
    handle.seek(position)
    block = handle.read(BLOCK)
    if len(block) < BLOCK:
        raise _damage(path, position, "the file ends without the two zero blocks that close a tar", "truncated")
    if not any(block):
        while chunk := handle.read(_CHUNK):
            if any(chunk):
                raise _damage(path, position, "zeros where a member header should be, data follows", "zero_hole")
        if total - position < 2 * BLOCK:
            raise _damage(path, position, "only one of the two zero blocks that close a tar", "truncated")
        return None
    stored = _number(block[148:156])
    if stored != sum(block[:148]) + 8 * 32 + sum(block[156:]):
        raise _damage(path, position, "the member header does not match its checksum", "bad_header")
    return block


def _number(field: bytes) -> int | None:
    """Octal or base-256 number of a tar header; None when it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return None


def _size(block: bytes, position: int, path: Path) -> int:
    size = _number(block[124:136])
    if size is None:
        raise _damage(path, position, f"unreadable member size {block[124:136]!r}", "bad_header")
    return size


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
    prefix = (
        block[345:500].split(b"\0", 1)[0].decode("utf-8", "surrogateescape") if block[257:263] == b"ustar\0" else ""
    )
    return f"{prefix}/{name}" if prefix else name


def _override(kind: bytes, payload: bytes, position: int, path: Path) -> str | None:
    """The name given by a GNU long-name member or a pax record ``LEN path=VALUE``."""
    if kind == b"L":
        return payload.rstrip(b"\0").decode("utf-8", "surrogateescape")
    while payload:
        length, _, _ = payload.partition(b" ")
        if not length.isdigit() or int(length) <= len(length):
            raise _damage(path, position, f"unreadable pax record {payload[:40]!r}", "bad_header")
        record, payload = payload[: int(length)], payload[int(length) :]
        key, _, value = record[len(length) + 1 :].rstrip(b"\n").partition(b"=")
        if key == b"path":
            return value.decode("utf-8", "surrogateescape")
    return None


def _crc(handle: BinaryIO, size: int) -> int:
    crc = 0
    while size:
        chunk = handle.read(min(size, _CHUNK))
        crc, size = zlib.crc32(chunk, crc), size - len(chunk)
    return crc


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def verify(folder: Path | str) -> list[Problem]:
    """Re-read every byte of a shard set and compare it with index and manifest; an empty list means intact.

    Raises DataError only when the set cannot be opened at all.
    """
    shard_set = read_index(folder)
    problems = []
    if (found := fingerprint(shard_set.manifest.shards, shard_set.table)) != shard_set.fingerprint:
        problems.append(Problem(INDEX_NAME, "", "fingerprint", f"content is {found}, manifest says otherwise"))
    listed = {shard["name"]: shard for shard in shard_set.manifest.shards}
    for name in sorted(set(shard_set.table.column("shard").unique().to_pylist()) - set(listed)):
        problems.append(Problem(name, "", "unlisted_shard", "in the index but not in the manifest"))
    names = np.asarray(shard_set.table.column("shard").to_pylist(), dtype=object)
    for name, shard in listed.items():
        rows = shard_set.table.filter(pa.array(names == name)).to_pylist()
        problems += verify_shard(shard_set.dir / name, shard, rows)
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
    except DataError as error:  # go on: the rows below tell which samples are affected
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
            found = member.crc32
        else:
            handle.seek(offset)
            found = zlib.crc32(handle.read(size))
        if found != crc:
            problems.append(
                Problem(row["shard"], row["key"], "crc32", f"bytes {offset}+{size} of {row['sample_id']} were changed")
            )
    return problems
