"""Real annotations and videos: PHOENIX-2014T's csv files and layout, Slovak sentence clips, NZSL glosses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shards.build.build import BuildOptions, build
from shards.build.report import corpus_report, report_lines
from shards.corpora.how2sign import How2Sign
from shards.corpora.phoenix14t import Phoenix14T
from shards.corpora.table import Table
from shards.corpora.text import Text
from shards.format.index import read_index
from shards.inspect.lint import lint
from shards.media.video import VideoOptions, decode, probe, transcode
from shards.schema import FrameFolder, VideoFile
from tests.unit.shards.making import save_tokenizer

pytestmark = pytest.mark.real


def test_phoenix_annotations_are_complete(shared_data: Path) -> None:
    corpus = Phoenix14T(shared_data / "phoenix2014t")
    segments = list(corpus.segments())
    counts = {split: sum(segment.split == split for segment in segments) for split in corpus.splits}
    assert counts == {"train": 7096, "dev": 519}
    assert len({segment.id for segment in segments}) == 7615
    assert len({segment.signer for segment in segments}) == 9
    assert all(segment.text and isinstance(segment.media, FrameFolder) for segment in segments)
    first = segments[0]
    assert first.text == "und nun die wettervorhersage für morgen donnerstag den zwölften august"
    assert first.gloss == "JETZT WETTER MORGEN DONNERSTAG ZWOELF FEBRUAR"


def test_phoenix_derivative_labels_agree_with_the_release(shared_data: Path) -> None:
    """GFSLT's pickles hold the release's clips and texts in its order; their glosses differ."""
    folder = shared_data / "phoenix2014t"
    official, derived = (list(Phoenix14T(folder, labels=labels).segments()) for labels in (None, folder))
    assert [(s.split, s.text, s.media) for s in derived] == [(s.split, s.text, s.media) for s in official]
    assert [s.id for s in derived] == [s.id for s in official]
    differing = sum(a.gloss != b.gloss for a, b in zip(official, derived, strict=True))
    assert 700 < differing < 900


def test_phoenix_report_against_the_publication(shared_data: Path) -> None:
    report = corpus_report(Phoenix14T(shared_data / "phoenix2014t"))
    for split, number in {"train": 7096, "dev": 519}.items():
        figures = report["splits"][split]
        assert (figures["published"], figures["annotated"], figures["missing_media"]) == (number, number, number)
    assert report["splits"]["dev"]["texts_shared_with_train"] == 25
    assert len(report["missing"]) == 7615


def test_how2sign_label_file(shared_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Uni-Sign's label file: 31,086 clips, 39 more than the papers state."""
    folder = shared_data / "how2sign"
    corpus = How2Sign(folder, labels=folder, clips=True)
    assert "pre-cut clips" in caplog.text
    segments = list(corpus.segments())
    assert len(segments) == len({segment.id for segment in segments}) == 31086
    assert sum(segment.id.startswith("-") for segment in segments) == 2196
    assert all(segment.text and segment.signer.isdecimal() for segment in segments)
    assert sum('"' in segment.text for segment in segments) == 279
    assert "train: +39 segments against the 31047 published" in report_lines(corpus_report(corpus))


def test_phoenix_release_layout(shared_data: Path, tmp_path: Path) -> None:
    root = shared_data / "phoenix2014t_layout_sample" / "PHOENIX-2014-T-release-v3"
    # The sample shows one clip in all three splits; ids are unique in the real corpus.
    for split in ("train", "dev", "test"):
        manifest = build(Phoenix14T(root, splits=[split]), tmp_path / split, BuildOptions())
        assert manifest.counts == {"samples": 1, "skipped": 0}
        report = lint(tmp_path / split)
        assert report.ok and report.frames == 2, report.problems
        row = read_index(tmp_path / split).row(0)
        assert (row.width, row.height, row.frames, row.fps) == (210, 260, 2, 25.0)
        assert row.text.startswith("regen und schnee lassen an den alpen")


def test_slovak_sentences(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "spj" / "sentences.tsv"
    lines = source.read_text(encoding="utf-8").splitlines()
    (tmp_path / "few.tsv").write_text("\n".join(lines[:7]) + "\n", encoding="utf-8")
    corpus = Table(
        table=tmp_path / "few.tsv", media_root=source.parent, media="video", text="translation_sk",
        language="sk", sign_language="svk", corpus="spj", test_fraction=0.3,
    )  # fmt: skip
    options = BuildOptions(VideoOptions(short_side=128), samples_per_shard=4)
    manifest = build(corpus, tmp_path / "set", options, workers=2)
    counts = {name: n for name, n in manifest.counts.items() if "bytes" not in name}
    assert counts == {"samples": 6, "skipped": 0, "encoded/size": 6}
    assert lint(tmp_path / "set").ok
    build(corpus, tmp_path / "again", options)
    for path in (tmp_path / "set").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    declared = {line.split("\t")[0]: int(line.split("\t")[4]) for line in lines[1:7]}
    rows = list(read_index(tmp_path / "set").rows())
    assert {row.sample_id: row.frames for row in rows} == declared
    assert {row.height for row in rows} == {128} and rows[0].text.endswith(".")


def test_original_with_audio_is_cut_and_resized(shared_data: Path) -> None:
    original = next((shared_data / "spj" / "originals").glob("*.mp4"))
    payload = transcode(VideoFile(original, 1.0, 2.0), VideoOptions())
    info = probe(payload)
    assert (info.frames, info.height, info.fps) == (25, 256, 25.0)
    whole = decode(transcode(VideoFile(original), VideoOptions()), probe(original).frames)
    part = decode(payload, 25)
    assert np.abs(part.astype(int) - whole[25:50]).mean() < 2.0, "the cut shows other frames"


def test_nzsl_glosses_as_text(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "nzsl" / "nzsl_usage.tsv"
    header = path.read_text(encoding="utf-8").splitlines()[0].split("\t")
    text = next(name for name in header if "transl" in name.lower() or "english" in name.lower())
    corpus = Text(
        paths={"train": str(path)}, text=text, templates=["{text}", "signs: {gloss} sentence: {text}"],
        function_words=["the", "a", "is", "to", "of"], repeat_max=3, corpus="nzsl",
    )  # fmt: skip
    options = BuildOptions(tokenizer=save_tokenizer(tmp_path / "tokenizer"))
    manifest = build(corpus, tmp_path / "set", options)
    assert manifest.counts["samples"] > 1000 and lint(tmp_path / "set").ok
    build(corpus, tmp_path / "two", options, workers=2)
    for file in (tmp_path / "set").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
