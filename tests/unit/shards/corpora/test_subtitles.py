"""A folder of videos with subtitles of any names: which belong together, tracks, tiers, splits, and a build."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest

from shards.corpora import make_corpus
from shards.corpora.subtitles import Subtitles
from shards.errors import DataError, OptionError
from shards.schema import Segment, VideoFile
from tests.unit.shards.corpora import layouts
from tests.unit.shards.corpora.layouts import built, segments_of
from tests.unit.shards.corpora.test_elan import document, tier, timed

SRT = "1\n00:00:00,000 --> 00:00:00,400\nGuten Tag\n\n2\n00:00:00,400 --> 00:00:01,000\n* Applaus *\n"


def touch(folder: Path, *names: str, content: str = "x") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def pairs(folder: Path, **options: Any) -> dict[str, str]:
    """Video -> its subtitles, or the reason why there are none."""
    found: dict[str, str] = {}
    for segment in segments_of(Subtitles(videos=folder, sounds=True, **options)):
        assert isinstance(segment.media, VideoFile)
        found[segment.media.path.name] = segment.excluded or Path(segment.origin.partition(":")[0]).name
    return found


def test_a_build_with_ids_that_are_no_youtube_ids(tmp_path: Path) -> None:
    layouts.video(tmp_path / "Tagesschau 7. März.mp4")
    touch(tmp_path, "Tagesschau 7. März.srt", content=SRT)
    options = {"videos": str(tmp_path), "language": "de", "sign_language": "gsg", "corpus": "news"}
    corpus = make_corpus("subtitles", options)
    first, applause = segments_of(corpus)
    assert (first.id, first.text, first.split) == ("Tagesschau 7. März-00000000-00000400", "Guten Tag", "train")
    assert (first.corpus, first.language, first.sign_language) == ("news", "de", "gsg")
    assert first.origin.endswith("Tagesschau 7. März.srt:2") and applause.excluded == "sound_only"
    rows = built(corpus, tmp_path / "out")
    assert {name: row.frames for name, row in rows.items()} == {first.id: 10}


def test_names(tmp_path: Path) -> None:
    touch(tmp_path, "talk 1.mp4", "talk.1.mp4", "sub/b.mkv", "sub/b.webm", "alone.mp4", "._talk 1.mp4", "talk_10.mp4")
    touch(tmp_path, "talk 1.srt", "talk.1.de.srt", "sub/b.SRT", "gone.srt", "talk_10_de-CH.srt", content=SRT)
    assert pairs(tmp_path) == {
        "talk 1.mp4": "talk 1.srt", "talk.1.mp4": "talk.1.de.srt", "b.mkv": "b.SRT", "alone.mp4": "no_subtitles",
        "talk_10.mp4": "talk_10_de-CH.srt", "gone.mp4": "no_video",
    }  # fmt: skip


def test_subtitles_in_a_folder_of_their_own(tmp_path: Path) -> None:
    videos, subtitles = tmp_path / "v", tmp_path / "s"
    touch(videos, "x/a.mp4", "y/a.mp4", "y/b.mp4", unicodedata.normalize("NFD", "x/čerešňa.mp4"))
    touch(subtitles, "x/a.vtt", "b.srt", unicodedata.normalize("NFC", "čerešňa.srt"), content=SRT)
    (subtitles / "x/a.vtt").write_text("WEBVTT\n\n00:00.000 --> 00:01.000\nda\n")
    found = segments_of(Subtitles(videos=videos, subtitles=subtitles))
    assert [(s.id, s.excluded) for s in found if s.text != "* Applaus *"] == [
        ("x/a-00000000-00001000", ""), ("x/čerešňa-00000000-00000400", ""), ("y/a", "no_subtitles"),
        ("y/b-00000000-00000400", ""),
    ]  # fmt: skip
    touch(subtitles, "a.srt", content=SRT)
    with pytest.raises(DataError, match=r"a\.srt may belong to x/a or y/a\n  fix: put the subtitles into the folders"):
        segments_of(Subtitles(videos=videos, subtitles=subtitles))


def test_tracks(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4")
    touch(tmp_path, "a.de.srt", "a.en.srt", "b.en.srt", content=SRT)
    with pytest.raises(
        OptionError, match=r"a: 2 tracks for one video: a\.de\.srt, a\.en\.srt\n  fix: choose with --tracks"
    ):
        pairs(tmp_path)
    assert pairs(tmp_path, tracks=["de"]) == {"a.mp4": "a.de.srt", "b.mp4": "no_subtitles"}
    assert pairs(tmp_path, tracks=["de", "en"]) == {"a.mp4": "a.de.srt", "b.mp4": "b.en.srt"}
    with pytest.raises(OptionError, match=r"no subtitles of the track 'fr'; there are 'de', 'en'"):
        pairs(tmp_path, tracks=["fr"])


def elan_corpus(folder: Path, **options: Any) -> list[Segment]:
    return segments_of(Subtitles(videos=folder, video_suffix="_1a1", **options))


def test_tiers(tmp_path: Path) -> None:
    """As in the DGS corpus: the video's name goes on, several tiers, one of them chosen; its participant signs."""
    touch(tmp_path, "17_1a1.mp4", "17_1b1.mp4", "18_1a1.mp4")
    said = tier("Text_A", timed("a1", "ts1", "ts2", "Ja."), timed("a2", "ts3", "ts4", "[NOT-SIGNED]"), participant="P1")
    touch(tmp_path, "17.eaf", content=document(said, tier("Gloss", timed("a3", "ts1", "ts2", "JA"))))
    touch(tmp_path, "18.eaf", content=document(tier("Gloss", timed("a3", "ts1", "ts2", "JA"))))
    yes, silent, other = elan_corpus(tmp_path, tiers=["Text_A"])
    assert (yes.id, yes.text, yes.signer) == ("17-00001000-00002000", "Ja.", "P1")
    assert yes.media == VideoFile(tmp_path / "17_1a1.mp4", 1.0, 2.0) and yes.origin.endswith("17.eaf: Text_A 1")
    assert (silent.excluded, other.id, other.excluded) == ("sound_only", "18", "no_tier")
    with pytest.raises(OptionError, match=r"17\.eaf: 2 tiers hold annotations: Text_A, Gloss"):
        elan_corpus(tmp_path)
    with pytest.raises(OptionError, match=r"no tier 'Text' in any file; there are Text_A, Gloss\n  fix: name tiers"):
        elan_corpus(tmp_path, tiers=["Text"])
    with pytest.raises(OptionError, match=r"none of 3 videos ends in '_c'; the first is '17_1a1'"):
        segments_of(Subtitles(videos=tmp_path, video_suffix="_c"))


def test_times_count_from_where_elan_says(tmp_path: Path) -> None:
    touch(tmp_path, "talk.mp4", "side.mp4")
    touch(tmp_path, "talk.eaf", "side.eaf", content=document(tier("T", timed("a1", "ts1", "ts3", "Ja."))))
    side, talk = segments_of(Subtitles(videos=tmp_path, shift_seconds=0.25))
    assert side.media == VideoFile(tmp_path / "side.mp4", 1.25, 3.25)
    assert talk.media == VideoFile(tmp_path / "talk.mp4", 2.75, 4.75)


def test_splits(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number}.mp4" for number in range(40)))
    touch(tmp_path, *(f"{number}.srt" for number in range(40)), content=SRT)
    touch(tmp_path, "test.txt", content="3\n\n5\n")

    def splits(**options: Any) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for segment in segments_of(Subtitles(videos=tmp_path, **options)):
            if not segment.excluded:
                found.setdefault(segment.split, []).append(segment.id.partition("-")[0])
        return found

    assert splits(test_videos=tmp_path / "test.txt")["test"] == ["3", "5"]
    assert list(splits(split="dev")) == ["dev"]
    drawn = splits(dev_fraction=0.2, test_fraction=0.2)
    assert set(drawn) == {"train", "dev", "test"} and drawn == splits(dev_fraction=0.2, test_fraction=0.2)
    touch(tmp_path, "test.txt", content="3\n99\n")
    with pytest.raises(DataError, match=r"test\.txt:2: no video or subtitles '99'\n  fix: list the videos by"):
        splits(test_videos=tmp_path / "test.txt")
    touch(tmp_path, "test.txt", content="3\n")
    with pytest.raises(DataError, match=r"test\.txt:1: '3' is in dev and in test"):
        splits(test_videos=tmp_path / "test.txt", dev_videos=tmp_path / "test.txt")


def test_damaged_and_empty_subtitles_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    touch(tmp_path, "a.srt", content="1\nno times\n")
    touch(tmp_path, "b.srt", "c.vtt", content="")
    (tmp_path / "c.vtt").write_text("WEBVTT\n")
    a, b, c = segments_of(Subtitles(videos=tmp_path))
    assert (a.excluded, b.excluded, c.excluded) == ("unreadable_subtitles", "no_subtitles", "no_subtitles")
    assert "a.srt:1 (no times in the block" in a.origin


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "Train!"}, "'Train!' cannot be a split"),
        ({"language": "German"}, "language='German' is no code\n  fix: write for example de"),
        ({"min_seconds": 2.0, "max_seconds": 1.0}, r"min_seconds 2\.0 and max_seconds 1\.0 leave no caption"),
        ({"dev_fraction": 0.7, "test_fraction": 0.7}, "is not within 0..1"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        Subtitles(videos=tmp_path, **options)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no video in it: looked for \.mp4, \.mkv"):
        segments_of(Subtitles(videos=tmp_path))
    with pytest.raises(DataError, match=r"no such folder; looked for subtitles \(\.eaf, \.vtt"):
        Subtitles(videos=tmp_path, subtitles=tmp_path / "s")
    touch(tmp_path, unicodedata.normalize("NFD", "č.mp4"), unicodedata.normalize("NFC", "č.mp4"))
    with pytest.raises(DataError, match="two files for 'č'"):
        segments_of(Subtitles(videos=tmp_path))
