"""A whole video in one pass: its subtitles are the translations of its parts."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipeline.inference.generate import GenerationOptions
from pipeline.inference.load import VIDEO_FORM
from pipeline.inference.long_video import LongReport, LongVideo, clips, translate_long, without_overlap
from pipeline.inference.translate import Translator
from shards.errors import DataError
from shards.media.motion import GivenSpans, PauseSpans, SpanOptions
from shards.media.playback import play
from shards.media.video import VideoOptions
from shards.schema import VideoFile
from tests.unit.films import FPS, SIZE, write_film

FAST = GenerationOptions(max_new_tokens=5)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[float, float]]]:
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    return path, write_film(path, 4)


@pytest.fixture(scope="module")
def translator(export_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Translator:
    folder = Path(shutil.copytree(export_dir, tmp_path_factory.mktemp("served") / "served"))
    form = VideoOptions(short_side=SIZE, fps=FPS)
    (folder / VIDEO_FORM).write_text(json.dumps(dataclasses.asdict(form)))
    loaded = Translator.from_export(folder)
    sizes = dataclasses.replace(loaded.processor.options, max_frames=32, frame_stride=4)  # 10 seconds at once
    loaded.processor.options = sizes
    return loaded


def test_a_subtitle_is_the_translation_of_its_part(
    translator: Translator, film: tuple[Path, list[tuple[float, float]]]
) -> None:
    path, gold = film
    report = LongReport()
    cues = list(translate_long(translator, LongVideo(path), FAST, report))
    assert len(cues) == len(gold) == report.cues
    for cue, (start, end) in zip(cues, gold, strict=True):
        assert abs(cue.start_seconds - start) < 0.4 and abs(cue.end_seconds - end) < 0.4
        part = VideoFile(path, cue.start_seconds, cue.end_seconds - 1 / (8 * FPS))
        (alone,) = translator.translate([part], FAST)
        assert (cue.text, cue.frames) == (alone.text, alone.frames)
    together = list(translate_long(translator, LongVideo(path, batch=3), FAST))
    assert together == cues


def test_the_frames_are_those_of_the_part(translator: Translator, film: tuple[Path, list[tuple[float, float]]]) -> None:
    path, _ = film
    with play(path, translator.form) as playback:
        found = list(clips(translator, playback, PauseSpans(SpanOptions(), playback.rate, 10.0)))
    for clip in found:
        part = VideoFile(path, clip.start_seconds, clip.end_seconds - 1 / (8 * FPS))
        np.testing.assert_array_equal(clip.frames_THWC, translator.read(part))


def test_given_spans_are_taken_as_they_are(
    translator: Translator, film: tuple[Path, list[tuple[float, float]]]
) -> None:
    path, gold = film
    video = LongVideo(path, make_spans=lambda playback: GivenSpans([*gold, (900.0, 901.0)], 0.0, playback.rate))
    report = LongReport()
    cues = list(translate_long(translator, video, FAST, report))
    assert [(cue.start_seconds, cue.end_seconds) for cue in cues] == [(round(a, 3), round(b, 3)) for a, b in gold]
    assert (report.cues, report.skipped) == (4, 1)


def test_pictures_of_finished_spans_are_given_up(
    translator: Translator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept does not grow with the video."""
    import collections

    import pipeline.inference.long_video as module

    longest = 0

    class Watched(collections.deque):  # type: ignore[type-arg]
        def append(self, value: object) -> None:
            nonlocal longest
            super().append(value)
            longest = max(longest, len(self))

    monkeypatch.setattr(module.collections, "deque", Watched)
    lengths = []
    for sentences in (3, 12):
        longest = 0
        gold = write_film(tmp_path / f"{sentences}.mp4", sentences)
        with play(tmp_path / f"{sentences}.mp4", translator.form) as playback:
            spans = GivenSpans(gold, 0.0, playback.rate)
            assert sum(1 for _ in clips(translator, playback, spans)) == sentences
        lengths.append((longest, max(end - start for start, end in gold)))
    assert all(kept <= seconds * FPS + 2 for kept, seconds in lengths)


def test_a_text_that_repeats_the_one_before_gives_no_subtitle(
    translator: Translator, film: tuple[Path, list[tuple[float, float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Around a cut both clips see the same frames; words that both texts hold there come once."""
    monkeypatch.setattr(
        Translator, "translate_clips", lambda self, batch, options, before: ["the rain comes"] * len(batch)
    )
    options = SpanOptions(max_seconds=2.0, overlap_seconds=0.4)
    report = LongReport()
    cues = list(translate_long(translator, LongVideo(film[0], options), FAST, report))
    assert report.without_text > 0 and report.cues == len(cues) >= 4


def test_a_damaged_video_gives_its_subtitles_until_then(
    translator: Translator, film: tuple[Path, list[tuple[float, float]]], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.mp4"
    payload = bytearray(film[0].read_bytes())
    middle = len(payload) * 2 // 3
    payload[middle : middle + 2000] = b"\x55" * 2000
    damaged.write_bytes(payload)
    found = []
    with pytest.raises(DataError, match="damaged"):
        for cue in translate_long(translator, LongVideo(damaged), FAST):
            found.append(cue)
    assert 1 <= len(found) < 4


@pytest.mark.parametrize(
    ("before", "text", "fresh"),
    [
        ("rain in the north", "in the north and sun", "and sun"),
        ("Rain in the North.", "the north, and sun", "and sun"),
        ("rain in the north", "north wind", "north wind"),  # one word may be said twice
        ("the rain", "the rain", ""),
        ("", "the rain", "the rain"),
        ("明天下雨", "下雨了", "了"),
    ],
)
def test_words_of_the_overlap_come_once(before: str, text: str, fresh: str) -> None:
    assert without_overlap(before, text) == fresh
