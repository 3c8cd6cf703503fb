"""A whole video in one pass: its subtitles are the translations of its parts."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import threading
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.errors import RecipeError
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
    subtitles = list(translate_long(translator, LongVideo(path), FAST, report))
    assert len(subtitles) == len(gold) == report.subtitles
    for subtitle, (start, end) in zip(subtitles, gold, strict=True):
        assert abs(subtitle.start_seconds - start) < 0.4 and abs(subtitle.end_seconds - end) < 0.4
        part = VideoFile(path, subtitle.start_seconds, subtitle.end_seconds - 1 / (8 * FPS))
        (alone,) = translator.translate([part], FAST)
        assert (subtitle.text, subtitle.frames) == (alone.text, alone.frames)
    together = list(translate_long(translator, LongVideo(path, batch=3), FAST))
    assert together == subtitles


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
    subtitles = list(translate_long(translator, video, FAST, report))
    assert [(subtitle.start_seconds, subtitle.end_seconds) for subtitle in subtitles] == [
        (round(a, 3), round(b, 3)) for a, b in gold
    ]
    assert (report.subtitles, report.skipped) == (4, 1)


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
    subtitles = list(translate_long(translator, LongVideo(film[0], options), FAST, report))
    assert report.without_text > 0 and report.subtitles == len(subtitles) >= 4


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
        for subtitle in translate_long(translator, LongVideo(damaged), FAST):
            found.append(subtitle)
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


def test_sentences_that_need_the_one_before_come_one_by_one(
    translator: Translator, film: tuple[Path, list[tuple[float, float]]]
) -> None:
    waiting = translator.with_prompt("{previous} {video} text:")
    with pytest.raises(RecipeError, match=r"--set batch=2: this model's prompt shows \{previous\}"):
        list(translate_long(waiting, LongVideo(film[0], batch=2), FAST))


def test_a_model_of_rows_takes_no_long_video(
    translator: Translator, film: tuple[Path, list[tuple[float, float]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(translator, "reads_rows", True)
    with pytest.raises(RecipeError, match="this model reads keypoints or stored features, a long video holds pictures"):
        list(translate_long(translator, LongVideo(film[0]), FAST))


def test_a_subtitle_comes_before_the_stream_goes_on(translator: Translator, tmp_path: Path) -> None:
    """The writer holds back the rest of the broadcast until the first sentence, which is over, has its subtitle."""
    gold = write_film(tmp_path / "live.mp4", 8)
    stream, ends = _transport_stream(tmp_path / "live.mp4")
    second = gold[1][1] + 6.0  # FFmpeg looks at the first five seconds of a stream before it decodes any of them
    held = next(size for seconds, size in ends if seconds > second)
    reading, writing = os.pipe()
    seen, waited = threading.Event(), []

    def write() -> None:
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(stream[:held])
            pipe.flush()
            waited.append(seen.wait(60))
            pipe.write(stream[held:])

    writer = threading.Thread(target=write)
    writer.start()
    found = []
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        for subtitle in translate_long(translator, LongVideo(pipe), FAST):
            found.append(subtitle)
            seen.set()
    writer.join()
    assert waited == [True] and len(found) == len(gold)
    assert found == list(translate_long(translator, LongVideo(tmp_path / "live.mp4"), FAST))


def _transport_stream(video: Path) -> tuple[bytes, list[tuple[float, int]]]:
    """A video as MPEG-TS, and (seconds shown, bytes written) after each picture."""
    target, ends = io.BytesIO(), []
    with av.open(str(video)) as source, av.open(target, "w", format="mpegts") as output:
        stream = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is None or packet.pts is None:
                continue
            seconds = float(packet.pts * packet.time_base)
            packet.stream = stream
            output.mux(packet)
            ends.append((seconds, target.tell()))
    return target.getvalue(), ends
