"""The real list of YouTube-ASL ids: every id is accounted for, with or without its video."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from shards.build.build import BuildOptions, build
from shards.corpora.youtube_asl import YouTubeASL
from shards.format.index import read_index
from shards.inspect.lint import lint

pytestmark = pytest.mark.real


def test_every_id_is_accounted_for(shared_data: Path, tmp_path: Path) -> None:
    """Two ids get real sign language videos; one begins with a minus sign."""
    ids = shared_data / "youtube_asl_ids" / "youtube_asl_video_ids.txt"
    listed = ids.read_text(encoding="utf-8").split()
    first, minus = listed[0], next(video for video in listed if video.startswith("-"))
    original = next((shared_data / "spj" / "originals").glob("*.mp4"))
    for video in (first, minus):
        (tmp_path / f"{video}.mp4").symlink_to(original)
    (tmp_path / f"{minus}.en.vtt").write_text(
        "WEBVTT\n\n00:00.000 --> 00:01.000\n[Music]\n\n00:00.500 --> 00:01.500\nhello\n", encoding="utf-8"
    )
    corpus = YouTubeASL(ids=ids, videos=tmp_path)
    found = Counter(segment.excluded for segment in corpus.segments())
    assert len(set(listed)) == 8846
    assert found == {"no_video": 8844, "no_captions": 1, "sound_only": 1, "": 1}
    manifest = build(corpus, tmp_path / "set", BuildOptions())
    assert manifest.splits == {"train": 1} and manifest.counts["excluded/no_video"] == 8844
    row = read_index(tmp_path / "set").row(0)
    assert (row.text, row.frames, row.sign_language) == ("hello", 25, "ase")
    assert lint(tmp_path / "set").ok
