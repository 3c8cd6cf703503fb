"""Builds into an object store: the same bytes, restarts, nothing half-finished, no foreign object deleted."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from shards.build.build import BuildOptions, BuildProgress, BuildRun, Part, build, build_part, merge
from shards.build.work import RemoteWork
from shards.errors import DataError
from tests.unit.shards.making import ListCorpus, stored_corpus, video_corpus

SMALL = BuildOptions(samples_per_shard=3)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> ListCorpus:
    folder = tmp_path_factory.mktemp("videos")
    video_corpus(folder, 8)
    return stored_corpus(folder)


@pytest.fixture(scope="module")
def built(corpus: ListCorpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("built") / "set"
    build(corpus, out, SMALL)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def objects(url: str) -> dict[str, bytes]:
    store, root = fsspec.core.url_to_fs(url)
    return {name.removeprefix(f"{root}/"): store.cat_file(name) for name in store.find(root)}


def test_the_same_bytes_as_a_local_build(corpus: ListCorpus, built: dict[str, bytes], tmp_path: Path) -> None:
    url = "memory://build/same"
    run = BuildRun(scratch=tmp_path / "scratch")
    assert build(corpus, url, SMALL, run).counts["samples"] == 8
    assert objects(url) == built
    assert list((tmp_path / "scratch").iterdir()) == []
    assert build(corpus, url, SMALL).counts["samples"] == 8, "a finished prefix is returned as it is"
    with pytest.raises(DataError, match=r"memory://build/same: holds a shard set made otherwise; different: samples"):
        build(corpus, url, BuildOptions(samples_per_shard=4))


def test_an_interrupted_build_continues(corpus: ListCorpus, built: dict[str, bytes]) -> None:
    url = "memory://build/again"

    def stop(state: BuildProgress) -> None:
        if state.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(corpus, url, SMALL, on_progress=stop)
    assert "train-000000.tar" in objects(url) and "manifest.json" not in objects(url)
    with pytest.raises(DataError, match=r"holds a build made otherwise; different: samples_per_shard\n  fix: choose"):
        build(corpus, url, BuildOptions(samples_per_shard=4))
    seen: list[BuildProgress] = []
    build(corpus, url, SMALL, on_progress=seen.append)
    assert seen[-1].before == 3 and objects(url) == built


def test_a_build_that_fails_lists_what_was_skipped(tmp_path: Path) -> None:
    url = "memory://build/faulty"
    faulty = video_corpus(tmp_path, 4)
    for segment in faulty.items[:2]:
        assert segment.media is not None
        segment.media.path.unlink()
    with pytest.raises(
        DataError, match=r"2 of 4 segments cannot be used \(missing_media 2\), .* All: \S+skipped\.jsonl"
    ):
        build(faulty, url, SMALL)
    assert objects(url)[".building/skipped.jsonl"].count(b"missing_media") == 2
    build(faulty, url, BuildOptions(samples_per_shard=3, max_skipped_fraction=0.5))
    assert ".building/skipped.jsonl" not in objects(url) and objects(url)["skipped.jsonl"].count(b"\n") == 2


def test_a_lost_shard_is_written_again(corpus: ListCorpus, built: dict[str, bytes]) -> None:
    url = "memory://build/lost"
    build_part(corpus, url, SMALL, Part(1, 1), BuildRun())
    store, root = fsspec.core.url_to_fs(url)
    store.rm_file(f"{root}/train-000001.tar")
    with pytest.raises(DataError, match=r"1 shards are missing \(train-000001\.tar\); part 1/1"):
        merge(corpus, url, SMALL, BuildRun())
    build(corpus, url, SMALL)
    assert objects(url) == built


def test_parts_and_merge(corpus: ListCorpus, built: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    url = "memory://build/parts"
    for number in (1, 2):
        build_part(corpus, url, SMALL, Part(number, 2), BuildRun())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RemoteWork, "publish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        merge(corpus, url, SMALL, BuildRun())
    assert any(name.startswith(".building/") for name in objects(url)), "killed after the manifest"
    assert merge(corpus, url, SMALL, BuildRun()).counts["samples"] == 8
    assert objects(url) == built


def test_foreign_objects_are_never_touched(corpus: ListCorpus) -> None:
    store, root = fsspec.core.url_to_fs("memory://build/foreign")
    store.pipe_file(f"{root}/notes.txt", b"mine")
    with pytest.raises(DataError, match="memory://build/foreign: not empty and not a shard set"):
        build(corpus, "memory://build/foreign", SMALL)
    assert objects("memory://build/foreign") == {"notes.txt": b"mine"}
