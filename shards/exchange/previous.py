"""The sentences before each sample in the same video, as text columns: `NAME` holds their texts, `NAME_ids` their ids.

Samples of one corpus, split, language and video stand in the order of their starts. Both come from the samples' ids by
a pattern, or from a table. A column holds the nearest sentences, the oldest of them first.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from shards.corpora.rows import text_field
from shards.corpora.table import seconds
from shards.errors import DataError, OptionError
from shards.exchange.text_table import keys_of, table_rows
from shards.format.index import ShardSet, read_index
from shards.format.text_columns import TextColumn, write_column

IDS = "_ids"
"""Ends the name of the column with the ids."""


@dataclass(frozen=True, slots=True)
class TimeColumns:
    """Which column of a table says what."""

    id: str = "id"
    video: str = "video"
    start: str = "start"
    """Seconds or HH:MM:SS.mmm."""


def places_by_pattern(shard_set: ShardSet, pattern: str) -> list[tuple[str, float]]:
    """(video, start) of every sample, from its id.

    Args:
        shard_set: the samples.
        pattern: regular expression with the groups ``video`` and ``start`` (a number), found at the id's beginning.

    Raises:
        OptionError: no such expression.
        DataError: an id that does not match.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise OptionError(f"{pattern!r} is no expression ({error})", where="--pattern", fix="correct it") from error
    if not {"video", "start"} <= expression.groupindex.keys():
        fix = r"name the groups: '(?P<video>.+)-(?P<start>\d+)-\d+'"
        raise OptionError(f"{pattern!r} lacks the groups video and start", where="--pattern", fix=fix)
    places = []
    for key, sample_id in zip(keys_of(shard_set), shard_set.table["sample_id"].to_pylist(), strict=True):
        found = expression.match(sample_id)
        if found is None or not _is_number(found["start"]):
            fix = "correct the pattern, or give the times in a table"
            raise DataError(
                f"{pattern!r} finds no video and start in the id of {key}", where=str(shard_set.dir), fix=fix
            )
        places.append((found["video"], float(found["start"])))
    return places


def places_by_table(shard_set: ShardSet, table: Path, columns: TimeColumns) -> list[tuple[str, float]]:
    """(video, start) of every sample, from a table with one row per sample.

    Raises:
        DataError: the table cannot be read, or lacks a sample.
    """
    places: dict[str, tuple[str, float]] = {}
    for number, row in table_rows(table, [columns.id, columns.video, columns.start]):
        where = f"{table}:{number}"
        start = seconds(str(row[columns.start]), where)
        if start is None:
            raise DataError("no start", where=where, fix="fill the column of the starts")
        places[text_field(row, columns.id, where)] = text_field(row, columns.video, where), start
    found = []
    for key, sample_id in zip(keys_of(shard_set), shard_set.table["sample_id"].to_pylist(), strict=True):
        place = places.get(key, places.get(sample_id))
        if place is None:
            raise DataError(f"no row for the sample {key}", where=str(table), fix="add it, with its video and start")
        found.append(place)
    return found


def previous_sentences(
    folder: Path | str, places: list[tuple[str, float]], count: int, name: str = "previous", replace: bool = False
) -> TextColumn:
    """Write both columns of a shard set.

    Args:
        folder: the set.
        places: (video, start) of every sample, in the order of the index.
        count: most sentences before each; a clip without text says nothing, but has sentences before it.
        name: of the column.
        replace: as in `write_column`.

    Raises:
        DataError: as `write_column`.
    """
    shard_set = read_index(folder)
    texts, keys = shard_set.table["text"].to_pylist(), keys_of(shard_set)
    before: dict[int, list[int]] = {}
    for rows in _videos(shard_set, places):
        said: list[int] = []
        for row in rows:
            before[row] = said[-count:]
            said += [row] if texts[row].strip() else []
    chosen = [before[row] for row in range(len(shard_set))]
    about: Mapping[str, object] = {"count": count, "videos": len({video for video, _ in places})}
    write_column(shard_set, name + IDS, [[keys[n] for n in rows] for rows in chosen], about, replace=replace)
    return write_column(shard_set, name, [[texts[n] for n in rows] for rows in chosen], about, replace=replace)


def _videos(shard_set: ShardSet, places: list[tuple[str, float]]) -> Iterator[list[int]]:
    """Rows of every video of a corpus, split and language, in the order of their starts."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    columns = [shard_set.table[name].to_pylist() for name in ("corpus", "split", "language")]
    for row, (place, *names) in enumerate(zip(places, *columns, strict=True)):
        groups[(*names, place[0])].append(row)
    for rows in groups.values():
        yield sorted(rows, key=lambda row: (places[row][1], row))


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True
