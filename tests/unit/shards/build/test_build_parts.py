"""Parts of an array job, merging them, changed sources, budgets and excluded segments."""

from __future__ import annotations

import dataclasses
import json
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest

import shards.build.engines
from shards.build.build import SKIPPED_NAME, BuildOptions, BuildProgress, BuildRun, Part, build, build_part, merge
from shards.errors import DataError
from shards.format.index import read_index
from shards.schema import Segment, VideoFile
from shards.text import load_tokenizer, tokenise, tokenizer_fingerprint
from tests.unit.shards.making import (
    ListCorpus,
    die_at_once,
    mp4,
    pictures,
    save_tokenizer,
    stored_corpus,
    text_corpus,
    video_corpus,
)

SMALL = BuildOptions(samples_per_shard=3)
HERE = BuildRun()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    video_corpus(folder, 12)
    return folder


@pytest.fixture(scope="module")
def built(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("built") / "set"
    build(stored_corpus(videos), out, SMALL)
    return content(out)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_parts_then_merge_give_the_bytes_of_one_build(
    videos: Path, built: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, corpus = tmp_path / "set", stored_corpus(videos)
    assert build_part(corpus, out, SMALL, Part(2, 3), HERE) == 1
    with pytest.raises(
        DataError, match=r"3 shards are missing \(train-000000\.tar, .*\); part 1/3, 3/3\n  fix: run the"
    ):
        merge(corpus, out, SMALL, HERE)
    assert build_part(corpus, out, SMALL, Part(3, 3), HERE) == 1
    assert build_part(corpus, out, SMALL, Part(1, 3), HERE) == 2
    assert not out.exists()
    monkeypatch.setattr(shards.build.engines, "write_shard", lambda *_: pytest.fail("work was done again"))
    assert build_part(corpus, out, SMALL, Part(1, 3), HERE) == 2
    assert merge(corpus, out, SMALL, HERE).splits == {"train": 12}
    assert content(out) == built
    assert build_part(corpus, out, SMALL, Part(1, 3), HERE) is None
    assert merge(corpus, out, SMALL, HERE).splits == {"train": 12}
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_build_without_part_finishes_what_parts_began(videos: Path, built: dict[str, bytes], tmp_path: Path) -> None:
    seen: list[BuildProgress] = []
    build_part(stored_corpus(videos), tmp_path / "set", SMALL, Part(1, 2), HERE, seen.append)
    assert (seen[-1].done, seen[-1].total, seen[-1].before) == (6, 6, 0)
    assert seen[-1].bytes > 0 and seen[-1].seconds == pytest.approx(6 * 11 / 25, abs=0.2)
    build(stored_corpus(videos), tmp_path / "set", SMALL, on_progress=seen.append)
    assert (seen[-1].done, seen[-1].total, seen[-1].before) == (12, 12, 6)
    assert content(tmp_path / "set") == built


def test_one_process_works_on_a_part_and_none_merges_meanwhile(videos: Path, tmp_path: Path) -> None:
    corpus, out = stored_corpus(videos), tmp_path / "set"

    def again(_: BuildProgress) -> None:
        for attempt in (
            lambda: build_part(corpus, out, SMALL, Part(1, 2), HERE),
            lambda: merge(corpus, out, SMALL, HERE),
            lambda: build(corpus, out, SMALL),
        ):
            with pytest.raises(DataError, match="another build is writing here"):
                attempt()
        build_part(corpus, out, SMALL, Part(2, 2), HERE)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_part(corpus, out, SMALL, Part(1, 2), HERE, again)


def test_a_part_of_another_build_is_refused(videos: Path, tmp_path: Path) -> None:
    build_part(stored_corpus(videos), tmp_path / "set", SMALL, Part(1, 4), HERE)
    with pytest.raises(DataError, match=r"holds a build made otherwise; different: samples_per_shard\n  fix: wait"):
        build_part(stored_corpus(videos), tmp_path / "set", BuildOptions(samples_per_shard=4), Part(2, 4), HERE)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/4/2", "-1/4"])
def test_impossible_parts(text: str) -> None:
    with pytest.raises(DataError, match=r"--part: .* is no share\n  fix: write I/N"):
        Part.parse(text)


def test_part_names() -> None:
    assert Part.parse("3/8") == Part(3, 8) and str(Part(3, 8)) == "3/8"
    with pytest.raises(DataError, match="--engine: unknown engine 'spark'\n  fix: use local or ray"):
        BuildRun(engine="spark")  # type: ignore[arg-type]


def test_ray_is_an_extra(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r"--engine ray: Ray is not installed .*\n  fix: pip install"):
        build(stored_corpus(videos), tmp_path / "set", SMALL, BuildRun(engine="ray"))


def test_a_killed_builder_process_names_the_shard(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.build.engines, "preparer", lambda *_: die_at_once)
    with pytest.raises(DataError, match=r"^at or shortly after train-00000\d\.tar: a builder process died"):
        build(stored_corpus(videos), tmp_path / "set", SMALL, 2)


def test_a_source_replaced_under_its_name_is_read_again(videos: Path, tmp_path: Path) -> None:
    copies = tmp_path / "videos"
    shutil.copytree(videos, copies)
    corpus, out = stored_corpus(copies), tmp_path / "set"
    build_part(corpus, out, SMALL, Part(1, 1), HERE)
    changed = mp4(pictures(30, seed=40))
    (copies / "clip.0.mp4").write_bytes(changed)
    seen: list[BuildProgress] = []
    build(corpus, out, SMALL, on_progress=seen.append)
    assert seen[-1].before == 9, "three shards are as they were"
    assert {row.sample_id: row.frames for row in read_index(out).rows()}["clip.0.mp4"] == 30


def test_excluded_segments_are_listed_and_cost_no_budget(videos: Path, tmp_path: Path) -> None:
    corpus = stored_corpus(videos)
    out_of = [dataclasses.replace(item, id=f"x{n}", excluded="too_long") for n, item in enumerate(corpus.items[:5])]
    both = ListCorpus([*corpus.items[:2], *out_of, *corpus.items[2:]])
    manifest = build(both, tmp_path / "set", dataclasses.replace(SMALL, max_skipped_fraction=0.0))
    assert manifest.counts == {"samples": 12, "skipped": 0, "excluded/too_long": 5}
    assert [shard["samples"] for shard in manifest.shards] == [3, 3, 3, 3], "they take no place in a shard"
    lines = [json.loads(line) for line in (tmp_path / "set" / SKIPPED_NAME).read_text().splitlines()]
    assert {(line["id"], line["reason"]) for line in lines} == {(f"x{n}", "excluded/too_long") for n in range(5)}
    with pytest.raises(DataError, match="all 5 segments are excluded"):
        build(ListCorpus(out_of), tmp_path / "none", SMALL)
    with pytest.raises(DataError, match="different: segments"):  # another reason is another annotation
        build(ListCorpus([dataclasses.replace(s, excluded="") for s in both.items]), tmp_path / "set", SMALL)


def gone(number: int, folder: Path) -> list[Segment]:
    return [Segment("list", f"g{n}", "train", "text", VideoFile(folder / f"g{n}.mp4")) for n in range(number)]


def test_the_corpus_says_how_much_is_usually_missing(videos: Path, tmp_path: Path) -> None:
    class Rotting(ListCorpus):
        max_skipped_fraction = 0.4

    items = [*stored_corpus(videos).items, *gone(6, tmp_path)]
    assert build(Rotting(items), tmp_path / "set", SMALL).counts["skipped/missing_media"] == 6
    with pytest.raises(DataError, match=r"allowed: 5\.0%"):
        build(ListCorpus(items), tmp_path / "other", SMALL)
    with pytest.raises(DataError, match=r"allowed: 10\.0%"):
        build(Rotting(items), tmp_path / "other", dataclasses.replace(SMALL, max_skipped_fraction=0.1))


def test_a_build_that_must_fail_stops_early(videos: Path, tmp_path: Path) -> None:
    items = [*gone(40, tmp_path), *stored_corpus(videos).items]
    seen: list[BuildProgress] = []
    with pytest.raises(DataError, match="20 of 52 segments cannot be used"):
        build(ListCorpus(items), tmp_path / "set", SMALL, on_progress=seen.append)
    assert seen[-1].done == 20


@pytest.mark.parametrize("split", ["Train", "a-b", "", "1st"])
def test_names_of_splits(split: str, tmp_path: Path) -> None:
    items = [Segment("list", "a", split, "text", VideoFile(tmp_path / "a.mp4"), origin="list:1")]
    with pytest.raises(DataError, match=f"list:1: '{split}' is no name of a split\n  fix: use small letters"):
        build(ListCorpus(items), tmp_path / "set", SMALL)
    items = [dataclasses.replace(item, split="test_aligned2") for item in text_corpus(3).items]
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    assert build(ListCorpus(items), tmp_path / "set", BuildOptions(tokenizer=tokenizer)).splits == {"test_aligned2": 3}


@pytest.mark.parametrize("bos", ["<s>", None])
def test_tokens_of_video_texts(videos: Path, tmp_path: Path, bos: str | None) -> None:
    folder = save_tokenizer(tmp_path / "tokenizer", bos)
    tokenizer = load_tokenizer(folder)
    manifest = build(stored_corpus(videos), tmp_path / "set", dataclasses.replace(SMALL, tokenizer=folder))
    assert manifest.options["text_tokenizer"] == tokenizer_fingerprint(tokenizer)
    for row in read_index(tmp_path / "set").rows():
        assert row.tokens == len(tokenise([row.text], tokenizer)[0]) - (bos is not None)
    with pytest.raises(DataError, match="different: text_tokenizer"):
        build(stored_corpus(videos), tmp_path / "set", SMALL)


def test_a_limit_on_file_sizes_is_named(videos: Path, built: dict[str, bytes], tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
        with pytest.raises(DataError, match=r"a file may not grow so large \(ulimit -f\)"):
            build(stored_corpus(videos), tmp_path / "set", SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert not (tmp_path / "set").exists() and list(tmp_path.rglob("*.tar*")) == []
    build(stored_corpus(videos), tmp_path / "set", SMALL)
    assert content(tmp_path / "set") == built
