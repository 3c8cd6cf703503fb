"""Spans of signing: found while the video plays, cut where signing does not pause, or given."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

from shards.errors import OptionError
from shards.media.motion import GivenSpans, Motion, PauseSpans, Span, SpanOptions
from shards.media.playback import play
from shards.media.video import VideoOptions
from tests.unit.films import FPS, SIZE, write_film

RATE = 10.0
OPTIONS = SpanOptions(
    pause_seconds=0.5, pad_seconds=0.2, min_seconds=0.6, max_seconds=0.0, overlap_seconds=0.4, pause_motion=0.15
)


def spans_of(motion: list[float], options: SpanOptions = OPTIONS, max_seconds: float = 20.0) -> tuple[list[Span], int]:
    finder = PauseSpans(options, RATE, max_seconds)
    found = [span for level in motion for span in finder.push(level)]
    return found + finder.finish(), finder.skipped


def test_sentences_of_a_film_are_found(tmp_path: Path) -> None:
    gold = write_film(tmp_path / "film.mp4", 8)
    with play(tmp_path / "film.mp4", VideoOptions(short_side=SIZE, fps=FPS)) as playback:
        motion, finder = Motion(), PauseSpans(SpanOptions(), playback.rate, 20.0)
        found = [span for picture in playback.pictures for span in finder.push(motion(picture))] + finder.finish()
        times = [(playback.seconds(span.start), playback.seconds(span.stop)) for span in found]
    assert len(times) == len(gold)
    for (start, stop), (begin, end) in zip(times, gold, strict=True):
        assert abs(start - begin) < 0.4 and abs(stop - end) < 0.4


def test_a_span_is_known_when_the_pause_has_lasted() -> None:
    finder = PauseSpans(OPTIONS, RATE, 20.0)
    for level in [0.0] * 10 + [9.0] * 20:
        assert not finder.push(level)
    waited = 0
    while not (found := finder.push(0.0)):
        waited += 1
    assert (waited + 1) / RATE <= OPTIONS.delay_seconds() + 1 / RATE
    (span,) = found
    assert (
        10 - 4 <= span.start <= 10 and 30 <= span.stop <= 30 + 4 and (span.first, span.last) == (span.start, span.stop)
    )


def test_short_motion_is_left_out_and_counted() -> None:
    motion = [0.0] * 20 + [9.0] * 2 + [0.0] * 20 + [9.0] * 20 + [0.0] * 20
    found, skipped = spans_of(motion)
    assert len(found) == 1 and skipped == 1 and found[0].start > 30


def test_signing_without_a_pause_is_cut_at_its_quietest_moment() -> None:
    motion = [0.0] * 10 + [9.0] * 90 + [0.0] * 20
    motion[45:47] = [3.0, 3.0]  # no pause, only slower
    found, _ = spans_of(motion, dataclasses.replace(OPTIONS, max_seconds=6.0))
    assert len(found) > 1
    first, second = found[:2]
    assert 44 <= first.stop <= 49 and second.start == first.stop
    assert (first.last, second.first) == (first.stop + 4, second.start - 4)  # the overlap, in frames
    assert all(span.last - span.first <= 60 for span in found)
    assert found[-1].stop >= 100 and all(a.stop == b.start for a, b in itertools.pairwise(found))


def test_rest_behind_a_cut_is_no_span() -> None:
    """Everything behind the cut was shown with the span before."""
    options = dataclasses.replace(OPTIONS, max_seconds=4.0)
    longest = 40 - 8
    motion = [9.0] * (longest + 5) + [0.0] * 30
    found, skipped = spans_of(motion, options)
    assert found and found[-1].last <= longest + 5 + 10 and skipped == 0


def test_frames_that_later_spans_may_show_are_kept() -> None:
    rng = np.random.default_rng(0)
    finder = PauseSpans(dataclasses.replace(OPTIONS, max_seconds=4.0), RATE, 20.0)
    kept, longest = 0, 0
    for number in range(3000):
        signing = (number // 70) % 3 != 0
        for span in finder.push(9.0 * rng.random() if signing else 0.05 * rng.random()):
            assert span.first >= kept, "a span shows a frame that was given up"
        assert finder.oldest >= kept
        kept = finder.oldest
        longest = max(longest, number - kept)
    assert longest <= 40 + 10


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pause_seconds": -1.0}, "pause_seconds -1: times are not negative"),
        ({"pause_motion": 1.0}, "pause_motion lies between 0 and 1"),
        ({"pad_seconds": 0.9}, "pause_seconds is above 0 and at least pad_seconds"),
        ({"max_seconds": 1.0}, "max_seconds 1 is too short for pause_seconds 0.5.*give at least 1.6 seconds"),
    ],
)
def test_options_that_cannot_work(values: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=f"(?s){message}"):
        SpanOptions(**values)


def test_a_model_that_takes_too_little_at_once() -> None:
    with pytest.raises(OptionError, match=re.escape("the model takes 1 seconds at once")):
        PauseSpans(OPTIONS, RATE, 1.0)


def test_given_spans_come_in_order_of_their_ends() -> None:
    spans = GivenSpans([(3.0, 4.0), (0.5, 3.5), (1.0, 1.5), (-3.0, -1.0), (9.0, 9.5), (4.5, 8.0)], 0.0, RATE)
    found = [(number, span) for number in range(50) for span in spans.push(0.0)]
    assert [(number, span.start, span.stop) for number, span in found] == [(14, 10, 15), (34, 5, 35), (39, 30, 40)]
    assert spans.oldest == 45
    assert [(span.start, span.last) for span in spans.finish()] == [(45, 50)]  # cut off by the end
    assert spans.skipped == 2  # before the first frame and behind the last one


def test_motion_of_equal_pictures_is_zero(tmp_path: Path) -> None:
    write_film(tmp_path / "film.mp4", 1)
    with play(tmp_path / "film.mp4", VideoOptions(short_side=SIZE, fps=FPS)) as playback:
        first = next(playback.pictures)
    motion = Motion()
    assert motion(first) == 0.0 and motion(first) == 0.0
