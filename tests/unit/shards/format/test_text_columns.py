"""shards.format.text_columns: what is written is read, by sample number and in worker processes; errors by name."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from shards.errors import DataError, OptionError
from shards.exchange.text_table import TableColumns, column_from_set, column_from_table
from shards.format.index import read_index
from shards.format.opening import open_shards
from shards.format.text_columns import column_file, column_names, open_column, write_column
from shards.load.loader import StepLoader
from shards.load.reader import SampleReader
from shards.load.requests import LoaderOptions
from shards.order.items import Elements
from shards.order.options import PlanOptions, Source
from shards.order.plan import Cursor, Plan
from tests.unit.shards.shard_sets import collate_lists, write_videos

TEXTS = [["one a", "one b"], [], ["drei ü"], ["four"]]
SCORES = [[0.5, 0.25], [], [1.0], []]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_videos(tmp_path / "set", [bytes([n]) * 9 for n in range(4)], [4] * 4, per_shard=3)


def fetch_texts(reader: SampleReader, item: Elements) -> list[tuple[int, list[str], list[float]]]:
    samples = reader.plan.samples
    return [(n, samples.texts("more", n), samples.scores("more", n)) for n in item["sample"].tolist()]


def test_a_column_is_read_as_it_was_written(folder: Path) -> None:
    shard_set = read_index(folder)
    column = write_column(shard_set, "more", TEXTS, {"from": "a test"}, SCORES)
    assert [column.texts(row) for row in range(4)] == TEXTS and [column.scores(row) for row in range(4)] == SCORES
    assert column.about == {"from": "a test"} and column_names(folder) == ["more"]
    again = write_column(shard_set, "same", TEXTS, {}, SCORES)
    other = write_column(shard_set, "other", [*TEXTS[:3], ["fore"]], {}, SCORES)
    assert column.fingerprint == again.fingerprint != other.fingerprint
    assert write_column(shard_set, "plain", TEXTS, {}).scores(0) == []
    table = pa.ipc.open_file(pa.memory_map(str(folder / column_file("more")))).read_all()
    assert table.column("texts").to_pylist() == TEXTS  # any Arrow tool reads it


def test_samples_of_several_sources_find_their_rows_also_in_a_worker(folder: Path, tmp_path: Path) -> None:
    second = write_videos(tmp_path / "second", [b"x", b"y"], [4, 4])
    write_column(read_index(folder), "more", TEXTS, {}, SCORES)
    write_column(read_index(second), "more", [["fifth"], ["sixth"]], {})
    sources = [Source(read_index(place), columns=("more",)) for place in (folder, second)]
    plan = Plan(sources, PlanOptions("clip"))
    assert [plan.samples.texts("more", n) for n in range(6)] == [*TEXTS, ["fifth"], ["sixth"]]
    assert [plan.samples.scores("more", n) for n in range(4)] == SCORES
    assert [plan.samples.place(n) for n in (0, 3, 4, 5)] == [(0, 0), (0, 3), (1, 0), (1, 1)]
    read: list[Any] = []
    for workers in (0, 2):
        loader = StepLoader(plan, fetch_texts, collate_lists, LoaderOptions(0, 1, 6, 3, workers=workers))
        steps = iter(loader)
        read.append([batch["items"] for _ in range(2) for batch in next(steps).micro_batches])
        del steps
    assert read[0] == read[1] and sorted(n for items in read[0][:2] for item in items for n, *_ in item) == list(
        range(6)
    )


def test_the_content_of_a_column_is_part_of_the_order(folder: Path) -> None:
    def plan(*columns: str) -> Plan:
        return Plan([Source(read_index(folder), columns=columns)], PlanOptions("clip"))

    write_column(read_index(folder), "more", TEXTS, {})
    plain, reading = plan(), plan("more")
    assert plain.fingerprint != reading.fingerprint and "+more:" not in str(plain.identity)
    state, pickled = reading.state(Cursor()), pickle.dumps(reading)
    write_column(read_index(folder), "more", [["else"]] * 4, {}, replace=True)
    with pytest.raises(DataError, match=r"another order of samples: sources: was \[.* x1 \+more:"):
        plan("more").restore(state)
    with pytest.raises(DataError, match="the shards changed while the run was reading them"):
        pickle.loads(pickled)


def test_a_column_that_cannot_be_written_says_why(folder: Path) -> None:
    shard_set = read_index(folder)
    with pytest.raises(OptionError, match=r"'My column' is no name of a column\n  fix: use small letters"):
        write_column(shard_set, "My column", TEXTS, {})
    with pytest.raises(DataError, match="3 rows of texts and 3 of scores for 4 samples"):
        write_column(shard_set, "more", TEXTS[:3], {})
    for texts, scores in (([["a"], [" "], [], []], None), (TEXTS, [[0.5], [], [], []]), (["text"] * 4, None)):
        with pytest.raises(DataError, match=r"row [01] \(made/clip000[01]\): .* with scores"):
            write_column(shard_set, "more", texts, {}, scores)
    write_column(shard_set, "more", TEXTS, {})
    with pytest.raises(OptionError, match=r"column-more\.arrow: the column exists\n  fix: take another name"):
        write_column(shard_set, "more", TEXTS, {})
    (folder / column_file("taken")).mkdir()
    with pytest.raises(DataError, match=r"the column cannot be written \(Is a directory\)"):
        write_column(shard_set, "taken", TEXTS, {}, replace=True)


def test_a_column_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    write_column(read_index(folder), "more", TEXTS, {})
    with pytest.raises(DataError, match=r"set: no text column 'mode'\n  fix: there is more; make it with"):
        open_column(read_index(folder), "mode")
    other = read_index(write_videos(tmp_path / "other", [b"x"], [4]))
    path = other.dir / column_file("more")
    path.write_bytes((folder / column_file("more")).read_bytes())
    with pytest.raises(DataError, match=r"made for other samples \(4 of the set .*; this is 1 of"):
        open_column(other, "more")
    for damage in (path.read_bytes()[:-200], b"ARROW1"):
        path.write_bytes(damage)
        with pytest.raises(DataError, match=r"column-more\.arrow: unreadable text column"):
            open_column(other, "more")
    schema = pa.schema(
        [pa.field("words", pa.string())], metadata={b"slt": b'{"name":"","set":"","fingerprint":"","about":{}}'}
    )
    with pa.ipc.new_file(str(path), schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(["a"])], schema=schema))
    with pytest.raises(DataError, match=r"unreadable text column \(its columns are words\)"):
        open_column(other, "more")


def test_the_mirror_of_a_remote_set_holds_the_columns_that_are_asked_for(folder: Path, tmp_path: Path) -> None:
    write_column(read_index(folder), "more", TEXTS, {})
    cache = tmp_path / "cache"
    cache.mkdir()
    shard_set = open_shards(f"local://{folder}", cache, columns=("more",))
    assert shard_set.dir.parent == cache and open_column(shard_set, "more").texts(2) == TEXTS[2]
    assert open_shards(f"local://{folder}", cache, columns=("more",)).dir == shard_set.dir
    with pytest.raises(DataError, match=r"column-else\.arrow: no such file in the shard set"):
        open_shards(f"local://{folder}", cache, columns=("else",))


def test_a_table_becomes_a_column(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "texts.tsv"
    table.write_text("name\tsaid\tsure\nclip0002\tb\t0.5\nmade/clip0000\ta\t1\nclip0002\tc\t.25\nclip0001\t\t0\n")
    column = column_from_table(folder, "more", table, TableColumns("name", "said", "sure"))
    assert [column.texts(row) for row in range(4)] == [["a"], [], ["b", "c"], []]
    assert column.scores(2) == [0.5, 0.25] and column.about == {"table": "texts.tsv", "text": "said"}
    records = tmp_path / "texts.jsonl"
    records.write_text('{"id": "clip0003", "text": "z"}\n')
    assert column_from_table(folder, "lines", records, TableColumns()).texts(3) == ["z"]


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.tsv", "id\ttext\nclip9\ta\n", TableColumns(), r"a\.tsv:2: 0 samples of .*set have the id 'clip9'"),
        ("a.tsv", "id\ttext\nclip0000\ta\n", TableColumns(score="p"), "no column 'p'; the header is"),
        ("a.tsv", "id\ttext\tp\nclip0000\ta\thigh\n", TableColumns(score="p"), r"a\.tsv:2: p is 'high', not a number"),
        ("a.txt", "", TableColumns(), r"a\.txt: not a table of a known kind\n  fix: name it by its kind: \.tsv"),
    ],
)
def test_a_table_that_cannot_be_used(
    folder: Path, name: str, content: str, columns: TableColumns, message: str
) -> None:
    path = folder.parent / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        column_from_table(folder, "more", path, columns)


def test_a_column_is_taken_over_by_sample(folder: Path, tmp_path: Path) -> None:
    write_column(read_index(folder), "more", TEXTS, {"how": "made"}, SCORES)
    part = write_videos(tmp_path / "part", [b"x", b"y", b"z"], [4] * 3)
    column = column_from_set(part, "more", folder)
    assert [column.texts(row) for row in range(3)] == TEXTS[:3] and column.scores(0) == SCORES[0]
    assert column.about == {"how": "made", "from_set": read_index(folder).fingerprint}
    write_column(read_index(part), "short", TEXTS[:3], {})
    with pytest.raises(DataError, match=r"part: 1 samples of .*set are not there: made/clip0003"):
        column_from_set(folder, "short", part)
