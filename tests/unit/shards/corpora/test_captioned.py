"""YouTube-ASL, YouTube-SL-25 and BOBSL: videos with caption files, the published filters, and what is missing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from shards.build.build import BuildOptions, build
from shards.corpora import make_corpus
from shards.corpora.bobsl import Bobsl
from shards.corpora.caption_segments import segment_ids
from shards.corpora.captions import Caption
from shards.corpora.media_files import files_below, files_by_stem
from shards.corpora.youtube_asl import YouTubeASL
from shards.corpora.youtube_files import CaptionFile
from shards.errors import DataError
from shards.format.index import read_index
from shards.inspect.lint import lint
from shards.media.video import VideoOptions
from shards.schema import Segment, VideoFile
from tests.unit.shards.making import mp4, pictures

A, B, C, D, E = "-abcdefgh_1", "BBBBBBBBBBB", "CCCCCCCCCCC", "DDDDDDDDDDD", "EEEEEEEEEEE"


def only(corpus: Any) -> list[Segment]:
    return list(corpus.segments())


def reasons(corpus: Any) -> dict[str, int]:
    return dict(Counter(segment.excluded for segment in corpus.segments()))


def vtt(*cues: tuple[float, float, str]) -> str:
    times = [
        f"00:{a // 60:02.0f}:{a % 60:06.3f} --> 00:{b // 60:02.0f}:{b % 60:06.3f}\n{text}\n" for a, b, text in cues
    ]
    return "WEBVTT\nKind: captions\nLanguage: en\n\n" + "\n".join(times)


@pytest.fixture(scope="module")
def movie() -> bytes:
    """Three seconds."""
    return mp4(pictures(75))


@pytest.fixture
def youtube(tmp_path: Path, movie: bytes) -> Path:
    """Five ids: two good videos, one without captions, one without video, one with broken captions."""
    videos = tmp_path / "videos"
    (videos / "sub").mkdir(parents=True)
    (tmp_path / "ids.txt").write_bytes(f"{A}\r\n{B}\r\n\r\n{C}\r\n{D}\r\n{A}\r\n{E}\r\n".encode())
    for name in (f"{A}.mp4", f"sub/{B}.webm", f"{B}.mp4", f"{C}.mkv", f"{E}.mp4", f"{E}.f137.mp4", f"{E}.webm.part"):
        (videos / name).write_bytes(movie)
    texts = [(0.0, 1.0, "hello"), (0.5, 2.0, "[Music]"), (1.0, 1.1, "hm"), (2.0, 3.0, "x" * 301), (2.0, 1.0, "back")]
    (videos / f"{A}.en.vtt").write_text(vtt(*texts, (1.0, 2.0, "you"), (1.0, 2.0, "there"), (0.0, 61.0, "all")))
    (videos / f"{A}.info.json").write_text("{}")
    entries = [{"text": "a list", "start": 0.2, "duration": 1.5}]
    (videos / f"{B}.json").write_text(json.dumps(entries))
    (videos / f"{E}.en.vtt").write_text("no captions\n")
    return tmp_path


class TestYouTube:
    def test_segments_and_filters(self, youtube: Path) -> None:
        corpus = make_corpus("youtube_asl", {"ids": f"{youtube}/ids.txt", "videos": f"{youtube}/videos"})
        found = only(corpus)
        assert reasons(corpus) == {
            "": 4, "sound_only": 1, "too_short": 1, "caption_too_long": 1, "end_before_start": 1, "too_long": 1,
            "no_captions": 1, "no_video": 1, "duplicate_id": 1, "unreadable_captions": 1,
        }  # fmt: skip
        hello = next(segment for segment in found if segment.text == "hello")
        assert hello == Segment(
            "youtube_asl", f"{A}-00000000-00001000", "train", "hello",
            VideoFile(youtube / "videos" / f"{A}.mp4", 0.0, 1.0), "en", "ase",
            origin=f"{youtube}/videos/{A}.en.vtt:5",
        )  # fmt: skip
        assert [s.id for s in found if s.text in ("you", "there")] == [
            f"{A}-00001000-00002000",
            f"{A}-00001000-00002000.2",
        ]
        assert len({segment.id for segment in found}) == len(found), "ids are unique, of excluded segments too"
        assert all(segment.media is not None for segment in found), "a report of text and video mixed would be refused"
        (broken,) = [segment for segment in found if segment.excluded == "unreadable_captions"]
        assert broken.origin == f"{youtube}/videos/{E}.en.vtt:1 (the first line is 'no captions', not WEBVTT)"
        duplicate = next(segment for segment in found if segment.excluded == "duplicate_id")
        assert (duplicate.id, duplicate.origin) == (f"{A}#6", f"{youtube}/ids.txt:6")
        assert corpus.published == {"train": 610193}  # type: ignore[attr-defined]

    def test_build(self, youtube: Path) -> None:
        corpus = YouTubeASL(ids=youtube / "ids.txt", videos=youtube / "videos", test_ids=self.ids(youtube, "test", B))
        manifest = build(corpus, youtube / "set", BuildOptions(VideoOptions(short_side=32)))
        assert manifest.splits == {"test": 1, "train": 3}
        assert {name: n for name, n in manifest.counts.items() if name.startswith("excluded/")} == {
            "excluded/sound_only": 1, "excluded/too_short": 1, "excluded/caption_too_long": 1, "excluded/too_long": 1,
            "excluded/end_before_start": 1, "excluded/no_captions": 1, "excluded/no_video": 1,
            "excluded/duplicate_id": 1, "excluded/unreadable_captions": 1,
        }  # fmt: skip
        assert lint(youtube / "set").ok
        rows = {row.text: row for row in read_index(youtube / "set").rows()}
        assert (rows["hello"].frames, rows["a list"].split) == (25, "test")

    def ids(self, folder: Path, name: str, *ids: str) -> Path:
        (folder / f"{name}.txt").write_text("\n".join(ids))
        return folder / f"{name}.txt"

    def test_lists(self, youtube: Path) -> None:
        options: dict[str, Any] = {"ids": youtube / "ids.txt", "videos": youtube / "videos"}
        dev, test = self.ids(youtube, "dev", B), self.ids(youtube, "test", A)
        splits = {segment.split for segment in only(YouTubeASL(**options, dev_ids=dev, test_ids=test)) if segment.text}
        assert splits == {"dev", "test"}
        found = reasons(YouTubeASL(**options, exclude_ids=self.ids(youtube, "bad", A, "not_listed_")))
        assert found["excluded_id"] == 1 and found[""] == 1
        with pytest.raises(DataError, match=rf"bad\.txt: 1 videos in dev and in test, first {A}"):
            only(YouTubeASL(**options, dev_ids=test, test_ids=youtube / "bad.txt"))
        with pytest.raises(DataError, match=r"bad\.txt: 1 of 2 dev videos are not in ids\.txt, first not_listed_"):
            only(YouTubeASL(**options, dev_ids=youtube / "bad.txt"))

    @pytest.mark.parametrize("line", ["video_id", f"https://youtu.be/{A}", f"{A} {B}", f"{A},english", f"{A},"])
    def test_lines_that_are_no_ids(self, youtube: Path, line: str) -> None:
        (youtube / "ids.txt").write_text(f"{B}\n{line}\n")
        with pytest.raises(DataError, match=r"ids\.txt:2: .* is no video id .*\n  fix: remove headers"):
            only(YouTubeASL(ids=youtube / "ids.txt", videos=youtube / "videos"))

    def test_openasl_evaluation_clips(self, youtube: Path) -> None:
        table = youtube / "openasl-v1.0.tsv"
        rows = (
            f"{A}\t00:00:00.900\t00:00:01.500\ttest\n{A}\t0:0:0.0\t0:0:0.5\ttrain\n{B}\t00:00:01.7\t00:00:03\tvalid\n"
        )
        table.write_text("yid\tstart\tend\tsplit\n" + rows)
        corpus = YouTubeASL(ids=youtube / "ids.txt", videos=youtube / "videos", openasl=table)
        found = {s.text: s.excluded for s in only(corpus)}
        assert (found["hello"], found["you"], found["a list"]) == ("in_openasl_evaluation", "in_openasl_evaluation", "")
        table.write_text(f"yid\tstart\tend\tsplit\n{A}\t\t\ttest\n")
        with pytest.raises(DataError, match=r"openasl-v1\.0\.tsv:2: a clip without times"):
            only(corpus)

    def test_people(self, youtube: Path) -> None:
        path = youtube / "people.tsv"
        path.write_text(f"segment\tpeople\n{A}-00000000-00001000\t1\n{A}-00001000-00002000\t2\n")
        corpus = YouTubeASL(ids=youtube / "ids.txt", videos=youtube / "videos", people=path)
        found = {s.text: s.excluded for s in only(corpus)}
        assert (found["hello"], found["you"], found["there"]) == ("", "not_one_person", "people_unknown")
        path.write_text("segment\tpeople\nx\tone\n")
        with pytest.raises(DataError, match=r"people\.tsv:2: 'one' is no number of people"):
            only(corpus)

    def test_table_of_captions(self, youtube: Path) -> None:
        rows = [f"{A}.mp4\t0.5\t1.5\tone  two", f"{A}\t0.5\t1.5\tagain", f"{B}\t1\t1.1\tshort", f"{D}\t0\t1\tno video",
                "ZZZZZZZZZZZ\t0\t1\tother"]  # fmt: skip
        table = youtube / "captions.tsv"
        table.write_text("video_name\tstart_time\tend_time\tcaption\n" + "\n".join(rows) + "\n")
        corpus = YouTubeASL(ids=youtube / "ids.txt", videos=youtube / "videos", table=table)
        found = [(s.id, s.text, s.excluded, s.language) for s in only(corpus)]
        assert found == [
            (f"{A}#6", "", "duplicate_id", "en"),
            (f"{A}-00000500-00001500", "one two", "", "en"),
            (f"{A}-00000500-00001500.2", "again", "", "en"),
            (f"{B}-00001000-00001100", "short", "too_short", "en"),
            (f"{D}-00000000-00001000", "no video", "no_video", "en"),
            ("ZZZZZZZZZZZ-00000000-00001000", "other", "unknown_id", ""),
            (C, "", "no_captions", "en"),
            (E, "", "no_captions", "en"),
        ]
        table.write_text(f"video_name\tstart_time\tend_time\tcaption\n{A}\t\t1\tx\n")
        with pytest.raises(DataError, match=rf"captions\.tsv:2: the row of {A} has no times"):
            only(corpus)

    def test_which_captions(self, youtube: Path) -> None:
        videos = youtube / "videos"
        (youtube / "ids.txt").write_text(C + "\n")
        corpus = YouTubeASL(ids=youtube / "ids.txt", videos=videos)

        def result() -> str:
            (segment,) = only(corpus)
            return segment.excluded or f"{segment.language} {segment.text}"

        assert result() == "no_captions"
        (videos / f"{C}.de.vtt").write_text(vtt((0, 1, "deutsch")))
        assert result() == "no_captions_in_language"
        (videos / f"{C}.en-de.vtt").write_text(vtt((0, 1, "translated")))
        assert result() == "automatic_captions"
        (videos / f"{C}.en.vtt").write_text(vtt((0, 1, "a<00:00:00.500><c> b</c>")))
        assert result() == "automatic_captions"
        corpus.automatic = True
        assert result() == "en a b"
        corpus.automatic = False
        (videos / f"{C}.en-j3PyPqV-e1s.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nby hand\n")
        assert result() == "en by hand"
        (videos / f"{C}.en-GB.vtt").write_text("WEBVTT\n")
        assert result() == "en by hand", "an empty track does not hide a good one"
        (videos / f"{C}.vtt").write_text(vtt((0, 1, "unnamed")))
        assert result() == "en by hand"
        corpus.languages = ["fr", "de"]
        assert result() == "de deutsch"
        corpus.languages = ["fr"]
        assert result() == "fr unnamed"

    def test_names_of_caption_files(self) -> None:
        def file(language: str) -> CaptionFile:
            return CaptionFile(Path("x.vtt"), language)

        assert [file(tag).automatic for tag in ("en-orig", "en-de", "zh-Hans-en", "a.en")] == [True, True, True, False]
        assert not any(file(tag).automatic for tag in ("en", "en-US", "zh-Hans", "es-419", "en-j3PyPqV-e1s", ""))
        assert [file(tag).text_language for tag in ("en-US", "zh-Hant-TW", "es-419", "en-j3PyPqV-e1s", "pt-x", "")] == [
            "en-US", "zh-Hant-TW", "es-419", "en", "pt", "",
        ]  # fmt: skip

    def test_sign_languages(self, youtube: Path, movie: bytes) -> None:
        videos = youtube / "videos"
        (youtube / "meta.csv").write_text(f"{A},ase\n{C},gsg\n{D},xxx\n")
        (videos / f"{C}.de.vtt").write_text(vtt((0, 1, "deutsch")))
        (videos / f"{C}.en.vtt").write_text(vtt((0, 1, "english")))
        options = {"ids": f"{youtube}/meta.csv", "videos": str(videos)}
        with pytest.raises(DataError, match=r"meta\.csv:3: no caption language is known for the sign language 'xxx'"):
            only(make_corpus("youtube_sl25", options))
        corpus = make_corpus("youtube_sl25", {**options, "sign_languages": "gsg,ase"})
        used = [s for s in only(corpus) if not s.excluded]
        assert {(s.corpus, s.sign_language, s.language) for s in used} == {
            ("youtube_sl25", "ase", "en"), ("youtube_sl25", "gsg", "de"),
        }  # fmt: skip
        assert reasons(corpus)["other_sign_language"] == 1 and corpus.published == {}  # type: ignore[attr-defined]
        pairs = youtube / "pairs.tsv"
        pairs.write_text("sign_language\tlanguage\nxxx\ten\ngsg\tfr en\n")
        found = {s.text for s in only(make_corpus("youtube_sl25", {**options, "spoken_languages": str(pairs)}))}
        assert "english" in found and "deutsch" not in found
        pairs.write_text("sign_language\tlanguage\nGerman\tde\n")
        with pytest.raises(DataError, match=r"pairs\.tsv:2: no pair of codes: 'German', 'de'"):
            only(make_corpus("youtube_sl25", {**options, "spoken_languages": str(pairs)}))

    def test_wrong_options(self, youtube: Path) -> None:
        with pytest.raises(DataError, match=r"gone: no such folder; looked for videos named <id>\.mp4"):
            YouTubeASL(ids=youtube / "ids.txt", videos=youtube / "gone")
        with pytest.raises(DataError, match=r"looked for captions named <id>\.en\.vtt"):
            YouTubeASL(ids=youtube / "ids.txt", videos=youtube / "videos", captions=youtube / "gone")
        with pytest.raises(DataError, match=r"min_seconds 2, max_seconds 1, max_characters 300 leave nothing"):
            YouTubeASL(ids=youtube / "ids.txt", videos=youtube / "videos", min_seconds=2, max_seconds=1)

    def test_two_files_for_one_video(self, youtube: Path, movie: bytes) -> None:
        videos = youtube / "videos"
        assert files_by_stem(videos, (".webm", ".mp4"))[B].suffix == ".webm"
        (videos / "loop").symlink_to(videos)
        assert len(list(files_below(videos))) == len({path.resolve() for path in files_below(videos)})
        (videos / "sub" / f"{B}.mp4").write_bytes(movie)
        with pytest.raises(DataError, match=rf"two files for '{B}': .*\n  fix: remove one"):
            only(YouTubeASL(ids=youtube / "ids.txt", videos=videos))

    def test_folders_that_cannot_be_listed(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"gone: cannot be listed \(No such file"):
            list(files_below(tmp_path / "gone"))


EPISODES = {"train": ["101", "102", 103], "val": ["201"], "test": ["301"], "challenge_test": ["401"]}
AUTOMATIC = "automatic_annotations/signing_aligned_subtitles/audio_aligned_heuristic_correction"
MANUAL = "manual_annotations/signing_aligned_subtitles"


@pytest.fixture
def bobsl(tmp_path: Path, movie: bytes) -> Path:
    root = tmp_path / "v1.4"
    for folder in ("original_data/videos/mp4", "original_data/metadata", AUTOMATIC, MANUAL):
        (root / folder).mkdir(parents=True)
    (root / "original_data/metadata/subset2episode.json").write_text(json.dumps(EPISODES))
    for episode in ("101", "102", "201", "301"):
        (root / "original_data/videos/mp4" / f"{episode}.mp4").write_bytes(movie)
    for episode in ("101", "103", "201", "301"):
        cues = ((0.2, 1.2, f"hello {episode}"), (1.2, 2.9, "and more"))
        (root / AUTOMATIC / f"{episode}.vtt").write_text(vtt(*cues))
    (root / MANUAL / "301.vtt").write_text(vtt((0.5, 1.5, "hello by hand")))
    return root


class TestBobsl:
    def test_segments(self, bobsl: Path) -> None:
        found = only(Bobsl(root=bobsl))
        assert [(s.split, s.id, s.excluded) for s in found if not s.text] == [
            ("train", "train/102", "no_subtitles"), ("train", "train/103", "no_video"),
        ]  # fmt: skip
        assert found[0] == Segment(
            "bobsl", "101-00000200-00001200", "train", "hello 101",
            VideoFile(bobsl / "original_data/videos/mp4/101.mp4", 0.2, 1.2), "en", "bfi",
            origin=f"{bobsl}/{AUTOMATIC}/101.vtt:5",
        )  # fmt: skip
        assert Counter(s.split for s in found if s.text) == {"train": 2, "dev": 2, "test": 2}

    def test_manually_aligned_splits(self, bobsl: Path) -> None:
        corpus = make_corpus(
            "bobsl", {"root": str(bobsl), "splits": "test,test_aligned,dev_aligned", "shift_seconds": "0.1"}
        )
        found = [(s.split, s.id, s.excluded, s.media.start_seconds) for s in only(corpus)]  # type: ignore[union-attr]
        assert found == [
            ("test", "301-00000200-00001200", "", 0.2 + 0.1),
            ("test", "301-00001200-00002900", "", 1.2 + 0.1),
            ("test_aligned", "test_aligned/301-00000500-00001500", "", 0.5),
            ("dev_aligned", "dev_aligned/201", "no_subtitles", None),
        ]
        manifest = build(corpus, bobsl / "set", BuildOptions(VideoOptions(short_side=32)))
        assert manifest.splits == {"test": 2, "test_aligned": 1} and manifest.counts["excluded/no_subtitles"] == 1
        assert lint(bobsl / "set").ok

    def test_lists_of_episodes(self, bobsl: Path) -> None:
        whole = only(Bobsl(root=bobsl))
        lists = bobsl / "lists"
        lists.mkdir()
        for name, episodes in (("bobsl_align_train", "101\n102\n\n103\n"), ("dev", "201\r\n"), ("test", "301")):
            (lists / f"{name}.txt").write_text(episodes)
        listed = only(Bobsl(root=bobsl, episodes=Path("lists")))
        assert [(s.id, s.split, s.excluded) for s in listed] == [(s.id, s.split, s.excluded) for s in whole]
        (lists / "dev.txt").write_text("101\n")
        with pytest.raises(DataError, match=r"dev\.txt:1: the episode 101 is listed twice: in train and dev"):
            only(Bobsl(root=bobsl, episodes=Path("lists")))
        (lists / "dev.txt").unlink()
        with pytest.raises(
            DataError, match=r"lists: no episode list for dev: looked for val\.txt, bobsl_align_val\.txt, dev"
        ):
            only(Bobsl(root=bobsl, episodes=Path("lists")))

    def test_limits_and_broken_subtitles(self, bobsl: Path) -> None:
        assert reasons(Bobsl(root=bobsl, splits=["test"], min_seconds=1.5)) == {"too_short": 1, "": 1}
        assert reasons(Bobsl(root=bobsl, splits=["test"], max_seconds=1.5)) == {"too_long": 1, "": 1}
        (bobsl / AUTOMATIC / "301.vtt").write_text("WEBVTT\n\nnothing\n")
        (segment,) = only(Bobsl(root=bobsl, splits=["test"]))
        assert segment.excluded == "unreadable_subtitles" and "301.vtt:3 (no times in the block" in segment.origin
        (bobsl / AUTOMATIC / "301.vtt").write_text("WEBVTT\n")
        assert reasons(Bobsl(root=bobsl, splits=["test"])) == {"no_subtitles": 1}

    def test_wrong_layout(self, bobsl: Path) -> None:
        with pytest.raises(
            DataError, match=r"gone: no such folder; looked for original_data and the annotation folders"
        ):
            Bobsl(root=bobsl / "gone")
        with pytest.raises(DataError, match=r"unknown split \['challenge'\]"):
            Bobsl(root=bobsl, splits=["challenge"])
        with pytest.raises(DataError, match="min_seconds 2 and max_seconds 1 leave no subtitle"):
            Bobsl(root=bobsl, min_seconds=2, max_seconds=1)
        with pytest.raises(
            DataError, match=r"auto_sat_aligned: no such folder; looked for the subtitles <episode>\.vtt"
        ):
            only(Bobsl(root=bobsl, subtitles=Path(AUTOMATIC).with_name("auto_sat_aligned")))
        with pytest.raises(DataError, match=r"x/mp4: no such folder; looked for the episodes' videos"):
            only(Bobsl(root=bobsl, videos=Path("x/mp4")))
        metadata = bobsl / "original_data/metadata/subset2episode.json"
        metadata.write_text('{"train": [], "test": []}')
        with pytest.raises(DataError, match=r"no list of val or dev episodes; found \['test', 'train'\]"):
            only(Bobsl(root=bobsl))
        metadata.write_text("[]")
        with pytest.raises(DataError, match="no object of subsets but a list"):
            only(Bobsl(root=bobsl))
        metadata.write_text('{"train": ["../x"], "val": [], "test": []}')
        with pytest.raises(DataError, match=r"'\.\./x' cannot name a file"):
            only(Bobsl(root=bobsl))
        metadata.unlink()
        with pytest.raises(
            DataError, match=r"no subset2episode\.json: it lists the episodes of each split\n  fix: pass"
        ):
            only(Bobsl(root=bobsl))


def test_equal_times_get_numbers() -> None:
    captions = [
        Caption(1.0, 2.0, "a", 1),
        Caption(1.0, 2.0, "b", 2),
        Caption(1.0, 2.5, "c", 3),
        Caption(1.0, 2.0, "d", 4),
    ]
    assert list(segment_ids("v", captions)) == [
        "v-00001000-00002000", "v-00001000-00002000.2", "v-00001000-00002500", "v-00001000-00002000.3",
    ]  # fmt: skip
