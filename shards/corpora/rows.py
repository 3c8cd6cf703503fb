"""Strict readers of annotation tables: wrong encodings, fields and column names are errors with their line."""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.corpora.compressed import byte_lines
from shards.errors import DataError, OptionError
from shards.names import existing

DELIMITERS = {".tsv": "\t", ".csv": ",", ".psv": "|"}
_CANDIDATES = "\t|,;"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_LARGEST = 1e9
_LONGEST_NAME = 200  # bytes; file systems allow 255 including a suffix


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its end) of a UTF-8 file, compressed or not.

    A byte order mark and CRLF ends are removed. Raises DataError for a missing or damaged file or, with line and byte,
    for other encodings.
    """
    for number, line in enumerate(byte_lines(path), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            utf16 = "" if number > 1 or not line.startswith(UTF16_MARKS) else "UTF-16 (its byte order mark is there), "
            raise DataError(
                f"{utf16}not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}",
                where=f"{path}:{number}",
                fix=f"convert the file, e.g. iconv -f {'UTF-16' if utf16 else 'LATIN1'} -t UTF-8 {path.name} > NEW",
            ) from None
        yield number, text.rstrip("\r\n")


def read_table(
    path: Path, delimiter: str, quoting: bool, needed: Iterable[str], names: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, row as a dict) of a delimited table with a header line, or with column names from ``names``.

    Args:
        quoting: honour ``"``; without it a quote is an ordinary character and every line is one row.
        needed: columns that must exist.
        names: column names, if the table has no header line.

    Raises:
        DataError: wrong delimiter, missing column, or a row with too few or too many fields.
    """
    lines = read_lines(path)
    rows = _quoted(path, lines, delimiter) if quoting else ((number, line.split(delimiter)) for number, line in lines)
    header = list(names) or next(rows, (1, [""]))[1]
    _check_header(path, header, delimiter, needed)
    expected = f"{len(header)} columns are named" if names else f"the header has {len(header)}"
    for number, fields in rows:
        if not any(fields):
            continue
        if fields == list(names):
            raise DataError("this line holds the columns' names", where=f"{path}:{number}", fix="leave --columns out")
        if len(fields) != len(header):
            raise DataError(
                f"{len(fields)} fields, {expected}",
                where=f"{path}:{number}",
                fix="repair the row (a delimiter inside a text, or a missing field)"
                + ("" if quoting else "; if fields are quoted add --quoting true"),
            )
        yield number, dict(zip(header, fields, strict=True))


def _quoted(path: Path, lines: Iterator[tuple[int, str]], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(number of the line where the row begins, fields): a quoted field may span several lines."""
    reader = csv.reader((line + "\n" for _, line in lines), delimiter=delimiter, strict=True)
    first = 1
    try:
        for fields in reader:
            yield first, fields
            first = reader.line_num + 1
    except csv.Error as error:
        read = f", which was read to line {reader.line_num}" if reader.line_num > first else ""
        raise DataError(
            f"broken quoting ({error}) in the row that begins here{read}",
            where=f"{path}:{first}",
            fix="close the quote, or add --quoting false if quotes are plain text",
        ) from None


def _check_header(path: Path, header: list[str], delimiter: str, needed: Iterable[str]) -> None:
    columns = dict.fromkeys(needed)
    missing = [column for column in columns if column not in header]
    where = f"{path}:1"
    if not missing:
        if len(set(header)) < len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise DataError(f"the column {twice!r} occurs twice", where=where, fix="rename one of the two")
        return
    others = {mark: header[0].count(mark) for mark in _CANDIDATES if mark != delimiter} if len(header) == 1 else {}
    if others and max(others.values()):
        best = max(others, key=lambda mark: others[mark])
        raise DataError(
            f"the delimiter {delimiter!r} does not occur in the header {header[0]!r}",
            where=where,
            fix=f"it looks separated by {best!r}: add --delimiter {_typed(best)}, or change the file's suffix",
        )
    near = difflib.get_close_matches(missing[0], header, n=1)
    raise DataError(
        f"no column {', '.join(map(repr, missing))}; the header is {header}",
        where=where,
        fix=(f"did you mean {near[0]!r}? " if near else "")
        + "map the column names in the corpus options; where the file has no header, name them: --columns NAME,NAME",
    )


def split_row(line: str, delimiter: str, where: str) -> list[str]:
    """The fields of one line in which ``"`` quotes. Raises DataError for broken quoting."""
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise DataError(f"broken quoting ({error}) in one line", where=where, fix="close the quote") from None


def _typed(delimiter: str) -> str:
    """A delimiter as written on the command line."""
    return "tab" if delimiter == "\t" else f"'{delimiter}'"


def read_jsonl(path: Path, needed: Iterable[str]) -> Iterator[tuple[int, dict[str, object]]]:
    """(line number, object) of a JSON-lines file. Raises DataError for a broken line or a missing field."""
    columns = list(needed)
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not JSON ({error})", where=f"{path}:{number}", fix="one object per line") from None
        _refuse_half_characters(line, values, f"{path}:{number}")
        if not isinstance(values, dict) or (missing := [name for name in columns if name not in values]):
            row = isinstance(values, dict)
            fields = sorted(values) if row else type(values).__name__
            raise DataError(
                f"lacks {', '.join(missing) if row else 'everything'}; found {fields}",
                where=f"{path}:{number}",
                fix="map the field names in the corpus options"
                if row
                else "one object per line; name an array NAME.json",
            )
        yield number, values


def read_json(path: Path) -> Any:
    """The value of a JSON file; a byte order mark is removed. Raises DataError with the line of the error."""
    text = "\n".join(line for _, line in read_lines(path))
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"not JSON ({error.msg}, column {error.colno})", where=f"{path}:{error.lineno}", fix="fetch the file again"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error})", where=str(path), fix="fetch the file again") from None
    _refuse_half_characters(text, values, str(path))
    return values


def _refuse_half_characters(raw: str, values: object, where: str) -> None:
    """Refuse half a surrogate pair, which JSON escapes can spell but no file can store."""
    if "\\ud" not in raw and "\\uD" not in raw:
        return
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError("half a surrogate pair in a text", where=where, fix="correct the \\u escape") from None


def file_stem(name: object, where: str) -> str:
    """``name`` if it can be the stem of one file in one folder. Raises DataError for paths, blanks and the like."""
    if (
        not isinstance(name, str)
        or name.strip() != name
        or name in ("", ".", "..")
        or set("/\\\0") & set(name)
        or not _storable(name)
        or len(name.encode()) > _LONGEST_NAME
    ):
        raise DataError(f"{name!r} cannot name a file", where=where, fix="correct the annotation file")
    return name


def text_field(entry: Mapping[str, object], name: str, where: str) -> str:
    """A field that is text, or a list of words (joined by blanks). Raises DataError for anything else."""
    value = entry[name]
    if isinstance(value, list | tuple) and all(isinstance(word, str) for word in value):
        value = " ".join(value)
    if not isinstance(value, str) or not _storable(value):
        kind = "broken text" if isinstance(value, str) else f"a {type(value).__name__}"
        raise DataError(f"{name} is {kind}, not text", where=where, fix="correct the annotation file")
    return value.strip()


def number_field(entry: Mapping[str, object], name: str, where: str) -> float:
    """A field that is a finite number. Raises DataError for anything else."""
    value = entry[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise DataError(f"{name} is {value!r}, not a number", where=where, fix="correct the annotation file")
    return float(value)


def _storable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_existing(candidates: Iterable[Path]) -> Path:
    """The first file or folder that exists, else the last, so that the report shows it as missing."""
    paths = [existing(path) for path in candidates]
    return next((path for path in paths if path.exists()), paths[-1])


def known_splits(splits: list[str] | None, known: Iterable[str], corpus: str) -> list[str]:
    """The chosen splits, all of ``known`` by default. Raises OptionError for an unknown one."""
    choices = list(known)
    unknown = sorted(set(splits or []) - set(choices))
    if unknown:
        raise OptionError(f"unknown split {unknown}", where=f"{corpus} splits", fix=f"choose from {choices}")
    return list(splits or choices)
