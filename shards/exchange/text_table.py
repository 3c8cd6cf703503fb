"""Text columns from a table of texts by sample, or from another shard set that holds the same samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.corpora.records import read_json_rows, read_parquet
from shards.corpora.rows import DELIMITERS, number_field, read_jsonl, read_table, text_field
from shards.errors import DataError
from shards.format.index import ShardSet, read_index
from shards.format.text_columns import TextColumn, open_column, write_column
from shards.wording import first_few

_RECORDS = {".jsonl": read_jsonl, ".json": read_json_rows, ".parquet": read_parquet}


@dataclass(frozen=True, slots=True)
class TableColumns:
    """Which column of a table says what."""

    id: str = "id"
    """The sample: its id, or ``CORPUS/ID`` where several corpora of the set have that id."""
    text: str = "text"
    score: str = ""
    """A number per text; empty = none has one."""


@dataclass(frozen=True, slots=True)
class Said:
    """One text of one sample."""

    sample: str
    text: str
    score: float | None
    where: str


def column_from_table(
    folder: Path | str, name: str, table: Path, columns: TableColumns, replace: bool = False
) -> TextColumn:
    """Write a text column from a table (.tsv, .csv, .psv, .jsonl, .json, .parquet) with one row per text.

    Several rows of one sample are its texts in the order of the table; rows whose text is empty are left out.

    Raises:
        DataError: the table cannot be read, or names a sample that the set does not hold or holds several times.
    """
    said = list(_said(table, columns))
    return _write(read_index(folder), name, said, {"table": table.name, "text": columns.text}, replace)


def column_from_set(folder: Path | str, name: str, other: Path | str, replace: bool = False) -> TextColumn:
    """Take a text column over from another set, sample by sample: to features of the same videos, to a part of a set.

    Samples that only the other set holds are left out.

    Raises:
        DataError: the other set lacks the column, or a sample of this set.
    """
    here, there = read_index(folder), read_index(other)
    column, rows = open_column(there, name), _rows_by_key(there)
    texts, scores, missing = [], [], []
    for key in keys_of(here):
        row = rows.get(key, -1)
        missing += [key] if row < 0 else []
        texts.append(column.texts(row) if row >= 0 else [])
        scores.append(column.scores(row) if row >= 0 else [])
    if missing:
        what = f"{len(missing)} samples of {folder} are not there: {first_few(missing, 3)}"
        raise DataError(what, where=str(other), fix="name the set that this one was made from")
    return write_column(here, name, texts, {**column.about, "from_set": there.fingerprint}, scores, replace)


def table_rows(table: Path, needed: list[str]) -> Iterator[tuple[int, dict[str, object]]]:
    """(number, row) of a table of any known kind. Raises DataError for another one, or a missing column."""
    suffix = table.suffix.lower()
    if suffix in _RECORDS:
        yield from _RECORDS[suffix](table, needed)
    elif suffix in DELIMITERS:
        for number, row in read_table(table, DELIMITERS[suffix], suffix == ".csv", needed):
            yield number, dict(row)
    else:
        known = ", ".join([*DELIMITERS, *_RECORDS])
        raise DataError("not a table of a known kind", where=str(table), fix=f"name it by its kind: {known}")


def _said(table: Path, columns: TableColumns) -> Iterator[Said]:
    needed = [columns.id, columns.text, *([columns.score] if columns.score else [])]
    for number, row in table_rows(table, needed):
        where = f"{table}:{number}"
        text = text_field(row, columns.text, where)
        if text:
            yield Said(text_field(row, columns.id, where), text, _score(row, columns.score, where), where)


def _score(row: dict[str, object], name: str, where: str) -> float | None:
    if not name:
        return None
    value = row[name]
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise DataError(f"{name} is {value!r}, not a number", where=where, fix="correct the table") from None
    return number_field({name: value}, name, where)


def _write(shard_set: ShardSet, name: str, said: list[Said], about: dict[str, object], replace: bool) -> TextColumn:
    keys = _rows_by_key(shard_set)
    by_id: dict[str, list[int]] = {}
    for row, sample_id in enumerate(shard_set.table["sample_id"].to_pylist()):
        by_id.setdefault(sample_id, []).append(row)
    texts: list[list[str]] = [[] for _ in range(len(shard_set))]
    scores: list[list[float]] = [[] for _ in range(len(shard_set))]
    for one in said:
        rows = [keys[one.sample]] if one.sample in keys else by_id.get(one.sample, [])
        if len(rows) != 1:
            what = f"{len(rows)} samples of {shard_set.dir} have the id {one.sample!r}"
            fix = "write CORPUS/ID" if rows else "name the column of the ids, and leave out rows of other samples"
            raise DataError(what, where=one.where, fix=fix)
        texts[rows[0]].append(one.text)
        scores[rows[0]] += [] if one.score is None else [one.score]
    return write_column(shard_set, name, texts, about, scores, replace)


def keys_of(shard_set: ShardSet) -> list[str]:
    """``CORPUS/ID`` of every sample, in the order of the index."""
    pairs = zip(*(shard_set.table[name].to_pylist() for name in ("corpus", "sample_id")), strict=True)
    return [f"{corpus}/{sample_id}" for corpus, sample_id in pairs]


def _rows_by_key(shard_set: ShardSet) -> dict[str, int]:
    return {key: row for row, key in enumerate(keys_of(shard_set))}
