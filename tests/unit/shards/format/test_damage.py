"""Damaged shards, on a set of our builder and on foreign tars: every damage named, every run goes on or stops alike."""

from __future__ import annotations

import itertools
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds

from shards.build.build import BuildOptions, build
from shards.errors import DataError
from shards.exchange.adopt import adopt
from shards.format.index import read_index
from shards.format.tar import index_tar
from shards.format.verify import verify
from shards.inspect.lint import lint
from shards.inspect.lint_shard import LintOptions
from shards.load.loader import LoaderOptions, StepLoader
from shards.load.reader import Reader
from shards.order.items import Elements
from shards.order.plan import Plan, PlanOptions, Source
from tests.unit.shards.damages import DAMAGES, broken_stsz, damage
from tests.unit.shards.making import mp4, pictures, video_corpus
from tests.unit.shards.shard_sets import write_videos

SAMPLES, PER_SHARD, VICTIM = 12, 4, "train-000001.tar"

# damage -> rule of index_tar ("" = a tar alone cannot show it), rules of verify, samples 4..7 that reading must name
EXPECTED: dict[str, tuple[str, set[str], set[int]]] = {
    "cut_inside_a_member": ("truncated", {"truncated", "size", "sha256", "crc32"}, {6, 7}),
    "cut_on_a_member_boundary": ("truncated", {"truncated", "size", "sha256", "crc32"}, {6, 7}),
    "bad_header": ("bad_header", {"bad_header", "sha256"}, set()),
    "hole_on_a_header": ("zero_hole", {"zero_hole", "sha256", "crc32"}, {5}),
    "payload_byte": ("", {"sha256", "crc32"}, {4}),
    "meta_byte": ("", {"sha256", "crc32"}, {4}),
    "missing": ("cannot read the shard", {"missing_shard"}, {4, 5, 6, 7}),
    "swapped": ("", {"sha256", "crc32"}, {4, 5, 6, 7, 8, 9, 10, 11}),
    "emptied": ("truncated", {"truncated", "size", "sha256", "crc32"}, {4, 5, 6, 7}),
    "only_zeros": ("", {"size", "sha256", "crc32"}, {4, 5, 6, 7}),
}


def fetch_clip(reader: Reader, item: Elements) -> list[tuple[int, bytes, dict[str, Any]]]:
    return [(sample, reader.payload(sample), reader.meta(sample)) for sample in item["sample"].tolist()]


def fetch_frames(reader: Reader, item: Elements) -> list[tuple[int, Any]]:
    return [(sample, reader.frames(sample).shape) for sample in item["sample"].tolist()]


def collate(items: list[list[Any]]) -> dict[str, Any]:
    return {"items": items}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of four samples by our builder."""
    out = tmp_path_factory.mktemp("built") / "set"
    build(video_corpus(tmp_path_factory.mktemp("videos"), SAMPLES), out, BuildOptions(samples_per_shard=PER_SHARD))
    return out


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by plain webdataset, adopted."""
    out = tmp_path_factory.mktemp("foreign") / "set"
    out.mkdir()
    for shard in range(SAMPLES // PER_SHARD):
        with wds.TarWriter(str(out / f"train-{shard:06d}.tar")) as tar:
            for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                clip = mp4(pictures(10 + number % 3, seed=number))
                tar.write({"__key__": f"clip{number:04d}", "mp4": clip, "json": {"text": f"satz {number}"}})
    adopt(out)
    return out


@pytest.fixture(params=["built", "foreign"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A fresh copy of either set."""
    return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "set"))


def plan_of(folder: Path) -> Plan:
    return Plan([Source(read_index(folder))], PlanOptions("clip", seed=1))


def affected(folder: Path, name: str) -> set[int]:
    """Of the samples in the hole of 4 KiB there may be more than the first, for the clips are small."""
    expected = EXPECTED[name][2]
    return expected | {6, 7} if name == "hole_on_a_header" else expected


@pytest.mark.parametrize("name", sorted(DAMAGES))
def test_every_tool_names_the_damage(folder: Path, name: str) -> None:
    keys = {number: read_index(folder).row(number).key for number in range(SAMPLES)}
    damage(name, folder / VICTIM)
    rule, rules, samples = EXPECTED[name]
    if rule:
        with pytest.raises(DataError, match=rule) as caught:
            index_tar(folder / VICTIM)
        assert VICTIM in caught.value.where and caught.value.fix
    problems = verify(folder)
    assert {problem.rule for problem in problems} >= rules
    named = {problem.key for problem in problems if problem.key}
    if name != "missing":  # there the shard says it all
        assert {keys[sample] for sample in samples} <= named <= {keys[sample] for sample in affected(folder, name)}
    assert {problem.shard for problem in problems} >= {VICTIM}
    linted = {(problem.shard, problem.rule) for problem in lint(folder, LintOptions(decode=False)).problems}
    assert {(problem.shard, problem.rule) for problem in problems} <= linted
    with pytest.raises(DataError, match=f"{VICTIM} is missing" if name == "missing" else VICTIM):
        adopt(folder)


@pytest.mark.parametrize("name", sorted(DAMAGES))
def test_training_goes_on_alike_on_every_rank(folder: Path, name: str) -> None:
    """The same substitutes in worlds of 1 and 3 ranks; what is delivered is what was built."""
    clean = Reader(plan_of(folder))
    payloads = {number: clean.payload(number) for number in range(SAMPLES)}
    clean.close()
    damage(name, folder / VICTIM)
    found = []
    for world in (1, 3):
        ranks = [StepLoader(plan_of(folder), fetch_clip, collate, LoaderOptions(r, world, 6, 1)) for r in range(world)]
        steps = list(islice(zip(*ranks, strict=True), 6))
        assert {len(part.micro_batches) for parts in steps for part in parts} == {6 // world}
        items = [
            [part.micro_batches[slot]["items"][0][0] for slot in range(6 // world) for part in parts] for parts in steps
        ]
        bad = {b.sample: b for parts in steps for part in parts for b in part.skipped}
        assert EXPECTED[name][2] <= set(bad) <= affected(folder, name)
        assert all(one.shard and one.key and one.reason and one.substitute >= 0 for one in bad.values())
        assert all(payload == payloads[sample] for step in items for sample, payload, _ in step)
        assert not {sample for step in items for sample, _, _ in step} & set(bad)
        found.append(([[sample for sample, _, _ in step] for step in items], {s: b.substitute for s, b in bad.items()}))
    assert found[0] == found[1]


def test_ranks_count_what_they_replaced(folder: Path) -> None:
    """The run's budget is the trainer's to keep, over all ranks; every rank has the count it needs for that."""
    damage("missing", folder / VICTIM)
    ranks = [StepLoader(plan_of(folder), fetch_clip, collate, LoaderOptions(r, 3, 12, 1)) for r in range(3)]
    for loader in ranks:
        next(iter(loader))
    assert sorted(sample for loader in ranks for sample in loader.bad_samples) == [4, 5, 6, 7]


# -- damage behind a right checksum ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["broken_stsz", "cut"])
def test_a_broken_video_with_a_right_checksum_is_found_by_decoding(tmp_path: Path, name: str) -> None:
    """Packed broken: no checksum can tell, the decoder and the frame count of the index do."""
    clips = [mp4(pictures(10, seed=number)) for number in range(6)]
    clips[2] = broken_stsz(clips[2]) if name == "broken_stsz" else clips[2][: len(clips[2]) * 2 // 3]
    folder = write_videos(tmp_path / "set", clips, [10] * 6, per_shard=3)
    assert verify(folder) == []
    (problem,) = [p for p in lint(folder).problems if p.rule == "decode"]
    assert (problem.shard, problem.key) == ("train-000000.tar", "clip0002")
    loader = StepLoader(plan_of(folder), fetch_frames, collate, LoaderOptions(0, 1, 6, 1))
    (step,) = islice(loader, 1)
    (bad,) = step.skipped
    assert bad.sample == 2 and bad.key == "clip0002"
    assert len(step.micro_batches) == 6 and all(m["items"][0][0][1] == (10, 48, 64, 3) for m in step.micro_batches)


# -- shards that change under a reader ---------------------------------------------------------------------------------
def other_tar(path: Path) -> bytes:
    """The bytes of another shard, for a file that takes the place of this one."""
    return next(p for p in sorted(path.parent.glob("*.tar")) if p != path).read_bytes()


def test_a_shard_replaced_by_rename_is_noticed_or_still_the_old_one(folder: Path) -> None:
    """An open file keeps its inode: right bytes, or a checksum error after it was opened again; never wrong bytes."""
    plan = plan_of(folder)
    reader = Reader(plan)
    before = {sample: reader.payload(sample) for sample in range(SAMPLES)}
    fresh = folder / "fresh"
    fresh.write_bytes(other_tar(folder / VICTIM))
    fresh.rename(folder / VICTIM)
    for sample in range(SAMPLES):
        try:
            assert reader.payload(sample) == before[sample]
        except DataError as error:
            assert VICTIM in error.where
    reader.close()
    for sample in range(PER_SHARD, 2 * PER_SHARD):
        with pytest.raises(DataError, match=r"do not match the CRC-32|truncated"):
            Reader(plan).payload(sample)


@pytest.mark.parametrize("size", [0, 700])
def test_a_shard_cut_short_under_an_open_reader_is_an_error(folder: Path, size: int) -> None:
    """Must not end the process either, as reading past the end of a mapped file would (SIGBUS)."""
    reader = Reader(plan_of(folder))
    assert all(reader.payload(sample) for sample in range(SAMPLES))
    with (folder / VICTIM).open("r+b") as handle:
        handle.truncate(size)
    for sample in range(PER_SHARD, 2 * PER_SHARD):
        with pytest.raises(DataError, match=VICTIM):
            reader.payload(sample)
    assert all(reader.payload(sample) for sample in range(PER_SHARD))


def test_a_shard_overwritten_under_an_open_reader_is_an_error(folder: Path) -> None:
    reader = Reader(plan_of(folder))
    assert all(reader.payload(sample) for sample in range(SAMPLES))
    size = (folder / VICTIM).stat().st_size
    (folder / VICTIM).write_bytes(other_tar(folder / VICTIM).ljust(size, b"\0")[:size])
    for sample in range(PER_SHARD, 2 * PER_SHARD):
        with pytest.raises(DataError, match="do not match the CRC-32"):
            reader.payload(sample)


def test_what_plain_webdataset_does_with_the_same_tars(built: Path, tmp_path: Path) -> None:
    """Why the index exists: two of the damages make samples vanish there without an error."""
    for name in ("bad_header", "hole_on_a_header"):
        copy = Path(shutil.copytree(built, tmp_path / name))
        damage(name, copy / VICTIM)
        urls = sorted(str(path) for path in copy.glob("*.tar"))
        pipeline = wds.WebDataset(urls, shardshuffle=False, handler=wds.reraise_exception)
        delivered = sum("mp4" in sample and "json" in sample for sample in itertools.islice(pipeline, 2 * SAMPLES))
        assert delivered < SAMPLES
