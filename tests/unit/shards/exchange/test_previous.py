"""The sentences before each sample: order, borders, both sources of the times."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.errors import DataError, OptionError
from shards.exchange.previous import TimeColumns, places_by_pattern, places_by_table, previous_sentences
from shards.format.index import fingerprint, read_index, rows_to_table, write_index
from shards.format.text_columns import open_column
from tests.unit.shards.shard_sets import write_videos

IDS = ["talk-00900-2", "talk-00100-1", "talk-00500-1", "news-00200-3", "talk-00300-1"]
SPLITS = ["train", "train", "train", "train", "dev"]
PATTERN = r"(?P<video>.+)-(?P<start>\d+)-\d"


def set_of(folder: Path, ids: list[str] = IDS, **columns: list[str]) -> Path:
    write_videos(folder, [b"x"] * len(ids), [4] * len(ids))
    shard_set = read_index(folder)
    values = {"split": SPLITS, **columns}
    rows = [
        row._replace(sample_id=name, **{"text": f"said {name}"} | {key: of[n] for key, of in values.items()})
        for n, (row, name) in enumerate(zip(shard_set.rows(), ids, strict=True))
    ]
    table = rows_to_table(rows)
    splits = {split: SPLITS.count(split) for split in set(SPLITS)}
    shard_set.manifest.splits, shard_set.manifest.fingerprint = splits, fingerprint(shard_set.manifest.shards, table)
    write_index(folder, table, shard_set.manifest)
    return folder


def test_the_nearest_sentences_of_the_same_video_and_split_the_oldest_first(tmp_path: Path) -> None:
    folder = set_of(tmp_path / "set")
    places = places_by_pattern(read_index(folder), PATTERN)
    assert places[0] == ("talk", 900.0)
    column = previous_sentences(folder, places, 2)
    said = [column.texts(row) for row in range(5)]
    assert said == [["said talk-00100-1", "said talk-00500-1"], [], ["said talk-00100-1"], [], []]
    ids = open_column(read_index(folder), "previous_ids")
    assert ids.texts(0) == ["made/talk-00100-1", "made/talk-00500-1"] and column.about == {"count": 2, "videos": 2}
    assert previous_sentences(folder, places, 1, "near").texts(0) == ["said talk-00500-1"]


def test_a_clip_without_text_says_nothing_but_has_a_context(tmp_path: Path) -> None:
    folder = set_of(tmp_path / "set", text=["c", "a", "", "x", "y"])
    column = previous_sentences(folder, places_by_pattern(read_index(folder), PATTERN), 2)
    assert column.texts(0) == ["a"] and column.texts(2) == ["a"]


def test_each_spoken_language_has_its_own_sentences(tmp_path: Path) -> None:
    folder = set_of(tmp_path / "set", language=["de", "en", "de", "de", "de"])
    column = previous_sentences(folder, places_by_pattern(read_index(folder), PATTERN), 3)
    assert column.texts(0) == ["said talk-00500-1"] and column.texts(2) == []


def test_times_from_a_table(tmp_path: Path) -> None:
    folder = set_of(tmp_path / "set")
    table = tmp_path / "times.csv"
    lines = [f"{name},{name[:4]},{'00:00:0' if n else ''}{9 - n}" for n, name in enumerate(IDS)]
    table.write_text("\n".join(["name,file,t0", *lines]) + "\n")
    columns = TimeColumns("name", "file", "t0")
    places = places_by_table(read_index(folder), table, columns)
    assert places == [("talk", 9.0), ("talk", 8.0), ("talk", 7.0), ("news", 6.0), ("talk", 5.0)]
    table.write_text("\n".join(["name,file,t0", *lines[:-1]]) + "\n")
    with pytest.raises(DataError, match=r"times\.csv: no row for the sample made/talk-00300-1"):
        places_by_table(read_index(folder), table, columns)
    table.write_text("name,file,t0\ntalk-00900-2,talk,\n")
    with pytest.raises(DataError, match=r"times\.csv:2: no start"):
        places_by_table(read_index(folder), table, columns)


def test_a_pattern_that_finds_nothing(tmp_path: Path) -> None:
    shard_set = read_index(set_of(tmp_path / "set"))
    with pytest.raises(OptionError, match=r"is no expression \(missing \)"):
        places_by_pattern(shard_set, "(")
    with pytest.raises(OptionError, match=r"lacks the groups video and start\n  fix: name the groups: '"):
        places_by_pattern(shard_set, "(?P<video>.+)")
    for pattern in (r"(?P<video>x)(?P<start>\d)", "(?P<video>t)(?P<start>.)"):
        with pytest.raises(DataError, match=r"finds no video and start in the id of made/talk-00900-2"):
            places_by_pattern(shard_set, pattern)
