"""Annotation records in JSON arrays and Parquet tables, read piece by piece, so that 200 MB of JSON need no 2 GB."""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shards.corpora.rows import UTF16_MARKS, read_lines
from shards.errors import DataError

MAX_RECORD_CHARACTERS = 16 << 20
_CHUNK_BYTES = 1 << 20
_SPACES = " \t\r\n"


def read_json_array(path: Path, needed: Iterable[str]) -> Iterator[tuple[int, dict[str, object]]]:
    """(number from 1, object) of a file that holds one JSON array of objects.

    Raises DataError for other content, an object without the ``needed`` fields, or one above 16 million characters.
    """
    columns = list(needed)
    for number, record in _elements(path):
        where = f"{path}:record {number}"
        if not isinstance(record, dict):
            raise DataError(
                f"a list element is {type(record).__name__}", where=where, fix="use a list of objects, or JSON lines"
            )
        check_fields(columns, list(record), where)
        yield number, record


def read_json_rows(path: Path, needed: Iterable[str]) -> Iterator[tuple[int, dict[str, object]]]:
    """(number from 1, row) of a JSON array of objects, or of an object of rows by name.

    The field ``key`` holds a row's name, unless the row has such a field; a row that is a text or number becomes the
    field ``value``. Raises DataError as :func:`read_json_array`, and for an object of lists instead of rows.
    """
    if _Text(path).peek() != "{":
        yield from read_json_array(path, needed)
        return
    _refuse_lines(path)
    columns = list(needed)
    for number, (name, value) in enumerate(_members(path), 1):
        where = f"{path}: {name}"
        if isinstance(value, list):
            raise DataError(
                f"{name!r} is a list: an object of rows holds one object per row",
                where=where,
                fix=f"if the rows lie in this list save it alone, for example jq '.{name}' {path.name} > rows.json",
            )
        record = {"key": name, **(value if isinstance(value, dict) else {"value": value})}
        check_fields(columns, list(record), where)
        yield number, record


def read_parquet(path: Path, needed: Iterable[str]) -> Iterator[tuple[int, dict[str, object]]]:
    """(row number from 1, row) of a Parquet file, ``needed`` columns only. Raises DataError for a broken file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(needed)
    number = 0
    try:
        with pq.ParquetFile(path) as table:
            check_fields(columns, table.schema_arrow.names, str(path))
            for batch in table.iter_batches(batch_size=4096, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        where = f"{path}:row {number}" if number else str(path)
        raise DataError(f"not a readable Parquet file ({error})", where=where, fix="write the file again") from None


def parquet_columns(path: Path) -> list[str]:
    """Column names of a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"not a Parquet file ({error})", where=str(path), fix="write the file again") from None


def check_fields(needed: list[str], fields: list[str], where: str) -> None:
    """Raise DataError if a needed field is missing."""
    missing = [name for name in needed if name not in fields]
    if missing:
        raise DataError(
            f"no field {', '.join(map(repr, missing))}; found {sorted(fields)}",
            where=where,
            fix="map the field names in the corpus options, or use the original file",
        )


def _refuse_lines(path: Path) -> None:
    """Raise DataError for JSON lines in a file named .json."""
    lines = [text for _, text in itertools.islice(read_lines(path), 2)]
    if len(lines) == 2 and lines[0].rstrip().endswith("}") and lines[1].startswith("{"):
        raise DataError("JSON lines, an object on each line", where=str(path), fix=f"name it {path.stem}.jsonl")


def _members(path: Path) -> Iterator[tuple[str, object]]:
    """(name, value) of a JSON object's members."""
    text = _Text(path)
    text.expect("{", "where an object should begin")
    begun = False
    while text.peek() != "}":
        if begun:
            text.expect(",", "after a row")
        begun = True
        name = text.value(str(path))
        if not isinstance(name, str):
            raise DataError(f"not JSON: {name!r} is no name of a row", where=str(path), fix="fetch the file again")
        text.expect(":", f"after {name!r}")
        yield name, text.value(f"{path}: {name}")
    text.skip()
    text.expect("", "after the object")


def _elements(path: Path) -> Iterator[tuple[int, object]]:
    """(number from 1, value) of a JSON array's elements."""
    text = _Text(path)
    if (first := text.peek()) != "[":
        raise DataError(f"not a JSON array: it begins {first!r}", where=str(path), fix="use a list of objects: [{...}]")
    text.skip()
    number = 0
    while text.peek() != "]":
        if number:
            text.expect(",", f"after element {number}")
        number += 1
        yield number, text.value(f"{path}:record {number}")
    text.skip()
    text.expect("", "after the list")


class _Text:
    """A UTF-8 file read through a buffer, refilled as its text is consumed."""

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self._chunks = _chunks(path)
        self._decode = json.JSONDecoder().raw_decode
        self._buffer, self._position = "", 0

    def peek(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            while self._position < len(self._buffer) and self._buffer[self._position] in _SPACES:
                self._position += 1
            if self._position < len(self._buffer) or not self._refill(1):
                return self._buffer[self._position : self._position + 1]

    def skip(self) -> None:
        self._position += 1

    def expect(self, mark: str, place: str) -> None:
        """Consume a mark, or check that the file ends (``""``). Raises DataError."""
        if (character := self.peek()) != mark:
            shown = repr(character) if character else "the end of the file"
            raise DataError(f"not JSON: {shown} {place}", where=self.where, fix="fetch the file again")
        self.skip()

    def value(self, where: str) -> Any:
        """The JSON value that begins here."""
        self.peek()
        characters = 0
        while True:
            try:
                value, end = self._decode(self._buffer, self._position)
            except RecursionError:
                raise DataError("not JSON: nested too deeply", where=where, fix="fetch the file again") from None
            except ValueError as error:
                characters = max(2 * characters, _CHUNK_BYTES)  # doubling: a record is parsed a few times at most
                if len(self._buffer) - self._position > MAX_RECORD_CHARACTERS or not self._refill(characters):
                    raise DataError(f"not JSON ({error})", where=where, fix="fetch the file again") from None
                continue
            if end == len(self._buffer) and self._refill(1):
                continue  # a number may continue after the buffer
            if re.search(r"\\u[dD]", self._buffer[self._position : end]):
                _refuse_half_characters(value, where)
            self._position = end
            return value

    def _refill(self, characters: int) -> bool:
        """Append at least this many characters if the file has them; False at its end."""
        chunks = [self._buffer[self._position :]]
        added = 0
        while added < characters and (chunk := next(self._chunks, "")):
            chunks.append(chunk)
            added += len(chunk)
        self._buffer, self._position = "".join(chunks), 0
        return added > 0


def _refuse_half_characters(value: object, where: str) -> None:
    """Refuse half a surrogate pair, which JSON escapes can spell but no file can store."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError("half a surrogate pair in a text", where=where, fix="correct the \\u escape") from None


def _chunks(path: Path) -> Iterator[str]:
    """The decoded text of a file without a byte order mark, in pieces that are never empty."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    position = 0
    try:
        with path.open("rb") as handle:
            while True:
                payload = handle.read(_CHUNK_BYTES)
                if not position and payload.startswith(UTF16_MARKS):
                    fix = f"convert it: iconv -f UTF-16 -t UTF-8 {path.name} > NEW"
                    raise DataError("UTF-16 (its byte order mark is there), not UTF-8", where=str(path), fix=fix)
                if text := decoder.decode(payload, final=not payload):
                    yield text
                if not payload:
                    return
                position += len(payload)
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 ({error.reason})", where=f"{path}: near byte {position}", fix="convert the file to UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f"records cannot be read ({error.strerror})", where=str(path), fix="check the path") from None
