"""shards.exchange.convert on stores written as other projects write them, and on damaged ones."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from shards.build.build import BuildOptions
from shards.errors import DataError
from shards.exchange.convert import ConvertOptions, convert
from shards.exchange.lmdb import read_lmdb
from shards.exchange.mds import read_mds
from shards.format.index import read_index
from shards.inspect.lint import lint
from shards.schema import IndexRow
from tests.unit.shards.making import mp4, pictures

FORM = BuildOptions()


def jpegs(frames: int, seed: int = 0) -> list[bytes]:
    encoded = []
    for picture in pictures(frames, seed=seed):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


def run(source: Path, kind: Any, out: Path, **options: Any) -> list[IndexRow]:
    convert(ConvertOptions(source, kind, "mine", **options), out, FORM)
    assert lint(out).errors == 0
    assert not list(out.parent.glob(".*"))  # nothing extracted stays behind
    return list(read_index(out).rows())


# -- WebDataset ------------------------------------------------------------------------------------------------------
def tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, payload in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return path


def test_tars_of_videos_and_frames(tmp_path: Path) -> None:
    frames = jpegs(12)
    files = {"a.mp4": mp4(pictures(8)), "a.json": b'{"caption": "regen", "signer": 7, "tags": ["x"]}', "a.txt": b"no"}
    files |= {f"b.{number}.jpg": frame for number, frame in enumerate(frames)} | {"b.txt": b"sonne\n"}
    (tmp_path / "in").mkdir()
    tar(tmp_path / "in" / "val-0.tar", files)
    first, second = run(tmp_path / "in", "wds", tmp_path / "set", defaults={"language": "de"}, fps=12.5)
    assert (first.sample_id, first.text, first.signer, first.split, first.frames) == ("a", "regen", "7", "dev", 8)
    assert (second.sample_id, second.text, second.language, second.corpus) == ("b", "sonne", "de", "mine")
    assert second.duration_seconds == pytest.approx(12 / 12.5)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.cls": b"1"}, r"t\.tar:a: members \['cls'\]: no video and no images"),
        ({"a.mp4": b"", "a.json": b"{"}, r"t\.tar:a: the json member cannot be parsed"),
        ({"a.mp4": b"", "a.json": b"[]"}, r"t\.tar:a: the json member holds list, not an object"),
        ({}, "no samples"),
    ],
)
def test_tars_that_cannot_be_converted(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(tar(tmp_path / "t.tar", files), "wds", tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["t.tar"]


# -- LMDB ------------------------------------------------------------------------------------------------------------
def database(path: Path, values: dict[str, bytes]) -> Path:
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=1 << 24) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key.encode("utf-8", "surrogateescape"), value)
    return path


def annotations(path: Path) -> Path:
    lines = ["name|translation|speaker", "clip_a|regen|s1", "clip_b|sonne|s2", "other|wind|s3"]
    path.write_text("\n".join(lines) + "\n")
    return path


TABLE = {"id": "name", "text": "translation", "signer": "speaker"}


def test_frames_by_split_name_and_number(tmp_path: Path) -> None:
    values = {f"dev/clip_a/{number:06d}": frame for number, frame in enumerate(jpegs(11))}
    values |= {f"train/clip_b/images{number}.jpg": frame for number, frame in enumerate(jpegs(12, seed=1), 1)}
    source = database(tmp_path / "in", {**values, "__len__": b"2"})
    table = annotations(tmp_path / "texts.psv")
    rows = {row.sample_id: row for row in run(source, "lmdb", tmp_path / "set", table=table, columns=TABLE)}
    assert {name: (row.split, row.text, row.signer, row.frames) for name, row in rows.items()} == {
        "clip_a": ("dev", "regen", "s1", 11), "clip_b": ("train", "sonne", "s2", 12)
    }  # fmt: skip


def test_a_database_per_video(tmp_path: Path) -> None:
    for name in ("clip_a", "clip_b"):
        values = {str(number): frame for number, frame in enumerate(jpegs(11))}
        database(tmp_path / "in" / "train" / name, {**values, "details": pickle.dumps({"num_frames": 11})})
    rows = run(tmp_path / "in", "lmdb", tmp_path / "set", table=annotations(tmp_path / "t.psv"), columns=TABLE)
    assert [(row.sample_id, row.frames) for row in rows] == [("clip_a", 11), ("clip_b", 11)]


def test_values_that_hold_whole_videos(tmp_path: Path) -> None:
    arrays = [np.frombuffer(frame, np.uint8) for frame in jpegs(5)]
    values = {
        "pictures": pickle.dumps(pictures(6)),
        "encoded": pickle.dumps(jpegs(7)),
        "old": pickle.dumps(jpegs(4), protocol=2),
        "buffers": pickle.dumps(arrays),
        "raw": pickle.dumps(list(pictures(8))),
        "file": mp4(pictures(9)),
    }
    source = database(tmp_path / "in", values)
    (tmp_path / "t.tsv").write_text("id\ttext\n" + "".join(f"{name}\ttext {name}\n" for name in values))
    found = {row.sample_id: row.frames for row in run(source, "lmdb", tmp_path / "set", table=tmp_path / "t.tsv")}
    assert found == {"pictures": 6, "encoded": 7, "old": 4, "buffers": 5, "raw": 8, "file": 9}


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("owned",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": pickle.dumps(Evil())}, r"in:a: the pickle is refused or damaged \(UnpicklingError: it wants to load"),
        ({"a": b"\x80\x04broken"}, "the pickle is refused or damaged"),
        ({"a": pickle.dumps({"x": 1})}, "a pickled dict that holds no images"),
        ({"a": b"text"}, "the value of 'a' is no image, video or list of images"),
        ({"a/1": jpegs(1)[0], "a/2": b"x"}, "the value of 'a/2' is no image"),
        ({"\udcff": b"x"}, r"the key b'\\xff' is no text"),
    ],
)
def test_databases_that_cannot_be_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, bytes], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        run(database(tmp_path / "in", values), "lmdb", tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_damaged_or_missing_databases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no LMDB database here"):
        list(read_lmdb(tmp_path))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "data.mdb").write_bytes(b"nothing" * 2000)
    with pytest.raises(DataError, match="damaged LMDB database"):
        run(tmp_path / "in", "lmdb", tmp_path / "set")
    monkeypatch.setitem(__import__("sys").modules, "lmdb", None)
    with pytest.raises(DataError, match=r"needs the package lmdb\n  fix: pip install 'llava-slt\[lmdb\]'"):
        run(tmp_path / "in", "lmdb", tmp_path / "set")


# -- MDS -------------------------------------------------------------------------------------------------------------
COLUMNS = [("caption", "str", None), ("score", "float32", 4), ("video", "bytes", None), ("who", "json", None)]


def mds(folder: Path, samples: list[tuple[str, bytes]], compression: str | None = None, /, **changes: Any) -> Path:
    """An MDS folder with one shard, written from the description of the format."""
    bodies = []
    for caption, video in samples:
        values = [caption.encode(), np.float32(0.5).tobytes(), video, b'{"name": "anna"}']
        sizes = [len(value) for value, (_, _, fixed) in zip(values, COLUMNS, strict=True) if fixed is None]
        bodies.append(np.asarray(sizes, "<u4").tobytes() + b"".join(values))
    settings = json.dumps({"format": "mds"}).encode()
    offsets = np.cumsum([0, *map(len, bodies)]) + 4 + 4 * (len(bodies) + 1) + len(settings)
    data = np.uint32(len(bodies)).tobytes() + offsets.astype("<u4").tobytes() + settings + b"".join(bodies)
    names, encodings, sizes_ = zip(*COLUMNS, strict=True)
    info = {
        "format": "mds", "samples": len(samples), "column_names": names, "column_encodings": encodings,
        "column_sizes": sizes_, "compression": compression, "hashes": [],
        "raw_data": {"basename": "shard.00000.mds", "bytes": len(data), "hashes": {}}, "zip_data": None,
    }  # fmt: skip
    folder.mkdir()
    if compression:
        packed = gzip.compress(data) if compression == "gz" else pa.compress(data, compression[:4], asbytes=True)
        info["zip_data"] = {"basename": "shard.00000.mds.zip", "bytes": len(packed), "hashes": {}}
        (folder / "shard.00000.mds.zip").write_bytes(packed)
    else:
        (folder / "shard.00000.mds").write_bytes(data)
    (folder / "index.json").write_text(json.dumps({"version": 2, "shards": [info | changes]}))
    return folder


@pytest.mark.parametrize("compression", [None, "zstd:7", "gz"])
def test_mds(tmp_path: Path, compression: str | None) -> None:
    samples = [("regen", mp4(pictures(8))), ("sonne und wind", mp4(pictures(9)))]
    rows = run(mds(tmp_path / "in", samples, compression), "mds", tmp_path / "set", columns={"gloss": "score"})
    assert [(row.text, row.frames, row.gloss, row.split) for row in rows] == [
        ("regen", 8, "0.5", "train"), ("sonne und wind", 9, "0.5", "train")
    ]  # fmt: skip
    assert rows[0].sample_id == "shard.00000.mds-0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "csv"}, "the format is 'csv', expected mds"),
        ({"samples": 7}, r"malformed MDS shard \(ValueError: 1 samples, the index says 7\)"),
        ({"column_sizes": [None, None, None, None]}, "malformed MDS shard"),
        ({"raw_data": {"basename": "../../etc/passwd", "bytes": 1}}, r"raw_data\.basename is '\.\./\.\./etc/passwd'"),
        ({"raw_data": {"basename": "gone.mds", "bytes": 1}}, "the MDS shard is missing"),
        ({"raw_data": {"basename": "shard.00000.mds", "bytes": 1}}, "bytes, the index says 1"),
        ({"column_names": ["a", "b", "c"]}, "malformed MDS shard"),
        ({"column_encodings": ["str", "float32", "pkl", "json"]}, "0 of its columns .* hold a video, expected one"),
        ({"raw_data": {}}, r"the file name raw_data\.basename is None"),
    ],
)
def test_mds_that_cannot_be_converted(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    source = mds(tmp_path / "in", [("regen", mp4(pictures(3)))], **changes)
    with pytest.raises(DataError, match=message):
        run(source, "mds", tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_cut_mds_sample(tmp_path: Path) -> None:
    source = mds(tmp_path / "in", [("regen", b"video")])
    shard = source / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    first = int(np.frombuffer(data, "<u4", 1, offset=4)[0])
    data[first : first + 4] = np.uint32(1 << 20).tobytes()
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"column caption of sample shard\.00000\.mds:0 is cut off"):
        list(read_mds(source))


def test_damaged_mds(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no index\.json: not an MDS folder"):
        run(tmp_path, "mds", tmp_path / "set")
    source = mds(tmp_path / "in", [("regen", mp4(pictures(3)))])
    shard = source / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[8:12] = b"\xff\xff\xff\x7f"
    shard.write_bytes(data)
    with pytest.raises(DataError, match="sample offsets reach past the end"):
        run(source, "mds", tmp_path / "set")
    shard.unlink()
    shard.mkdir()
    with pytest.raises(DataError, match="the MDS shard is missing"):
        run(source, "mds", tmp_path / "set")
    unknown = mds(tmp_path / "b", [("x", b"")], "gz", compression="lzma")
    with pytest.raises(DataError, match="unknown compression 'lzma'"):
        run(unknown, "mds", tmp_path / "set")
    (unknown / "shard.00000.mds.zip").unlink()
    with pytest.raises(DataError, match="cannot read the MDS shard"):
        run(unknown, "mds", tmp_path / "set")
    (source / "index.json").write_text("[]")
    with pytest.raises(DataError, match="unreadable MDS index"):
        run(source, "mds", tmp_path / "set")


# -- options ---------------------------------------------------------------------------------------------------------
def test_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown format 'zip'"):
        ConvertOptions(tmp_path, "zip", "x")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="unknown field 'words'"):
        ConvertOptions(tmp_path, "wds", "x", columns={"words": "a"})
    with pytest.raises(DataError, match="0 frames per second"):
        ConvertOptions(tmp_path, "wds", "x", fps=0)


def test_annotations_that_do_not_fit(tmp_path: Path) -> None:
    source = tar(tmp_path / "t.tar", {"a.mp4": mp4(pictures(5)), "a.txt": b"regen"})
    (tmp_path / "t.tsv").write_text("id\ttext\nb\tsonne\n")
    with pytest.raises(DataError, match="none of its 1 ids is that of a sample, such as 'a'"):
        run(source, "wds", tmp_path / "set", table=tmp_path / "t.tsv")
    with pytest.raises(DataError, match=r"not a \.tsv, \.csv or \.psv table"):
        run(source, "wds", tmp_path / "set", table=tmp_path / "t.xlsx")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot extract the samples"):
        run(source, "wds", tmp_path / "file" / "set")
