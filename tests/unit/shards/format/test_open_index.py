"""The memory-mapped copy of a large index: the same rows, made once, complete or absent."""

from __future__ import annotations

import errno
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shards.errors import DataError
from shards.format import index
from shards.format.index import open_index, read_index, with_numbered_names
from shards.order.plan import Plan, PlanOptions, Source
from tests.unit.shards.shard_sets import write_videos


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shard set whose index counts as large."""
    monkeypatch.setattr(index, "MAPPED_ABOVE", 0)
    monkeypatch.setattr(index, "BATCH_ROWS", 8)
    return write_videos(tmp_path / "set", [b"x" * n for n in range(1, 30)], [n + 3 for n in range(29)])


def copies(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "arrow" in path.name)


def test_a_mapped_index_holds_the_same_rows(folder: Path) -> None:
    plain, mapped = read_index(folder), open_index(folder)
    assert list(mapped.rows()) == list(plain.rows()) and mapped.row(11) == plain.row(11)
    assert copies(folder) == [f"index-{plain.fingerprint[:16]}.arrow"]
    assert mapped.table.column("shard").num_chunks == 4
    written = (folder / copies(folder)[0]).stat().st_mtime_ns
    assert open_index(folder).fingerprint == plain.fingerprint
    assert (folder / copies(folder)[0]).stat().st_mtime_ns == written, "made once"


def test_a_small_index_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(index, "MAPPED_ABOVE", 1 << 20)
    assert open_index(folder, tmp_path).cache == tmp_path and copies(folder) == []
    table = with_numbered_names(open_index(folder).table)
    assert (
        pa.types.is_dictionary(table.schema.field("split").type)
        and table.column("shard")[0].as_py() == "train-000000.tar"
    )


def test_a_new_index_replaces_the_copy_of_the_old_one(folder: Path) -> None:
    (folder / "index-0123456789abcdef.arrow").write_bytes(b"of an index that was built anew since")
    (folder / "index.parquet.arrow").write_bytes(b"somebody's own")
    opened = open_index(folder)
    assert copies(folder) == [f"index-{opened.fingerprint[:16]}.arrow", "index.parquet.arrow"]


def test_many_makers_leave_one_copy(folder: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        opened = list(pool.map(lambda _: open_index(folder), range(12)))
    assert len(copies(folder)) == 1
    assert all(list(shard_set.rows()) == list(opened[0].rows()) for shard_set in opened)


def _read_only(path: object, mode: int) -> bool:
    return not str(path).endswith("set")


def test_a_read_only_folder_needs_a_cache(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(index.os, "access", _read_only)
    with pytest.raises(DataError, match="needs a memory-mapped copy, and the folder for it is read-only"):
        open_index(folder)
    cache = tmp_path / "cache"
    cache.mkdir()
    assert len(open_index(folder, cache)) == 29
    assert copies(folder) == [] and len(copies(cache)) == 1
    plan = Plan([Source(open_index(folder, cache))], PlanOptions("clip"))
    assert pickle.loads(pickle.dumps(plan)).sources[0].shard_set.cache == cache


def test_a_full_disk_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(index, "sync", full)
    with pytest.raises(DataError, match=r"cannot write the memory-mapped copy of the index .*No space left"):
        open_index(folder)
    assert copies(folder) == []


def test_files_that_cannot_be_locked_are_no_obstacle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(index.fcntl, "flock", refuse)
    assert len(open_index(folder)) == 29 and len(copies(folder)) == 1


def test_damaged_copies_are_named(folder: Path) -> None:
    open_index(folder)
    path = folder / copies(folder)[0]
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"unreadable copy of the index .*\n.*delete this file"):
        open_index(folder)
    (folder / "index.parquet").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="unreadable index"):
        open_index(folder)


def _sum_of_offsets(payload: bytes) -> int:
    plan = pickle.loads(payload)
    return int(plan.samples.columns["offset"][np.arange(len(plan.samples))].sum())


def test_workers_open_the_copy_again(folder: Path) -> None:
    plan = Plan([Source(open_index(folder))], PlanOptions("clip"))
    payload = pickle.dumps(plan)
    assert len(payload) < 4096
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_sum_of_offsets, (payload,)) == _sum_of_offsets(payload)
