"""The samples of a plan: numbers and rows found where they lie, whatever is selected and however it is stored."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.format import index
from shards.format.index import open_index, read_index
from shards.order import columns as plan_columns
from shards.order.columns import NUMBERS
from shards.order.samples import Samples
from shards.schema import IndexRow
from tests.unit.shards.shard_sets import in_memory, write_videos


def everything(numbers: dict[str, Any]) -> Any:
    return np.ones(len(numbers["tokens"]), dtype=bool)


@given(st.lists(st.sampled_from(["train", "dev"]), min_size=1, max_size=80), st.sampled_from(["a", "b", None]))
def test_a_selection_is_the_rows_that_match(splits: list[str], corpus: str | None) -> None:
    corpora = ["ab"[number * number % 3 % 2] for number in range(len(splits))]
    shard_set = in_memory("video", [n + 1 for n in range(len(splits))], split=splits, corpus=corpora)
    wanted = [n for n, s in enumerate(splits) if s == "train" and corpus in (None, corpora[n])]
    if not wanted:
        return
    samples = Samples([(shard_set, "train", corpus), (shard_set, "train", corpus)], everything)
    assert samples.counts == (len(wanted),) * 2
    rows = [samples.row(number) for number in range(len(samples))]
    assert rows == [shard_set.row(n) for n in wanted] * 2
    for name in NUMBERS:
        assert samples.columns[name][np.arange(len(samples))].tolist() == [getattr(row, name) for row in rows]
    assert [samples.shards[samples.shard_of[n]].name for n in range(len(rows))] == [row.shard for row in rows]
    assert samples.column("text").to_pylist() == [row.text for row in rows]
    assert samples.column("corpus").to_pylist() == [row.corpus for row in rows]
    assert samples.distinct("corpus") == sorted({row.corpus for row in rows})


def test_scattered_rows_are_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = [["train", "dev"][n * n % 7 % 2] for n in range(300)]
    shard_set = in_memory("video", list(range(1, 301)), split=splits)
    runs = Samples([(shard_set, "train", None)], everything)
    monkeypatch.setattr(plan_columns, "_MOST_RUNS", 3)
    rows = Samples([(shard_set, "train", None)], everything)
    numbers = np.asarray([0, 5, 5, len(runs) - 1, 3])
    assert rows.columns["frames"][numbers].tolist() == runs.columns["frames"][numbers].tolist()
    assert rows.row(7) == runs.row(7) and len(rows) == len(runs) == splits.count("train")
    assert rows.columns["size"][0] == runs.columns["size"][0] and len(rows.columns["size"]) == len(rows)


def test_samples_of_a_mapped_index_are_views_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_videos(tmp_path / "set", [b"x" * n for n in range(1, 30)], [4] * 29)
    plain = Samples([(read_index(folder), "train", None)], everything)
    monkeypatch.setattr(index, "MAPPED_ABOVE", 0)
    monkeypatch.setattr(index, "BATCH_ROWS", 8)
    shard_set = open_index(folder)
    mapped = Samples([(shard_set, "train", None)], everything)
    assert [mapped.row(n) for n in range(29)] == [plain.row(n) for n in range(29)]
    assert mapped.shards == plain.shards
    everyone = np.arange(29)
    for name, column in mapped.columns.items():
        assert np.array_equal(column[everyone], plain.columns[name][everyone])
        ((_, values, _),) = column._sources
        assert shard_set.mapped is not None and len(values._bounds) == 4
        assert values._file.ctypes.data == shard_set.mapped.address, "a view of the file"


def test_rows_read_together_are_the_rows_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sources, the second mapped and in several batches; texts of any length and alphabet."""
    monkeypatch.setattr(index, "MAPPED_ABOVE", 0)
    monkeypatch.setattr(index, "BATCH_ROWS", 4)
    texts = ["", "schnee", "Grüße ☃", "x" * 300, ""]
    first = in_memory("text", [3] * 5, name="first", text=texts, split=["train", "dev", "train", "train", "dev"])
    mapped = open_index(write_videos(tmp_path / "videos", [bytes(8)] * 13, [4] * 13))
    samples = Samples([(first, "train", None), (mapped, "train", None)], everything)
    wanted = np.array([15, 0, 3, 2, 14, 7, 7, 1])
    found = samples.rows(wanted)
    for name in IndexRow._fields:
        assert [getattr(row, name) for row in found] == samples.column(name).take(wanted).to_pylist()
    assert found == [samples.row(sample) for sample in wanted.tolist()] == pickle.loads(pickle.dumps(found))
    assert found[1].text == "" and found[3].text == "x" * 300 and found[7].text == "Grüße ☃"
