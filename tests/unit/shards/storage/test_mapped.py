"""Mapped files: bytes in place, pages asked for once, and an error where touching them would kill the process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shards.storage.mapped import MappedFile

BLOB = np.random.default_rng(0).integers(0, 256, 500_000, dtype=np.uint8).tobytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "0.tar"
    found.write_bytes(BLOB)
    return found


@pytest.fixture
def file(path: Path) -> Iterator[MappedFile]:
    handle = os.open(path, os.O_RDONLY)
    yield MappedFile(handle)
    os.close(handle)


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (4095, 2), (12_345, 300_001), (499_999, 1), (0, 500_000)])
def test_views_are_the_bytes_of_the_file_however_often_asked_for(file: MappedFile, offset: int, size: int) -> None:
    for _ in range(2):
        view = file.view(offset, size)
        assert view == BLOB[offset : offset + size] and view.readonly


def test_pages_in_memory_are_not_asked_for_again(file: MappedFile, monkeypatch: pytest.MonkeyPatch) -> None:
    assert file.view(8192, 100_000) == BLOB[8192:108_192]
    monkeypatch.setattr("shards.storage.mapped._POPULATE_READ", 9999)  # an advice no kernel knows
    assert file.view(8192, 100_000) == BLOB[8192:108_192]
    with pytest.raises(OSError, match="Invalid argument"):
        file.view(300_000, 10)


def test_pages_that_went_away_are_an_error_and_no_signal(file: MappedFile, path: Path) -> None:
    assert file.view(100_000, 200_000) == BLOB[100_000:300_000]
    os.truncate(path, 150_000)
    with pytest.raises(OSError, match="Bad address"):
        file.view(100_000, 200_000)
    assert file.view(100_000, 50_000) == BLOB[100_000:150_000]


def test_views_outlive_the_handle(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    file = MappedFile(handle)
    first = file.view(0, 10)
    os.close(handle)
    assert first == BLOB[:10] and file.view(1000, 10) == BLOB[1000:1010]
