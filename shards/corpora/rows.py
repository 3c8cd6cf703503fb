"""Reading annotation tables strictly: what decodes, splits or names its columns wrongly is refused with its line."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from shards.errors import DataError

DELIMITERS = {".tsv": "\t", ".csv": ",", ".psv": "|"}
_CANDIDATES = "\t|,;"


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of a UTF-8 file; a byte order mark and CRLF ends are removed.

    Raises DataError for a missing file or, with line and byte, for other encodings.
    """
    try:
        with path.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}",
                        where=f"{path}:{number}",
                        fix="convert the file, e.g. iconv -f LATIN1 -t UTF-8",
                    ) from None
                yield number, text.rstrip("\r\n")
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", where=str(path), fix="check the path") from None


def read_table(
    path: Path, delimiter: str, quoting: bool, needed: Iterable[str]
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row as a dict) of a delimited table with a header line.

    Args:
        quoting: honour ``"``; without it a quote is an ordinary character and every line is one row.
        needed: columns that must exist.

    Raises:
        DataError: wrong delimiter, missing column, or a row with another number of fields.
    """
    lines = read_lines(path)
    if quoting:
        position = [0]
        rows = _quoted(path, lines, delimiter, position)
    else:
        rows = ((number, line.split(delimiter)) for number, line in lines)
    header = next(rows, (1, [""]))[1]
    _check_header(path, header, delimiter, needed)
    for number, fields in rows:
        if not any(fields):
            continue
        if len(fields) != len(header):
            raise DataError(
                f"{len(fields)} fields, the header has {len(header)}",
                where=f"{path}:{number}",
                fix="repair the row (a delimiter inside a text, or a missing field)"
                + ("" if quoting else "; if fields are quoted set quoting=true"),
            )
        yield number, dict(zip(header, fields, strict=True))


def _quoted(
    path: Path, lines: Iterator[tuple[int, str]], delimiter: str, position: list[int]
) -> Iterator[tuple[int, list[str]]]:
    def counted() -> Iterator[str]:
        for number, line in lines:
            position[0] = number
            yield line + "\n"

    reader = csv.reader(counted(), delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            yield position[0], fields
    except csv.Error as error:
        raise DataError(
            f"broken quoting ({error})",
            where=f"{path}:{position[0]}",
            fix="quoting=false if quotes are plain text",
        ) from None


def _check_header(path: Path, header: list[str], delimiter: str, needed: Iterable[str]) -> None:
    columns = list(needed)
    missing = [column for column in columns if column not in header]
    if not missing:
        return
    where = f"{path}:1"
    others = {mark: header[0].count(mark) for mark in _CANDIDATES if mark != delimiter} if len(header) == 1 else {}
    if others and max(others.values()):
        best = max(others, key=lambda mark: others[mark])
        raise DataError(
            f"the delimiter {delimiter!r} does not occur in the header {header[0]!r}",
            where=where,
            fix=f"it looks separated by {best!r}: pass delimiter={best!r}",
        )
    near = difflib.get_close_matches(missing[0], header, n=1)
    raise DataError(
        f"no column {', '.join(map(repr, missing))}; the header is {header}",
        where=where,
        fix=(f"did you mean {near[0]!r}? " if near else "") + "map the column names in the corpus options",
    )


def read_jsonl(path: Path, needed: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSON-lines file. Raises DataError for a broken line or a missing field."""
    columns = list(needed)
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"not JSON ({error})", where=f"{path}:{number}", fix="one object per line") from None
        if not isinstance(values, dict) or (missing := [name for name in columns if name not in values]):
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            lacking = ", ".join(missing) if isinstance(values, dict) else "everything"
            raise DataError(
                f"lacks {lacking}; found {found}",
                where=f"{path}:{number}",
                fix="map the field names in the corpus options",
            )
        yield number, values
