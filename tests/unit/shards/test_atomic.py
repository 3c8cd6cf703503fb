"""A file is the old one or the new one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import pytest

from shards.atomic import put_file, write_atomic


def test_text_and_bytes(tmp_path: Path) -> None:
    write_atomic(tmp_path / "f", "a long old text")
    write_atomic(tmp_path / "f", "für\n")
    assert (tmp_path / "f").read_bytes() == "für\n".encode()
    write_atomic(tmp_path / "f", b"\xff\0")
    assert (tmp_path / "f").read_bytes() == b"\xff\0"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.rename"])
def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    write_atomic(tmp_path / "f", "old")

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(step, broken)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "f", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("f", "old")]


def test_a_writer_that_stops_leaves_nothing(tmp_path: Path) -> None:
    def half(handle: BinaryIO) -> None:
        handle.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        put_file(tmp_path / "f", half)
    assert not list(tmp_path.iterdir())


def test_others_may_read_it(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_atomic(tmp_path / "f", "shared")
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o644
