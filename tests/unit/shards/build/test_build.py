"""The build: determinism, restart after kill -9, skips, full disk, and that plain webdataset reads the result."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

import shards.build.engines
import shards.build.work
import shards.format.writer
from shards.build.build import SKIPPED_NAME, BuildOptions, BuildProgress, build
from shards.build.prepare import ordered_map
from shards.errors import DataError, OptionError
from shards.format.index import read_index
from shards.format.verify import verify
from shards.inspect.lint import lint
from shards.media.video import VideoOptions, decode
from shards.schema import FrameFolder, Segment, VideoFile
from shards.text import load_tokenizer, tokenise
from tests.unit.shards.making import (
    ListCorpus,
    audio_only,
    die_at_three,
    mp4,
    pictures,
    save_tokenizer,
    text_corpus,
    video_corpus,
)

SMALL = BuildOptions(samples_per_shard=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> ListCorpus:
    corpus = video_corpus(tmp_path_factory.mktemp("videos"), 8)
    corpus.items[7] = dataclasses.replace(corpus.items[7], split="dev")
    return corpus


@pytest.fixture(scope="module")
def built(corpus: ListCorpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "set"
    build(corpus, out, SMALL)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_layout_rows_and_manifest(built: Path, corpus: ListCorpus) -> None:
    names = ["dev-000000.tar", "index.parquet", "manifest.json", SKIPPED_NAME]
    assert sorted(content(built)) == sorted([*names, "train-000000.tar", "train-000001.tar", "train-000002.tar"])
    shard_set = read_index(built)
    assert shard_set.manifest.splits == {"dev": 1, "train": 7}
    assert shard_set.manifest.counts == {"samples": 8, "skipped": 0}
    assert shard_set.manifest.options["video"]["short_side"] == 256
    by_id = {segment.id: segment for segment in corpus.items}
    for row in shard_set.rows():
        segment = by_id[row.sample_id]
        assert (row.text, row.gloss, row.signer, row.language) == (segment.text, "SATZ", "s1", "de")
        payload = shard_set.shard_path(row.shard).read_bytes()
        frames = decode(payload[row.offset : row.offset + row.size], row.frames)
        assert frames.shape == (10 + int(row.sample_id[5:]) % 3, row.height, row.width, 3)
        meta = json.loads(payload[row.meta_offset : row.meta_offset + row.meta_size])
        assert meta["id"] == row.sample_id and meta["frames"] == row.frames and meta["text"] == row.text
        assert "." not in row.key
    assert verify(built) == [] and lint(built).ok


def test_plain_webdataset_reads_videos(built: Path) -> None:
    rows = {row.key: row for row in read_index(built).rows() if row.split == "train"}
    shards = [str(path) for path in sorted(built.glob("train-*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == list(rows)
    for sample in samples:
        row = rows[sample["__key__"]]
        assert json.loads(sample["json"])["text"] == row.text
        payload = (built / row.shard).read_bytes()[row.offset : row.offset + row.size]
        assert sample["mp4"] == payload


@pytest.mark.parametrize("workers", [2, 3])
def test_bytes_do_not_depend_on_workers(built: Path, corpus: ListCorpus, tmp_path: Path, workers: int) -> None:
    build(corpus, tmp_path / "set", SMALL, workers=workers)
    assert content(tmp_path / "set") == content(built)


def test_finished_result_is_returned_at_once(built: Path, corpus: ListCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.iterdir()}
    monkeypatch.setattr(shards.build.engines, "ordered_map", lambda *_: pytest.fail("work was done again"))
    assert build(corpus, built, SMALL).splits == {"dev": 1, "train": 7}
    assert before == {path: path.stat().st_mtime_ns for path in built.iterdir()}


def test_other_options_or_segments_are_refused(built: Path, corpus: ListCorpus) -> None:
    with pytest.raises(DataError, match=r"made otherwise; different: video\n  fix: choose another --out"):
        build(corpus, built, BuildOptions(video=VideoOptions(crf=30), samples_per_shard=3))
    with pytest.raises(DataError, match="different: segments"):
        build(ListCorpus(corpus.items[:5]), built, SMALL)


def test_a_folder_with_something_else_is_refused(corpus: ListCorpus, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty and not a shard set"):
        build(corpus, tmp_path, SMALL)


def test_a_mount_point_is_refused(corpus: ListCorpus) -> None:
    with pytest.raises(DataError, match="is a mount point and cannot be renamed to"):
        build(corpus, Path("/proc"), SMALL)


def test_an_unwritable_place_is_named(corpus: ListCorpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write"):
        build(corpus, tmp_path / "file" / "set", SMALL)


def test_an_empty_folder_is_filled(corpus: ListCorpus, built: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    build(corpus, tmp_path / "set", SMALL)
    assert content(tmp_path / "set") == content(built)


def test_two_builds_of_one_folder_exclude_each_other(corpus: ListCorpus, tmp_path: Path) -> None:
    def again(_: BuildProgress) -> None:
        with pytest.raises(DataError, match="another build is writing here"):
            build(corpus, tmp_path / "set", SMALL)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(corpus, tmp_path / "set", SMALL, on_progress=again)


def test_moving_the_media_keeps_the_result(corpus: ListCorpus, built: Path, tmp_path: Path) -> None:
    moved = []
    for segment in corpus.items:
        assert isinstance(segment.media, VideoFile)
        target = tmp_path / segment.media.path.name
        target.write_bytes(segment.media.path.read_bytes())
        moved.append(dataclasses.replace(segment, media=VideoFile(target), origin="elsewhere"))
    assert build(ListCorpus(moved), built, SMALL).counts["samples"] == 8


def test_progress_counts_every_segment(corpus: ListCorpus, tmp_path: Path) -> None:
    seen: list[BuildProgress] = []
    build(corpus, tmp_path / "set", SMALL, on_progress=seen.append)
    assert seen[-1].done == seen[-1].total == 8 and seen[-1].skipped == 0
    assert [state.done for state in seen] == sorted(state.done for state in seen)


@pytest.mark.parametrize("step", ["parts", "manifest", "rename"])
def test_death_while_finishing(
    corpus: ListCorpus, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if step == "rename":
            patch.setattr(Path, "rename", lambda self, to: die() if self.suffix == ".building" else os.rename(self, to))
        else:
            patch.setattr(shards.build.work.LocalWork, "_clear", die) if step == "parts" else patch.setattr(
                shards.build.work, "write_index", die
            )
        build(corpus, tmp_path / "set", SMALL)
    assert not (tmp_path / "set").exists()
    build(corpus, tmp_path / "set", SMALL)
    assert content(tmp_path / "set") == content(built)


def test_an_interrupted_build_with_other_options_starts_over(corpus: ListCorpus, built: Path, tmp_path: Path) -> None:
    def stop(state: BuildProgress) -> None:
        if state.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(corpus, tmp_path / "set", BuildOptions(VideoOptions(crf=40), samples_per_shard=3), on_progress=stop)
    build(corpus, tmp_path / "set", SMALL)
    assert content(tmp_path / "set") == content(built)


def test_full_disk(corpus: ListCorpus, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put, room = shards.format.writer.TarWriter._put, [20_000]

    def limited(self: shards.format.writer.TarWriter, data: bytes) -> None:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(shards.format.writer.TarWriter, "_put", limited)
        with pytest.raises(DataError, match=r"the disk is full\n  fix: free some space and run the same command again"):
            build(corpus, tmp_path / "set", SMALL)
    assert not (tmp_path / "set").exists()
    assert list(tmp_path.rglob("*.tmp")) == []
    build(corpus, tmp_path / "set", SMALL)
    assert content(tmp_path / "set") == content(built)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small tmpfs")
def test_full_disk_for_real(corpus: ListCorpus, built: Path, tmp_path: Path) -> None:
    size = sum(map(len, content(built).values()))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size // 2}", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(DataError, match="the disk is full"):
            build(corpus, tmp_path / "set", SMALL)
        assert not (tmp_path / "set").exists() and list(tmp_path.rglob("*.tmp")) == []
        subprocess.run(["mount", "-o", f"remount,size={size * 4}", str(tmp_path)], check=True)
        build(corpus, tmp_path / "set", SMALL)
        assert content(tmp_path / "set") == content(built)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def faulty_corpus(folder: Path) -> ListCorpus:
    corpus = video_corpus(folder, 6)
    broken = {"zero": b"", "audio": audio_only(), "cut": mp4(pictures(30))[:2000]}
    for name, payload in broken.items():
        (folder / f"{name}.mp4").write_bytes(payload)
    (folder / "frames").mkdir()
    (folder / "frames" / "profile.lprof").write_bytes(b"x")
    media = {name: VideoFile(folder / f"{name}.mp4") for name in [*broken, "gone"]}
    items = [Segment("list", name, "train", "text", path, origin=f"list:{name}") for name, path in media.items()]
    frames = FrameFolder(folder / "frames", "*", 25.0)
    items.append(Segment("list", "folder", "train", "text", frames, origin="list:folder"))
    items.append(dataclasses.replace(corpus.items[0], id="blank", text=" \n", origin="list:blank"))
    return ListCorpus([*items[:3], *corpus.items, *items[3:]])


def test_unusable_segments_are_counted_and_listed(tmp_path: Path) -> None:
    manifest = build(faulty_corpus(tmp_path / "v"), tmp_path / "set", BuildOptions(max_skipped_fraction=0.5))
    reasons = {"skipped/empty_text": 1, "skipped/missing_media": 2, "skipped/unreadable_media": 3}
    assert manifest.counts == {"samples": 6, "skipped": 6, **reasons}
    lines = [json.loads(line) for line in (tmp_path / "set" / SKIPPED_NAME).read_text().splitlines()]
    assert {line["id"] for line in lines} == {"zero", "audio", "cut", "gone", "folder", "blank"}
    audio = next(line for line in lines if line["id"] == "audio")
    assert audio["origin"] == "list:audio" and "only audio" in audio["detail"]
    assert lint(tmp_path / "set").ok


def test_too_many_unusable_segments_fail_the_build(tmp_path: Path) -> None:
    corpus = faulty_corpus(tmp_path / "v")
    with pytest.raises(DataError, match=r"6 of 12 segments cannot be used .* allowed: 5\.0%\. First: list:") as caught:
        build(corpus, tmp_path / "set", SMALL)
    message = str(caught.value)
    assert (
        message.startswith(f"list, build of {tmp_path / 'set'}: 6 of 12") and "raise --max-skipped-fraction" in message
    )
    assert "missing_media 2" in message and "; fetch the missing media" in message and "{" not in message
    skipped = tmp_path / ".set.building" / SKIPPED_NAME
    assert f"All: {skipped}" in message and len(skipped.read_text().splitlines()) == 6
    assert not (tmp_path / "set").exists()
    for segment in corpus.items:  # repaired media is looked at again
        if isinstance(segment.media, VideoFile):
            segment.media.path.write_bytes(mp4(pictures(5)))
    manifest = build(corpus, tmp_path / "set", dataclasses.replace(SMALL, max_skipped_fraction=0.2))
    assert manifest.counts["samples"] == 10


def test_nothing_usable_at_all(tmp_path: Path) -> None:
    items = [Segment("list", "a", "train", "text", VideoFile(tmp_path / "gone.mp4"))]
    with pytest.raises(DataError, match="1 of 1 segments cannot be used"):
        build(ListCorpus(items), tmp_path / "set", BuildOptions(max_skipped_fraction=1.0))


def test_a_finished_build_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    corpus = video_corpus(tmp_path / "v", 3)
    build(corpus, tmp_path / "set", SMALL)
    with caplog.at_level("INFO"):
        build(corpus, tmp_path / "set", SMALL)
    assert caplog.messages[-1] == f"{tmp_path / 'set'} is complete already: train 3"


def test_duplicate_ids_name_both_places(tmp_path: Path) -> None:
    corpus = video_corpus(tmp_path / "v", 3)
    corpus.items.append(dataclasses.replace(corpus.items[1], origin="list:99"))
    with pytest.raises(
        DataError, match=r"list:99: the id 'clip\.1' occurs twice, first at list:1\n  fix: make ids unique"
    ):
        build(corpus, tmp_path / "set", SMALL)


def test_ids_that_look_alike_get_keys_of_their_own(tmp_path: Path) -> None:
    corpus = video_corpus(tmp_path / "v", 4)
    ids = ["a.b", "a/b", "-x", "ü" * 300]
    corpus.items = [dataclasses.replace(item, id=name) for item, name in zip(corpus.items, ids, strict=True)]
    build(corpus, tmp_path / "set", BuildOptions())
    keys = [row.key for row in read_index(tmp_path / "set").rows()]
    assert len(set(keys)) == 4 and not any(
        set(key) - set(shards.format.writer.re.sub(r"[^A-Za-z0-9_-]", "", key)) for key in keys
    )
    assert not any(key.startswith("-") or len(key) > 90 for key in keys)


def test_empty_and_mixed_corpora(tmp_path: Path, tokenizer: str) -> None:
    with pytest.raises(DataError, match="list: no segments at all"):
        build(ListCorpus([]), tmp_path / "set", SMALL)
    mixed = ListCorpus([*video_corpus(tmp_path / "v", 1).items, *text_corpus(1).items])
    with pytest.raises(DataError, match="video and text segments are mixed"):
        build(mixed, tmp_path / "set", BuildOptions(tokenizer=tokenizer))
    with pytest.raises(OptionError, match="a text corpus needs a tokenizer"):
        build(text_corpus(2), tmp_path / "set", SMALL)
    with pytest.raises(DataError, match="shard and member sizes must be >= 1"):
        BuildOptions(samples_per_shard=0)


def test_text_rows_address_their_documents(tmp_path: Path, tokenizer: str) -> None:
    corpus = text_corpus(1300)
    options = BuildOptions(tokenizer=tokenizer, documents_per_shard=700, tokens_per_member=3000)
    manifest = build(corpus, tmp_path / "set", options)
    expected = tokenise([segment.text for segment in corpus.items], load_tokenizer(tokenizer))
    shard_set = read_index(tmp_path / "set")
    assert manifest.kind == "text" and [shard["samples"] for shard in manifest.shards] == [700, 600]
    blobs = {shard["name"]: (tmp_path / "set" / shard["name"]).read_bytes() for shard in manifest.shards}
    for row, segment, ids in zip(shard_set.rows(), corpus.items, expected, strict=True):
        found = np.frombuffer(blobs[row.shard][row.offset : row.offset + row.size], manifest.options["token_dtype"])
        assert (found == ids).all() and row.tokens == len(ids) and row.sample_id == segment.id
        assert (row.text, row.meta_offset, row.frames) == (segment.text, -1, 0)
    assert verify(tmp_path / "set") == [] and lint(tmp_path / "set").tokens == sum(map(len, expected))
    samples = list(
        webdataset.WebDataset([str(p) for p in sorted((tmp_path / "set").glob("*.tar"))], shardshuffle=False).decode()
    )
    assert len(samples) > 5
    joined = np.concatenate([sample["npy"] for sample in samples])
    assert (joined == np.concatenate(expected)).all()
    documents = [document for sample in samples for document in sample["json"]["documents"]]
    assert [document["text"] for document in documents] == [segment.text for segment in corpus.items]


def test_empty_documents_are_skipped(tmp_path: Path, tokenizer: str) -> None:
    corpus = text_corpus(40)
    corpus.items[3] = dataclasses.replace(corpus.items[3], text="  ")
    manifest = build(corpus, tmp_path / "set", BuildOptions(tokenizer=tokenizer, documents_per_shard=1))
    assert manifest.counts == {"samples": 39, "skipped": 1, "skipped/empty_text": 1}
    assert lint(tmp_path / "set").ok


def test_a_killed_builder_process_is_an_error_not_a_hang() -> None:
    with pytest.raises(DataError, match=r"unit \d: a builder process died .*\n  fix: run again with fewer --workers"):
        list(ordered_map(die_at_three, iter([(f"unit {number}", number) for number in range(6)]), 2))


def test_a_name_is_written_once(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"a\.tar: two members named x\.mp4"),
        shards.format.writer.TarWriter(tmp_path / "a.tar") as tar,
    ):
        tar.add("x.mp4", b"1")
        tar.add("x.mp4", b"2")
    assert list(tmp_path.iterdir()) == []
