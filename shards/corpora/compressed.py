"""Opening files that may be compressed: ``.gz``, ``.bz2``, ``.xz`` and ``.zst`` are read as streams, never unpacked."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from shards.corpora.file_kinds import HEAD_BYTES, refuse_binary, text_kind
from shards.errors import DataError
from shards.names import existing

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What reading a missing, unreadable, cut off or damaged file raises."""
LONGEST_LINE = 1 << 28
"""Bytes; a longer line is not a document (a JSON array on one line, a binary file)."""


def plain_suffix(path: Path) -> str:
    """The suffix of the uncompressed format, in lower case: ``.tsv`` of ``a.tsv`` and of ``A.TSV.gz``."""
    return (Path(path.stem) if compressed(path) else path).suffix.lower()


def compressed(path: Path) -> bool:
    """Whether the name says that the file is compressed."""
    return path.suffix.lower() in COMPRESSIONS


def open_source(path: Path) -> io.BufferedReader:
    """The uncompressed bytes of a file as a stream. Raises one of :data:`DAMAGED`, as reading from it does."""
    path = existing(path)
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".bz2":
        return bz2.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".xz":
        return lzma.open(path, "rb")  # type: ignore[return-value]
    if suffix == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"), 1 << 20)
    return path.open("rb")


def byte_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file with their ends. Raises DataError if the file is missing, damaged or not text."""
    try:
        with open_source(path) as handle:
            refuse_binary(handle.peek(HEAD_BYTES)[:HEAD_BYTES], path)
            for line in iter(functools.partial(handle.readline, LONGEST_LINE + 1), b""):
                if len(line) > LONGEST_LINE:
                    raise DataError(
                        f"a line of more than {LONGEST_LINE >> 20} MiB",
                        where=str(path),
                        fix="put one document on a line",
                    )
                yield line
    except DAMAGED as error:
        raise cannot_read(path, error) from None


def cannot_read(path: Path, error: BaseException) -> DataError:
    """The DataError for a file that cannot be opened or unpacked."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    damaged = compressed(path) and not isinstance(error, FileNotFoundError | PermissionError)
    fix = "copy or fetch the file again: it is cut off or damaged" if damaged else "check the path"
    return DataError(f"cannot be read ({reason})", where=str(path), fix=fix)


def refuse_no_table(path: Path) -> None:
    """Raise DataError if a file that should be a table is missing or begins like another kind of file."""
    try:
        with open_source(path) as handle:
            head = handle.peek(HEAD_BYTES)[:HEAD_BYTES]
    except DAMAGED as error:
        raise cannot_read(path, error) from None
    refuse_binary(head, path)
    if (known := text_kind(head)) is not None:
        raise DataError(f"no table but {known[0]}", where=str(path), fix=known[1])
