"""shards.inspect.lint and shards.exchange.adopt on good, damaged and foreign shard sets."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from shards.build.build import BuildOptions, build
from shards.errors import DataError
from shards.exchange.adopt import adopt
from shards.format.index import fingerprint, read_index, rows_to_table, write_index
from shards.format.writer import TarWriter, add_video
from shards.inspect.lint import RULES, lint
from shards.inspect.lint_shard import LintOptions
from shards.media.video import probe
from shards.schema import IndexRow, Manifest, Segment, text_hash
from shards.storage.store import open_folder
from tests.unit.shards.making import ListCorpus, mp4, pictures, save_tokenizer, text_corpus, video_corpus
from tests.unit.shards.shard_sets import write_texts, write_videos


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


def rules(folder: Path | str, options: LintOptions | None = None) -> set[str]:
    return {problem.rule for problem in lint(folder, options).problems}


def test_good_sets(video_set: Path, text_set: Path) -> None:
    report = lint(video_set)
    assert report.ok and (report.shards, report.samples, report.frames) == (2, 4, 43)
    assert lint(video_set, LintOptions(decode=False)).frames == 0
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
        rewrite(folder, [rows[0]._replace(**change), *rows[1:]])  # type: ignore[arg-type]
        assert rule in rules(folder), rule
    rewrite(folder, rows)
    assert rules(folder) == set()
    (folder / "extra.tar").write_bytes((folder / rows[0].shard).read_bytes())
    assert rules(folder) == {"unlisted_shard"}


def test_annotation_rules(video_set: Path, tmp_path: Path) -> None:
    folder = copy(video_set, tmp_path)
    rows = list(read_index(folder).rows())
    cases = {
        "few_frames": {"frames": 3},
        "text_too_long": {"duration_seconds": 0.1},
        "text_too_short": {"duration_seconds": 100.0},
        "wrong_script": {"language": "zh"},
        "line_break": {"text": "satz\nnummer"},
    }
    for rule, change in cases.items():
        rewrite(folder, [rows[0]._replace(**change), *rows[1:]])  # type: ignore[arg-type]
        report = lint(folder, LintOptions(decode=False))
        assert rule in report.by_rule() and report.warnings >= 1, rule
        assert RULES[rule].severity == "warning"


def test_duplicates_and_contamination(video_set: Path, tmp_path: Path) -> None:
    folder = copy(video_set, tmp_path)
    manifest = read_index(folder).manifest
    rows = list(read_index(folder).rows())
    again = {name: getattr(rows[0], name) for name in ("offset", "size", "crc32", "text", "text_hash")}
    manifest.splits = {"dev": 1, "train": 3}
    rewrite(folder, [rows[0], rows[1]._replace(**again), *rows[2:3], rows[3]], manifest)
    found = lint(folder, LintOptions(decode=False)).by_rule()
    assert [(p.key, p.detail) for p in found["duplicate_video"]] == [
        (rows[1].key, f"same bytes as {rows[0].shard}:{rows[0].key}")
    ]
    rewrite(folder, [rows[0], rows[1]._replace(split="dev", **again), *rows[2:]], manifest)
    found = lint(folder, LintOptions(decode=False)).by_rule()
    assert found["video_in_two_splits"][0].detail.endswith(" of train")
    assert [p.detail for p in found["text_in_train"]] == ["dev: 'satz nummer 0'"]


def test_a_video_in_which_nothing_moves(tmp_path: Path) -> None:
    still = np.repeat(pictures(1), 6, axis=0)
    payloads = [mp4(still), mp4(np.zeros((6, 48, 64, 3), np.uint8)), mp4(pictures(6))]
    rows = []
    with TarWriter(tmp_path / "train-000000.tar") as tar:
        for number, payload in enumerate(payloads):
            segment = Segment("made", f"s{number}", "train", f"satz {number}", language="de")
            rows.append(add_video(tar, segment, payload, probe(payload)))
    shards = [{"name": tar.path.name, "samples": 3, "size": tar.size, "sha256": tar.digest.hexdigest()}]
    rewrite(tmp_path, rows, Manifest("video", shards=shards, splits={"train": 3}))
    details = {problem.key: problem.detail for problem in lint(tmp_path).by_rule()["still_video"]}
    assert details == {"s0": "first, middle and last frame are the same", "s1": "every picture is of one colour"}


def test_token_ids_against_a_tokenizer(text_set: Path, tmp_path: Path) -> None:
    same = save_tokenizer(tmp_path / "same")
    folder = copy(text_set, tmp_path)
    assert lint(folder, LintOptions(tokenizer=same)).problems == []
    other = save_tokenizer(tmp_path / "other", bos=None)
    assert rules(folder, LintOptions(tokenizer=other)) == {"tokenizer"}
    shard_set = read_index(folder)
    rows = list(shard_set.rows())
    changed = rows[0]._replace(text="sonne", text_hash=text_hash("sonne"))
    rewrite(folder, [changed, *rows[1:]])
    (problem,) = lint(folder, LintOptions(tokenizer=same)).problems
    assert problem.rule == "tokens" and problem.detail.startswith("d:0: ") and "'sonne'" in problem.detail


def test_control_tokens_that_a_text_spells(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    rows = ["the rain </s> <s>", "the rain [MASK]", "the rain <b>"]
    corpus = ListCorpus([Segment("docs", f"d:{n}", "train", text) for n, text in enumerate(rows)], "docs")
    build(corpus, tmp_path / "set", BuildOptions(tokenizer=tokenizer), 1)
    found = lint(tmp_path / "set", LintOptions(tokenizer=tokenizer)).by_rule()
    assert [problem.detail.partition(" in ")[0] for problem in found["control_token"]] == [
        "d:0: '</s>', '<s>'",
        "d:1: '[MASK]'",
    ]
    assert set(found) == {"control_token", "markup"}


def test_token_ids_out_of_range(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    folder = write_texts(tmp_path / "set", [np.asarray([2, 3, 9000, 1], "<u2")])
    assert rules(folder, LintOptions(tokenizer=tokenizer)) == {"token_range"}
    assert rules(folder) == set()


def test_features(tmp_path: Path) -> None:
    values = np.ones((4, 8), "<f2")
    bad = values.copy()
    bad[2, 1] = np.nan
    folder = write_videos(tmp_path / "set", [values.tobytes(), bad.tobytes(), b"12"], [4, 4, 4])
    shard_set = read_index(folder)
    shard_set.manifest.kind = "features"
    rewrite(folder, [row._replace(width=8) for row in shard_set.rows()], shard_set.manifest)
    found = lint(folder).by_rule()
    assert [p.detail for p in found["features"]] == ["NaN or infinite values", "2 bytes are not 4 rows of 8 float16"]


def test_object_stores(video_set: Path) -> None:
    address = f"memory://lint-{video_set.parent.name}"
    remote = open_folder(address)
    with pytest.raises(DataError, match=r"no manifest\.json: not a shard set"):
        lint(address)
    for path in video_set.iterdir():
        remote.upload(path, path.name)
    report = lint(address)
    assert report.problems == [] and (report.shards, report.frames) == (2, 43)
    remote.delete("train-000001.tar")
    assert rules(address) == {"missing_shard"}


def test_reports(video_set: Path, tmp_path: Path) -> None:
    folder = copy(video_set, tmp_path)
    rows = list(read_index(folder).rows())
    rewrite(folder, [rows[0]._replace(text_hash=5), rows[1]._replace(language="ja"), *rows[2:]])
    report = lint(folder, LintOptions(decode=False))
    values = report.to_dict()
    assert (values["errors"], values["warnings"], values["ok"]) == (report.errors, report.warnings, False)
    assert list(values["rules"]) == ["meta", "text_hash", "wrong_script"]
    lines = report.to_csv().splitlines()
    assert lines[0] == "severity,rule,shard,key,detail" and len(lines) == 1 + len(report.problems)
    assert any(line.startswith(f"warning,wrong_script,{rows[1].shard},{rows[1].key},") for line in lines)


def test_a_shard_that_cannot_be_read(video_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        raise DataError("cannot read the shard (Permission denied)", where=str(path))

    monkeypatch.setattr("shards.format.verify.index_tar", denied)
    report = lint(copy(video_set, tmp_path), LintOptions(decode=False))
    assert not report.ok and list(report.by_rule()) == ["cannot read the shard (Permission denied)"]
    assert "error,cannot read the shard (Permission denied)" in report.to_csv()


def test_options_are_checked() -> None:
    with pytest.raises(DataError, match="lint options: min_frames -1, characters per second"):
        LintOptions(min_frames=-1)


def test_changed_index_is_noticed(video_set: Path, tmp_path: Path) -> None:
    folder = copy(video_set, tmp_path)
    shard_set = read_index(folder)
    rows = list(shard_set.rows())
    write_index(folder, rows_to_table([rows[0]._replace(fps=24.0), *rows[1:]]), shard_set.manifest)
    assert "fingerprint" in rules(folder, LintOptions(decode=False))


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
    rewrite(folder, [rows[0]._replace(tokens=rows[0].tokens + 1), *rows[1:]])
    assert rules(folder) == {"documents"}


def test_missing_shard(video_set: Path, tmp_path: Path) -> None:
    folder = copy(video_set, tmp_path)
    (folder / "train-000001.tar").unlink()
    assert rules(folder) == {"missing_shard"}


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


@pytest.mark.parametrize(
    ("said", "adopted", "wrong"),
    [(b'""   ', False, True), (b'""   ', True, False), (b'"dgs"', False, True), (b'"dgs"', True, True)],
)
def test_only_in_tars_made_elsewhere_a_json_may_say_less_than_the_index(
    said: bytes, adopted: bool, wrong: bool, video_set: Path, tmp_path: Path
) -> None:
    folder = copy(video_set, tmp_path)
    shard_set = read_index(folder)
    first, *others = shard_set.rows()
    blob = (folder / first.shard).read_bytes()
    meta = slice(first.meta_offset, first.meta_offset + first.meta_size)
    assert blob[meta].count(b'"gsg"') == 1
    changed = blob[meta].replace(b'"gsg"', said)
    (folder / first.shard).write_bytes(blob[: meta.start] + changed + blob[meta.stop :])
    shard_set.manifest.options["adopted"] = adopted
    rewrite(folder, [first._replace(meta_crc32=zlib.crc32(changed)), *others], shard_set.manifest)
    assert ("meta" in rules(folder)) is wrong


def test_a_json_member_that_is_no_json(video_set: Path, tmp_path: Path) -> None:
    folder = copy(video_set, tmp_path)
    rows = list(read_index(folder).rows())
    bad = rows[0]._replace(meta_size=rows[0].meta_size - 1, meta_crc32=0)
    payload = (folder / rows[0].shard).read_bytes()[bad.meta_offset : bad.meta_offset + bad.meta_size]
    rewrite(folder, [bad._replace(meta_crc32=zlib.crc32(payload)), *rows[1:]])
    assert "meta" in rules(folder)


def test_writer_parts_are_usable_alone(tmp_path: Path) -> None:
    payload = mp4(pictures(5))
    segment = video_corpus(tmp_path / "v", 1).items[0]
    with TarWriter(tmp_path / "train-000000.tar") as tar:
        row = add_video(tar, segment, payload, probe(payload))
    assert (tmp_path / "train-000000.tar").read_bytes()[row.offset : row.offset + row.size] == payload
    assert tar.path.stat().st_size == tar.size
