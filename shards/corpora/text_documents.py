"""Documents of a text file, one by one: lines, paragraphs, JSON lines, table rows, parquet and Arrow rows.

At most one document, parquet page or Arrow batch is in memory.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from shards.corpora.compressed import LONGEST_LINE, plain_suffix
from shards.corpora.rows import DELIMITERS, read_jsonl, read_lines, read_table
from shards.errors import DataError

Unit = Literal["line", "paragraph", "file"]
UNITS = ("line", "paragraph", "file")
PLAIN, JSON_LINES, PARQUET = ".txt", (".jsonl", ".ndjson"), ".parquet"
SUFFIXES = (PLAIN, *JSON_LINES, *DELIMITERS, PARQUET)
_ROWS = 1024


def read_documents(
    path: Path, fields: Sequence[str], unit: Unit = "line", quoting: bool | None = None, columns: Sequence[str] = ()
) -> Iterator[tuple[int, list[object]]]:
    """(line or row number from 1, value of each field) of a file; the suffix tells its format.

    Args:
        path: may be compressed, except parquet, which compresses itself.
        fields: names of fields or columns; ``translation.de`` is the field ``de`` of ``translation``. Plain text has
            no fields: the document is the first one.
        unit: what a document of plain text is: a line, a paragraph between blank lines, or the file.
        quoting: whether ``"`` quotes table fields; default: only for commas.
        columns: names of all columns of tables without a header line.

    Raises:
        DataError: the file is missing, damaged, not UTF-8, or lacks a field.
    """
    suffix = plain_suffix(path)
    if suffix == PLAIN:
        texts = read_lines(path) if unit == "line" else _joined(path, unit)
        for number, text in texts:
            if text.strip():
                yield number, [text]
        return
    if suffix == PARQUET:
        yield from _read_parquet(path, fields)
        return
    heads = sorted({field.partition(".")[0] for field in fields})
    rows: Iterator[tuple[int, Mapping[str, object]]]
    if suffix in DELIMITERS:
        delimiter = DELIMITERS[suffix]
        csv.field_size_limit(LONGEST_LINE)  # the library's own limit, 128 KiB, is shorter than many documents
        heads = list(fields)
        rows = read_table(path, delimiter, delimiter == "," if quoting is None else quoting, heads, columns)
    else:
        rows = read_jsonl(path, heads)
    for number, row in rows:
        yield number, [value_at(row, field, f"{path}:{number}") for field in fields]


def fields_of(path: Path) -> list[str] | None:
    """The fields or columns of a file's documents, by its first row; None for plain text.

    Raises:
        DataError: the file cannot be read.
    """
    suffix = plain_suffix(path)
    if suffix == PLAIN:
        return None
    if suffix == PARQUET:
        with _parquet(path) as file:
            return list(file.schema_arrow.names)
    if suffix in JSON_LINES:
        return list(next(read_jsonl(path, ()), (0, {}))[1])
    delimiter = DELIMITERS[suffix]
    header = next(read_lines(path), (0, ""))[1]
    return next(csv.reader([header], delimiter=delimiter)) if delimiter == "," else header.split(delimiter)


def value_at(row: Mapping[str, object], field: str, where: str) -> Any:
    """The value of ``a`` or ``a.b``; None where a part of the path is null. Raises DataError when it does not exist."""
    if field in row:
        return row[field]
    value: object = row
    for name in field.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or name not in value:
            fields = sorted(value) if isinstance(value, Mapping) else type(value).__name__
            raise DataError(
                f"no field {field!r}: {name!r} is not in {fields}", where=where, fix="name fields as a.b.c from the top"
            )
        value = value[name]
    return value


def arrow_columns(names: Sequence[str], fields: Sequence[str], where: str) -> list[str]:
    """The columns that hold the fields, each once. Raises DataError naming one that does not exist."""
    columns = [field if field in names else field.partition(".")[0] for field in fields]
    missing = [column for column in columns if column not in names]
    if missing:
        raise DataError(
            f"no column {', '.join(map(repr, missing))}; there are {list(names)}",
            where=where,
            fix="map the field names",
        )
    return list(dict.fromkeys(columns))


def arrow_rows(
    batches: Iterable[pa.RecordBatch], fields: Sequence[str], where: str
) -> Iterator[tuple[int, list[object]]]:
    """(row number from 1, value of each field) of Arrow batches.

    Raises DataError for a column that does not exist, text that is not UTF-8, or batches that cannot be read.
    """
    number = 0
    try:
        for batch in batches:
            part = batch.select(arrow_columns(batch.schema.names, fields, where))
            part.validate(full=True)  # damaged offsets would be followed out of the buffers
            for start in range(0, part.num_rows, _ROWS):
                for row in part.slice(start, _ROWS).to_pylist():
                    number += 1
                    yield number, [value_at(row, field, f"{where}:{number}") for field in fields]
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"unreadable after row {number} ({error})", where=where, fix="fetch or write the file again"
        ) from None


def _joined(path: Path, unit: Unit) -> Iterator[tuple[int, str]]:
    """Paragraphs, or the whole file, with the number of their first line."""
    lines: list[str] = []
    first, size = 1, 0
    for number, line in read_lines(path):
        if unit == "paragraph" and not line.strip():
            if lines:
                yield first, "\n".join(lines)
            lines, size = [], 0
            continue
        first = first if lines else number
        lines.append(line)
        size += len(line)
        if size > LONGEST_LINE:
            raise DataError(
                f"a {unit} of more than {LONGEST_LINE >> 20} MiB", where=f"{path}:{first}", fix="choose a smaller unit"
            )
    if lines:
        yield first, "\n".join(lines)


def _read_parquet(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, list[object]]]:
    with _parquet(path) as file:
        columns = arrow_columns(file.schema_arrow.names, fields, str(path))
        batches = file.iter_batches(batch_size=_ROWS, columns=columns, use_threads=False)
        yield from arrow_rows(batches, fields, str(path))


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with path.open("rb") as handle, pq.ParquetFile(handle, buffer_size=1 << 20) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"not a parquet file ({error})", where=str(path), fix="fetch or write the file again") from None
