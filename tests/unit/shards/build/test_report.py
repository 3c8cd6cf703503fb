"""The preparation report: annotated against published, disk and shards; the list of what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from shards.build.build import BuildOptions, build
from shards.build.report import corpus_report, report_lines, write_missing
from shards.corpora.csl_daily import CslDaily
from shards.corpora.table import Table
from shards.errors import DataError
from shards.schema import Segment, VideoFile
from tests.unit.shards.corpora import layouts
from tests.unit.shards.making import ListCorpus, mp4, pictures, text_corpus


class Corpus:
    """Five segments of one real video, one broken and one missing file."""

    name = "list"
    published: ClassVar[dict[str, int]] = {"train": 4, "test": 2}
    settings: ClassVar[dict[str, Any]] = {"clips": False}
    notes = ("a known oddity",)

    def __init__(self, folder: Path) -> None:
        self.good, self.bad, self.gone = (folder / name for name in ("good.mp4", "bad.mp4", "gone.mp4"))
        self.good.write_bytes(mp4(pictures(25)))
        self.bad.write_bytes(b"no video")

    def segments(self) -> Iterator[Segment]:
        rows = [
            ("a", "train", "Der Regen", self.good, ""),
            ("b", "train", "die Sonne", self.bad, ""),
            ("c", "train", "  ", self.good, ""),
            ("d", "train", "zu lang", self.good, "caption_too_long"),
            ("e", "test", "der  regen", self.good, ""),
            ("f", "test", "Wind", self.gone, ""),
            ("g", "test", "Wolke", self.gone, ""),
        ]
        for name, split, text, path, excluded in rows:
            media = VideoFile(path, 0.0, 0.4)
            yield Segment("list", name, split, text, media, origin=f"list:{name}", excluded=excluded)


def test_before_a_build(tmp_path: Path) -> None:
    seen: list[int] = []
    report = corpus_report(Corpus(tmp_path), on_progress=seen.append)
    assert report["corpus"] == "list" and report["settings"] == {"clips": False} and not seen
    assert report["splits"] == {
        "train": {
            "published": 4,
            "annotated": 4,
            "excluded": {"caption_too_long": 1},
            "empty_text": 1,
            "missing_media": 0,
            "wrong_times": 0,
            "usable": 2,
            "hours": 0.0,
            "texts_shared_with_train": 0,
        },
        "test": {
            "published": 2,
            "annotated": 3,
            "excluded": {},
            "empty_text": 0,
            "missing_media": 2,
            "wrong_times": 0,
            "usable": 1,
            "hours": 0.0,
            "texts_shared_with_train": 1,
        },
    }
    assert json.loads(json.dumps(report)) == report
    assert report_lines(report) == [
        "               train  test",
        "published          4     2",
        "annotated          4     3",
        "excluded           1     0",
        "no text            1     0",
        "no media           0     2",
        "wrong times        0     0",
        "usable             2     1",
        "hours            0.0   0.0",
        "text in train      0     1",
        "train: excluded/caption_too_long 1",
        "train: -1 segments against the 4 published",
        "test: +1 segments against the 2 published",
        "note: a known oddity",
    ]


def test_texts_of_train_are_told_where_there_is_a_train_split() -> None:
    texts = [("train", "Der Regen."), ("dev", "der regen"), ("dev", "der, Regen!"), ("dev", "wind")]
    items = [Segment("list", str(n), split, text) for n, (split, text) in enumerate(texts)]
    splits = corpus_report(ListCorpus(items))["splits"]
    assert (splits["train"]["texts_shared_with_train"], splits["dev"]["texts_shared_with_train"]) == (0, 2)
    report = corpus_report(ListCorpus(items[1:]))
    assert report["splits"]["dev"]["texts_shared_with_train"] is None
    assert "text in train    -" in report_lines(report)


def test_the_missing_list(tmp_path: Path) -> None:
    report = corpus_report(Corpus(tmp_path))
    gone = str(tmp_path / "gone.mp4")
    assert write_missing(report, tmp_path / "out") == 1
    assert (tmp_path / "out/missing.txt").read_text() == f"{gone}\n"
    lines = [json.loads(line) for line in (tmp_path / "out/missing.jsonl").read_text().splitlines()]
    assert lines[0] == {"id": "f", "split": "test", "media": gone, "origin": "list:f"} and len(lines) == 2


def test_what_a_build_would_refuse(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(mp4(pictures(5)))
    rows = ["id\tmedia\ttext\ts\te", "a\tv.mp4\tx\t0\t1", "b\tv.mp4\ty\t9\t1", "c\t\tz\t0\t1"]
    table = tmp_path / "t.tsv"
    table.write_text("\n".join([*rows, *["a\tv.mp4\tx\t0\t1"] * 7]) + "\n")
    report = corpus_report(Table(table=table, start="s", end="e"))
    figures = report["splits"]["train"]
    assert (figures["annotated"], figures["wrong_times"], figures["usable"]) == (10, 1, 8) and figures["hours"] > 0
    assert (
        report["faults"][0] == f"{table}:5: the id 'a' occurs twice, first at {table}:2" and len(report["faults"]) == 7
    )
    lines = report_lines(report)
    assert f"fault: {report['faults'][4]}" in lines and "and 2 more faults; --json lists all" in lines
    assert write_missing(report, tmp_path / "out") == 0, "an annotation without media is no file to fetch"
    assert (tmp_path / "out/missing.txt").read_text() == ""
    assert json.loads((tmp_path / "out/missing.jsonl").read_text())["media"] == ""
    table.write_text(rows[0] + "\n")
    report = corpus_report(Table(table=table, start="s", end="e"))
    assert report["faults"] == ["table: no segments at all"] and report_lines(report) == [
        "fault: table: no segments at all"
    ]


def test_after_a_build(tmp_path: Path) -> None:
    corpus = Corpus(tmp_path)
    build(corpus, tmp_path / "set", BuildOptions(max_skipped_fraction=0.9))
    splits = corpus_report(corpus, tmp_path / "set")["splits"]
    assert splits["train"]["skipped"] == {"empty_text": 1, "unreadable_media": 1}
    assert splits["test"]["skipped"] == {"missing_media": 2}
    for figures, stored in ((splits["train"], 1), (splits["test"], 1)):
        assert figures["built"] == stored
        counted = figures["built"] + sum(figures["skipped"].values()) + sum(figures["excluded"].values())
        assert counted == figures["annotated"], "a segment is in no column, or in two"
    lines = report_lines(corpus_report(corpus, tmp_path / "set"))
    assert [line.split()[0] for line in lines[10:13]] == ["skipped", "built", "built"]
    assert "train: skipped/unreadable_media 1" in lines
    with pytest.raises(DataError, match=r"manifest\.json"):
        corpus_report(corpus, tmp_path / "nothing")


def test_csl_daily_explains_its_counts(tmp_path: Path) -> None:
    report = corpus_report(CslDaily(layouts.csl(tmp_path)))
    assert report["splits"]["train"]["excluded"] == {"annotated_not_listed": 1, "listed_not_annotated": 1}
    assert report["splits"]["train"]["hours"] is None, "frame folders tell no length"
    assert any(line.startswith("note: train: S000005_P0004_T00 is listed but not") for line in report_lines(report))


def test_text_corpora_have_no_media_to_miss() -> None:
    numbers: list[int] = []
    (figures,) = corpus_report(text_corpus(2500), on_progress=numbers.append)["splits"].values()
    assert (figures["usable"], figures["missing_media"], figures["published"]) == (2500, 0, None)
    assert numbers == [1000, 2000]
