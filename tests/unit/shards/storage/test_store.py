"""Folders on disk and in object stores: the same contract, failures retried and then named."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from shards.errors import DataError
from shards.storage import store
from shards.storage.store import Folder, LocalFolder, RemoteFolder, StoreError, is_remote, open_folder

PAYLOAD = bytes(range(256)) * 40


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    if request.param == "local":
        (tmp_path / "set").mkdir()
        yield open_folder(tmp_path / "set")
        return
    yield open_folder("memory://bucket/set")
    fsspec.filesystem("memory").store.clear()


def test_what_is_written_can_be_read(folder: Folder, tmp_path: Path) -> None:
    assert folder.list() == [] and not folder.exists("a.tar")
    folder.write("a.tar", PAYLOAD)
    (tmp_path / "b").write_bytes(PAYLOAD * 2)
    folder.upload(tmp_path / "b", "b.tar.idx")
    assert folder.list() == ["a.tar", "b.tar.idx"] and folder.list(".tar") == ["a.tar"]
    assert folder.exists("a.tar") and folder.size("b.tar.idx") == 2 * len(PAYLOAD)
    assert folder.read("a.tar") == PAYLOAD and folder.read_range("a.tar", 3, 5) == PAYLOAD[3:8]
    ranges = [("a.tar", 0, 4), ("b.tar.idx", 100, 7), ("a.tar", 0, 0)]
    assert folder.read_ranges(ranges) == [PAYLOAD[:4], PAYLOAD[100:107], b""]
    assert folder.download("a.tar", tmp_path / "copy") == hashlib.sha256(PAYLOAD).hexdigest()
    assert (tmp_path / "copy").read_bytes() == PAYLOAD
    folder.write("a.tar", b"new")
    assert folder.read("a.tar") == b"new"
    folder.delete("a.tar")
    folder.delete("a.tar")
    assert folder.list() == ["b.tar.idx"]
    assert not [path for path in tmp_path.rglob("*.tmp")]


def test_a_file_can_be_read_as_a_stream(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_PART", 1000)
    folder.write("a", PAYLOAD)
    with folder.open("a") as handle:
        assert handle.read(10) == PAYLOAD[:10] and handle.tell() == 10
        handle.seek(-5, 2)
        assert handle.read() == PAYLOAD[-5:]
        handle.seek(100)
        assert handle.read(5000) == PAYLOAD[100:5100]


def test_a_range_past_the_end_is_named(folder: Folder) -> None:
    folder.write("a", PAYLOAD)
    with pytest.raises(DataError, match=r"set/a: bytes 10238..10248 reach past the end, 2 of 10 came"):
        folder.read_range("a", len(PAYLOAD) - 2, 10)


def test_a_missing_file_is_named(folder: Folder, tmp_path: Path) -> None:
    for call in (folder.read, folder.size, lambda name: folder.download(name, tmp_path / "x")):
        with pytest.raises(DataError, match=r"set/gone: (No such file|cannot .* the object after 1 attempt)") as caught:
            call("gone")
        assert not isinstance(caught.value, StoreError), "it is the data that is incomplete"
    assert not (tmp_path / "x").exists()


def test_locations() -> None:
    assert is_remote("s3://bucket/set") and not is_remote("/data/set") and not is_remote("file:///data/set")
    local, remote = open_folder("file:///data/set"), open_folder("memory://bucket/set/")
    assert isinstance(local, LocalFolder) and local.path("a") == Path("/data/set/a") and local.is_local
    assert isinstance(remote, RemoteFolder) and remote.join("a") == "memory://bucket/set/a" and not remote.is_local
    with pytest.raises(DataError, match="memory://bucket/set: not a local folder"):
        remote.path("a")
    assert pickle.loads(pickle.dumps(remote)).location == remote.location


def test_an_unknown_store_is_named() -> None:
    with pytest.raises(DataError, match=r"nostore://a/b: cannot use this kind of store \(.*nostore"):
        open_folder("nostore://a/b").list()


def test_a_copy_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = open_folder("memory://bucket/set")
    folder.write("a", b"x")
    with pytest.raises(DataError, match=r"cannot write the copy of memory://bucket/set/a \(No such file"):
        folder.download("a", tmp_path / "no" / "a")


class Flaky:
    """A file system whose reads fail in the given ways before they succeed."""

    def __init__(self, *problems: Any) -> None:
        self.problems = list(problems)

    def invalidate_cache(self) -> None:
        pass

    def info(self, path: str) -> dict[str, int]:
        return {"size": len(PAYLOAD)}

    def cat_file(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        if self.problems:
            problem = self.problems.pop(0)
            if isinstance(problem, Exception):
                raise problem
            return PAYLOAD[start:end][:problem]
        return PAYLOAD[start:end]


def connected(monkeypatch: pytest.MonkeyPatch, *problems: Any) -> RemoteFolder:
    monkeypatch.setattr(store, "FIRST_PAUSE_SECONDS", 0.001)
    file_system = Flaky(*problems)
    monkeypatch.setattr(store, "_connect", lambda *_: (file_system, "root"))
    return RemoteFolder("s3://bucket/set")


def test_what_may_pass_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = connected(monkeypatch, ConnectionResetError(), TimeoutError(), OSError(16, "Service Unavailable"), 3)
    assert folder.read_range("a", 10, 20) == PAYLOAD[10:30]


def test_a_lasting_failure_ends_after_some_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = connected(monkeypatch, *[OSError(16, "Service Unavailable")] * 20)
    with pytest.raises(StoreError, match=r"s3://bucket/set/a: cannot read the object after 6 attempts .*Unavailable"):
        folder.read_range("a", 10, 20)


@pytest.mark.parametrize("problem", [PermissionError("no"), ValueError("bad option"), TypeError("our fault")])
def test_what_cannot_pass_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    with pytest.raises(StoreError, match=r"cannot read the object after 1 attempt \("):
        connected(monkeypatch, problem).read("a")


def test_an_answer_that_stays_cut_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="the answer was cut after 3 of 20 bytes"):
        connected(monkeypatch, *[3] * 20).read_range("a", 10, 20)


def test_an_upload_that_arrives_short_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = connected(monkeypatch)
    monkeypatch.setattr(Flaky, "put_file", lambda *_: None, raising=False)
    (tmp_path / "a").write_bytes(PAYLOAD + b"more")
    with pytest.raises(StoreError, match=f"{len(PAYLOAD)} of {len(PAYLOAD) + 4} bytes arrived"):
        folder.upload(tmp_path / "a", "a")
