"""Ranges of shards: merged without loss, read in place where that is safe, never a signal that kills."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.storage.access import LocalFiles, Remote, ShardBytes
from shards.storage.spans import merge

BLOB = np.random.default_rng(0).integers(0, 256, 60_000, dtype=np.uint8).tobytes()


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{number}.tar" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_bytes(BLOB[number:] + BLOB[:number])
    return paths


RANGES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 50_000), st.integers(1, 5000)), min_size=1, max_size=40)


@given(RANGES, st.integers(0, 9000))
def test_merged_spans_hold_every_range(ranges: list[tuple[int, int, int]], gap: int) -> None:
    numbers, offsets, sizes = (np.asarray(values, dtype=np.int64) for values in zip(*ranges, strict=True))
    spans = merge(numbers, offsets, sizes, gap)
    blobs = [BLOB[number:] + BLOB[:number] for number in range(3)]
    rows = zip(spans.shards, spans.offsets, spans.sizes, strict=True)
    joined = b"".join(blobs[shard][offset : offset + size] for shard, offset, size in rows)
    for (shard, offset, size), begin in zip(ranges, spans.begins, strict=True):
        assert joined[begin : begin + size] == blobs[shard][offset : offset + size]
    keys = list(zip(spans.shards.tolist(), spans.offsets.tolist(), strict=True))
    assert keys == sorted(keys) and len(keys) <= len(ranges)


def test_neighbours_become_one_span_and_long_spans_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    offsets = np.arange(0, 4000, 100)
    same, sizes = np.zeros(40, dtype=np.int64), np.full(40, 60)
    assert len(merge(same, offsets, sizes, 40).sizes) == 1 and len(merge(same, offsets, sizes, 39).sizes) == 40
    monkeypatch.setattr("shards.storage.spans.LONGEST_SPAN", 1000)
    assert len(merge(same, offsets, sizes, 40).sizes) == 4


def test_views_and_joined_reads_are_the_same_bytes(shards: list[Path]) -> None:
    source = ShardBytes(shards, Remote(), 2)
    places = [(0, 10, 4000), (2, 0, 60_000), (1, 59_999, 1), (0, 4096, 4096)]
    numbers, offsets, sizes = (list(values) for values in zip(*places, strict=True))
    joined, begins = source.read(*(np.asarray(values) for values in (numbers, offsets, sizes)))
    for view, begin, size in zip(source.views(numbers, offsets, sizes), begins, sizes, strict=True):
        assert view == joined[begin : begin + size].tobytes() and view.readonly
    source.close()


def test_ranges_past_the_end_are_errors_not_signals(shards: list[Path], tmp_path: Path) -> None:
    files = LocalFiles(4)
    with pytest.raises(EOFError, match=r"bytes 59000..61000 reach past the end of the file"):
        files.read([shards[0]], [59_000], [2000])
    assert list(files.views([shards[0]], [0], [60_000])) == [BLOB]
    with pytest.raises(EOFError, match=r"bytes 59000..61000 reach past the end of the mapped file"):
        list(files.views([shards[0]], [59_000], [2000]))
    os.truncate(shards[0], 5000)
    views = files.views([shards[0], shards[0]], [0, 20_000], [2000, 2000])
    assert next(views) == BLOB[:2000]
    with pytest.raises(OSError, match="Bad address"):
        next(views)  # touching these pages would be SIGBUS
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(EOFError, match="the file is empty"):
        list(files.views([tmp_path / "empty"], [0], [1]))
    files.close()


def test_kernels_that_cannot_check_pages_read_copies(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.storage.mapped._POPULATE_READ", 9999)  # unknown advice: EINVAL, as before Linux 5.14
    files = LocalFiles(4)
    for _ in range(2):
        views = list(files.views([shards[0], shards[1]], [0, 5], [100, 50]))
        assert views == [BLOB[:100], (BLOB[1:] + BLOB[:1])[5:55]] and all(view.readonly for view in views)
    files.close()
