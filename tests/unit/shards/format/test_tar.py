"""A shard that changes while it is indexed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shards.errors import DataError
from shards.format import tar
from shards.format.opening import open_shards
from shards.format.tar import index_tar
from tests.unit.shards.shard_sets import write_videos


def test_a_file_that_shrinks_under_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_videos(tmp_path / "set", [b"x" * 5000] * 2, [4] * 2) / "train-000000.tar"
    kept = tar.crc32

    def cut_and_sum(chunk: bytes, crc: int) -> Any:
        with path.open("r+b") as handle:
            handle.truncate(1000)
        return kept(chunk, crc)

    monkeypatch.setattr(tar, "_CHUNK", 1024)
    monkeypatch.setattr(tar, "crc32", cut_and_sum)
    with pytest.raises(DataError, match=r"train-000000\.tar.*the file became shorter while it was read"):
        index_tar(path)


def test_a_remote_set_needs_a_folder_for_its_index() -> None:
    with pytest.raises(DataError, match=r"s3://bucket/set: a shard set in an object store needs a local folder"):
        open_shards("s3://bucket/set")
