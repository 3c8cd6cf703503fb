"""The node cache: one download per host, bounded, never wrong bytes, nothing left by a kill."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shards.errors import DataError
from shards.format.index import read_index
from shards.load.loader import LoaderOptions, StepLoader
from shards.load.prefetch import Prefetcher
from shards.load.reader import Reader
from shards.order.plan import Plan, PlanOptions, Source
from shards.storage import cache
from shards.storage.access import Remote
from shards.storage.cache import ShardCache, mirror, remote_of, unpin
from shards.storage.store import Folder, StoreError, open_folder
from tests.unit.shards.shard_sets import collate_lists, fetch_payload, write_videos

SHARDS, PER_SHARD = 5, 6
PAYLOADS = [bytes([number + 1]) * (2000 + 31 * number) for number in range(SHARDS * PER_SHARD)]
GIB = 1 << 30


@pytest.fixture
def remote(tmp_path: Path) -> str:
    """A shard set behind fsspec; ``local://`` counts as remote and every process can read it."""
    write_videos(tmp_path / "store" / "set", PAYLOADS, [4] * len(PAYLOADS), per_shard=PER_SHARD)
    return f"local://{tmp_path}/store/set"


def plan_of(folder: Path, **options: Any) -> Plan:
    return Plan([Source(read_index(folder))], PlanOptions("clip", **options))


def sizes(folder: Path) -> list[int]:
    return [entry["size"] for entry in read_index(folder).manifest.shards]


def cached(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.tar"))


def make_cache(folder: Path, shards: float) -> ShardCache:
    """A cache with room for so many shards."""
    store = remote_of(folder)
    assert store is not None
    return ShardCache(folder, store, shards * max(sizes(folder)) / GIB)


def test_a_mirror_is_a_shard_set_without_shards(remote: str, tmp_path: Path) -> None:
    folder = mirror(remote, tmp_path / "cache")
    assert mirror(remote + "/", tmp_path / "cache") == folder and cached(folder) == []
    assert folder.name.startswith("set-") and read_index(folder).fingerprint == read_index(remote[8:]).fingerprint
    assert remote_of(folder).location == remote and remote_of(tmp_path) is None  # type: ignore[union-attr]


def test_no_set_and_a_broken_manifest_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: cannot read the object"):
        mirror(f"local://{tmp_path}/gone", tmp_path / "cache")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"manifest\.json: unreadable manifest \(KeyError: 'fingerprint'\)"):
        mirror(f"local://{tmp_path}", tmp_path / "cache")


def test_a_set_that_changes_while_it_is_opened_is_refused(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Folder.read

    def older(self: Any, name: str) -> bytes:
        values = json.loads(Path(remote[8:], name).read_bytes())
        return json.dumps({**values, "fingerprint": "0" * 64}).encode()

    monkeypatch.setattr("shards.storage.store.RemoteFolder.read", older)
    with pytest.raises(DataError, match="the shard set changed while it was opened"):
        mirror(remote, tmp_path / "cache")
    assert read is Folder.read and not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("how", [Remote("ranged"), Remote("cache", 1.0), Remote("auto", 1.0), Remote()])
def test_a_remote_set_reads_like_a_local_one(remote: str, tmp_path: Path, how: Remote) -> None:
    folder = mirror(remote, tmp_path / "cache")
    reader = Reader(plan_of(folder), remote=how)
    assert [bytes(reader.payload(n)) for n in range(len(PAYLOADS))] == PAYLOADS
    assert reader.meta(7)["text"] == "text number 7"
    assert len(cached(folder)) == (SHARDS if how.resolved() == "cache" else 0)
    loaders = [
        StepLoader(plan_of(place), fetch_payload, collate_lists, LoaderOptions(0, 1, 6, 3, workers=workers, remote=how))
        for place, workers in ((folder, 0), (folder, 1), (Path(remote[8:]), 0))
    ]
    seen = [[step.micro_batches for step in islice(loader, 8)] for loader in loaders]
    assert seen[0] == seen[1] == seen[2]


def test_a_cache_without_room_is_refused(remote: str, tmp_path: Path) -> None:
    folder = mirror(remote, tmp_path / "cache")
    with pytest.raises(DataError, match="access 'cache' with a cache of 0 GiB"):
        Reader(plan_of(folder), remote=Remote("cache")).payload(0)
    with pytest.raises(StoreError, match=r"a shard of 0\.00 GiB does not fit into a cache of 0\.00 GiB"):
        make_cache(folder, 0.9).open("train-000000.tar")


def test_the_shard_unused_longest_goes_first_but_none_that_is_read(remote: str, tmp_path: Path) -> None:
    folder = mirror(remote, tmp_path / "cache")
    shards = make_cache(folder, 3)
    handles = {}
    for number in (0, 1, 2):
        handles[number] = shards.open(f"train-{number:06d}.tar")
        os.utime(handles[number], ns=(number, number))
    for number in (1, 2):
        unpin(handles[number])
    shards.fetch("train-000003.tar")
    assert cached(folder) == ["train-000000.tar", "train-000002.tar", "train-000003.tar"], "0 is older, but pinned"
    assert os.pread(handles[1], 10, 512), "an open file stays readable after its eviction"
    for handle in handles.values():
        os.close(handle)


def test_everything_in_use_is_an_error_after_a_while(
    remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "WAIT_SECONDS", 0.2)
    shards = make_cache(mirror(remote, tmp_path / "cache"), 1)
    handle = shards.open("train-000000.tar")
    with pytest.raises(
        StoreError, match=r"no room for a shard .* everything in the cache is being read or the disk is"
    ):
        shards.fetch("train-000001.tar")
    os.close(handle)
    shards.fetch("train-000001.tar")


def test_a_full_disk_makes_room_or_is_named(remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "WAIT_SECONDS", 0.1)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    with pytest.raises(StoreError, match="no room for a shard"):
        make_cache(mirror(remote, tmp_path / "cache"), 3).fetch("train-000001.tar")


def test_a_reader_with_a_small_cache_reads_everything(remote: str, tmp_path: Path) -> None:
    folder = mirror(remote, tmp_path / "cache")
    limit = 2 * max(sizes(folder)) / GIB
    reader = Reader(plan_of(folder), remote=Remote("cache", limit))
    for _ in range(2):
        for sample in np.random.default_rng(0).permutation(len(PAYLOADS)).tolist():
            assert reader.payload(sample) == PAYLOADS[sample]
    assert sum(path.stat().st_size for path in folder.glob("*.tar")) <= limit * GIB


def test_a_damaged_copy_is_fetched_again_once(remote: str, tmp_path: Path) -> None:
    folder = mirror(remote, tmp_path / "cache")
    plan = plan_of(folder)
    reader = Reader(plan, remote=Remote("cache", 1.0))
    reader.payload(0)
    offset = int(plan.samples.columns["offset"][3])
    for _ in range(2):
        with (folder / "train-000000.tar").open("r+b") as handle:
            handle.seek(offset)
            handle.write(b"\0\0")
        if _ == 0:
            assert reader.payload(3) == PAYLOADS[3]
    with pytest.raises(DataError, match=r"clip0003 .*the bytes do not match the CRC-32 in the index"):
        reader.payload(3)


def test_an_object_that_is_not_the_manifests_is_an_error(
    remote: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = mirror(remote, tmp_path / "cache")
    path = Path(remote[8:], "train-000001.tar")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    shards = make_cache(folder, 5)
    for _ in range(2):
        with pytest.raises(DataError, match=r"train-000001\.tar: sha256 .* of .* bytes, the manifest says"):
            shards.fetch("train-000001.tar")
    assert len([r for r in caplog.records if "downloading again" in r.getMessage()]) == 1, "not for every sample"
    assert not list(folder.glob("*.part*")) and cached(folder) == []
    with pytest.raises(DataError, match="the index names a shard that the manifest does not list"):
        shards.fetch("other.tar")


def _fetch(folder: Path, slow: float) -> None:
    store = remote_of(folder)
    assert store is not None
    download = store.download

    def slowly(name: str, local: Path) -> str:
        local.with_name(local.name + ".abc.tmp").write_bytes(b"half")
        (folder / "downloads").open("a").write("x")
        time.sleep(slow)
        local.with_name(local.name + ".abc.tmp").unlink()
        return download(name, local)

    store.download = slowly  # type: ignore[method-assign]
    ShardCache(folder, store, 1.0).fetch("train-000002.tar")


def test_one_process_downloads_and_the_others_wait(remote: str, tmp_path: Path) -> None:
    folder = mirror(remote, tmp_path / "cache")
    processes = [multiprocessing.get_context("fork").Process(target=_fetch, args=(folder, 0.2)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (folder / "downloads").read_text() == "x" and cached(folder) == ["train-000002.tar"]


def test_a_killed_download_leaves_nothing_wrong(remote: str, tmp_path: Path) -> None:
    folder = mirror(remote, tmp_path / "cache")
    process = multiprocessing.get_context("fork").Process(target=_fetch, args=(folder, 60.0))
    process.start()
    while not list(folder.glob("*.tmp")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
    process.join()
    assert cached(folder) == [] and list(folder.glob("*.part")), "it took room, and no more"
    make_cache(folder, 3).fetch("train-000000.tar")
    assert not list(folder.glob("*.part*")), "what was left behind is gone"
    make_cache(folder, 3).fetch("train-000002.tar")
    assert cached(folder) == ["train-000000.tar", "train-000002.tar"]


def test_a_lock_held_for_ever_is_named(remote: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mirror(remote, tmp_path / "cache")
    monkeypatch.setattr(cache, "WAIT_SECONDS", 0.2)
    said = r"train-000000\.tar\.lock: another process has held this lock for 0 s"
    with cache._locked(folder / "train-000000.tar.lock"), pytest.raises(DataError, match=said):
        make_cache(folder, 3).fetch("train-000000.tar")


def test_a_file_system_without_locks_is_an_error_and_no_held_lock() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        cache._try_lock(1 << 20)


def test_the_shards_of_coming_steps_are_fetched_within_half_the_cache(
    remote: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    folder = mirror(remote, tmp_path / "cache")
    plan = plan_of(folder)
    assert not Prefetcher(plan.samples.shards, Remote("ranged")).active
    ahead = Prefetcher(plan.samples.shards, Remote("cache", 4.1 * max(sizes(folder)) / GIB))
    coming = iter([[number % SHARDS] for number in range(100)])
    ahead.step(coming)
    deadline = time.monotonic() + 10
    while len(cached(folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert cached(folder) == ["train-000000.tar", "train-000001.tar"] and not caplog.records
    Path(remote[8:], "train-000002.tar").unlink()
    ahead.step(coming)
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "cannot fetch a shard ahead of time" in caplog.text


def test_a_folder_is_needed_for_a_local_path(tmp_path: Path) -> None:
    assert open_folder(tmp_path).path("x") == tmp_path / "x"
