"""Annotations of the captioned and clip corpora with bytes put in, cut out and exchanged: a DataError or segments."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.build.prepare import has_media
from shards.corpora import make_corpus
from shards.errors import DataError
from tests.unit.shards.corpora.test_elan import document, referring, tier, timed

VIDEO = "-abcdefgh_1"
PIECES = [
    b"\t", b"\n", b'"', b",", b"\xff", b"\x00", b"[", b"]", b"{", b"}", b"NaN", b"1e999", b"null", b"-1", b"../", b"/",
    b"\\ud800", b"x" * 300, b"9" * 5000, b"\xef\xbb\xbf", b"true", b"1e-320", b":",
]  # fmt: skip


def youtube(root: Path) -> dict[str, Any]:
    (root / "ids").write_text(f"{VIDEO},ase\nBBBBBBBBBBB,gsg\n")
    (root / "table").write_text(f"video_name\tstart_time\tend_time\tcaption\n{VIDEO}\t0.5\t1.5\tx\n")
    (root / "openasl").write_text(f"yid\tstart\tend\tsplit\n{VIDEO}\t0:0:1.5\t00:00:03\tvalid\n")
    (root / "people").write_text(f"segment\tpeople\n{VIDEO}-00000500-00001500\t1\n")
    (root / "spoken").write_text("sign_language\tlanguage\ngsg\tde en\n")
    (root / f"{VIDEO}.mp4").touch()
    names = {"ids": "ids", "table": "table", "openasl": "openasl", "people": "people", "spoken_languages": "spoken"}
    return {"videos": root} | {option: root / name for option, name in names.items()}


def bobsl(root: Path) -> dict[str, Any]:
    (root / "episodes.json").write_text(json.dumps({"train": ["1", 2], "val": [], "test": ["3"]}))
    for folder in ("videos", "subtitles"):
        (root / folder).mkdir()
    return {"root": root, "episodes": Path("episodes.json"), "videos": Path("videos"), "subtitles": Path("subtitles")}


def csl_news(root: Path) -> dict[str, Any]:
    entries = [{"video": "a.mp4", "pose": "a.pkl", "text": "x"}, {"video": "b.mp4", "pose": "b.pkl", "text": "y"}]
    (root / "labels.json").write_text(json.dumps(entries))
    return {"labels": root / "labels.json", "videos": root}


def dailymoth(root: Path) -> dict[str, Any]:
    (root / "manifests").mkdir()
    (root / "manifests" / "train.tsv").write_text("a.mp4\t1.5\thello\nb.mp4\t2\tx\n")
    return {"root": root}


def subtitles(root: Path) -> dict[str, Any]:
    (root / "a.mp4").touch()
    said = tier("T", timed("a1", "ts1", "ts2", "Ja."), participant="P1")
    (root / "a.eaf").write_text(document(said, tier("U", referring("b1", "a1", "b"))))
    (root / "list.txt").write_text("a\n")
    return {"videos": root, "tiers": ["T", "U"], "test_videos": root / "list.txt"}


def classes(root: Path) -> dict[str, Any]:
    (root / "a.json").write_text(json.dumps({"a.mp4": 1, "b.mp4": 0}))
    (root / "c.csv").write_text('number,word\n0,book\n1,"thin, small"\n')
    return {"table": root / "a.json", "id": "key", "media": "key", "text": "value", "classes": root / "c.csv"}


def table(suffix: str) -> Callable[[Path], dict[str, Any]]:
    record = {"id": "1", "media": "a.mp4", "text": "x", "start": 0.5, "end": 1.5, "split": "val", "box": [0, 0, 1, 1]}

    def write(root: Path) -> dict[str, Any]:
        path = root / f"a{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist([record] * 3), path)
        else:
            path.write_text(json.dumps([record] * 3) if suffix == ".json" else "\n".join([json.dumps(record)] * 3))
        return {"table": path, "start": "start", "end": "end", "split": "split", "bbox": "box"}

    return write


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("youtube_sl25", youtube), ("bobsl", bobsl), ("csl_news", csl_news), ("dailymoth", dailymoth),
        ("table", table(".json")), ("table", table(".jsonl")), ("table", table(".parquet")),
        ("table", classes), ("subtitles", subtitles),
    ],
)  # fmt: skip
def test_damaged_annotations(name: str, write: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    options = write(tmp_path)
    assert list(make_corpus(name, options).segments())
    rng = random.Random(name)
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file() and path.stat().st_size]
    outcomes = {"segments": 0, "refused": 0}
    for _ in range(100):
        path = rng.choice(files)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            start = rng.randint(0, len(damaged))
            damaged[start : start + rng.choice((0, 0, 1, 3, 10))] = rng.choice(PIECES)
        path.write_bytes(damaged)
        try:
            for segment in make_corpus(name, options).segments():
                assert segment.id.encode() and segment.media is not None
                has_media(segment.media)
            outcomes["segments"] += 1
        except DataError:
            outcomes["refused"] += 1
        path.write_bytes(whole)
    assert outcomes["refused"] and sum(outcomes.values()) == 100
