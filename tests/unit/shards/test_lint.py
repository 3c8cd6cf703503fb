"""shards.lint, shards.stats and shards.adopt on good, damaged and foreign shard sets."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from shards.adopt import adopt
from shards.build import BuildOptions, build
from shards.errors import DataError
from shards.index import fingerprint, read_index, rows_to_table, write_index
from shards.lint import lint
from shards.schema import IndexRow, Manifest
from shards.stats import stats
from shards.writer import TarWriter, add_video
from tests.unit.shards.making import mp4, pictures, save_tokenizer, text_corpus, video_corpus


@pytest.fixture(scope="module")
def video_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lint") / "set"
    build(video_corpus(tmp_path_factory.mktemp("videos"), 4), out, BuildOptions(samples_per_shard=2))
    return out


@pytest.fixture(scope="module")
def text_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lint_text") / "set"
    tokenizer = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    build(text_corpus(60), out, BuildOptions(tokenizer=tokenizer, tokens_per_member=300))
    return out


def copy(source: Path, target: Path) -> Path:
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def rewrite(folder: Path, rows: list[IndexRow], manifest: Manifest | None = None) -> None:
    """Write an index with other values as a careless program would: consistent with itself."""
    manifest = manifest or read_index(folder).manifest
    table = rows_to_table(rows)
    manifest.fingerprint = fingerprint(manifest.shards, table)
    write_index(folder, table, manifest)


def rules(folder: Path, **options: bool) -> set[str]:
    return {problem.rule for problem in lint(folder, **options).problems}  # type: ignore[arg-type]


def test_good_sets(video_set: Path, text_set: Path) -> None:
    report = lint(video_set)
    assert report.ok and (report.shards, report.samples, report.frames) == (2, 4, 43)
    assert lint(video_set, decode=False).frames == 0
    report = lint(text_set)
    assert report.ok and report.samples == 60 and report.tokens > 60
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_workers_find_the_same(video_set: Path, tmp_path: Path) -> None:
    folder = copy(video_set, tmp_path)
    row = read_index(folder).row(2)
    blob = bytearray((folder / row.shard).read_bytes())
    blob[row.offset + 700] ^= 255
    (folder / row.shard).write_bytes(blob)
    one, two = lint(folder), lint(folder, workers=2)
    assert one.problems == two.problems and {problem.key for problem in one.problems} == {"", row.key}


def test_index_rules(video_set: Path, tmp_path: Path) -> None:
    folder = copy(video_set, tmp_path)
    rows = list(read_index(folder).rows())
    cases = {
        "duplicate_id": {"sample_id": rows[1].sample_id},
        "empty_text": {"text": " "},
        "text_hash": {"text_hash": 5},
        "meta": {"signer": "somebody"},
        "decode": {"frames": 9},
        "size": {"width": 62},
        "splits": {"split": "dev"},
        "empty_sample": {"frames": 0},
    }
    for rule, change in cases.items():
        rewrite(folder, [dataclasses.replace(rows[0], **change), *rows[1:]])  # type: ignore[arg-type]
        assert rule in rules(folder), rule
    rewrite(folder, rows)
    assert rules(folder) == set()
    (folder / "extra.tar").write_bytes((folder / rows[0].shard).read_bytes())
    assert rules(folder) == {"unlisted_shard"}


def test_changed_index_is_noticed(video_set: Path, tmp_path: Path) -> None:
    folder = copy(video_set, tmp_path)
    shard_set = read_index(folder)
    rows = list(shard_set.rows())
    write_index(folder, rows_to_table([dataclasses.replace(rows[0], fps=24.0), *rows[1:]]), shard_set.manifest)
    assert "fingerprint" in rules(folder, decode=False)


def test_split_samples_and_duplicate_members(video_set: Path, tmp_path: Path) -> None:
    folder = copy(video_set, tmp_path)
    shard_set = read_index(folder)
    name = shard_set.manifest.shards[0]["name"]
    blobs = {row.key: (folder / name).read_bytes()[row.offset : row.offset + row.size] for row in shard_set.rows()}
    with tarfile.open(folder / name, "w") as tar:
        for member in ("a.mp4", "b.mp4", "a.json", "b.mp4"):
            info = tarfile.TarInfo(member)
            payload = next(iter(blobs.values()))
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    assert {"split_sample", "duplicate_member", "sha256"} <= rules(folder)


def test_damaged_documents(text_set: Path, tmp_path: Path) -> None:
    folder = copy(text_set, tmp_path)
    rows = list(read_index(folder).rows())
    rewrite(folder, [dataclasses.replace(rows[0], tokens=rows[0].tokens + 1), *rows[1:]])
    assert rules(folder) == {"documents"}


def test_missing_shard(video_set: Path, tmp_path: Path) -> None:
    folder = copy(video_set, tmp_path)
    (folder / "train-000001.tar").unlink()
    assert rules(folder) == {"missing_shard"}


def test_stats(video_set: Path, text_set: Path) -> None:
    figures = stats(video_set)
    assert figures["shards"] == 2 and figures["kind"] == "video"
    (group,) = figures["groups"]
    assert (group["samples"], group["frames"], group["signers"], group["distinct_texts"]) == (4, 43, 1, 4)
    assert group["length"]["max"] == 12 and group["vocabulary"] == 6
    assert stats(text_set)["groups"][0]["length"]["unit"] == "tokens"


def test_stats_counts_texts_shared_with_train(video_set: Path, tmp_path: Path) -> None:
    folder = copy(video_set, tmp_path)
    rows = list(read_index(folder).rows())
    leaked = dataclasses.replace(rows[3], split="test", text=rows[0].text, text_hash=rows[0].text_hash)
    manifest = read_index(folder).manifest
    manifest.splits = {"test": 1, "train": 3}
    rewrite(folder, [*rows[:3], leaked], manifest)
    assert stats(folder)["texts_shared_with_train"] == {"test": 1}


@pytest.mark.parametrize("kind", ["video", "text"])
def test_a_lost_index_is_written_again(video_set: Path, text_set: Path, tmp_path: Path, kind: str) -> None:
    source = video_set if kind == "video" else text_set
    folder = copy(source, tmp_path)
    before = (folder / "index.parquet").read_bytes()
    (folder / "index.parquet").unlink()
    assert adopt(folder).fingerprint == read_index(source).fingerprint
    assert read_index(folder).table.equals(read_index(source).table) and before
    (folder / "manifest.json").unlink()
    assert adopt(folder).fingerprint == read_index(source).fingerprint
    assert lint(folder).ok


def foreign_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, payload in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(payload), 1_700_000_000
            tar.addfile(info, io.BytesIO(payload))


def test_foreign_tars(tmp_path: Path) -> None:
    video = mp4(pictures(8))
    files = {
        "./a/x.mp4": video, "./a/x.json": b'{"caption": "regen", "split": "train"}',
        "./a/y.mp4": video, "./a/y.txt": b"sonne und wind\n", "./a/y.json": b"{}",
    }  # fmt: skip
    foreign_tar(tmp_path / "val-00.tar", files)
    seen: list[tuple[int, int]] = []
    manifest = adopt(tmp_path, "mine", lambda done, total: seen.append((done, total)))
    rows = list(read_index(tmp_path).rows())
    assert [(row.key, row.text, row.split, row.corpus, row.frames) for row in rows] == [
        ("./a/x", "regen", "train", "mine", 8),
        ("./a/y", "sonne und wind", "dev", "mine", 8),
    ]
    assert manifest.splits == {"dev": 1, "train": 1} and seen == [(1, 1)] and lint(tmp_path).ok


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.mp4": b"", "a.cls": b"1"}, r"t\.tar:a: members \['cls', 'mp4'\]: need one of"),
        ({"a.mp4": b"", "a.json": b"{"}, r"t\.tar:a: a\.json is no JSON object"),
        ({"a.mp4": b"", "a.json": b"{}"}, r"t\.tar:a: no text under \['text', 'caption'"),
        ({"a.npy": b"12", "a.json": b"{}"}, r"t\.tar:a: npy and json members do not describe documents"),
    ],
)
def test_foreign_tars_that_cannot_be_used(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    foreign_tar(tmp_path / "t.tar", files)
    with pytest.raises(DataError, match=message):
        adopt(tmp_path)


def test_adopt_refuses_empty_changed_and_mixed_folders(video_set: Path, text_set: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \*\.tar files"):
        adopt(tmp_path)
    folder = copy(video_set, tmp_path)
    good = (folder / "train-000000.tar").read_bytes()
    blob = bytearray(good)
    blob[-1] = 0
    blob[600] ^= 1
    (folder / "train-000000.tar").write_bytes(blob)
    with pytest.raises(DataError, match=r"train-000000\.tar: not the bytes its manifest was written for"):
        adopt(folder)
    (folder / "train-000000.tar").write_bytes(good)
    (folder / "manifest.json").unlink()
    (folder / "train-000009.tar").write_bytes((text_set / "train-000000.tar").read_bytes())
    with pytest.raises(DataError, match="video and text shards are mixed"):
        adopt(folder)


def test_an_npy_that_is_no_array(text_set: Path, tmp_path: Path) -> None:
    folder = copy(text_set, tmp_path)
    shard_set = read_index(folder)
    rows = list(shard_set.rows())
    path = folder / rows[0].shard
    blob = bytearray(path.read_bytes())
    start = blob.index(b"\x93NUMPY")
    blob[start : start + 6] = b"broken"
    path.write_bytes(blob)
    assert {"npy", "sha256"} <= rules(folder)
    assert np.load(io.BytesIO(b"\x93NUMPY" + bytes(blob[start + 6 : start + 400_000])), allow_pickle=False).ndim == 1


def test_a_json_member_that_is_no_json(video_set: Path, tmp_path: Path) -> None:
    folder = copy(video_set, tmp_path)
    rows = list(read_index(folder).rows())
    bad = dataclasses.replace(rows[0], meta_size=rows[0].meta_size - 1, meta_crc32=0)
    payload = (folder / rows[0].shard).read_bytes()[bad.meta_offset : bad.meta_offset + bad.meta_size]
    import zlib

    rewrite(folder, [dataclasses.replace(bad, meta_crc32=zlib.crc32(payload)), *rows[1:]])
    assert "meta" in rules(folder)


def test_writer_parts_are_usable_alone(tmp_path: Path) -> None:
    from shards.video import probe

    payload = mp4(pictures(5))
    segment = video_corpus(tmp_path / "v", 1).items[0]
    with TarWriter(tmp_path / "train-000000.tar") as tar:
        row = add_video(tar, segment, payload, probe(payload))
    assert (tmp_path / "train-000000.tar").read_bytes()[row.offset : row.offset + row.size] == payload
    assert tar.path.stat().st_size == tar.size
