"""Texts of a shard set's own splits, rows that say another split, and evaluation sentences among training texts."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from shards.build.build import BuildOptions, build
from shards.build.report import corpus_report, report_lines
from shards.corpora import make_corpus
from shards.corpora.text import Text
from shards.errors import OptionError
from shards.filter.corpus import filtered
from shards.filter.known_texts import known_texts
from shards.filter.options import FilterOptions
from shards.format.index import read_index, write_index
from shards.storage.store import open_folder
from tests.unit.shards.making import save_tokenizer
from tests.unit.shards.shard_sets import in_memory

TEXTS = ["guten abend", "es regnet", "morgen sonne", "wind"]
SPLITS = ["train", "test", "train", "dev"]
PAIR = "signs: {gloss} sentence: {text}"


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """The index of a video set with three splits."""
    made = in_memory("video", [10] * 4, text=TEXTS, split=SPLITS, gloss=[text.upper() for text in TEXTS])
    (folder := tmp_path / "videos").mkdir()
    write_index(folder, made.table, made.manifest)
    return folder


def test_a_shard_set_gives_a_split_its_own_sentences(videos: Path) -> None:
    corpus = Text(paths={"train": str(videos), "dev": str(videos)}, gloss="gloss", templates=["{text}", PAIR])
    found = [(segment.split, segment.id, segment.text) for segment in corpus.segments()]
    assert found == [
        ("train", "train/videos:1#0.0", "guten abend"),
        ("train", "train/videos:1#1.0", "signs: GUTEN ABEND sentence: guten abend"),
        ("train", "train/videos:3#0.0", "morgen sonne"),
        ("train", "train/videos:3#1.0", "signs: MORGEN SONNE sentence: morgen sonne"),
        ("dev", "dev/videos:4#0.0", "wind"),
        ("dev", "dev/videos:4#1.0", "signs: WIND sentence: wind"),
    ]
    assert corpus.notes == []
    (plain, _) = make_corpus("text", {"paths": f"train={videos}"}).segments()
    assert plain.text == "guten abend"


def test_a_split_that_the_set_does_not_have(videos: Path) -> None:
    with pytest.raises(OptionError, match=r"videos has no split 'valid'; it has .*\n  fix: a shard set gives a split"):
        Text(paths={"valid": str(videos)})


@pytest.mark.parametrize(("name", "mark"), [("a.tsv", "\t"), ("a.csv", ","), ("videos/index.parquet", "")])
def test_rows_that_say_another_split_are_counted(
    videos: Path, tmp_path: Path, name: str, mark: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / name
    if mark:
        rows = [mark.join(row) for row in zip(["text", *TEXTS], ["split", "train", "Test", "", "val"], strict=True)]
        path.write_text("\n".join(rows) + "\n")
    corpus = filtered(Text(paths={"train": str(path)}), FilterOptions(min_words=1))
    assert [segment.text for segment in corpus.segments()] == TEXTS, "a note, not another corpus"
    report = corpus_report(corpus)
    (note,) = report["notes"]
    assert "2 rows are taken into train, but their column 'split' says test 1, dev 1" in note
    assert note.endswith("build from the video set: --paths train=SET") and caplog.text.count(note) == 1
    assert f"note: {note}" in report_lines(report)
    (tmp_path / "plain.jsonl").write_text('{"text": "a", "split": "test"}\n{"text": "b"}\n')
    assert len(list(Text(paths={"train": str(tmp_path / "plain.jsonl")}).segments())) == 2


def test_known_sentences_are_counted(videos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    (tmp_path / "all.tsv").write_text("text\tgloss\n" + "".join(f"{text.title()}!\tX\n" for text in TEXTS))
    options = BuildOptions(tokenizer=save_tokenizer(tmp_path / "tokenizer"))
    build(Text(paths={"train": str(tmp_path / "all.tsv")}, gloss="gloss", templates=[PAIR]), tmp_path / "all", options)
    build(Text(paths={"train": str(videos)}), tmp_path / "own", options)
    evaluation = [row.text for row in read_index(videos).rows() if row.split != "train"] + ["Wind", "neu", "?!"]
    found = known_texts(evaluation, [(open_folder(tmp_path / "all"), "train")])
    assert (found.samples, found.known, found.example, found.documents, found.complete) == (5, 3, "es regnet", 4, True)
    assert known_texts(evaluation, [(open_folder(tmp_path / "own"), "train")]).known == 0
    assert known_texts(evaluation, [(open_folder(tmp_path / "all"), "dev")]).documents == 0
    part = known_texts(evaluation, [(open_folder(tmp_path / "all"), "train")], most=2)
    assert (part.known, part.documents, part.complete) == (1, 2, False)
